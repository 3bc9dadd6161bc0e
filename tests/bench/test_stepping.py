from bench import stepping
from bench.stepping import Ours, Work
from engines.language.runner import Runner
from tests.support.drive import language_model, new_cache


def test_turns_are_taken_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def work(name: str, seconds: list[float]) -> Work:
        def once() -> float:
            order.append(name)
            return seconds.pop(0)

        return once

    medians = stepping.interleave({"a": work("a", [9, 1, 2, 3]), "b": work("b", [9, 4, 5, 6])}, repeats=3)
    assert medians == {"a": 2, "b": 5}
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_steps_go_on_where_the_last_one_ended() -> None:
    model = language_model("qwen2_vl")
    prompt = [5, 6, 7] * 6
    ours = Ours(Runner(model, new_cache(model)))
    (alone,) = ours.sequences(1, prompt, room=4)
    ours.steps([alone], 3)
    assert (alone.num_output_tokens, alone.remaining) == (3, 1)
    beside = ours.sequences(2, prompt, room=4)
    ours.steps(beside, 3)
    assert [seq.output_ids for seq in beside] == [alone.output_ids] * 2
    assert not set(beside[0].block_table) & set(beside[1].block_table)


def test_decode_is_timed_without_its_prefill() -> None:
    model = language_model("qwen2_vl")
    ours = Ours(Runner(model, new_cache(model)))
    assert stepping.prefill(ours, [1] * 8)() > 0
    assert stepping.decode(ours, 2, [1] * 8, 2)() > 0
