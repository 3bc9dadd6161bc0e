"""Which vision a model gets, of all who tell one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from proxy.balancer.fleet import Event, Fleet
from proxy.core import Role
from proxy.media.profiles import Profiles, flagged
from proxy.media.vision import DEFAULT, FAMILIES, Vision
from tests.support.checkpoints import checkpoint

TWO, THREE = FAMILIES["qwen2_vl"], FAMILIES["qwen3_vl"]
SMALL = replace(THREE, max_pixels=1 << 20)


def fleet(**told: Vision) -> Fleet:
    """Of one encoder for each model, which tells its vision."""
    found = Fleet()
    for model, vision in told.items():
        meet(found, model, vision)
    return found


def meet(fleet: Fleet, model: str, vision: Vision) -> None:
    instance = fleet.join(f"http://{model}", Role.ENCODE, "native")
    instance.model, instance.facts = model, {"vision": asdict(vision)}
    fleet.apply(instance, Event.HEALTHY, "")


def test_a_flag_comes_before_all_that_is_told() -> None:
    profiles = Profiles(fleet(a=SMALL, b=SMALL), {"a": TWO, "": THREE})
    assert (profiles.of("a"), profiles.of("b")) == (TWO, THREE)


def test_an_encoder_of_the_model_comes_before_its_name() -> None:
    profiles = Profiles(fleet(qwen2_vl=SMALL, b=TWO), {})
    assert (profiles.of("qwen2_vl"), profiles.of("b")) == (SMALL, TWO)
    assert profiles.of("org/Qwen3-VL-8B") is THREE
    assert profiles.of("") is DEFAULT, "the encoders are not alike"


def test_what_all_encoders_tell_alike_is_that_of_any_model() -> None:
    assert Profiles(fleet(a=SMALL, b=SMALL), {}).of("alias") == SMALL
    assert Profiles(fleet(), {}).of("alias") is DEFAULT


def test_an_encoder_that_comes_later_is_heard() -> None:
    encoders = fleet()
    profiles = Profiles(encoders, {})
    assert profiles.of("a") is DEFAULT
    meet(encoders, "a", SMALL)
    assert profiles.of("a") == SMALL


def test_any_number_of_names_can_be_asked_for() -> None:
    profiles = Profiles(fleet(), {})
    for n in range(3000):
        assert profiles.of(f"m{n}") is DEFAULT
    assert len(profiles._known[1]) < 1100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_folder_tells_its_numbers(family: str) -> None:
    found = flagged(f"{family}, m={checkpoint(family)}")
    assert found[""] is FAMILIES[family]
    assert (found["m"].family, found["m"].max_pixels) == (family, 1024 * found["m"].patch ** 2 * 4)
    assert found["m"].embedding_bytes == 256 * 4 * (3 if family == "qwen3_vl" else 1)


def test_processors_in_one_file_are_read_too(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_vl_moe", "vision_config": {"out_hidden_size": 2048}, "torch_dtype": "bfloat16"}
    areas = {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "min_frames": 2}
    write(tmp_path, "config.json", config)
    write(tmp_path, "processor_config.json", {"image_processor": areas, "video_processor": areas})
    found = flagged(str(tmp_path))[""]
    assert (found.min_pixels, found.video_max, found.min_frames, found.embedding_bytes) == (1024, 4096, 2, 16384)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("config", [None, {}, {"model_type": "llama"}, {"model_type": "qwen3_vl"}, [], "{"])
def test_a_folder_that_tells_nothing_is_named(tmp_path: Path, config: Any) -> None:
    if config is not None:
        write(tmp_path, "config.json", config)
    with pytest.raises(ValueError, match=f"--vision {tmp_path}: ."):
        flagged(str(tmp_path))


def test_what_is_neither_a_family_nor_a_folder_is_named() -> None:
    with pytest.raises(ValueError, match=r"'llava' is neither a family \(qwen2_vl, "):
        flagged("a=qwen2_vl,llava")
    assert flagged("") == {}
