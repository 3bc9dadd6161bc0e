from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from engines.errors import SetupError
from engines.language.model import LanguageModel
from engines.language.parallel.group import Alone, Processes
from engines.language.parallel.sharding import ShardedEmbedding, ShardedHead, Share, Summand, refuse_unequal, shard
from engines.language.runner import Runner
from engines.weights import on_meta
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.drive import CASES, Driver, case, new_cache
from tests.support.threads import on_ranks


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_reference_tokens_from_half_the_weights(family: str) -> None:
    wanted = [case(family, name) for name in CASES]
    whole = LanguageModel.load(checkpoint(family)).report

    def work(group: Processes) -> tuple[int, list[list[int]]]:
        model = LanguageModel.load(checkpoint(family), group=group)
        assert model.report.names == whole.names
        driver = Driver(Runner(model, new_cache(model)), chunk=48)
        return model.report.nbytes, driver.finish(*(driver.of(one) for one in wanted))

    for nbytes, found in on_ranks(2, work):
        assert found == [one.expected for one in wanted]
        assert whole.nbytes / 2 < nbytes < 0.51 * whole.nbytes


def test_a_vocabulary_that_does_not_divide_is_shared_all_the_same() -> None:
    table = nn.Embedding(10, 4)
    ids, rows = torch.tensor([0, 9, 3, 4, 8]), torch.randn(5, 4)

    def work(group: Processes) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = Share(group.rank, group.size).of(10)
        embedding = ShardedEmbedding(last - first, 4, first, group)
        head = ShardedHead(4, (first, last), 10, group)
        embedding.weight = head.weight = nn.Parameter(table.weight[first:last].detach().clone())
        return embedding(ids), head(rows)

    for embedded, logits in on_ranks(3, work):
        assert embedded.equal(table(ids))
        torch.testing.assert_close(logits, rows @ table.weight.t())


def test_a_bias_is_added_once() -> None:
    whole = nn.Linear(4, 3)
    rows = torch.randn(2, 4)

    def work(group: Processes) -> torch.Tensor:
        own = slice(2 * group.rank, 2 * group.rank + 2)
        summand = Summand(2, 3, True, group)
        summand.weight, summand.bias = nn.Parameter(whole.weight[:, own]), whole.bias
        found: torch.Tensor = summand(rows[:, own])
        return found

    for found in on_ranks(2, work):
        torch.testing.assert_close(found, whole(rows))


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [(4, "2 key/value heads"), (3, "2 key/value heads"), (2, None)],
)
def test_heads_that_cannot_be_shared_are_refused(ranks: int, reason: str | None) -> None:
    text = AutoConfig.from_pretrained(checkpoint("qwen3_vl")).text_config
    if reason is None:
        refuse_unequal(text, ranks)
        return
    with pytest.raises(SetupError, match=f"--tensor-parallel {ranks}: the model has {reason}"):
        refuse_unequal(text, ranks)


def test_layers_of_another_kind_are_refused() -> None:
    layer = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    model = on_meta(lambda: nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([layer])})}))
    with pytest.raises(SetupError, match="layers called qkv"):
        shard(model, Processes(0, 2, timeout=1.0))


def test_one_rank_has_the_model_as_it_is() -> None:
    assert shard(SimpleNamespace(), Alone()) == {}
