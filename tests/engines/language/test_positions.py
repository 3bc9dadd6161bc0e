"""Positions equal `get_rope_index` of each family, and its rule for generated tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.language.positions import Positions
from engines.language.sequence import Item
from tests.support.checkpoints import FAMILIES
from tests.support.reference import reference

MERGE = 2
TEXT, IMAGE = 7, 268
grids = st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6)).map(lambda g: (g[0], g[1] * MERGE, g[2] * MERGE))


def prompt(parts) -> tuple[list[int], list[Item]]:
    """A part is a number of text tokens or an image's grid."""
    ids, items = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
        else:
            count = part[0] * part[1] * part[2] // MERGE**2
            items.append(Item(f"{len(items):064x}", "image", part, len(ids), count))
            ids += [IMAGE] * count
    return ids, items


def theirs(family: str, ids: list[int], items: list[Item]) -> tuple[np.ndarray, int]:
    tokens = torch.tensor([ids])
    grid = torch.tensor([item.grid for item in items]) if items else None
    positions, delta = reference(family).model.model.get_rope_index(tokens, (tokens == IMAGE).int(), grid)
    return positions[:, 0].numpy(), int(delta)


PROMPTS = {
    "text": [9],
    "one": [4, (1, 8, 6), 5],
    "first": [(1, 4, 12), 3],
    "last": [3, (1, 12, 4)],
    "two sizes": [2, (1, 4, 8), 6, (1, 10, 2), 1],
    "three": [1, (1, 2, 2), 1, (1, 8, 8), 30, (1, 2, 20), 4],
    "frames": [2, (3, 4, 6), 2],
}


@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_numbered_as_transformers_numbers_it(family, parts):
    ids, items = prompt(parts)
    positions, delta = theirs(family, ids, items)
    ours = Positions.build(items, MERGE)
    np.testing.assert_array_equal(ours.slice(0, len(ids)), positions)
    generated = np.arange(len(ids), len(ids) + 5) + delta
    np.testing.assert_array_equal(ours.slice(len(ids), len(ids) + 5), [generated] * 3)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(grids, st.integers(1, 9)), max_size=3), st.integers(1, 9), st.sampled_from(FAMILIES))
def test_any_prompt_is(images, lead, family):
    ids, items = prompt([lead, *(part for pair in images for part in pair)])
    ours = Positions.build(items, MERGE).slice(0, len(ids))
    np.testing.assert_array_equal(ours, theirs(family, ids, items)[0])


@given(st.lists(st.integers(1, 12), min_size=1))
def test_slices_join_to_the_whole(cuts):
    _, items = prompt(PROMPTS["three"])
    positions = Positions.build(items, MERGE)
    edges = [0, *np.cumsum(cuts).tolist()]
    parts = [positions.slice(a, b) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), positions.slice(0, edges[-1]))


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (Item("a", "video", (2, 4, 4), 0, 4), "makes 8 tokens, its prompt holds 4"),
        (Item("a", "image", (1, 4, 4), 0, 5), "makes 4 tokens, its prompt holds 5"),
    ],
)
def test_what_has_no_positions_is_refused(item, told):
    with pytest.raises(ValueError, match=told):
        Positions.build([item], MERGE)


def test_without_mrope_a_position_is_an_index():
    items = (Item("a", "image", (3, 8, 8), 5, 48), Item("b", "image", (1, 4, 4), 60, 4))
    found = Positions.build(items, 2, mrope=False).slice(0, 90)
    assert (found == np.arange(90)).all() and found.shape == (3, 90)
    with pytest.raises(ValueError, match="makes 4 tokens"):
        Positions.build((Item("a", "image", (1, 4, 4), 0, 5),), 2, mrope=False)


def test_overlapping_items_are_refused():
    items = [Item("a", "image", (1, 4, 4), 0, 4), Item("b", "image", (1, 4, 4), 3, 4)]
    with pytest.raises(ValueError, match="inside the item before it"):
        Positions.build(items, MERGE)


VIDEO = 269
FILMS = {
    "few steps": ([3, (2, 8, 4), 5], 1.0),
    "time passes the text behind": ([3, (12, 4, 8), 5], 1.0),
    "time passes the generated text": ([1, (30, 4, 4), 2], 2.0),
    "parts of a position": ([2, (7, 4, 4), 3, (5, 6, 6), 1], 0.7),
    "far apart": ([2, (3, 4, 4), 40], 25 * 1.3),
}


@pytest.mark.parametrize(("parts", "interval"), FILMS.values(), ids=FILMS)
def test_a_video_is_numbered_as_transformers_numbers_it(parts, interval):
    """Qwen2.5-VL's: those of the others are as far apart as 1 position, or have one step each."""
    ids, images = prompt(parts)
    items = [replace(item, modality="video", interval=interval) for item in images]
    tokens = torch.tensor([[VIDEO if token == IMAGE else token for token in ids]])
    model = reference("qwen2_5_vl").model
    seconds = torch.tensor([interval / model.config.vision_config.tokens_per_second] * len(items))
    grids = torch.tensor([item.grid for item in items])
    types = (tokens == VIDEO).int() * 2
    positions, _ = model.model.get_rope_index(tokens, types, None, grids, second_per_grid_ts=seconds)
    ours = Positions.build(items, MERGE)
    np.testing.assert_array_equal(ours.slice(0, len(ids)), positions[:, 0].numpy())
    generated = int(positions[0, 0, -1]) + 1 + np.arange(5)
    np.testing.assert_array_equal(ours.slice(len(ids) - 1, len(ids) + 5)[:, 1:], [generated] * 3)
