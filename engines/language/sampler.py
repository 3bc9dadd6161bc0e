"""Chooses the next token of each sequence from its logits. It keeps no state: a sequence's dice are its seed and how
long it is.

Order, as in vLLM: forbid the end while `min_tokens` is not reached, penalties, temperature, top-k, top-p, one draw.
Log-probabilities are those of the model's own distribution, before any of this.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from hashlib import blake2b
from typing import cast

import torch

from engines.language.sequence import SamplingParams, Sequence

# A nucleus (top-p without top-k) is looked for among this many candidates before the whole vocabulary is sorted for it.
NUCLEUS_CANDIDATES = 1024
SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token. `logprob` and `top_logprobs` (id, log-probability; best first) only when the request asked for
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
    """`eos_token_ids` are what `min_tokens` forbids beside a request's own stop ids; `entropy` seeds requests that
    gave no seed.
    """

    def __init__(self, eos_token_ids: Iterable[int], entropy: Callable[[], int] = lambda: secrets.randbits(64)) -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self.entropy = entropy

    def sample(self, logits: torch.Tensor, sequences: Listing[Sequence]) -> list[Sampled]:
        """One token per row of `logits` `[n, vocab]`, which may be overwritten. Each row depends on its own sequence
        alone.
        """
        if not sequences:
            return []
        logprobs = self._logprobs(logits, sequences)
        logits = logits.float()
        for row, seq in enumerate(sequences):
            self._shape(logits[row], seq)
        tokens = cast("list[int]", logits.argmax(-1).tolist())
        rows = [row for row, seq in enumerate(sequences) if seq.params.temperature > 0]
        if rows:
            for row, token in zip(rows, self._throw(logits[rows], [sequences[row] for row in rows]), strict=True):
                tokens[row] = token
        if not logprobs:
            return [Sampled(token) for token in tokens]
        return [
            described(token, logprobs[row], sequences[row].params) if row in logprobs else Sampled(token)
            for row, token in enumerate(tokens)
        ]

    @staticmethod
    def _logprobs(logits: torch.Tensor, sequences: Listing[Sequence]) -> dict[int, torch.Tensor]:
        rows = [row for row, seq in enumerate(sequences) if seq.params.logprobs is not None]
        return dict(zip(rows, logits[rows].float().log_softmax(-1), strict=True)) if rows else {}

    def _shape(self, logits: torch.Tensor, seq: Sequence) -> None:
        """Change one row in place by what its request forbids and penalises."""
        params = seq.params
        if seq.num_output_tokens < params.min_tokens:
            logits[[*self.eos_token_ids, *params.stop_token_ids]] = float("-inf")
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(seq.token_ids)), device=logits.device)
            held = logits[seen]
            logits[seen] = torch.where(held > 0, held / params.repetition_penalty, held * params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and seq.num_output_tokens:
            counts = Counter(seq.output_ids)
            used, times = (torch.tensor(list(part), device=logits.device) for part in (counts, counts.values()))
            logits[used] -= params.presence_penalty + params.frequency_penalty * times

    def _throw(self, logits: torch.Tensor, sequences: Listing[Sequence]) -> list[int]:
        """Sample rows with a temperature: those that truncate their distribution apart from those that do not."""
        dice = [self._dice(seq) for seq in sequences]
        temperature = torch.tensor(
            [seq.params.temperature for seq in sequences], device=logits.device, dtype=torch.float64
        )
        # The maximum goes first, so that a tiny temperature cannot overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)).double() / temperature[:, None]
        probs = scaled.softmax(-1)
        tokens = [0] * len(sequences)
        cut = [row for row, seq in enumerate(sequences) if truncates(seq.params, logits.shape[-1])]
        whole = [row for row in range(len(sequences)) if row not in set(cut)]
        if whole:
            choice = pick(probs[whole], [dice[row] for row in whole])
            for row, token in zip(whole, choice.tolist(), strict=True):
                tokens[row] = token
        if cut:
            kept, ids = truncated(probs[cut], [sequences[row].params for row in cut])
            choice = ids.gather(-1, pick(kept, [dice[row] for row in cut])[:, None])[:, 0]
            for row, token in zip(cut, choice.tolist(), strict=True):
                tokens[row] = token
        return tokens

    def _dice(self, seq: Sequence) -> float:
        if seq.generator is None:
            seq.generator = self.entropy() if seq.params.seed is None else seq.params.seed
        return draw(cast(int, seq.generator), seq.num_tokens)


def truncates(params: SamplingParams, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1.0


def truncated(probs: torch.Tensor, params: Listing[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates that top-k and then top-p leave, best first: their probabilities (zero where cut off) and their
    token ids.
    """
    vocab = probs.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    width = max(k if k < vocab else min(vocab, NUCLEUS_CANDIDATES) for k in top_k)
    limit = torch.tensor(top_k, device=probs.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=probs.device, dtype=probs.dtype)[:, None]
    while True:
        kept, ids = probs.topk(width, dim=-1)
        kept = kept.masked_fill(torch.arange(width, device=probs.device) >= limit, 0.0)
        # Of a row that top-k limits, what is left is the whole; of another, the whole vocabulary is.
        whole = torch.where(limit < vocab, kept.sum(-1, keepdim=True), probs.sum(-1, keepdim=True))
        reached = kept.cumsum(-1)
        enough = (limit <= width) | (reached[:, -1:] >= top_p * whole)
        if width == vocab or bool(enough.all()):
            before = reached - kept  # the mass ahead of each candidate: the first always stays
            return kept.masked_fill((before >= top_p * whole) & (before > 0), 0.0), ids
        width = vocab


def pick(probs: torch.Tensor, dice: Listing[float]) -> torch.Tensor:
    """Invert the cumulative distribution of each row (unnormalised) at its number in [0, 1)."""
    reached = probs.cumsum(-1)
    target = torch.tensor(dice, device=probs.device, dtype=probs.dtype)[:, None] * reached[:, -1:]
    index = torch.searchsorted(reached, target, right=True)[:, 0]
    return torch.minimum(index, (probs > 0).cumsum(-1).argmax(-1))


def described(token: int, logprobs: torch.Tensor, params: SamplingParams) -> Sampled:
    best = logprobs.topk(min(params.logprobs or 0, logprobs.shape[-1]))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Sampled(token, float(logprobs[token]), top)
