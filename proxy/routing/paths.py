"""The paths in order of preference: apart where the fleet can, text never through an encoder. No fleet is looked at."""

from __future__ import annotations

from proxy.core import Path

TEXT: tuple[Path, ...] = (Path.P_D, Path.PD)
MEDIA: tuple[Path, ...] = (Path.E_P_D, Path.E_PD)
INLINE: tuple[Path, ...] = (*MEDIA, Path.EPD)


def candidates(has_media: bool, inline: bool = False) -> tuple[Path, ...]:
    """`inline`: combined engines here can encode, where no encoder does."""
    if not has_media:
        return TEXT
    return INLINE if inline else MEDIA
