"""Chooses the next token of each sequence from its logits. It keeps no state: a sequence's dice are its seed and how
long it is. On a CUDA device everything is chosen there, and the host waits once: for the ids.

Order, as in vLLM: forbid the end while `min_tokens` is not reached, penalties, temperature, top-k, top-p, one draw.
Log-probabilities are those of the model's own distribution, before any of this.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from engines.devices import onto
from engines.language.sequence import SamplingParams, Sequence

# A nucleus (top-p without top-k) is looked for among this many candidates before the whole vocabulary is sorted for it.
NUCLEUS_CANDIDATES = 1024
SEED_MASK = (1 << 64) - 1
TINY = 1e-30  # the least temperature that float32 divides by without trouble


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token.

    `logprob` and `top_logprobs` (id, log-probability; best first) are there only when the request asked for
    them.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def draw(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at `position` of a sequence: the same in every batch, process and restart."""
    material = (seed & SEED_MASK).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(material, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class Sampler:
    """Samples for any number of sequences.

    `eos_token_ids` are what `min_tokens` forbids beside a request's own stop ids; `entropy` seeds requests that
    gave no seed.
    """

    def __init__(self, eos_token_ids: Iterable[int], entropy: Callable[[], int] = lambda: secrets.randbits(64)) -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self.entropy = entropy

    def sample(self, logits: torch.Tensor, sequences: Listing[Sequence]) -> list[Sampled]:
        """One token per row of `logits`, `[n, vocab]`. Each row depends on its own sequence alone."""
        if not sequences:
            return []
        logits = logits.float()
        tokens: list[int] = self.choose(logits, sequences).tolist()
        sampled = [Sampled(token) for token in tokens]
        for row, found in described(logits, tokens, sequences):
            sampled[row] = found
        return sampled

    def choose(self, logits: torch.Tensor, sequences: Listing[Sequence]) -> torch.Tensor:
        """The tokens alone, `[n]`, where the logits, in float32, are. Nothing of a CUDA device's is waited for."""
        return self._throw(self._shaped(logits, sequences), sequences)

    def _shaped(self, logits: torch.Tensor, sequences: Listing[Sequence]) -> torch.Tensor:
        """The logits with what each request forbids and penalises; the same tensor when no request does."""
        rows = [row for row, seq in enumerate(sequences) if reshapes(seq)]
        if not rows:
            return logits
        logits = logits.clone()
        for row in rows:
            self._reshape(logits[row], sequences[row])
        return logits

    def _reshape(self, logits: torch.Tensor, seq: Sequence) -> None:
        params = seq.params
        if seq.num_output_tokens < params.min_tokens:
            ends = [*self.eos_token_ids, *params.stop_token_ids]
            logits.index_fill_(0, beside(logits, ends, np.int64), float("-inf"))
        if params.repetition_penalty != 1.0:
            seen = beside(logits, sorted(set(seq.token_ids)), np.int64)
            held = logits[seen]
            logits[seen] = torch.where(held > 0, held / params.repetition_penalty, held * params.repetition_penalty)
        if counts := Counter(seq.output_ids):
            used, times = (beside(logits, part, np.int64) for part in (counts, counts.values()))
            logits[used] -= params.presence_penalty + params.frequency_penalty * times

    def _throw(self, logits: torch.Tensor, sequences: Listing[Sequence]) -> torch.Tensor:
        """`[n]`. Greedy rows together, then those that sample from everything, then those that cut the distribution
        first."""
        vocab = logits.shape[-1]
        hot = [row for row, seq in enumerate(sequences) if seq.params.temperature > 0]
        some_greedy = len(hot) < len(sequences)
        tokens = logits.argmax(-1) if some_greedy else logits.new_empty(len(hot), dtype=torch.int64)
        cut = [row for row in hot if truncates(sequences[row].params, vocab)]
        whole = [row for row in hot if not truncates(sequences[row].params, vocab)]
        for rows, throw in ((whole, throw_whole), (cut, throw_cut)):
            if rows:
                chosen = [sequences[row] for row in rows]
                found = throw(scaled(taken(logits, rows), chosen), chosen, [self._dice(seq) for seq in chosen])
                tokens.index_copy_(0, beside(logits, rows, np.int64), found)
        return tokens

    def _dice(self, seq: Sequence) -> float:
        if seq.generator is None:
            seq.generator = self.entropy() if seq.params.seed is None else seq.params.seed
        return draw(cast(int, seq.generator), seq.num_tokens)


def beside(logits: torch.Tensor, values: Iterable[Any], dtype: npt.DTypeLike) -> torch.Tensor:
    """`[n]`, on the device of the logits."""
    return onto(np.array(list(values), dtype), logits.device)


def taken(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows, copied only when they are not all."""
    return logits if len(rows) == len(logits) else logits[beside(logits, rows, np.int64)]


def reshapes(seq: Sequence) -> bool:
    params = seq.params
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(penalties) or seq.num_output_tokens < params.min_tokens


def truncates(params: SamplingParams, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1.0


def scaled(logits: torch.Tensor, sequences: Listing[Sequence]) -> torch.Tensor:
    """Logits over temperature, the best at 0. Subtracted first, so that a tiny temperature cannot overflow."""
    temperature = beside(logits, [max(seq.params.temperature, TINY) for seq in sequences], np.float32)
    return (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]


def throw_whole(logits: torch.Tensor, sequences: Listing[Sequence], dice: Listing[float]) -> torch.Tensor:
    return pick(logits.exp(), dice)


def throw_cut(logits: torch.Tensor, sequences: Listing[Sequence], dice: Listing[float]) -> torch.Tensor:
    weights, ids = truncated(logits, [seq.params for seq in sequences])
    return ids.gather(-1, pick(weights, dice)[:, None])[:, 0]


def truncated(logits: torch.Tensor, params: Listing[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates that top-k and then top-p leave, best first: their weights (zero where cut off) and token ids."""
    vocab, device = logits.shape[-1], logits.device
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    limit = beside(logits, top_k, np.int64)[:, None]
    top_p = beside(logits, [p.top_p for p in params], np.float64)[:, None]
    everything = logits.exp().sum(-1, keepdim=True).double() if vocab in top_k else logits.new_ones(len(params), 1)
    # Whether a few candidates are enough can be asked where the answer is at hand: a CUDA device would be waited for.
    few = NUCLEUS_CANDIDATES if device.type == "cpu" else vocab
    width = max(k if k < vocab else min(vocab, few) for k in top_k)
    while True:
        best, ids = logits.topk(width) if width < vocab else logits.sort(descending=True)
        weights = best.double().exp().masked_fill(torch.arange(width, device=device) >= limit, 0.0)
        reached = weights.cumsum(-1)
        # What a top-k row kept is its whole; another row's whole is the vocabulary.
        mass = top_p * torch.where(limit < vocab, reached[:, -1:], everything)
        if max(top_k) <= width or bool(((limit <= width) | (reached[:, -1:] >= mass)).all()):
            ahead = reached - weights
            return weights.masked_fill((ahead >= mass) & (ahead > 0), 0.0), ids
        width = vocab


def pick(weights: torch.Tensor, dice: Listing[float]) -> torch.Tensor:
    """Invert each row's cumulative distribution at its number in [0, 1). Weights need not add up to 1."""
    reached = weights.cumsum(-1)
    total = reached[:, -1:]
    target = beside(weights, dice, np.float64).to(weights.dtype)[:, None] * total
    # Rounding may lift the target to the total, which no cumulative weight exceeds.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, target, right=True)[:, 0]


def described(
    logits: torch.Tensor, tokens: Listing[int], sequences: Listing[Sequence]
) -> Iterator[tuple[int, Sampled]]:
    """The rows whose requests asked for log-probabilities, with them."""
    rows = [row for row, seq in enumerate(sequences) if seq.params.logprobs is not None]
    if not rows:
        return
    chosen = taken(logits, rows)
    whole = chosen.logsumexp(-1, keepdim=True)
    width = min(max(sequences[row].params.logprobs or 0 for row in rows), logits.shape[-1])
    best = chosen.topk(width)
    picked = beside(logits, [tokens[row] for row in rows], np.int64)[:, None]
    own = (chosen.gather(-1, picked) - whole)[:, 0].tolist()
    for n, (row, ids, values) in enumerate(
        zip(rows, best.indices.tolist(), (best.values - whole).tolist(), strict=True)
    ):
        wanted = sequences[row].params.logprobs or 0
        yield row, Sampled(tokens[row], own[n], tuple(zip(ids, values, strict=True))[:wanted])
