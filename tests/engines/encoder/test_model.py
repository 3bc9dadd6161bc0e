"""The tower alone gives what the whole reference model gives, one image or many."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from engines.devices import devices_of
from engines.encoder.cutting import Prepared
from engines.encoder.media import ImageReader
from engines.encoder.model import Replicas, VisionModel
from engines.errors import SetupError
from engines.settings import EncoderSettings
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.pictures import image_file
from tests.support.reference import reference

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@cache
def model(family: str) -> VisionModel:
    return VisionModel.load(checkpoint(family))


def prepared(family: str) -> list[Prepared]:
    reader = ImageReader(checkpoint(family), EncoderSettings(model=Path("m")))
    sizes = [(96, 64), (200, 120), (64, 64), (301, 77)]
    return [reader.read(image_file(*size, seed=n), {}) for n, size in enumerate(sizes)]


def encode(family: str, batch: list[Prepared]) -> list[torch.Tensor]:
    outputs = [torch.full((item.tokens, model(family).width), float("nan")) for item in batch]
    model(family).encode(batch, outputs)
    return outputs


@torch.inference_mode()
def expected(family: str, item: Prepared) -> torch.Tensor:
    out = reference(family).model.get_image_features(item.pixels, torch.tensor([item.grid]))
    levels = [out.pooler_output[0], *(level[0] for level in getattr(out, "deepstack_features", None) or ())]
    return torch.cat(levels, dim=-1)


@EACH_FAMILY
def test_one_image_equals_the_reference_bit_by_bit(family: str) -> None:
    for item in prepared(family):
        assert torch.equal(encode(family, [item])[0], expected(family, item))


@EACH_FAMILY
def test_a_batch_equals_its_items(family: str) -> None:
    batch = prepared(family)
    for item, got in zip(batch, encode(family, batch), strict=True):
        torch.testing.assert_close(got, expected(family, item), rtol=1e-5, atol=1e-5)


@EACH_FAMILY
def test_only_the_vision_tower_is_read(family: str) -> None:
    report = model(family).report
    assert report.names
    assert all(".visual." in f".{name}" for name in report.names)
    whole = sum(parameter.nbytes for parameter in reference(family).model.parameters())
    tower = sum(parameter.nbytes for parameter in reference(family).model.model.visual.parameters())
    assert report.nbytes == tower < whole


def test_the_width_counts_the_deepstack_levels() -> None:
    hidden = reference("qwen3_vl").model.config.text_config.hidden_size
    assert [model(family).width for family in FAMILIES] == [hidden, hidden, 3 * hidden]
    assert model("qwen3_vl").nbytes(tokens=10) == 10 * 3 * hidden * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(dtype: str) -> None:
    small = VisionModel.load(checkpoint("qwen2_vl"), dtype=dtype)
    item = prepared("qwen2_vl")[0]
    output = torch.empty(item.tokens, small.width, dtype=small.dtype)
    small.encode([item], [output])
    assert (small.dtype_name, small.nbytes(1)) == (dtype, small.width * 2)
    assert torch.nn.functional.cosine_similarity(output.float(), expected("qwen2_vl", item)).min() > 0.99


def test_a_folder_that_is_no_known_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="--model"):
        VisionModel.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(SetupError, match="'qwen2' is not served"):
        VisionModel.load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint("qwen2_vl") / "config.json").read_text())
    with pytest.raises(SetupError, match=r"neither model\.safetensors"):
        VisionModel.load(tmp_path)


@EACH_FAMILY
def test_its_numbers_are_those_of_the_checkpoint(family: str) -> None:
    told = model(family).numbers()
    config = json.loads((checkpoint(family) / "config.json").read_text())["vision_config"]
    assert told["model_type"].startswith(family) and told["itemsize"] == 4
    assert told["vision_config"].items() <= config.items()
    assert {"depth", "hidden_size", "patch_size"} <= told["vision_config"].keys()
    assert ("deepstack_visual_indexes" in told["vision_config"]) == (family == "qwen3_vl")


def test_replicas_say_the_same_on_each_device_and_are_told_by_the_first() -> None:
    one = model("qwen3_vl")
    both = Replicas.load(checkpoint("qwen3_vl"), dtype="auto", devices=devices_of("cpu,cpu"))
    assert len(both.encodes) == 2 and both.depth == one.depth == 1
    assert (both.width, both.dtype_name, both.nbytes(3)) == (one.width, one.dtype_name, one.nbytes(3))
    item = prepared("qwen3_vl")[1]
    (wanted,) = encode("qwen3_vl", [item])
    for run in both.encodes:
        output = torch.empty_like(wanted)
        run([item], [output])
        assert output.equal(wanted)


def test_what_is_staged_has_the_towers_dtype_and_gives_the_same() -> None:
    small = VisionModel.load(checkpoint("qwen2_vl"), dtype="bfloat16")
    item = prepared("qwen2_vl")[0]
    staged = small.stage(item)
    assert staged.pixels.dtype == torch.bfloat16 and (staged.grid, staged.tokens) == (item.grid, item.tokens)
    outputs = [torch.empty(item.tokens, small.width, dtype=small.dtype) for _ in range(2)]
    small.encode([item], outputs[:1])
    small.encode([staged], outputs[1:])
    assert outputs[0].equal(outputs[1])
    assert model("qwen2_vl").stage(item).pixels is item.pixels, "what needs no change is not copied"
