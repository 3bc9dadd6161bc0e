"""What a request may hold at the most, and which URLs it may name. Pure: it looks at what was parsed, and refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import BadRequest, TooLarge
from proxy.media.addresses import Rules
from proxy.media.costs import Size
from proxy.media.formats import Shape

_URLS = ("image_url", "video_url", "audio_url")  # keys of a part in which engines look for one
_NESTING = frozenset((dict, list))


@dataclass(frozen=True, slots=True)
class Limits:
    """Every method raises TooLarge or another BadRequest."""

    depth: int = 200  # of objects and lists within each other; beyond 254, orjson does not write what it has read
    items: int = 512
    text_bytes: int = 16 << 20
    pixels: int = 178_956_970  # of one image; where there are more, Pillow takes it for an attack
    rules: Rules | None = None  # None: whatever stands where URLs do is passed on

    def check_depth(self, body: Any) -> None:
        level = [body]
        for _ in range(self.depth):
            inner = []
            for outer in level:
                for value in outer.values() if type(outer) is dict else outer:
                    if type(value) in _NESTING:
                        inner.append(value)  # a comprehension takes twice as long for what a chat has
            if not inner:
                return
            level = inner
        raise BadRequest(f"the body is nested more than {self.depth} deep (--max-json-depth)", code="nested_too_deep")

    def check_text(self, nbytes: int) -> None:
        if nbytes > self.text_bytes:
            raise TooLarge(f"more than {self.text_bytes} bytes of text (--max-text-bytes)", code="text_too_large")

    def check_items(self, count: int) -> None:
        if count > self.items:
            raise TooLarge(f"more than {self.items} images, videos and sounds (--max-items)", code="too_many_items")

    def check_size(self, size: Size | None, param: str) -> None:
        """Of the item that the client knows by `param`."""
        if not isinstance(size, Shape) or size.modality != "image" or size.width is None or size.height is None:
            return
        if size.width * size.height > self.pixels:
            told = f"an image of {size.width} x {size.height}, more than {self.pixels} pixels (--max-pixels)"
            raise TooLarge(told, param=param, code="too_many_pixels")

    def check_urls(self, part: Mapping[str, Any], kind: str | None, param: str) -> None:
        """Each URL in a content part, whichever an engine may choose. `kind`: that which is fetched here, if any is."""
        if self.rules is None:
            return
        for name in _URLS:
            value = part.get(name)
            url = value.get("url") if isinstance(value, dict) else value
            away = isinstance(url, str) and self.rules.judge(url, param) is not None
            if away and name != kind and self.rules.mode == "fetch":
                raise BadRequest(f"`{name}` in a part of another type", param=param, code="invalid_media_url")
