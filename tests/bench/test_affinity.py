import random
from collections import Counter

import orjson
import pytest

from bench import affinity
from bench.affinity import Answers, Turn
from bench.report import Report
from bench.scripted.load import NotServed
from proxy.balancer import POLICIES
from tests.support.checkpoints import checkpoint

EXPOSITION = """\
# TYPE triptych_encode_cache_total counter
triptych_encode_cache_total{result="hit"} 5.0
triptych_encode_cache_total{result="joined"} 2.0
triptych_encode_cache_total{result="miss"} 4.0
# TYPE triptych_encode_cache_created gauge
triptych_encode_cache_created{result="hit"} 1.79e+09
# TYPE triptych_encode_item_seconds histogram
triptych_encode_item_seconds_bucket{le="+Inf"} 11.0
triptych_encode_item_seconds_count 11.0
triptych_encode_item_seconds_sum 2.5
# TYPE triptych_encode_forward_seconds histogram
triptych_encode_forward_seconds_bucket{le="+Inf"} 4.0
triptych_encode_forward_seconds_count 4.0
triptych_encode_forward_seconds_sum 1.5
"""


def told(chosen: Turn, other: Turn, answers: Answers) -> Report:
    report = Report("affinity")
    affinity.tell(report, {"round_robin": [other], "affinity": [chosen]}, answers)
    return report


def test_the_policies_named_exist() -> None:
    assert {affinity.CHOSEN, *affinity.OTHERS.split(",")} <= POLICIES.keys()


def test_questions_are_the_same_for_the_same_dice_and_follow_the_rank() -> None:
    drawn = affinity.draw(4000, random.Random(7))
    assert drawn == affinity.draw(4000, random.Random(7))
    often = Counter(drawn)
    assert set(often) == set(range(affinity.PICTURES))
    assert often[0] / often[15] == pytest.approx(16**affinity.SKEW, rel=0.4)


def test_pictures_fit_into_all_caches_and_not_into_one() -> None:
    assert affinity.HELD < affinity.PICTURES < affinity.ENCODERS * affinity.HELD
    weights = [1 / rank**affinity.SKEW for rank in range(1, affinity.PICTURES + 1)]
    most = sum(weights[: affinity.HELD]) / sum(weights)
    assert 0.85 < affinity.HITS * most < 0.95


def test_what_encoders_counted_is_told_as_the_difference_over_a_turn() -> None:
    turn, after = Turn(), dict(affinity.samples(EXPOSITION))
    before = {"hit": 1.0, "miss": 1.0, "triptych_encode_item_seconds_sum": 0.5, "triptych_encode_item_seconds_count": 1}
    affinity.tell_encoders(turn, before, after)
    assert (turn.held, turn.items) == (6, 9)
    assert turn.encode == pytest.approx(0.2)
    assert turn.tower == 1.5


def test_rows_are_medians_of_turns_and_bars_compare_policies() -> None:
    report = told(Turn([0.1, 0.3], 10, 9, 0.02, 0.5), Turn([0.2, 0.6], 10, 6, 0.08, 2.0), Answers())
    assert report.rows[1] == {
        "policy": "affinity",
        "questions": 2,
        "hit_percent": 90.0,
        "encode_ms": 20.0,
        "tower_s": 0.5,
        "ttft_ms": 200.0,
        "ttft_p99_ms": 298.0,
    }
    assert [(bar.value, bar.holds) for bar in report.bars] == [(1.5, True), (0.5, True), (0, True)]


def test_every_bar_can_fail() -> None:
    answers = Answers()
    for text in ("a cat", "a cat", "a dog"):
        answers.compare(0, text)
    answers.compare(1, "a dog")
    assert answers.differing == 1
    report = told(Turn([0.4, 0.4], 10, 6), Turn([0.3, 0.3], 10, 5), answers)
    assert [bar.holds for bar in report.bars] == [False, False, False]


def test_an_event_without_a_choice_is_no_answer() -> None:
    assert affinity.said({"choices": [{"delta": {"content": "x"}}]}) == "x"
    assert affinity.said({"choices": [{"delta": {"role": "assistant"}}]}) == ""
    with pytest.raises(NotServed, match="overloaded"):
        affinity.said({"error": {"message": "overloaded"}})


def test_requests_show_different_pictures() -> None:
    requests = [orjson.loads(request) for request in affinity.catalogue()]
    urls = [request["messages"][0]["content"][0]["image_url"]["url"] for request in requests]
    assert len(set(urls)) == affinity.PICTURES


@pytest.mark.timeout(300)
async def test_real_encoders_are_asked_again_for_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENCODERS": 2, "PICTURES": 4, "CLIENTS": 1, "SIZES": ((96, 64),)}.items():
        monkeypatch.setattr(affinity, name, value)
    report = Report("affinity")
    await affinity.measure(report, checkpoint(affinity.FAMILY), ["round_robin"], questions=6, repeats=1)
    rows = {row["policy"]: row for row in report.rows}
    assert rows["affinity"]["hit_percent"] == 100.0
    assert rows["affinity"]["tower_s"] == 0.0
    assert rows["round_robin"]["questions"] == 6
    assert all(row["ttft_p99_ms"] >= row["ttft_ms"] > 0 for row in rows.values())
    assert [bar.value for bar in report.bars if bar.name == "answers that differ"] == [0]
