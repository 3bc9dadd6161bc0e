"""Which path a fleet serves a request by, and what is said when it cannot."""

from __future__ import annotations

from collections import Counter

import pytest

from proxy.core import Path, Role, State
from proxy.errors import BadRequest, NoInstance
from proxy.routing import paths, router

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE
READY, DOWN, JOINING = State.READY, State.DOWN, State.JOINING


def census(**states: list[State]) -> dict[Role, Counter[State]]:
    return {Role.named(label): Counter(found) for label, found in states.items()}


@pytest.mark.parametrize(
    ("items", "fleet", "path"),
    [
        (0, census(both=[READY]), Path.PD),
        (0, census(prefill=[READY], decode=[READY]), Path.P_D),
        (0, census(encode=[READY], prefill=[READY], decode=[READY]), Path.P_D),
        (0, census(encode=[DOWN], prefill=[READY], decode=[READY]), Path.P_D),
        (2, census(encode=[READY], prefill=[READY], decode=[READY]), Path.E_P_D),
        (2, census(encode=[READY], both=[READY]), Path.E_PD),
        (0, census(prefill=[DOWN], decode=[READY], both=[READY]), Path.PD),
        (1, census(encode=[READY], prefill=[DOWN, READY], decode=[READY], both=[READY]), Path.E_P_D),
    ],
)
def test_path_by_fleet(items: int, fleet: dict[Role, Counter[State]], path: Path) -> None:
    assert router.route(items, fleet).path is path


def test_the_reason_says_why() -> None:
    assert router.route(0, census(both=[READY])).reason == "text only, combined engines only"
    assert router.route(1, census(encode=[READY], prefill=[READY], decode=[READY])).reason == (
        "1 item, prefill and decode apart"
    )
    assert "no prefill and decode pair is ready" in router.route(0, census(prefill=[DOWN], both=[READY])).reason


def test_other_paths_that_could_serve_are_told_in_order() -> None:
    full = census(encode=[READY], prefill=[READY], decode=[READY], both=[READY])
    assert router.route(0, full).others == (Path.PD,)
    assert router.route(1, full).others == (Path.E_PD,)
    assert router.route(1, full, inline=paths.INLINE).others == (Path.E_PD, Path.EP_D, Path.EPD)
    assert router.route(1, census(encode=[READY], prefill=[DOWN], both=[READY])).others == ()


def test_a_fleet_without_encoders_can_never_serve_media() -> None:
    with pytest.raises(BadRequest, match="no encoder") as caught:
        router.route(1, census(both=[READY]), "messages[0].content[1]")
    assert (caught.value.status, caught.value.param) == (400, "messages[0].content[1]")


@pytest.mark.parametrize(
    ("items", "fleet", "stage", "says"),
    [
        (
            0,
            census(prefill=[DOWN, JOINING], decode=[READY]),
            "prefill",
            "no prefill engine is ready (1 DOWN, 1 JOINING)",
        ),
        (0, census(prefill=[READY], decode=[DOWN]), "decode", "no decode engine is ready (1 DOWN)"),
        (1, census(encode=[DOWN], prefill=[READY], decode=[READY]), "encode", "no encode engine is ready (1 DOWN)"),
        (0, census(both=[State.DRAINING]), "decode", "no combined engine is ready (1 DRAINING)"),
        (0, {}, "prefill", "no prefill engine is ready (none known)"),
    ],
)
def test_what_is_missing_is_named(items: int, fleet: dict[Role, Counter[State]], stage: str, says: str) -> None:
    with pytest.raises(NoInstance) as caught:
        router.route(items, fleet)
    assert (str(caught.value), caught.value.stage, caught.value.retryable) == (says, stage, True)


def test_servable_means_every_stage_that_the_fleet_has() -> None:
    assert router.servable(census(both=[READY]))
    assert router.servable(census(encode=[READY], prefill=[READY], decode=[READY, DOWN]))
    assert not router.servable(census(encode=[DOWN], prefill=[READY], decode=[READY]))
    assert not router.servable(census(prefill=[READY], decode=[DOWN]))


def test_media_go_inline_only_where_that_is_allowed_and_no_encoder_is_up() -> None:
    gone, up = census(encode=[DOWN], both=[READY]), census(encode=[READY], both=[READY])
    assert router.route(1, up, inline=(Path.EPD,)).path is Path.E_PD
    found = router.route(1, gone, inline=(Path.EPD,))
    assert (found.path, found.reason) == (Path.EPD, "1 item, encoded inline because no encoder is ready")
    with pytest.raises(NoInstance):
        router.route(1, gone)
    assert router.route(1, census(both=[READY]), inline=(Path.EPD,)).path is Path.EPD
    assert router.route(0, gone, inline=(Path.EPD,)).path is Path.PD


def test_engines_with_an_encoder_of_their_own_need_none_in_the_fleet() -> None:
    pair = census(prefill=[READY], decode=[READY])
    found = router.route(2, pair, inline=paths.INLINE)
    assert (found.path, found.reason) == (Path.EP_D, "2 items, encoded inline because no encoder is listed")
    with pytest.raises(BadRequest, match="no encoder"):
        router.route(2, pair, inline=(Path.EPD,))
    with pytest.raises(NoInstance, match=r"no prefill engine is ready \(1 DOWN\)"):
        router.route(2, census(prefill=[DOWN], decode=[READY]), inline=paths.INLINE)
