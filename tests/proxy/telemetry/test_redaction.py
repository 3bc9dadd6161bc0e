"""What is left of a text that others have chosen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.telemetry.redaction import redacted

SECRET = "Zm9vYmFyYmF6cXV4"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("out of memory on cuda:0", "out of memory on cuda:0"),
        (f"GET https://h/a.png?X-Amz-Signature={SECRET}#x failed", "GET https://h/a.png?… failed"),
        (f"'https://user:{SECRET}@h/a' is down", "'https://…@h/a' is down"),
        (f"see s3://b/k?{SECRET}.", "see s3://b/k?…"),
        (f'"data:image/png;base64,{SECRET}" is no image', '"data:…" is no image'),
        (f"data:;base64,{SECRET}", "data:…"),
        (f"authorization: Bearer {SECRET}, and more", "authorization: Bearer …, and more"),
        (f"Incorrect API key provided: sk-{SECRET}.", "Incorrect API key provided: sk-…."),
        ("the item " + "0f" * 32 + " is gone", "the item " + "0f" * 32 + " is gone"),
        ("cannot read " + "QUJD" * 20, "cannot read QUJDQUJD…"),
        ("one\r\nINFO forged\x1b[2J\u2028two", "one INFO forged [2J two"),
    ],
)
def test_what_is_left(text: str, left: str) -> None:
    assert redacted(text) == left


def test_long_texts_are_cut_before_they_are_looked_through() -> None:
    assert redacted("word " * 1_000_000) == "word " * 60 + "…"
    assert SECRET not in redacted(f"https://h/{'a/' * 590}?{SECRET * 100}")


@given(st.text(), st.text())
def test_there_is_one_line_and_never_the_secret_of_a_url(before: str, after: str) -> None:
    found = redacted(f"{before} https://h/p?k={SECRET} {after}")
    assert SECRET not in found and "\n" not in found and len(found) <= 301
