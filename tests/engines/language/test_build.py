from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engines.errors import SetupError
from engines.language.build import build, layout_of, limits_of
from engines.language.model import ModelFacts
from engines.settings import LanguageSettings
from tests.support.checkpoints import checkpoint

FAMILY = "qwen2_5_vl"


def settings(**changes: Any) -> LanguageSettings:
    fields = {"model": checkpoint(FAMILY), "dtype": "float32", "kv_blocks": 4, "embedding_bytes": 1 << 20}
    return LanguageSettings(**{**fields, **changes})


def test_the_cache_is_as_large_as_told() -> None:
    facts = ModelFacts.read(checkpoint(FAMILY))
    one = layout_of(settings(kv_blocks=1), facts, torch.float32)
    assert layout_of(settings(kv_blocks=7), facts, torch.float32).num_blocks == 7
    by_bytes = layout_of(settings(kv_blocks=None, kv_bytes=10 * one.nbytes + 1), facts, torch.float32)
    assert by_bytes.num_blocks == 10
    limits = limits_of(settings(), facts, one)
    assert (limits.num_blocks, limits.block_size, limits.max_model_len) == (1, 16, facts.max_positions)


async def test_what_was_built_is_taken_apart() -> None:
    before = set(Path("/dev/shm").iterdir())
    async with build(settings()) as app:
        assert len(set(Path("/dev/shm").iterdir()) - before) > 0
        assert app.info()["transfer"]["name"] == "shm"
    assert not {path for path in Path("/dev/shm").iterdir() if path not in before and _is_ours(path)}


def _is_ours(path: Path) -> bool:
    """Other tests' engines come and go beside us."""
    import os

    return str(os.getpid()) in path.name.split("-")


async def test_a_transport_without_kv_gets_one_beside_it(tmp_path: Path) -> None:
    async with build(settings(transfer="storage", storage_path=tmp_path, role="prefill")) as app:
        assert app.info()["transfer"]["name"] == "shm"
        assert [transfer.name for transfer in app._parts.transfers] == ["shm", "storage"]
        assert app.info()["transfer"]["audit"] == dict.fromkeys(app.info()["transfer"]["audit"], 0)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"model": Path("nothing/here")}, "is not a folder"),
        ({"max_model_len": 10**9}, "--max-model-len"),
        ({"kv_blocks": None, "kv_bytes": 10}, "--kv-bytes 10 is less than one KV block"),
        ({"kv_blocks": 10**12}, "--transfer shm"),
        ({"device": "abacus"}, "--device abacus: Expected one of cpu, cuda"),
        ({"device": "cpu,cpu"}, "--device cpu,cpu: a language engine takes one"),
    ],
)
async def test_what_cannot_start_says_why(changes: dict[str, Any], hint: str) -> None:
    with pytest.raises(SetupError, match=hint):
        async with build(settings(**changes)):
            pass


def test_blocks_are_as_large_as_attention_needs() -> None:
    facts = ModelFacts.read(checkpoint(FAMILY))
    assert layout_of(settings(), facts, torch.float32).block_size == 16
    assert layout_of(settings(attention="varlen"), facts, torch.float32).block_size == 256
    assert layout_of(settings(attention="varlen", block_size=512), facts, torch.float32).block_size == 512


async def test_a_kernel_that_cannot_run_here_is_refused_at_start() -> None:
    with pytest.raises(SetupError, match="--attention varlen cannot run here"):
        async with build(settings(attention="varlen")):
            pass
    with pytest.raises(SetupError, match="--block-size 16: --attention varlen needs a multiple of 256"):
        async with build(settings(attention="varlen", block_size=16)):
            pass
