"""The thread that fetches and publishes, over real transfers and real folders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engines.ec_connector.arrivals import Arrivals, Wanted
from engines.ec_connector.courier import Courier
from engines.ec_connector.options import Options
from engines.ec_connector.shelf import Shelf
from engines.transfer.base import TransferError

CAT, DOG = "ca" * 32, "d0" * 32
WIDTH = 16


def embedding(tokens: int = 4) -> torch.Tensor:
    return torch.arange(tokens * WIDTH, dtype=torch.float32).view(tokens, WIDTH)


def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def couriers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "triptych-courier"]


@contextmanager
def courier(
    tmp_path: Path, name: str, *, receives: bool = False, sends: bool = False, **extra: object
) -> Iterator[Courier]:
    if extra.get("transfer", "storage") == "storage":
        extra["shared_storage_path"] = str(tmp_path / "shared")
    folder = tmp_path / name
    folder.mkdir()
    shelf = Shelf.make(folder)
    made = Courier(Options.read({"wait_timeout": 20, **extra}), shelf, WIDTH, receives=receives, sends=sends)
    before = couriers()
    made.start()
    try:
        made.shelf = shelf  # type: ignore[attr-defined]
        yield made
    finally:
        made.close()
        made.close()
    assert couriers() == before


class Consumer:
    """One request's view of a courier's deliveries."""

    def __init__(self, courier: Courier) -> None:
        self.courier, self.arrivals = courier, Arrivals(courier, 1 << 20)

    def ready(self, wanted: Wanted) -> bool:
        self.courier.report(self.arrivals)
        return self.arrivals.ready("r", [wanted])

    def lost(self, wanted: Wanted) -> bool:
        self.ready(wanted)
        return self.arrivals.take_lost() == {"r"}


@pytest.mark.parametrize("transfer", ["zmq", "shm"])
def test_an_embedding_travels_from_one_engines_worker_to_anothers(tmp_path: Path, transfer: str) -> None:
    with (
        courier(tmp_path, "e", sends=True, transfer=transfer) as sender,
        courier(tmp_path, "p", receives=True, transfer=transfer) as receiver,
    ):
        assert sender.publish(CAT) == {}
        sender.store.put(CAT, embedding())
        entry = sender.publish(CAT)
        assert sender.published(CAT) and not sender.published(DOG)
        consumer, wanted = Consumer(receiver), Wanted(CAT, 4, entry)
        soon(lambda: consumer.ready(wanted))
        assert receiver.shelf.get(CAT).equal(embedding())  # type: ignore[attr-defined]
        assert receiver.publish(CAT) == {} and not receiver.published(CAT), "it only receives"


def test_a_file_that_comes_later_is_waited_for_and_survives_its_removal(tmp_path: Path) -> None:
    with courier(tmp_path, "p", receives=True) as receiver:
        consumer, wanted = Consumer(receiver), Wanted(CAT, 4)
        assert not consumer.ready(wanted)
        shared = Shelf(tmp_path / "shared")
        shared.put(CAT, embedding())
        soon(lambda: consumer.ready(wanted))
        shared.discard(CAT)
        assert receiver.shelf.get(CAT).equal(embedding())  # type: ignore[attr-defined]
        receiver.discard(CAT)
        soon(lambda: not receiver.shelf.path(CAT).exists())  # type: ignore[attr-defined]


def test_a_file_that_never_comes_and_one_that_does_not_fit_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with courier(tmp_path, "p", receives=True, wait_timeout=0.2) as receiver:
        consumer, never = Consumer(receiver), Wanted(CAT, 4)
        soon(lambda: consumer.lost(never))
        consumer.arrivals.finished("r")
        Shelf(tmp_path / "shared").put(DOG, embedding(tokens=5))
        soon(lambda: consumer.lost(Wanted(DOG, 4)))
        consumer.arrivals.finished("r")
        soon(lambda: consumer.lost(Wanted("../" * 10, 4)))
    assert [record.message for record in caplog.records] == [
        f"no embedding {CAT}: nothing came within 0.2 s",
        f"no embedding {DOG}: the embedding of {DOG} has shape [5, 16], this model needs [4, 16]",
        "no embedding ../../../../../../../../../../: '../../../../../../../../../../' is no mm_hash: embeddings are"
        " named by 64 lowercase hex digits",
    ]


def test_who_can_encode_takes_a_file_that_is_there_and_waits_for_none(tmp_path: Path) -> None:
    with courier(tmp_path, "p", receives=True, wait_timeout=3600) as receiver:
        consumer, promised = Consumer(receiver), Wanted(CAT, 4, {"metadata": {}}, encodable=True)
        soon(lambda: consumer.ready(promised))
        assert CAT not in consumer.arrivals
        consumer.arrivals.finished("r")
        Shelf(tmp_path / "shared").put(CAT, embedding())
        soon(lambda: consumer.ready(promised))
        assert CAT in consumer.arrivals


def test_a_handle_that_leads_nowhere_is_lost_at_once(tmp_path: Path) -> None:
    with courier(tmp_path, "p", receives=True, transfer="zmq") as receiver:
        consumer = Consumer(receiver)
        soon(lambda: consumer.lost(Wanted(CAT, 4)))
        consumer.arrivals.finished("r")
        entry = {"dtype": "float32", "shape": [4, WIDTH], "where": {"transport": "zmq"}}
        soon(lambda: consumer.lost(Wanted(CAT, 4, entry)))


def test_what_is_cancelled_reports_nothing_and_can_be_ordered_again(tmp_path: Path) -> None:
    with courier(tmp_path, "p", receives=True) as receiver:
        consumer, wanted = Consumer(receiver), Wanted(CAT, 4)
        assert not consumer.ready(wanted)
        consumer.arrivals.finished("r")
        assert not consumer.ready(wanted)
        Shelf(tmp_path / "shared").put(CAT, embedding())
        soon(lambda: consumer.ready(wanted))


def test_what_cannot_be_published_is_logged_and_has_no_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with courier(tmp_path, "e", sends=True, transfer="zmq", cache_bytes=64) as sender:
        sender.store.put(CAT, embedding())
        assert sender.publish(CAT) == {}
    assert "no room for the embedding" in caplog.text


def test_a_transfer_that_cannot_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "shared").touch()
    with pytest.raises(TransferError, match="cannot use the storage folder"), courier(tmp_path, "p", receives=True):
        raise AssertionError
