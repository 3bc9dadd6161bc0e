"""Reads one part of a checkpoint, the vision tower or the language model, and nothing else of it.

A vision-language folder holds both parts under prefixes that changed over the years (`visual.*` and `model.*` in the
Qwen2-VL files of 2024, `model.visual.*` and `model.language_model.*` since; towers and projectors of other families
stand beside each other, and keep their names). Both are mapped to the names that the
part's own module uses. Tensors of the other part are never read: safetensors reads by name.

Of a tensor that several processes share, only the process's own part is read: safetensors slices by name, too.

Quantised weights are not read here: a folder that holds them is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

Built = TypeVar("Built")
Part = Literal["vision", "language"]

VISION = re.compile(r"^(?:model\.)?(?:visual\.(?P<name>.+)|(?P<whole>(?:vision_tower|multi_modal_projector)\..+))$")
LANGUAGE = re.compile(
    r"^(?:model\.language_model\.|language_model\.model\.|model\.(?!visual\.|vision_tower\.|multi_modal_projector\.))"
    r"(?P<name>.+)$"
)
HEAD = re.compile(r"^(?:language_model\.)?lm_head\.(?P<name>.+)$")


class WeightsError(Exception):
    """The folder does not hold what the module needs; the message names the tensors and the folder."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was read: checkpoint names in file order, and their bytes as loaded."""

    names: tuple[str, ...]
    nbytes: int

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The distinct leading names (`model.visual`, `visual`, `lm_head`), to show what was left unread."""
        return tuple(sorted({".".join(re.split(r"\.", name)[:2]) for name in self.names}))


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor from `first` to `last` - 1 along `dim`, where all of it is `whole` long."""

    dim: int
    first: int
    last: int
    whole: int


def shards(folder: Path) -> dict[str, Path]:
    """Tensor name → file. Reads only the index or the file's header.

    :raises WeightsError: there is no safetensors file in `folder`.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise WeightsError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def module_name(name: str, part: Part) -> str | None:
    """The name that the part's module gives a checkpoint tensor; None when it belongs to the other part.

    >>> module_name("model.visual.blocks.0.norm1.weight", "vision")
    'blocks.0.norm1.weight'
    >>> module_name("model.layers.0.mlp.up_proj.weight", "language")
    'model.layers.0.mlp.up_proj.weight'
    """
    if part == "vision":
        found = VISION.match(name)
        return found["name"] or found["whole"] if found else None
    if found := HEAD.match(name):
        return f"lm_head.{found['name']}"
    found = LANGUAGE.match(name)
    return f"model.{found['name']}" if found else None


def read(folder: Path, part: Part, cuts: Mapping[str, Cut] | None = None) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (checkpoint name, module name, tensor) of one part, file by file; of the tensors in `cuts`, by module name,
    that much.

    :raises WeightsError: a tensor is of another size than its cut supposes.
    """
    wanted: dict[Path, list[tuple[str, str]]] = {}
    for name, path in shards(folder).items():
        if (mapped := module_name(name, part)) is not None:
            wanted.setdefault(path, []).append((name, mapped))
    for path, names in wanted.items():
        with safe_open(path, framework="pt") as file:
            for name, mapped in names:
                cut = cuts.get(mapped) if cuts else None
                yield name, mapped, file.get_tensor(name) if cut is None else cut_out(file, folder, name, cut)


def cut_out(file: Any, folder: Path, name: str, cut: Cut) -> torch.Tensor:
    part = file.get_slice(name)
    shape: list[int] = part.get_shape()
    if len(shape) <= cut.dim or shape[cut.dim] != cut.whole:
        raise WeightsError(f"{folder}: {name} is {tuple(shape)}, expected {cut.whole} along dimension {cut.dim}")
    found: torch.Tensor = part[(*[slice(None)] * cut.dim, slice(cut.first, cut.last))]
    return found


def on_meta(build: Callable[[], Built]) -> Built:
    """Build a module without memory for its weights; `load` fills it."""
    with torch.device("meta"):
        return build()


def load(
    module: nn.Module,
    folder: Path,
    part: Part,
    dtype: torch.dtype,
    device: str = "cpu",
    cuts: Mapping[str, Cut] | None = None,
) -> LoadReport:
    """Fill `module` (built `on_meta`) with one part's tensors, or with what `cuts` leaves of them.

    For `language` the module has a text model as `.model` and the head as `.lm_head`; a checkpoint without a head
    tensor is one that ties it to the embedding.

    :raises WeightsError: tensors are missing, unexpected, of another shape, or quantised.
    """
    refuse_quantised(folder)
    expected = module.state_dict()
    state: dict[str, torch.Tensor] = {}
    names: list[str] = []
    for name, mapped, tensor in read(folder, part, cuts):
        if mapped not in expected:
            raise WeightsError(f"{folder}: tensor {name} has no place in {type(module).__name__}")
        if tensor.shape != expected[mapped].shape:
            raise WeightsError(f"{folder}: {name} is {tuple(tensor.shape)}, expected {tuple(expected[mapped].shape)}")
        state[mapped] = tensor.to(device=device, dtype=dtype)
        names.append(name)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if part == "language" and "lm_head.weight" in expected and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if missing := sorted(expected.keys() - state.keys()):
        raise WeightsError(f"{folder}: {len(missing)} tensors of the {part} part are missing, first {missing[0]}")
    module.load_state_dict(state, strict=True, assign=True)
    restore_buffers(module, device)
    module.requires_grad_(False).eval()
    return LoadReport(tuple(names), nbytes)


def refuse_quantised(folder: Path) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    quantisation = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown")
        raise WeightsError(f"{folder} holds {method} quantised weights; use a float32, bfloat16 or float16 checkpoint")


def restore_buffers(module: nn.Module, device: str) -> None:
    """Compute what no checkpoint stores (rotary frequencies) and `on_meta` left without memory.

    transformers recomputes them in `_init_weights` of the model that owns the submodule; the call touches buffers only,
    since every parameter-bearing module is skipped here.
    """
    owner = next((child for child in module.modules() if isinstance(child, PreTrainedModel)), None)
    for child in module.modules():
        empty = {name: buffer for name, buffer in child.named_buffers(recurse=False) if buffer.is_meta}
        if not empty:
            continue
        if owner is None or next(child.parameters(recurse=False), None) is not None:
            raise WeightsError(f"{type(child).__name__} has buffers {sorted(empty)} that no checkpoint stores")
        for name, buffer in empty.items():
            child._buffers[name] = torch.empty_like(buffer, device=device)
        owner._init_weights(child)
