"""Heads as they go out."""

import pytest

from proxy.http.message import head_bytes, json_response, size, status_line


def test_a_head_is_its_lines() -> None:
    data = head_bytes(status_line(200), {"x": "1", "y": "ö"}, "content-length: 0\r\n")
    assert data == b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: 1\r\ny: \xf6\r\n\r\n"
    assert status_line(499) == "HTTP/1.1 499 \r\n"


@pytest.mark.parametrize("value", ["a\r\nset-cookie: b", "a\nb", "a\rb", "a\0b"])
def test_no_value_makes_a_line_of_its_own(value: str) -> None:
    head = head_bytes(status_line(200), {"x": value}, "")
    assert head.count(b"\n") == 3 and b"\0" not in head and head.count(b"\r") == 3


def test_sizes_and_json() -> None:
    assert size(b"ab") == size([b"a", memoryview(b"b")]) == 2
    assert json_response({"a": 1}, 201).body == b'{"a":1}'
