"""How the kernel is chosen and called. That it finds what `gathering` finds is `test_attention`'s; greedy tokens of a
whole model through a kernel written out in plain torch equal those of `generate`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.errors import SetupError
from engines.language.gathering import Gathering
from engines.language.kv import KVCache, KVLayout
from engines.language.runner import Runner
from engines.language.varlen import Varlen, backend_of, block_size_for
from tests.support.checkpoints import FAMILIES
from tests.support.drive import CASES, Driver, case, language_model, new_cache
from tests.support.kernels import varlen_attn
from tests.support.paged import MIXES, Bench

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def cache_of(block_size: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> KVCache:
    return KVCache(KVLayout(2, 3, block_size, 2, 8, dtype), device=device)


class Counting:
    """The kernel, and the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        self.calls.append({"rows": len(query), "paged": options.get("block_table") is not None, **options})
        return varlen_attn(query, *arguments, **options)


def calls(spans: list[tuple[int, int]], layer: int = 1) -> list[tuple[int, bool, tuple[int, int]]]:
    kernel = Counting()
    Bench(spans, 16, lambda cache: Varlen(cache, kernel)).run(layer)
    return [(call["rows"], call["paged"], call["window_size"]) for call in kernel.calls]


def test_one_call_for_all_decodes_one_for_all_chunks_one_for_all_that_begin() -> None:
    assert calls(MIXES["everything"]) == [(2, True, (-1, -1)), (13, True, (-1, 0)), (12, False, (-1, 0))]
    assert calls(MIXES["unequal decodes"]) == [(5, True, (-1, -1))]
    assert calls(MIXES["prompts"]) == [(17, False, (-1, 0))]


def test_the_last_layer_asks_once_for_the_rows_that_are_read() -> None:
    assert calls(MIXES["everything"], layer=2) == [(6, True, (-1, -1))]
    assert calls(MIXES["unequal decodes"], layer=2) == [(5, True, (-1, -1))]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family: str) -> None:
    model = language_model(family)
    cache = new_cache(model)
    loop = Driver(Runner(model, cache, backend=Varlen(cache, varlen_attn)), budget=40, chunk=24)
    cases = [case(family, name) for name in CASES for _ in range(2)]
    assert loop.finish(*(loop.of(one) for one in cases)) == [one.expected for one in cases]


@pytest.mark.parametrize(
    ("name", "dtype", "device", "expected"),
    [
        ("auto", torch.bfloat16, CUDA, 256),
        ("auto", torch.float32, CUDA, 16),
        ("auto", torch.bfloat16, CPU, 16),
        ("gather", torch.bfloat16, CUDA, 16),
        ("varlen", torch.float32, CPU, 256),
    ],
)
def test_blocks_suit_the_kernel_where_nobody_says(
    name: str, dtype: torch.dtype, device: torch.device, expected: int
) -> None:
    assert block_size_for(name, dtype, device) == expected


def test_the_kernel_is_taken_where_it_is_asked_for_and_runs() -> None:
    assert isinstance(backend_of("auto", cache_of(256), 4), Gathering)
    assert isinstance(backend_of("gather", cache_of(256), 4, varlen_attn), Gathering)
    assert isinstance(backend_of("varlen", cache_of(512), 4, varlen_attn), Varlen)


def test_blocks_that_the_kernel_cannot_read_are_refused() -> None:
    with pytest.raises(SetupError, match="--block-size 16: --attention varlen needs a multiple of 256"):
        backend_of("varlen", cache_of(16), 4, varlen_attn)


def test_a_kernel_that_does_not_run_here_is_refused_when_asked_for() -> None:
    with pytest.raises(SetupError, match="--attention varlen cannot run here: "):
        backend_of("varlen", cache_of(256), 4)  # torch's own, which the CPU has not


def test_a_kernel_that_does_not_run_here_is_not_taken_unasked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel for this head\nfar more about it")

    monkeypatch.setattr("engines.language.varlen.wanted", lambda *_: True)
    assert isinstance(backend_of("auto", cache_of(256), 4, refuse), Gathering)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["no kernel for this head"]
