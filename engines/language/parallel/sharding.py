"""Cuts a text model into equal shares, one per rank: attention by heads, the MLP by its inner columns, embedding and
head by the vocabulary. It reads no weights; it says which part of each tensor a rank reads.

    q k v, gate up      rows of the weight     the rank's heads, the rank's columns: nothing is exchanged
    o, down             columns of the weight  each rank has a summand of the whole output: the group adds them up
    embedding           rows of the table      zero for tokens of other ranks: the group adds them up
    head                rows of the weight     each rank has some of the logits: the group puts them side by side
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engines.errors import SetupError
from engines.language.parallel.group import Group
from engines.weights import Cut

SPLIT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
SPLIT_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Share:
    """The part `rank` has of something that `size` ranks share. Equal parts, but of a vocabulary that does not divide:
    there the last has less."""

    rank: int
    size: int

    def of(self, whole: int) -> tuple[int, int]:
        """The first index and the one behind the last.

        >>> [Share(rank, 3).of(10) for rank in range(3)]
        [(0, 4), (4, 8), (8, 10)]
        """
        each = -(-whole // self.size)
        return min(self.rank * each, whole), min((self.rank + 1) * each, whole)


class Summand(nn.Linear):
    """A linear layer that has some of the inputs: all ranks' outputs are added up, and the bias once."""

    def __init__(self, in_features: int, out_features: int, bias: bool, group: Group) -> None:
        super().__init__(in_features, out_features, bias)
        self._group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        whole = self._group.sum(functional.linear(input, self.weight))
        return whole if self.bias is None else whole + self.bias


class ShardedEmbedding(nn.Embedding):
    """A table that has the tokens from `first` on. The result is fresh memory."""

    def __init__(self, count: int, width: int, first: int, group: Group) -> None:
        super().__init__(count, width)
        self._first = first
        self._group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own = input - self._first
        known = (own >= 0) & (own < self.num_embeddings)
        found = functional.embedding(own.clamp(0, self.num_embeddings - 1), self.weight)
        return self._group.sum(found.masked_fill_(~known[..., None], 0))


class ShardedHead(nn.Linear):
    """A head that has some of the vocabulary's logits, and gives all of them on every rank."""

    def __init__(self, in_features: int, share: tuple[int, int], vocab: int, group: Group) -> None:
        first, last = share
        super().__init__(in_features, last - first, bias=False)
        self._vocab = vocab
        self._padding = -(-vocab // group.size) - (last - first)
        self._group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own = functional.pad(functional.linear(input, self.weight), (0, self._padding))
        return self._group.gather(own)[..., : self._vocab]


def refuse_unequal(text: Any, size: int) -> None:
    """`text` is the text model's configuration.

    :raises SetupError: its heads or columns cannot be shared equally by `size` ranks.
    """
    for name, what in (
        ("num_key_value_heads", "key/value heads"),
        ("num_attention_heads", "attention heads"),
        ("intermediate_size", "columns in its MLP"),
    ):
        count = getattr(text, name)
        if count % size:
            raise SetupError(
                f"--tensor-parallel {size}: the model has {count} {what}, which {size} ranks cannot share equally"
            )


def shard(model: Any, group: Group) -> dict[str, Cut]:
    """Replace the layers of a language model, built on meta, by this rank's share of them.

    :returns: by the module's own names, the part of each tensor that it holds now.
    :raises SetupError: a layer is of a kind that is not known here.
    """
    if group.size == 1:
        return {}
    share, cuts = Share(group.rank, group.size), dict[str, Cut]()
    layers = model.model.layers
    for name, linear in list(layers.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            smaller, dim = cut_linear(linear, leaf, share, group)
            setattr(layers.get_submodule(parent), leaf, smaller)
            whole = linear.weight.shape[dim]
            cuts[f"model.layers.{name}.weight"] = Cut(dim, *share.of(whole), whole)
            if linear.bias is not None and dim == 0:
                cuts[f"model.layers.{name}.bias"] = Cut(0, *share.of(whole), whole)
    return cuts | shard_vocabulary(model, share, group)


def cut_linear(linear: nn.Linear, name: str, share: Share, group: Group) -> tuple[nn.Linear, int]:
    """A rank's layer in place of `linear`, and the dimension of its weight that is cut."""
    inputs, outputs, bias = linear.in_features, linear.out_features, linear.bias is not None
    with torch.device("meta"):
        if name in SPLIT_OUTPUTS:
            return nn.Linear(inputs, outputs // share.size, bias), 0
        if name in SPLIT_INPUTS:
            return Summand(inputs // share.size, outputs, bias, group), 1
    raise SetupError(f"--tensor-parallel: this model has layers called {name}, which cannot be shared by ranks")


def shard_vocabulary(model: Any, share: Share, group: Group) -> dict[str, Cut]:
    vocab, width = model.model.embed_tokens.weight.shape
    first, last = share.of(vocab)
    with torch.device("meta"):
        model.model.embed_tokens = ShardedEmbedding(last - first, width, first, group)
        model.lm_head = ShardedHead(width, (first, last), vocab, group)
    return dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), Cut(0, first, last, vocab))
