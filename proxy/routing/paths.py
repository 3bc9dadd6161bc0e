"""The paths in order of preference: apart where the fleet can, text never through an encoder. No fleet is looked at."""

from __future__ import annotations

from proxy.core import Path

TEXT: tuple[Path, ...] = (Path.P_D, Path.PD)
MEDIA: tuple[Path, ...] = (Path.E_P_D, Path.E_PD)
INLINE: tuple[Path, ...] = (Path.EP_D, Path.EPD)


def candidates(has_media: bool, inline: tuple[Path, ...] = ()) -> tuple[Path, ...]:
    """`inline`: those of INLINE whose engines here can encode, where no encoder does."""
    return (*MEDIA, *inline) if has_media else TEXT


def inline(path: Path) -> Path:
    """The same engines without encoders."""
    return Path.EPD if path.combined else Path.EP_D
