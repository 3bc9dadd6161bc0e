"""Real, tiny images, and chat bodies with them."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def image(width: int = 8, height: int = 8, kind: str = "PNG", color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, kind)
    return out.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(data: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def chat(*parts: dict[str, Any], text: str = "what is this?", **fields: Any) -> dict[str, Any]:
    """One user message: text, then `parts`; a plain string without them."""
    content: Any = [{"type": "text", "text": text}, *parts] if parts else text
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
