"""What a request may hold, at the limit and one above it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import Api
from proxy.errors import BadRequest, ForbiddenMedia
from proxy.intake.limits import Limits
from proxy.media import splice
from proxy.media.addresses import Rules
from proxy.openai import Identity
from tests.fakes.media import chat, image, part

FAR: dict[str, Any] = {"url": "https://cdn.example.com/a.png"}


def refused(body: Any, limits: Limits) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        openai.parse(orjson.dumps(body), Api.CHAT, "id", Identity(), limits=limits)
    return caught.value


def taken(body: Any, limits: Limits) -> bool:
    openai.parse(orjson.dumps(body), Api.CHAT, "id", Identity(), limits=limits)
    return True


def nested(depth: int, form: Callable[[Any], Any]) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = form(inner)
    return inner


@pytest.mark.parametrize("form", [lambda x: [x], lambda x: {"a": x}, lambda x: [1, "[[[{", x]])
def test_depth(form: Callable[[Any], Any]) -> None:
    limits = Limits(depth=20)
    assert taken(chat(extra=nested(19, form)), limits), "the body itself is the first"
    error = refused(chat(extra=nested(20, form)), limits)
    assert (error.status, error.code) == (400, "nested_too_deep")
    assert taken(chat(text="[{" * 1000, list=[1] * 1000), limits), "brackets in texts are none"


def test_what_is_let_through_can_be_written_again() -> None:
    body = chat(extra=nested(199, lambda x: [x]))
    assert splice.dumps(openai.parse(orjson.dumps(body), Api.CHAT, "id", Identity()).body)
    assert refused(chat(extra=nested(200, lambda x: [x])), Limits()).code == "nested_too_deep"


def test_a_deep_body_of_megabytes_is_refused() -> None:
    raw = b'{"messages":' + b"[" * 5_000_000
    with pytest.raises(BadRequest):
        openai.parse(raw, Api.CHAT, "id", Identity())


def test_items() -> None:
    picture = part(image())
    assert taken(chat(picture, picture), Limits(items=2))
    error = refused(chat(picture, picture, picture), Limits(items=2))
    assert (error.status, error.code) == (413, "too_many_items")


def test_text() -> None:
    assert taken(chat(text="é" * 50), Limits(text_bytes=100))
    error = refused(chat(text="é" * 51), Limits(text_bytes=100))
    assert (error.status, error.code) == (413, "text_too_large")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_pixels(kind: str) -> None:
    assert taken(chat(part(image(100, 50, kind))), Limits(pixels=5000))
    error = refused(chat(part(image(100, 51, kind))), Limits(pixels=5000))
    assert (error.status, error.code, error.param) == (413, "too_many_pixels", "messages[0].content[1]")


def test_a_bomb_of_pixels_is_known_by_its_header() -> None:
    """Some tens of bytes that unpack to 12 GB."""
    png = bytearray(image())
    png[16:24] = (65535).to_bytes(4, "big") * 2
    assert refused(chat(part(bytes(png))), Limits()).code == "too_many_pixels"


@pytest.mark.parametrize("name", ["image_url", "video_url", "audio_url"])
@pytest.mark.parametrize("form", [lambda url: url, lambda url: {"url": url}], ids=["bare", "object"])
@pytest.mark.parametrize("type_", [None, "same", "input_image", "text", 7, []], ids=str)
def test_urls_are_judged_wherever_an_engine_may_look(name: str, form: Callable[[str], Any], type_: Any) -> None:
    given: dict[str, Any] = {name: form("http://169.254.169.254/latest")}
    if type_ is not None:
        given["type"] = name if type_ == "same" else type_
    with pytest.raises(ForbiddenMedia) as caught:
        taken(chat(given), Limits(rules=Rules()))
    assert caught.value.param == "messages[0].content[1]"


def test_no_url_goes_to_engines_unfetched_where_the_proxy_fetches() -> None:
    limits = Limits(rules=Rules(mode="fetch"))
    assert taken(chat({"type": "image_url", "image_url": FAR}), limits)
    for given in ({"type": "input_image", "image_url": FAR}, {"type": "image_url", "image_url": FAR, "video_url": FAR}):
        assert refused(chat(given), limits).code == "invalid_media_url"


def test_nobody_judges_urls_without_rules() -> None:
    assert taken(chat({"type": "image_url", "image_url": {"url": "/local.png"}}), Limits())
