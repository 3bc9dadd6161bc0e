"""Flags, environment and YAML: what they mean, which wins, and what a person reads when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy import settings
from proxy.balancer import POLICIES
from proxy.core import BOTH, ROLES, Order, Role
from proxy.settings import Endpoint, ProxySettings

D = ["--decode-servers-urls", "http://d:1"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ProxySettings.model_fields:
        monkeypatch.delenv(f"TRIPTYCH_{name.upper()}", raising=False)


def load(*argv: str) -> ProxySettings:
    return settings.load([*argv])


def test_lists_become_a_fleet_with_roles() -> None:
    found = load(
        *("--encode-servers-urls", "http://e:1, http://e:2/"),
        *("--prefill-servers-urls", "native+http://p:1"),
        *("--decode-servers-urls", "http://d:1"),
    )
    assert found.fleet() == [
        (Role.ENCODE, Endpoint("http://e:1", "auto")),
        (Role.ENCODE, Endpoint("http://e:2", "auto")),
        (Role.PREFILL, Endpoint("http://p:1", "native")),
        (Role.DECODE, Endpoint("http://d:1", "auto")),
    ]


@pytest.mark.parametrize("nothing", ["disable", "none", "", "NONE", " "])
def test_without_prefill_the_decode_list_is_combined(nothing: str) -> None:
    assert load("--prefill-servers-urls", nothing, *D).fleet() == [(BOTH, Endpoint("http://d:1", "auto"))]


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("decode-servers-urls: [http://y:1, http://y:2]\nport: 1\nhost: file\nkv_handoff: pull\n")
    monkeypatch.setenv("TRIPTYCH_PORT", "2")
    monkeypatch.setenv("TRIPTYCH_HOST", "env")
    found = load("--config", str(file), "--port", "3")
    assert (found.port, found.host, found.order, found.encode_timeout) == (3, "env", Order.SEQUENTIAL, 60.0)
    assert found.decode_servers_urls == "http://y:1,http://y:2"
    monkeypatch.setenv("TRIPTYCH_CONFIG", str(file))
    assert load().port == 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", ["affinity", *["least_loaded"] * 3]),
        ("round_robin", ["round_robin"] * 4),
        ("encode=round_robin", ["round_robin", *["least_loaded"] * 3]),
        ("round_robin, decode=least_loaded", ["round_robin", "round_robin", "least_loaded", "round_robin"]),
    ],
)
def test_policies_per_role_or_common(policy: str, expected: list[str]) -> None:
    found = load(*D, "--policy", policy).policies()
    assert [found[role] for role in ROLES] == expected


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--decode-servers-urls: at least one engine is needed"),
        (["--prefill-servers-urls", "http://p:1"], "--decode-servers-urls: at least one engine is needed"),
        ([*D, "--encode-servers-urls", "http://d:1/"], "http://d:1 is listed twice"),
        (["--decode-servers-urls", "d:1"], "an engine's URL looks like http://host:port"),
        (
            ["--decode-servers-urls", "http://d:1?port=2"],
            "a URL may say ?bootstrap_port=PORT, ?ec_port=PORT, ?zone=NAME, ?rack=NAME, ?host=NAME and nothing else",
        ),
        (["--decode-servers-urls", "http://d:1?bootstrap_port=x"], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1?host="], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1/v1"], "give the base URL only, like http://d:1"),
        (["--decode-servers-urls", "http://d:99999"], "out of range"),
        (["--decode-servers-urls", "magic+http://d:1"], "no dialect 'magic' (known: auto, native"),
        ([*D, "--port", "70000"], "--port: Input should be less than or equal to 65535"),
        ([*D, "--encode-timeout", "0"], "--encode-timeout: Input should be greater than 0"),
        ([*D, "--policy", "magic"], f"no policy 'magic' (known: {', '.join(POLICIES)})"),
        ([*D, "--policy", "chef=round_robin"], "no role 'chef'"),
        ([*D, "--vision", "m=llava"], "--vision: 'llava' is neither a family (qwen2_vl"),
        ([*D, "--measure-urls", "yes"], "--measure-urls: Input should be 'never', 'public' or 'all'"),
        ([*D, "--hedge-after", "soon"], "--hedge-after: 'soon' is neither seconds like 0.5 nor a percentile like p95"),
        ([*D, "--link-rates", "moon=1"], "--link-rates: no link 'moon' (known: host, rack, zone, other)"),
        ([*D, "--max-embedding-bytes", "0"], "--max-embedding-bytes: Input should be greater than 0"),
        ([*D, "--max-attempts", "0"], "--max-attempts: Input should be greater than 0"),
        ([*D, "--virtual-encoder-port", "0", "--workers", "2"], "must meet in one process"),
        ([*D, "--encoder-register-urls", "http://l:8997"], "listens on --virtual-encoder-port"),
        ([*D, "--virtual-encoder-port", "0", "--encoder-register-urls", "l:8997"], "looks like http://host:port"),
        ([*D, "--config", "/does/not/exist"], "--config: there is no file /does/not/exist"),
        ([*D, "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(*argv)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("text", "says"), [("nope: 1\n", "--nope: Extra inputs"), ("a: [", "--config: ")])
def test_a_wrong_file_is_explained(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        load(*D, "--config", str(file))
    assert says in capsys.readouterr().err


def test_help_teaches_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in ProxySettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text and field.description
    assert "seconds to connect to an engine" in text


def test_there_is_one_worker_unless_more_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(*D).workers == 1
    assert load(*D, "--workers", "4").workers == 4
    with pytest.raises(SystemExit):
        load(*D, "--workers", "0")
    assert "--workers: " in capsys.readouterr().err


def test_a_url_may_say_where_its_engine_stands() -> None:
    found = Endpoint.parse("http://d:1?host=h1&rack=r1&bootstrap_port=8998", "vllm")
    assert found == Endpoint("http://d:1", "vllm", {"bootstrap_port": 8998, "labels": {"host": "h1", "rack": "r1"}})


def test_lists_of_encoders_are_urls_without_their_ends() -> None:
    flags = ["--virtual-encoder-port", "0", "--encoder-register-urls", "http://l:8997/, http://m:8997"]
    assert load(*D, *flags).lists() == ["http://l:8997", "http://m:8997"]
    assert load(*D).lists() == []
