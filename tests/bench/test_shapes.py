"""The arithmetic against published figures, which are rounded."""

from __future__ import annotations

import pytest

from bench.shapes import (
    Peak,
    configs,
    decode_floor,
    grid_of,
    kv_nbytes,
    peak_of,
    prefill_flops,
    tower_flops,
    weight_nbytes,
)
from engines.language.model import LanguageModel
from engines.weights import on_meta

CONFIGS = configs()


@pytest.mark.parametrize(
    ("model", "size", "tokens", "tera"),
    [
        ("Qwen2.5-VL-7B", (640, 480), 391, 2.07),
        ("Qwen2.5-VL-7B", (1920, 1080), 2691, 16.3),
        ("Qwen3-VL-8B", (640, 480), 300, 1.24),
        ("Qwen3-VL-8B", (1920, 1080), 2040, 15.5),
        ("Qwen3-VL-8B", (3840, 2160), 8160, 161.5),
    ],
)
def test_images_cost_what_is_published(model: str, size: tuple[int, int], tokens: int, tera: float) -> None:
    grid = grid_of(*size, CONFIGS[model])
    assert grid[1] * grid[2] == 4 * tokens
    assert tower_flops(grid, CONFIGS[model]) / 1e12 == pytest.approx(tera, rel=0.03)


def test_models_are_as_large_as_their_names_say() -> None:
    billions = {name: weight_nbytes(config, 1) / 1e9 for name, config in CONFIGS.items()}
    assert billions == pytest.approx({"Qwen2.5-VL-3B": 3.1, "Qwen2.5-VL-7B": 7.1, "Qwen3-VL-8B": 7.6}, rel=0.02)
    assert kv_nbytes(CONFIGS["Qwen2.5-VL-7B"], 2) == 57344


def test_a_prompt_of_4k_tokens_costs_two_flops_a_weight_and_token_and_its_attention() -> None:
    text = CONFIGS["Qwen2.5-VL-7B"].text_config
    layers = 4096 * 2 * (weight_nbytes(CONFIGS["Qwen2.5-VL-7B"], 1) - text.vocab_size * text.hidden_size)
    found = prefill_flops(4096, CONFIGS["Qwen2.5-VL-7B"])
    assert 0.97 < found / layers < 1.06


def test_a_step_is_bound_by_what_it_reads_until_there_is_much_to_compute() -> None:
    config, peak = CONFIGS["Qwen2.5-VL-7B"], Peak(989e12, 3.35e12)
    assert decode_floor(1, 0, config, 2, peak) == weight_nbytes(config, 2) / 3.35e12
    assert decode_floor(32, 4096, config, 2, peak) == pytest.approx(
        decode_floor(1, 0, config, 2, peak) * 1.53, rel=0.01
    )
    assert decode_floor(4096, 0, config, 2, peak) == pytest.approx(8192 * weight_nbytes(config, 1) / 989e12)


def test_a_device_is_known_by_its_name() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert peak_of("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert peak_of("NVIDIA H200") == Peak(989e12, 4.8e12)
    with pytest.raises(LookupError, match="--peak-tflops"):
        peak_of("abacus")


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_model_that_is_made(name: str) -> None:
    model = on_meta(lambda: LanguageModel(CONFIGS[name]))
    matrices = {key: value for key, value in model.state_dict().items() if value.ndim > 1}
    del matrices["model.embed_tokens.weight"]
    assert weight_nbytes(CONFIGS[name], 1) == sum(matrix.numel() for matrix in matrices.values())
