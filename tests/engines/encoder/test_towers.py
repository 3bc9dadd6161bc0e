"""Towers: what each holds of a model, and how wide its embeddings are. What they compute is tested with `model`."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from engines import weights
from engines.encoder.towers import GridTower, TileTower, tower_of
from engines.families import FAMILIES
from tests.support.checkpoints import checkpoint

HIDDEN = 256


@pytest.mark.parametrize(
    ("family", "kind", "width"),
    [
        ("qwen2_vl", GridTower, HIDDEN),
        ("qwen2_5_vl", GridTower, HIDDEN),
        ("qwen3_vl", GridTower, 3 * HIDDEN),
        ("internvl", TileTower, HIDDEN),
    ],
)
def test_a_tower_holds_the_vision_part_alone(family: str, kind: type, width: int) -> None:
    config = AutoConfig.from_pretrained(checkpoint(family))
    tower = weights.on_meta(lambda: tower_of(FAMILIES[family], config))
    assert isinstance(tower, kind) and tower.width == width
    names = set(tower.module.state_dict())
    stored = {weights.module_name(name, "vision") for name in weights.shards(checkpoint(family))}
    assert names == stored - {None}
