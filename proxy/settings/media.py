"""Flags about what clients send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from proxy.media.addresses import SCHEMES, Mode, Rules, hosts, networks

T = TypeVar("T")


class MediaSettings(BaseModel):
    """Media and bodies: what clients may make the proxy read"""

    media_urls: Mode = Field(
        "engines",
        description="media behind URLs; engines: they fetch, once scheme, host and address as written are judged here; "
        "fetch: the proxy does, and engines get them inline; refuse: only inline media are taken",
    )
    media_schemes: str = Field(",".join(SCHEMES), description="of media URLs; file: only with --media-roots as well")
    media_hosts: str = Field(
        "",
        description="where media may be, as cdn.example.com,*.images.example.com; empty or *: anywhere in the "
        "Internet; where engines fetch, names of one's own network are listed, as minio,*",
    )
    media_networks: str = Field(
        "", description="networks besides the open Internet where media may be, as 10.0.0.0/8,fd00::/8"
    )
    media_roots: str = Field("", description="folders that file: URLs may name, as /data,/more; empty: no files")
    max_media_bytes: PositiveInt = Field(64 << 20, description="largest image, video or sound that is fetched")
    media_timeout: PositiveFloat = Field(10.0, description="seconds to fetch one, redirects included")
    max_media_fetches: PositiveInt = Field(32, description="media fetched at once; more wait, in their own time")
    media_cache_bytes: NonNegativeInt = Field(
        256 << 20, description="fetched media kept for the next requests that name their URL, for a minute; 0: none"
    )
    max_header_bytes: PositiveInt = Field(64 << 10, description="largest head of a request accepted")
    max_body_bytes: PositiveInt = Field(256 << 20, description="largest request body accepted, unpacked")
    max_text_bytes: PositiveInt = Field(16 << 20, description="most text in a request, in UTF-8")
    max_json_depth: int = Field(100, ge=10, le=200, description="objects and lists within each other in a body")
    max_items: PositiveInt = Field(512, description="images, videos and sounds in one request")
    max_pixels: PositiveInt = Field(178_956_970, description="pixels of the largest image, by its header")
    measure_urls: Literal["never", "public", "all"] = Field(
        "never",
        description="before planning, read up to 64 KiB of media behind URLs to know their size; public: at addresses "
        "of the open Internet and --media-networks; all: wherever a name leads, which clients then choose",
    )
    measure_timeout: PositiveFloat = Field(1.0, description="seconds that a request waits for its media's sizes")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        self.media_rules()
        return self

    def media_rules(self) -> Rules:
        """Raises ValueError."""
        schemes = frozenset(_entries(self.media_schemes.lower()))
        if unknown := schemes - set(SCHEMES):
            raise ValueError(f"--media-schemes: no scheme {min(unknown)!r} (known: {', '.join(SCHEMES)})")
        roots = tuple(map(PurePosixPath, _entries(self.media_roots)))
        if relative := [root for root in roots if not root.is_absolute()]:
            raise ValueError(f"--media-roots: {relative[0]} is no absolute path")
        named = _read("--media-hosts", hosts, self.media_hosts)
        nets = _read("--media-networks", networks, self.media_networks)
        return Rules(self.media_urls, schemes, named, nets, roots)


def _read(flag: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]
