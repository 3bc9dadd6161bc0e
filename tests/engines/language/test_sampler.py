"""Sampling against distributions computed by hand, and each sequence's independence of its batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.language import sampler as module
from engines.language.sampler import Sampled, Sampler, draw, pick, truncated
from engines.language.sequence import SamplingParams, Sequence

VOCAB = 50
EOS = (3, 4)


def sequence(prompt=(1, 2), output=(), **params) -> Sequence:
    ids = [*prompt, *output]
    return Sequence("s", ids, len(prompt), SamplingParams(**{"max_tokens": 9, "temperature": 0.0, **params}))


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def sample(rows: torch.Tensor, *sequences: Sequence) -> list[Sampled]:
    return Sampler(EOS).sample(rows.clone(), sequences)


def shares(row: torch.Tensor, times: int = 4000, **params) -> torch.Tensor:
    """How often each token is drawn, over as many seeds."""
    drawn = sample(row.expand(times, -1), *(sequence(temperature=params.get("temperature", 1.0), seed=n, **{
        key: value for key, value in params.items() if key != "temperature"
    }) for n in range(times)))  # fmt: skip
    return torch.bincount(torch.tensor([one.token_id for one in drawn]), minlength=VOCAB) / times


class TestGreedy:
    def test_it_takes_the_best(self):
        rows = logits(4)
        assert sample(rows, *[sequence()] * 4) == [Sampled(int(token)) for token in rows.argmax(-1)]

    def test_top_k_of_one_is_greedy_too(self):
        row = logits()
        assert sample(row, sequence(temperature=5.0, top_k=1))[0].token_id == row.argmax()

    def test_half_precision_is_sampled_in_full(self):
        row = logits().bfloat16()
        assert sample(row, sequence(logprobs=1))[0].logprob == pytest.approx(float(row.float().log_softmax(-1).max()))


class TestDistribution:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
    def test_temperature_flattens_it(self, temperature):
        row = logits()
        expected = (row[0] / temperature).softmax(-1)
        torch.testing.assert_close(shares(row, temperature=temperature), expected, atol=0.03, rtol=0)

    def test_a_tiny_temperature_does_not_overflow(self):
        row = logits() * 1e4
        assert sample(row, sequence(temperature=1e-30, seed=1))[0].token_id == row.argmax()

    def test_top_k_keeps_the_best_k(self):
        row = logits()
        best = row[0].topk(3).indices
        expected = torch.zeros(VOCAB)
        expected[best] = row[0][best].softmax(-1)
        torch.testing.assert_close(shares(row, top_k=3), expected, atol=0.03, rtol=0)

    def test_top_p_keeps_the_fewest_that_reach_it(self):
        row = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        row = torch.nn.functional.pad(row, (0, VOCAB - 4), value=float("-inf"))
        expected = torch.zeros(VOCAB)
        expected[:2] = torch.tensor([2 / 3, 1 / 3])
        torch.testing.assert_close(shares(row, top_p=0.6), expected, atol=0.03, rtol=0)

    def test_top_p_cuts_what_top_k_left(self):
        row = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
        row = torch.nn.functional.pad(row, (0, VOCAB - 4), value=float("-inf"))
        # Of the two that top-k leaves, the first has 4/7 of the mass: it alone reaches 0.5.
        assert shares(row, times=200, top_k=2, top_p=0.5)[0] == 1.0

    def test_a_top_p_of_nothing_keeps_the_best(self):
        row = logits()
        assert sample(row, sequence(temperature=1.0, top_p=1e-9))[0].token_id == row.argmax()


@given(st.floats(0.05, 0.99), st.integers(0, VOCAB), st.integers(0, 5), st.integers(1, VOCAB))
def test_truncation_is_exact_however_few_candidates_are_tried(top_p, top_k, seed, tried):
    row = logits(1, seed) / 3
    probs = row.double().softmax(-1)
    params = SamplingParams(max_tokens=1, top_p=top_p, top_k=top_k)
    before, module.NUCLEUS_CANDIDATES = module.NUCLEUS_CANDIDATES, tried
    try:
        kept, ids = truncated(row - row.max(), [params])
    finally:
        module.NUCLEUS_CANDIDATES = before
    order = probs[0].sort(descending=True)
    limit = top_k if 0 < top_k < VOCAB else VOCAB
    values = order.values[:limit] / order.values[:limit].sum()
    count = int((values.cumsum(-1) - values < top_p - 1e-12).sum())
    assert ids[0][kept[0] > 0].tolist() == order.indices[: max(count, 1)].tolist()


class TestDice:
    def test_a_seed_gives_the_same_tokens_in_any_batch(self):
        rows = logits(3)
        alone = [sample(rows[i : i + 1], sequence(temperature=1.0, seed=i))[0] for i in range(3)]
        mixed = [
            sequence(temperature=1.0, seed=0),
            sequence(temperature=1.0, seed=1),
            sequence(temperature=1.0, seed=2),
        ]
        assert sample(rows, *mixed) == alone
        neighbours = [sequence(temperature=1.0, top_p=0.9), mixed[1], sequence()]
        assert sample(rows, *neighbours)[1] == alone[1]

    def test_each_position_throws_anew(self):
        assert len({draw(1, position) for position in range(100)}) == 100

    def test_parallel_samples_of_a_seed_differ_and_repeat(self):
        rows = torch.zeros(8, VOCAB)
        parent = sequence(temperature=1.0, seed=7)

        def texts():
            return [one.token_id for one in sample(rows, parent, *(parent.fork(n) for n in range(1, 8)))]

        assert len(set(texts())) > 3
        assert texts() == texts()

    def test_without_a_seed_two_requests_differ(self):
        rows = torch.zeros(16, VOCAB)
        drawn = [one.token_id for one in sample(rows, *(sequence(temperature=1.0) for _ in range(16)))]
        assert len(set(drawn)) > 3

    @pytest.mark.parametrize("seed", [-1, 0, 2**64 + 5, -(2**70)])
    def test_any_whole_number_is_a_seed(self, seed):
        assert 0.0 <= draw(seed, 5) < 1.0

    @given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True))
    def test_a_token_without_probability_is_never_picked(self, weights, dice):
        probs = torch.tensor([[*weights, 1.0, 0.0]], dtype=torch.float64)
        assert probs[0, pick(probs, [dice])[0]] > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_largest_number_picks_the_last_token_with_weight(self, dtype):
        weights = torch.tensor([[0.1] * 10 + [0.0] * 3], dtype=dtype)
        assert pick(weights, [1 - 2**-53]).tolist() == [9]


class TestShaping:
    def test_the_end_is_forbidden_until_min_tokens(self):
        row = logits()
        row[0, [3, 9]] = torch.tensor([50.0, 40.0])
        assert sample(row, sequence(output=[5], min_tokens=2, stop_token_ids=(9,)))[0].token_id not in (3, 9)
        assert sample(row, sequence(output=[5, 6], min_tokens=2, stop_token_ids=(9,)))[0].token_id == 3

    def test_presence_and_frequency_count_the_output_alone(self):
        row = torch.zeros(1, VOCAB)
        row[0, [1, 5, 6]] = torch.tensor([1.0, 2.0, 1.9])
        assert sample(row, sequence(output=[5, 5], presence_penalty=0.05))[0].token_id == 5
        assert sample(row, sequence(output=[5, 5], frequency_penalty=0.06))[0].token_id == 6
        assert sample(row, sequence(prompt=[5, 5, 5], output=[1], presence_penalty=2.0))[0].token_id == 5

    def test_repetition_counts_the_prompt_too_and_works_below_zero(self):
        row = torch.full((1, VOCAB), -10.0)
        row[0, [5, 6]] = torch.tensor([2.0, 1.5])
        assert sample(row, sequence(prompt=[5], repetition_penalty=2.0))[0].token_id == 6
        row[0, [5, 6]] = torch.tensor([-1.0, -1.5])
        assert sample(row, sequence(prompt=[5], repetition_penalty=2.0))[0].token_id == 6

    def test_a_neighbour_is_not_penalised(self):
        rows = logits(2)
        rows[:, 5] = 30.0
        found = sample(rows, sequence(output=[5], presence_penalty=100.0), sequence(output=[5]))
        assert found[0].token_id != 5
        assert found[1].token_id == 5


class TestLogprobs:
    def test_they_are_the_models_own(self):
        row = logits()
        expected = row[0].log_softmax(-1)
        one = sample(row, sequence(temperature=0.7, seed=3, top_k=5, min_tokens=9, presence_penalty=1.0, logprobs=4))[0]
        assert one.logprob == pytest.approx(float(expected[one.token_id]))
        best = expected.topk(4)
        assert [token for token, _ in one.top_logprobs] == best.indices.tolist()
        assert [value for _, value in one.top_logprobs] == pytest.approx(best.values.tolist())

    def test_none_are_computed_unless_asked_for(self):
        assert sample(logits(), sequence())[0] == Sampled(int(logits().argmax()))

    def test_no_alternatives_still_gives_the_chosen_one(self):
        found = sample(logits(2), sequence(logprobs=0), sequence())
        assert found[0].top_logprobs == ()
        assert not math.isnan(found[0].logprob)
        assert found[1].logprob is None


def test_everything_is_chosen_before_anything_is_read():
    """Of the meta device nothing can be read, and what it holds cannot be mixed with what is elsewhere."""
    rows = [
        sequence(),
        sequence(temperature=0.7, seed=1),
        sequence(temperature=0.7, top_p=0.9, repetition_penalty=1.2, min_tokens=3),
        sequence(temperature=1.0, top_k=5, output=(7, 7), presence_penalty=0.5),
    ]
    chosen = Sampler(EOS).choose(torch.empty(4, VOCAB, device="meta"), rows)
    assert (chosen.device.type, chosen.shape, chosen.dtype) == ("meta", (4,), torch.int64)
    with pytest.raises(RuntimeError):
        chosen.tolist()
    only_some = Sampler(EOS).choose(torch.empty(1, VOCAB, device="meta"), [sequence(temperature=1.0, top_k=5)])
    assert only_some.device.type == "meta"
