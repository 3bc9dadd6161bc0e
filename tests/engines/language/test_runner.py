"""Greedy tokens of the paged runner equal `generate`, whatever is in the batch and wherever the chunks are cut."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from engines.errors import SetupError
from engines.language.fusing import FusedNorm
from engines.language.gathering import Gathering
from engines.language.graphs import DecodeGraphs
from engines.language.kv import KVCache
from engines.language.model import LanguageModel
from engines.language.runner import BadEmbeddings, Runner, runner_of
from engines.language.sequence import Scheduled
from engines.language.varlen import COPIED_TOKENS, Varlen
from engines.weights import on_meta
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.drive import CASES, Driver, case, driver, language_model, new_cache
from tests.support.kernels import varlen_attn

ALL = [(family, name) for family in FAMILIES for name in CASES]


@pytest.mark.parametrize("chunk", [1 << 30, 7], ids=["whole", "chunks"])
@pytest.mark.parametrize(("family", "name"), ALL)
def test_greedy_tokens_equal_generate(family, name, chunk):
    loop = driver(family, chunk=chunk)
    want = case(family, name)
    assert loop.finish(loop.of(want)) == [want.expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_go_in_token_by_token(family):
    loop = driver(family, chunk=1)
    want = case(family, "one")
    assert loop.finish(loop.of(want)) == [want.expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_each_sequence_its_own_tokens(family):
    loop = driver(family, budget=40, chunk=24)
    cases = [case(family, name) for name in CASES for _ in range(3)]
    assert loop.finish(*(loop.of(one) for one in cases)) == [one.expected for one in cases]
    assert max(loop.steps) > len(CASES), "the batch was never mixed"


@pytest.mark.parametrize("family", FAMILIES)
def test_late_arrivals_join_running_sequences(family):
    loop = driver(family, chunk=50)
    cases = [case(family, name) for name in CASES]
    sequences = []
    for one in cases:
        sequences.append(loop.of(one))
        loop.step(sequences)
        loop.step(sequences)
    assert loop.finish(*sequences) == [one.expected for one in cases]


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size_gives_the_same_tokens(block_size):
    loop = driver("qwen3_vl", chunk=19, block_size=block_size, num_blocks=2048 // block_size)
    cases = [case("qwen3_vl", name) for name in ("two", "long", "text")]
    assert loop.finish(*(loop.of(one) for one in cases)) == [one.expected for one in cases]


def test_recomputing_from_scratch_after_output_goes_on_as_before():
    want = case("qwen2_vl", "two")
    loop = driver("qwen2_vl", chunk=11)
    seq = loop.of(want)
    while seq.num_output_tokens < 5:
        loop.step([seq])
    seq.num_computed = 0
    assert loop.finish(seq) == [want.expected]


def test_saved_blocks_go_on_in_other_blocks():
    want = case("qwen2_5_vl", "one")
    loop = driver("qwen2_5_vl")
    seq = loop.of(want)
    for _ in range(4):
        loop.step([seq])
    cache = loop.runner.cache
    saved = cache.save(seq.block_table)
    cache.pool.fill_(7.0)
    seq.block_table = [loop.free.pop() for _ in seq.block_table]
    cache.restore(saved, seq.block_table)
    assert loop.finish(seq) == [want.expected]


def test_a_fork_shares_full_blocks_and_copies_the_last():
    want = case("qwen3_vl", "one")
    loop = driver("qwen3_vl")
    first = loop.of(want)
    entry = Scheduled(first, 0, len(first.token_ids) - 1, False)
    assert loop.runner.run([entry]) == []
    first.num_computed = entry.count
    second = first.fork(1)
    shared = first.num_computed // 16
    second.block_table = first.block_table[:shared] + [loop.free.pop() for _ in first.block_table[shared:]]
    second.num_computed = first.num_computed
    loop.runner.cache.copy_block(first.block_table[shared], second.block_table[shared])
    assert loop.finish(first, second) == [want.expected] * 2


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, [(0, 2), (2, 3), (3, 4)]),
        (3, [(0, 3), (3, 4)]),
        (9, [(0, 3), (3, 4)]),
    ],
)
def test_groups_of_layers_are_told_in_order_and_already_written(size, groups):
    model = language_model("qwen2_vl")
    runner = Runner(model, new_cache(model), layers_per_push=size)
    loop = driver("qwen2_vl")
    seq = loop.sequence(range(40))
    told, kept = [], []

    def on_layers(first, last):
        told.append((first, last))
        assert not runner.cache.pool[last:].any(), "told after later layers"
        kept.append(runner.cache.pool[first:last, seq.block_table].clone())

    runner.run([Scheduled(seq, 0, 40, True)], on_layers)
    assert told == groups
    assert torch.equal(torch.cat(kept), runner.cache.pool[:, seq.block_table])


def test_half_precision_takes_every_path():
    model = LanguageModel.load(checkpoint("qwen3_vl"), torch.bfloat16)
    loop, exact = Driver(Runner(model, new_cache(model)), budget=40, chunk=24), driver("qwen3_vl", budget=40, chunk=24)
    cases = [case("qwen3_vl", name) for name in CASES]
    halves, fulls = ([other.of(one, logprobs=0) for one in cases] for other in (loop, exact))
    loop.finish(*halves)
    exact.finish(*fulls)
    # The texts differ by now, but not the prompts: their last token once more.
    again = [[Scheduled(cut(seq), seq.num_prompt_tokens - 1, 1, True) for seq in seqs] for seqs in (halves, fulls)]
    for half, full in zip(loop.runner.run(again[0]), exact.runner.run(again[1]), strict=True):
        assert half.logprob == pytest.approx(full.logprob, abs=0.2)


def cut(seq):
    return replace(seq, token_ids=seq.token_ids[: seq.num_prompt_tokens])


def test_an_empty_step_does_nothing():
    assert driver("qwen2_vl").runner.run([]) == []


def test_results_come_in_the_order_of_the_batch():
    loop = driver("qwen2_vl")
    ahead, behind = loop.sequence(range(60)), loop.sequence([5] * 9)
    loop.step([ahead])
    batch = [Scheduled(behind, 0, 9, True), Scheduled(ahead, 60, 1, True)]
    found = [one.token_id for one in loop.runner.run(batch)]
    alone = [loop.runner.run([entry])[0].token_id for entry in batch]
    assert found == alone
    assert found == [one.token_id for one in loop.runner.run(batch[::-1])][::-1]


class TestBadEmbeddings:
    @pytest.fixture
    def loop(self):
        return driver("qwen3_vl")

    @pytest.mark.parametrize("held", [None, [], [None]])
    def test_missing_ones_are_named_before_the_model_runs(self, loop, held):
        want = case("qwen3_vl", "one")
        seq = loop.of(want)
        seq.embeddings = held
        with pytest.raises(BadEmbeddings, match=f"{seq.id}: tokens .* whose embedding is not here") as raised:
            loop.step([seq])
        assert raised.value.sequence is seq
        assert not loop.runner.cache.pool.any(), "the model ran"

    def test_a_chunk_before_the_image_needs_none(self, loop):
        seq = loop.of(case("qwen3_vl", "long"))
        seq.embeddings = None
        loop.chunk = 32
        loop.step([seq])
        assert seq.num_computed == 32

    def test_decoding_needs_none(self, loop):
        want = case("qwen3_vl", "one")
        seq = loop.of(want)
        loop.step([seq])
        seq.embeddings = None
        assert loop.finish(seq) == [want.expected]

    def test_the_width_must_hold_every_deepstack_level(self, loop):
        want = case("qwen3_vl", "one")
        seq = loop.of(want)
        seq.embeddings = [one[:, :256] for one in want.embeddings]
        with pytest.raises(BadEmbeddings, match=r"is \[\d+, 256\], the model needs \[\d+, 768\]"):
            loop.step([seq])

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite_are_refused(self, loop, poison):
        want = case("qwen3_vl", "one")
        seq = loop.of(want)
        seq.embeddings = [one.clone() for one in want.embeddings]
        seq.embeddings[0][3, 300] = poison
        with pytest.raises(BadEmbeddings, match="not finite"):
            loop.step([seq])


def test_a_cache_on_another_device_is_refused():
    model = language_model("qwen2_vl")
    cache = new_cache(model)
    cache.pool = cache.pool.to("meta")
    with pytest.raises(SetupError, match="KV cache is in meta memory, but the model on cpu"):
        Runner(model, cache)


class TestOnADevice:
    """Of the meta device nothing can be read, and nothing there mixes with what is elsewhere: a step that runs on it
    waits for nothing of a CUDA device's either, and leaves nothing on the host."""

    @pytest.fixture
    def runner(self):
        model = on_meta(lambda: LanguageModel(AutoConfig.from_pretrained(checkpoint("qwen3_vl"))))
        model.facts = language_model("qwen3_vl").facts
        cache = KVCache(new_cache(language_model("qwen3_vl")).layout, device="meta")
        backend = Varlen(cache, lambda query, *_, **__: torch.empty_like(query))
        graphs = DecodeGraphs(model, cache, backend, 4, 1024, lambda work: work)
        return Runner(model, cache, backend=backend, graphs=graphs)

    def test_nothing_is_read_before_the_tokens(self, runner):
        loop = Driver(runner, chunk=24)
        seqs = [loop.of(case("qwen3_vl", name)) for name in ("two", "long", "text")]
        seqs[1].num_computed, seqs[2].num_computed = 24, len(seqs[2].token_ids) - 1
        mixed = [
            Scheduled(seqs[0], 0, 24, False),
            Scheduled(seqs[1], 24, 70, False),
            Scheduled(seqs[2], seqs[2].num_computed, 1, True),
        ]
        for batch in (mixed, mixed[2:], mixed[:1]):
            logits = runner.forward(runner.pack(batch))
            assert logits.device.type == "meta"
            assert len(logits) == sum(entry.sample for entry in batch)


class TestRunnerOf:
    def test_a_cpu_gets_what_runs_anywhere(self):
        model = language_model("qwen2_vl")
        runner = runner_of(model, new_cache(model), decoding=(4, 64), layers_per_push=3)
        assert isinstance(runner.backend, Gathering)
        assert runner.graphs is None
        assert runner.layers_per_push == 3
        assert not any(isinstance(module, FusedNorm) for module in model.modules())

    def test_a_gpu_gets_fused_norms_the_kernel_and_graphs(self, monkeypatch):
        """Of a GPU that is the CPU by another name."""
        model, made = LanguageModel.load(checkpoint("qwen2_vl")), []
        cache = new_cache(model)
        backend = Varlen(cache, varlen_attn)
        monkeypatch.setattr(LanguageModel, "device", property(lambda model: SimpleNamespace(type="cuda")))
        monkeypatch.setattr(cache, "pool", SimpleNamespace(device=SimpleNamespace(type="cuda")))
        monkeypatch.setattr("engines.language.runner.backend_of", lambda *_: backend)
        monkeypatch.setattr("engines.language.runner.Captures", lambda device: device.type)
        monkeypatch.setattr("engines.language.runner.DecodeGraphs", lambda *given: made.append(given) or "graphs")
        runner = runner_of(model, cache, decoding=(4, 64))
        assert (runner.backend, runner.graphs) == (backend, "graphs")
        assert made == [(model, cache, backend, 4, 64, "cuda")]
        assert sum(isinstance(module, FusedNorm) for module in model.modules()) == 2 * model.facts.num_layers + 1
        assert runner_of(model, cache).graphs is None
        monkeypatch.setattr("engines.language.runner.backend_of", lambda *_: "another")
        assert runner_of(model, cache, decoding=(4, 1 << 20)).backend == "another"
        assert isinstance(made[1][2], Varlen)
        assert made[1][4] == COPIED_TOKENS
