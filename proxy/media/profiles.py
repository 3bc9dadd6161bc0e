"""Which vision a model has: as a flag says, or an encoder of it, or its name. Chosen here, computed in `vision`.

The files of --vision are read once, when the flag is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxy.balancer.fleet import Fleet
from proxy.media.vision import DEFAULT, FAMILIES, Vision, family_of, vision

_REMEMBERED = 1024  # models; clients choose their names
_ITEMSIZES = {"float32": 4, "float64": 8}  # bytes; all else that models are stored in becomes embeddings of two


class Profiles:
    """`costs.Visions` of one fleet. For any thread."""

    def __init__(self, fleet: Fleet, flagged: Mapping[str, Vision]) -> None:
        """`flagged`: what `flagged` read."""
        self._fleet = fleet
        self._flagged = flagged
        self._known: tuple[int, dict[str, Vision]] = (-1, {})  # the fleet's version, and what was found since

    def of(self, model: str) -> Vision:
        """By the flag for this model, else for all; else what an encoder of it told; else the family that its name
        tells; else what all encoders tell alike; else the default."""
        version, known = self._known
        if version != self._fleet.version or len(known) > _REMEMBERED:
            known = {}
            self._known = (self._fleet.version, known)
        found = known.get(model)
        if found is None:
            found = known[model] = self._find(model)
        return found

    def _find(self, model: str) -> Vision:
        flagged = self._flagged.get(model) or self._flagged.get("")
        if flagged is not None:
            return flagged
        told = {i.model: Vision(**i.facts["vision"]) for i in self._fleet if "vision" in i.facts}
        if model in told:
            return told[model]
        if (family := family_of(model)) is not None:
            return FAMILIES[family]
        return next(iter(told.values())) if len(set(told.values())) == 1 else DEFAULT


def flagged(text: str) -> dict[str, Vision]:
    """Of `qwen3_vl` or a model's folder, for all models, or of `MODEL=…,MODEL=…`: by model, "" for all.

    Raises ValueError saying what is wrong.
    """
    found = {}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        model, _, what = entry.rpartition("=")
        if what not in FAMILIES and not Path(what).is_dir():
            known = ", ".join(FAMILIES)
            raise ValueError(f"--vision: {what!r} is neither a family ({known}) nor a model's folder")
        found[model] = FAMILIES.get(what) or _of_folder(Path(what))
    return found


def _of_folder(folder: Path) -> Vision:
    try:
        config = json.loads((folder / "config.json").read_text())
        family = family_of(str(config.get("model_type")))
        if family is None:
            raise ValueError(f"no family known for the model type {config.get('model_type')!r}")
        whole = _read(folder / "processor_config.json")
        image = _read(folder / "preprocessor_config.json") or whole.get("image_processor")
        video = _read(folder / "video_preprocessor_config.json") or whole.get("video_processor")
        dtype = str(config.get("dtype") or config.get("torch_dtype"))
        return vision(family, config["vision_config"], image, video, _ITEMSIZES.get(dtype, 2))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--vision {folder}: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    """Empty if there is none."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found
