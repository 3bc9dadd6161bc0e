"""A YAML text and its lines."""

from __future__ import annotations

import pytest

from proxy.settings.document import Document, Unreadable

TEXT = """\
# engines
encode-servers-urls:
  - http://e:1
  - url: http://e:2
    weight: 2

port: 8000
"""


def test_a_text_is_plain_values() -> None:
    assert Document(TEXT).value == {
        "encode-servers-urls": ["http://e:1", {"url": "http://e:2", "weight": 2}],
        "port": 8000,
    }
    assert Document("").value is None and Document("# nothing\n").value is None


@pytest.mark.parametrize(
    ("where", "line"),
    [
        (["port"], 7),
        (["encode_servers_urls"], 2),
        (["encode_servers_urls", 0], 3),
        (["encode-servers-urls", 1], 4),
        (["encode_servers_urls", 1, "weight"], 5),
        (["encode_servers_urls", 1, "labels", 0], 4),
        (["encode_servers_urls", 9], 2),
        (["host"], 1),
        ([], 1),
    ],
)
def test_every_value_has_a_line(where: list[str | int], line: int) -> None:
    assert Document(TEXT).line(where) == line


def test_what_a_message_mentions_has_a_line() -> None:
    document = Document(TEXT + "decode-servers-urls: [http://e:2]\n")
    assert document.mention("'http://e:2': listed twice") == 8, "the last one"
    assert document.mention("http://e:2: listed twice", ["encode_servers_urls"]) == 4
    assert document.mention("http://e: nowhere", ["encode_servers_urls"]) is None
    assert document.mention("http://e:2", ["host"]) is None
    assert Document("").mention("anything") is None


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: [1,\n", 3, "expected the node content"),
        ("a:\n  b-c: 1\n  b_c: 2\n", 3, "b_c is there twice"),
        ("a: 1\n\tb: 2\n", 2, "found character"),
        ("a: !!python/object:os.system 1\n", 1, "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", 2, "but found another document"),
        ("a: 1\nb: \x00", 2, "special characters are not allowed"),
        ("a: 1\nb: " + "[" * 10_000, 2, "nested too deeply"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(Unreadable, match=says) as caught:
        Document(text)
    assert caught.value.line == line
