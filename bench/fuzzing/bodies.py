"""What clients send, nearly right: media, URLs, bodies."""

from __future__ import annotations

import base64
import gzip
import io
import struct
from functools import cache
from typing import Any

import orjson
import zstandard
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from bench.fuzzing.nearly import ODD, maybe

# ---- media


@cache
def _pictures() -> tuple[bytes, ...]:
    """Real ones, of each format that Pillow writes, and heads of others."""
    from PIL import Image

    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        out = io.BytesIO()
        Image.new("RGB", (9, 7), (200, 30, 30)).save(out, kind)
        found.append(out.getvalue())
    return tuple(found)


def _box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I4s", 8 + len(data), kind) + data


_FILM = _box(b"ftyp", b"isom" + bytes(8)) + _box(
    b"moov",
    _box(b"mvhd", struct.pack(">IIIII", 0, 0, 0, 1000, 5000) + bytes(80)),
    _box(
        b"trak",
        _box(b"tkhd", bytes(76) + struct.pack(">II", 640 << 16, 360 << 16)),
        _box(b"mdia", _box(b"minf", _box(b"stbl", _box(b"stsz", struct.pack(">III", 0, 0, 125))))),
    ),
)
_HEIF = _box(b"ftyp", b"heic" + bytes(8)) + _box(
    b"meta", bytes(4), _box(b"iprp", _box(b"ipco", _box(b"ispe", struct.pack(">III", 0, 640, 480))))
)
_MATROSKA = bytes.fromhex("1a45dfa380") + bytes.fromhex("18538067ff1549a966892ad7b1830f42404489844479c000")
_WAV = b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16) + b"data"
_OTHERS = (
    *(_FILM, _HEIF, _MATROSKA, _WAV + struct.pack("<I", 16000), b"fLaC\0\0\0\x22" + bytes(34)),
    *(b"OggS\0\2" + bytes(20) + b"\x01\x1e\x01vorbis" + bytes(20) + b"OggS\0\4" + bytes(30), b"\xff\xfb\x90\x00" * 200),
    *(b"ID3\4\0\0\0\0\0\7" + bytes(7) + b"\xff\xfb\x90\x00" + bytes(36) + b"Xing" + bytes(12), b"", b"x"),
)


def media() -> SearchStrategy[bytes]:
    """Bytes that begin like an image, a film or a sound."""
    return st.one_of(st.sampled_from(_pictures()), st.sampled_from(_OTHERS), st.binary(max_size=64))


# ---- requests' bodies


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


_HOSTS = st.sampled_from(
    [
        *["cdn.example.com"] * 9,
        "cdn.example.com",
        "127.0.0.1",
        "0x7f.1",
        "[::1]",
        "2130706433",
        "a@b",
        "localhost",
        "h:99999",
        "",
    ]
)


def urls() -> SearchStrategy[str]:
    return st.one_of(
        media().map(lambda data: f"data:image/png;base64,{_base64(data)}"),
        st.binary(max_size=8).map(lambda data: f"data:image/png;base64,{_base64(data)}!"),
        st.builds(
            "{}://{}/{}".format, st.sampled_from(["http", "https", "file", "ftp", "HTTP"]), _HOSTS, st.text(max_size=4)
        ),
        st.sampled_from(["data:,x", "data:;base64,AAA", "x", "", "file:///data/../etc/passwd", "//h/x", "data:" * 9]),
        st.just(f"data:image/png;base64,{_base64(bytes(60_000))}"),
    )


def _part(kind: str) -> SearchStrategy[Any]:
    value = urls() if kind != "input_audio" else media().map(_base64)
    name = "data" if kind == "input_audio" else "url"
    held = st.one_of(value, st.fixed_dictionaries({name: maybe(value)}, optional={"detail": ODD, "format": ODD}))
    typed = st.sampled_from([kind, kind, kind, "input_image", "text"]) | ODD
    others = {"type": typed, "uuid": ODD, "detail" if kind == "video_url" else "video_url": ODD}
    return st.fixed_dictionaries({kind: maybe(held)}, optional=others)


_parts = st.one_of(
    *map(_part, ("image_url", "image_url", "video_url", "audio_url", "input_audio")),
    st.fixed_dictionaries({"type": maybe(st.just("text")), "text": maybe(st.text(max_size=9))}),
    st.fixed_dictionaries({"type": st.just("image_embeds"), "image_embeds": ODD}),
    ODD,
)
_messages = st.lists(
    maybe(
        st.fixed_dictionaries(
            {"role": maybe(st.sampled_from(["user", "system", "assistant", "tool"]))},
            optional={
                "content": maybe(st.one_of(st.text(max_size=20), st.lists(_parts, max_size=4))),
                "tool_calls": ODD,
            },
        )
    ),
    max_size=3,
)
_prompts = st.one_of(
    st.text(max_size=20),
    st.lists(st.integers(0, 1 << 17), max_size=5),
    st.lists(st.one_of(st.text(max_size=5), st.lists(st.integers(0, 9), max_size=3), ODD), max_size=3),
)
_FIELDS: dict[str, SearchStrategy[Any]] = {
    "model": maybe(st.sampled_from(["m", "qwen2_vl", "Qwen3-VL"])),
    "stream": maybe(st.booleans()),
    "n": maybe(st.integers(1, 3)),
    "max_tokens": maybe(st.integers(0, 1 << 20)),
    "max_completion_tokens": maybe(st.integers(0, 99)),
    "tools": maybe(st.just([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])),
    "mm_processor_kwargs": maybe(
        st.fixed_dictionaries({}, optional={"max_pixels": ODD, "min_pixels": ODD, "fps": ODD})
    ),
    "media_io_kwargs": ODD,
    "stream_options": maybe(st.just({"include_usage": True})),
    "priority": ODD,
    "seed": ODD,
    "logit_bias": ODD,
    "min_tokens": ODD,
    "bootstrap_room": ODD,
}


def bodies() -> SearchStrategy[bytes]:
    """Requests to chat and completions, as JSON."""
    chats = st.fixed_dictionaries({"messages": _messages}, optional=_FIELDS)
    fields = {**_FIELDS, "messages": maybe(_messages)}
    trusted = dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "prompt_embeds"), ODD)
    others = st.fixed_dictionaries({"prompt": _prompts}, optional=fields | trusted)
    return maybe(st.one_of(chats, chats, chats, others)).map(orjson.dumps)


def encoder_calls() -> SearchStrategy[bytes]:
    """What SGLang's language servers send to encoders."""
    fields = {
        "mm_items": maybe(st.lists(maybe(st.one_of(urls(), st.fixed_dictionaries({"url": urls()}))), max_size=3)),
        "req_id": maybe(st.sampled_from(["r", "r_local_part_0", ""])),
        "num_parts": maybe(st.just(1)),
        "part_idx": maybe(st.just(0)),
    }
    others = {"modality": maybe(st.sampled_from(["IMAGE", "video", "x"])), "hashes": ODD, "embedding_port": ODD}
    return st.fixed_dictionaries(fields, optional=others).map(orjson.dumps)


def texts() -> SearchStrategy[bytes]:
    """Base64, long and short."""
    long = st.just(base64.b64encode(bytes(200_000)))
    return st.one_of(media().map(base64.b64encode), media().map(base64.b64encode), long)


def packed() -> SearchStrategy[bytes]:
    """Compressed bodies, some of which grow a thousandfold."""
    plain = st.one_of(bodies(), st.just(bytes(1 << 20)))
    return st.one_of(plain.map(lambda data: gzip.compress(data, 1)), plain.map(zstandard.compress))
