"""What the scheduler's side reads of vLLM's requests, and what it tells the workers; nothing is transferred."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engines.ec_connector.arrivals import Wanted
from engines.ec_connector.options import Options
from engines.ec_connector.scheduler_side import SchedulerSide
from engines.ec_connector.shelf import Shelf
from tests.fakes.vllm_ec import Feature, Position, Request, Resolver, collect

CAT, DOG = "ca" * 32, "d0" * 32
HANDLE = {"dtype": "float32", "where": {"key": CAT}}


class Desk:
    """A courier that only writes down what it is told; `here` has arrived."""

    def __init__(self, folder: Path) -> None:
        self.store = Shelf(folder)
        self.ordered: list[Wanted] = []
        self.here: list[str] = []
        self.readable: dict[str, Mapping[str, Any]] = {}
        self.closed = False

    def order(self, wanted: Wanted) -> None:
        self.ordered.append(wanted)

    def cancel(self, key: str) -> None: ...

    def discard(self, key: str) -> None: ...

    def report(self, arrivals: Any) -> None:
        while self.here:
            arrivals.arrived(self.here.pop(), 64)

    def published(self, key: str) -> bool:
        return key in self.readable

    def publish(self, key: str) -> Mapping[str, Any]:
        return self.readable.get(key, {})

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "store")


@pytest.fixture
def side(desk: Desk, tmp_path: Path) -> Iterator[SchedulerSide]:
    resolver = Resolver(None)
    options = Options.read({"shared_storage_path": str(tmp_path)})
    made = SchedulerSide(
        options,
        desk,  # type: ignore[arg-type]
        Shelf.make(tmp_path),
        describe=lambda features: collect(features, resolver),
        fields=resolver.fields_for,
    )
    yield made
    folder = Path(made.shelf)
    made.close()
    assert desk.closed
    assert not folder.exists()


def item(key: str, offset: int = 0, **changes: Any) -> Feature:
    return Feature(key, Position(offset, 4), **changes)


def test_an_order_says_how_many_embeddings_there_are_and_what_the_request_knows(
    side: SchedulerSide, desk: Desk
) -> None:
    request = Request("r", [item(CAT), item(DOG, offset=4)], {CAT: HANDLE, DOG: "nonsense", "ec_items": []})
    assert not side.available(request, 0)
    assert desk.ordered == [Wanted(CAT, 4, HANDLE), Wanted(DOG, 4)]


@pytest.mark.parametrize(
    ("data", "encodable"),
    [(None, False), ({"image_grid_thw": 1}, False), ({"image_grid_thw": 1, "pixel_values": 2}, True)],
)
def test_an_item_can_be_encoded_where_its_data_is_more_than_its_description(
    side: SchedulerSide, data: dict[str, Any] | None, encodable: bool
) -> None:
    assert side.available(Request("r", [item(CAT, data=data)]), 0) is encodable


def test_only_what_is_not_computed_yet_is_wanted(side: SchedulerSide, desk: Desk) -> None:
    request = Request("r", [item(CAT), item(DOG, offset=4)])
    side.available(request, 4)
    assert [wanted.key for wanted in desk.ordered] == [DOG]
    assert side.available(Request("s", [item(CAT)]), 4)


def test_workers_load_in_a_step_what_is_here_and_what_vllm_has_room_for(side: SchedulerSide, desk: Desk) -> None:
    request = Request("r", [item(CAT), item(CAT, offset=4)])
    assert not side.available(request, 0)
    side.will_load(CAT)
    assert side.take_loads() == [], "it is not here yet"
    desk.here.append(CAT)
    assert side.available(request, 0)
    assert side.has(CAT) and not side.has(DOG)
    side.will_load(CAT)
    side.will_load(CAT)
    side.will_load(DOG)
    assert side.take_loads() == [CAT]
    assert side.take_loads() == []
    side.finished(request)
    assert repr(side) == "<SchedulerSide <Arrivals 0 ordered 1 here 0 failed, 0 requests>>"


def test_workers_save_what_nobody_can_fetch_any_more(side: SchedulerSide, desk: Desk) -> None:
    desk.readable[DOG] = HANDLE
    side.ask(Request("e", [item(CAT), item(DOG), item("../evil")]))
    assert side.take_unpublished() == [CAT]
    assert side.take_unpublished() == []


def test_an_answer_describes_what_is_published_and_only_names_the_rest(side: SchedulerSide, desk: Desk) -> None:
    desk.readable[CAT] = HANDLE
    assert side.published(Request("e", [item(CAT), item(DOG), item(CAT)])) == {
        CAT: {"item_indices": [0, 2], "metadata": {"image_grid_thw": [1, 4, 4]}, "modality": "image", **HANDLE},
        DOG: {"item_indices": [1], "metadata": {}, "modality": "image"},
    }
    assert side.published(Request("t", [])) is None
