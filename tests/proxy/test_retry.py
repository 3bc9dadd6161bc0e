"""The table of failures: which row an error belongs to, and whom it sends away."""

from __future__ import annotations

import pytest

from proxy.core import BOTH, Item, Path, Role, Stage
from proxy.errors import (
    BadRequest,
    Broken,
    DeadlineExceeded,
    GaveUp,
    NoInstance,
    ProxyError,
    Refused,
    StageTimeout,
    Unreachable,
    within_200,
)
from proxy.retry import RULES, Blame, Cause, cause, culprit, fetching, rule


def refused(status: int, code: str = "", stage: str = "decode", retry_after: str | None = None) -> Refused:
    said = b'{"error":{"message":"no","code":"%s","stage":"%s"}}' % (code.encode(), stage.encode())
    return Refused(status, said, stage=Stage.DECODE, retry_after=retry_after)


ROWS = [
    (Unreachable("x"), Cause.CONNECT),
    (StageTimeout("x"), Cause.TIMEOUT),
    (Broken("x"), Cause.BROKEN),
    (GaveUp("x"), Cause.LOST),
    (refused(500), Cause.SERVER_ERROR),
    (refused(503), Cause.SERVER_ERROR),
    (refused(503, retry_after="2"), Cause.BUSY),
    (refused(503, "other_role"), Cause.BUSY),
    (refused(429), Cause.BUSY),
    (refused(429, retry_after="2"), Cause.BUSY),
    (refused(502, "embedding_gone", "encode"), Cause.LOST),
    (refused(502, "kv_gone", "prefill"), Cause.LOST),
    (refused(400), Cause.CLIENT),
    (refused(404), Cause.CLIENT),
    (refused(413), Cause.CLIENT),
    (within_200({"error": {"message": "boom"}}, stage=Stage.DECODE), Cause.SERVER_ERROR),
    (within_200({"error": {"message": "long", "code": 400}}, stage=Stage.DECODE), Cause.CLIENT),
    (NoInstance("x"), Cause.OURS),
    (BadRequest("x"), Cause.OURS),
    (DeadlineExceeded("x"), Cause.OURS),
]


@pytest.mark.parametrize(("error", "row"), ROWS, ids=lambda value: str(getattr(value, "code", value)))
def test_every_failure_has_its_row(error: ProxyError, row: Cause) -> None:
    assert cause(error) is row


@pytest.mark.parametrize(
    ("url", "status", "row"),
    [(True, 500, Cause.MEDIA), (True, 400, Cause.CLIENT), (True, 429, Cause.BUSY), (False, 500, Cause.SERVER_ERROR)],
)
def test_who_had_to_fetch_media_is_not_blamed_for_their_url(url: bool, status: int, row: Cause) -> None:
    item = Item(0, 0, 0, "image", {}, None if url else "hash", "http://media", 1)
    with pytest.raises(Refused) as caught, fetching([item]):
        raise refused(status)
    assert cause(caught.value) is row


def test_the_table_is_complete_and_blames_nobody_for_what_is_not_retried() -> None:
    assert set(RULES) == set(Cause)
    for one in RULES.values():
        assert one.elsewhere or one.blame is Blame.NONE
        assert one.elsewhere or not one.again
    assert {cause for cause, one in RULES.items() if not one.elsewhere} == {Cause.CLIENT, Cause.OURS}


def test_retry_after_is_seconds_and_nothing_else() -> None:
    assert refused(429, retry_after=" 7 ").retry_after == 7.0
    for text in ("Wed, 21 Oct 2026 07:28:00 GMT", "-1", "1.5", "²", "", None):
        assert refused(429, retry_after=text).retry_after is None


@pytest.mark.parametrize(
    ("stage", "path", "role"),
    [
        (Stage.ENCODE, Path.E_PD, Role.ENCODE),
        (Stage.PREFILL, Path.P_D, Role.PREFILL),
        (Stage.DECODE, Path.P_D, Role.DECODE),
        (Stage.PREFILL, Path.PD, BOTH),
        (Stage.DECODE, Path.EPD, BOTH),
        (Stage.PROXY, Path.P_D, Role.DECODE),
    ],
)
def test_the_stage_that_failed_is_replaced_not_the_one_that_told(stage: Stage, path: Path, role: Role) -> None:
    assert culprit(Broken("x", stage=stage), path) == role
    assert rule(Broken("x", stage=stage)) is RULES[Cause.BROKEN]
