"""The file of keys: what is found in it, what its errors say."""

from __future__ import annotations

from hashlib import sha256

import pytest

from proxy.auth import keys
from proxy.auth.keys import Keys, made

KEY, HASH = made(bytes(32))
OLD = f"sha256:{sha256(b'old').hexdigest()}"


def test_a_key_is_found_by_either_hash_and_nothing_else_is() -> None:
    found = Keys.parse(f"- {{name: acme, hash: '{HASH}'}}\n- {{name: old, hash: '{OLD}', tenant: t, concurrent: 2}}\n")
    assert len(found) == 2 and list(found) == ["acme", "old"] and repr(found) == "<Keys acme, old>"
    acme, old = found.find(KEY), found.find("old")
    assert acme is not None and acme.name == "acme" and not acme.limited
    assert old is not None and (old.tenant, old.concurrent, old.limited) == ("t", 2, True)
    for wrong in ("", KEY[:-1], KEY + "0", KEY.upper(), HASH, "\udcff"):
        assert found.find(wrong) is None


def test_what_only_begins_like_a_hash_is_not_it() -> None:
    spoilt = HASH[:-1] + ("0" if HASH[-1] != "0" else "1")
    assert Keys.parse(f"- {{name: a, hash: '{spoilt}'}}").find(KEY) is None


def test_keys_that_are_made_are_long_and_told_once() -> None:
    key, digest = made(bytes(range(32)))
    assert key.startswith("triptych-") and len(key) == 9 + 64
    assert key not in digest and Keys.parse(f"- {{name: a, hash: '{digest}'}}").find(key)


@pytest.mark.parametrize(
    ("models", "model", "allowed"),
    [
        ("['*']", "", True),
        ("['*']", "any", True),
        ("['qwen*', tiny]", "qwen3-vl", True),
        ("['qwen*', tiny]", "Qwen3", False),
        ("['qwen*', tiny]", "tiny", True),
        ("['qwen*', tiny]", "tiny2", False),
        ("['qwen*', tiny]", "", False),
        ("['**']", "", False),
        ("[]", "tiny", False),
    ],
)
def test_models_are_allowed_by_pattern(models: str, model: str, allowed: bool) -> None:
    key = Keys.parse(f"- {{name: a, hash: '{HASH}', models: {models}}}").find(KEY)
    assert key is not None and key.allows(model) is allowed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1", "line 1: a list of keys"),
        ("[" * 10_000, "nested too deeply"),
        ("- name: a\n  hash: 12\n", "line 2: hash: "),
        ("- name: a\n- name: b\n", "line 1: hash: Field required"),
        (f"- name: a\n  hash: {HASH}\n- name: b c\n  hash: {OLD}\n", "line 3: name: "),
        (f"- name: a\n  hash: {HASH}\n  requests_per_minute: 0\n", "line 3: requests_per_minute: .*greater than 0"),
        (f"- name: a\n  hash: {HASH}\n  request_per_minute: 1\n", "line 3: request_per_minute: .*not permitted"),
        ("- just a name\n", "line 1: "),
        ("- [a\n", "line 2"),
        (f"- {{name: a, hash: '{HASH}'}}\n- {{name: a, hash: '{OLD}'}}\n", "a: another key has the same name"),
        (f"- {{name: a, hash: '{HASH}'}}\n- {{name: b, hash: '{HASH}'}}\n", "b: another key has the same hash"),
    ],
)
def test_errors_name_the_line_and_the_field(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Keys.parse(text)
    assert HASH not in str(caught.value)


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as can be accounted for."""
    monkeypatch.setattr(keys, "MOST", 2)
    with pytest.raises(ValueError, match="more than 2 keys"):
        Keys.parse("- {}\n" * 3)


def test_an_empty_file_lets_nobody_in() -> None:
    assert len(Keys.parse("# none yet\n")) == 0 and Keys.parse("").find(KEY) is None
