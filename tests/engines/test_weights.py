import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engines.weights import Cut, WeightsError, load, module_name, on_meta, read, shards
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.reference import reference


class Language(nn.Module):
    def __init__(self, full: nn.Module) -> None:
        super().__init__()
        self.model = type(full.model.language_model)(full.model.language_model.config)
        self.lm_head = nn.Linear(full.lm_head.in_features, full.lm_head.out_features, bias=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_loads_its_own_tensors_alone(family: str) -> None:
    full = reference(family).model
    vision_module = on_meta(lambda: type(full.model.visual)(full.model.visual.config))
    vision = load(vision_module, checkpoint(family), "vision", torch.float32)
    language_module = on_meta(lambda: Language(full))
    language = load(language_module, checkpoint(family), "language", torch.float32)

    assert not set(vision.names) & set(language.names)
    assert set(vision.names) | set(language.names) == set(shards(checkpoint(family)))
    assert all("visual" in name for name in vision.names)
    for mine, theirs in ((vision_module, full.model.visual), (language_module.model, full.model.language_model)):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())
        buffers = dict(theirs.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in mine.named_buffers())
    assert vision.nbytes == sum(tensor.nbytes for tensor in vision_module.state_dict().values())


@pytest.mark.parametrize(
    ("name", "vision", "language"),
    [
        ("visual.blocks.0.norm1.weight", "blocks.0.norm1.weight", None),
        ("model.visual.merger.mlp.0.bias", "merger.mlp.0.bias", None),
        ("model.layers.3.mlp.up_proj.weight", None, "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", None, "model.embed_tokens.weight"),
        ("language_model.model.norm.weight", None, "model.norm.weight"),
        ("lm_head.weight", None, "lm_head.weight"),
    ],
)
def test_both_key_layouts_map_to_module_names(name: str, vision: str | None, language: str | None) -> None:
    assert module_name(name, "vision") == vision
    assert module_name(name, "language") == language


def copy(source: Path, target: Path) -> Path:
    return shutil.copytree(source, target)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    folder = copy(checkpoint("qwen2_vl"), tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    found = {name: tensor for name, _, tensor in read(folder, "vision")}
    assert set(found) == {name for name in names if "visual" in name}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


def test_a_missing_head_is_tied_to_the_embedding(tmp_path: Path) -> None:
    folder = copy(checkpoint("qwen2_vl"), tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    module = on_meta(lambda: Language(reference("qwen2_vl").model))
    load(module, folder, "language", torch.float32)
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "missing"), ("shape", "expected"), ("extra", "no place"), ("quantised", "gptq quantised")],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, damage: str, message: str) -> None:
    folder = copy(checkpoint("qwen2_vl"), tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = "visual.blocks.0.norm1.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif damage == "extra":
        tensors["visual.surprise"] = torch.zeros(1)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    save_file(tensors, folder / "model.safetensors")
    visual = reference("qwen2_vl").model.model.visual
    with pytest.raises(WeightsError, match=message):
        load(on_meta(lambda: type(visual)(visual.config)), folder, "vision", torch.float32)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither model\.safetensors"):
        shards(tmp_path)


def test_of_a_tensor_that_is_cut_a_part_is_read() -> None:
    folder, name = checkpoint("qwen3_vl"), "model.layers.1.self_attn.o_proj.weight"
    whole = {mapped: tensor for _, mapped, tensor in read(folder, "language")}
    rows, columns = whole[name].shape
    for cut, wanted in (
        (Cut(0, 8, 24, rows), whole[name][8:24]),
        (Cut(1, 16, columns, columns), whole[name][:, 16:]),
    ):
        found = {mapped: tensor for _, mapped, tensor in read(folder, "language", {name: cut})}
        assert found[name].equal(wanted)
        assert all(found[other].equal(tensor) for other, tensor in whole.items() if other != name)


def test_a_cut_of_a_tensor_of_another_size_is_refused() -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    with pytest.raises(WeightsError, match="expected 12 along dimension 1"):
        list(read(checkpoint("qwen3_vl"), "language", {name: Cut(1, 0, 6, 12)}))
