"""A folder becomes a language model and its facts, without a byte of its vision tower."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from engines.errors import SetupError
from engines.language.model import LanguageModel, ModelFacts
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.reference import reference


@pytest.fixture
def folder(tmp_path):
    """The configuration of a checkpoint, to be changed; its weights are not copied."""
    for file in checkpoint("qwen2_5_vl").glob("*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def change(folder, **text):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= text
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("family", "levels"), [("qwen2_vl", 0), ("qwen2_5_vl", 0), ("qwen3_vl", 2)])
def test_facts_are_those_of_the_checkpoint(family, levels):
    facts = ModelFacts.read(checkpoint(family))
    config = reference(family).model.config
    assert facts.family == family
    assert facts.deepstack_levels == levels
    assert facts.embedding_width == facts.hidden_size * (1 + levels)
    assert (facts.num_layers, facts.vocab_size) == (config.text_config.num_hidden_layers, config.text_config.vocab_size)
    assert facts.head_dim == 64
    assert facts.image_token_id == config.image_token_id
    ends = reference(family).model.generation_config.eos_token_id
    assert facts.eos_token_ids == tuple([ends] if isinstance(ends, int) else ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_language_tensors_are_loaded(family):
    model = LanguageModel.load(checkpoint(family))
    assert not [name for name in model.report.names if "visual" in name]
    assert model.report.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert not [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_one_asked_for(dtype):
    model = LanguageModel.load(checkpoint("qwen3_vl"), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_ends_come_from_the_model_where_no_generation_config_is(folder):
    (folder / "generation_config.json").unlink()
    change(folder, eos_token_id=11)
    assert ModelFacts.read(folder).eos_token_ids == (11,)


def test_another_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SetupError, match="'llama' is not served; known: qwen2_vl, qwen2_5_vl, qwen3_vl"):
        ModelFacts.read(tmp_path)


def test_sliding_windows_are_refused(folder):
    layers = ["full_attention"] * 3 + ["sliding_attention"]
    change(folder, layer_types=layers, sliding_window=64, use_sliding_window=True)
    with pytest.raises(SetupError, match="sliding-window"):
        ModelFacts.read(folder)


def test_rotary_scaling_by_the_longest_of_a_batch_is_refused(folder):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    change(folder, rope_parameters=rope)
    with pytest.raises(SetupError, match="rope_type dynamic"):
        ModelFacts.read(folder)


def test_more_deepstack_levels_than_layers_are_refused(tmp_path):
    config = json.loads((checkpoint("qwen3_vl") / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = [0, 1, 2, 3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match="4 deepstack levels for 4 layers"):
        ModelFacts.read(tmp_path)
