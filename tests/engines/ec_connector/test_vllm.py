"""The connector as vLLM drives it, step by step: one engine that encodes, one that prefills. vLLM is scripted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.vllm_ec import Feature, Position, Request, Role, config, installed

CAT, DOG = "ca" * 32, "d0" * 32
TOKENS, WIDTH = 4, 16
PIXELS = {"image_grid_thw": [1, 4, 4], "pixel_values": torch.zeros(1)}


def embedding(seed: int = 1) -> torch.Tensor:
    return torch.arange(TOKENS * WIDTH, dtype=torch.float32).view(TOKENS, WIDTH) * seed


def feature(key: str, offset: int = 3, data: dict[str, Any] | None = None) -> Feature:
    found = Feature(key, Position(offset, TOKENS))
    found.data = data if data is not None else found.data
    return found


def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Engine:
    """vLLM's scheduler and worker around a pair of connectors, as far as encoder outputs go."""

    def __init__(self, module: Any, tmp_path: Path, **options: Any) -> None:
        settings = config(shelf_path=str(tmp_path), **options)
        self.scheduler = module.TriptychECConnector(settings, Role.SCHEDULER)
        self.worker = module.TriptychECConnector(settings, Role.WORKER)
        self.cache: dict[str, torch.Tensor] = {}
        self.encoded: list[str] = []

    def step(self, request: Request, computed: int = 0) -> bool:
        """One pass: False if the request has to wait. Items are loaded, or encoded if they can be."""
        if not self.scheduler.ensure_cache_available(request, computed):
            self._run([])
            return False
        encode = []
        for index, item in enumerate(request.mm_features):
            if item.identifier not in self.cache and not self.scheduler.has_cache_item(item.identifier):
                assert "pixel_values" in item.data, "a real engine dies here"
                encode.append(item.identifier)
            self.scheduler.update_state_after_alloc(request, index)
        self._run(encode)
        return True

    def _run(self, encode: list[str]) -> None:
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(None))
        if self.worker.is_producer:
            self.worker.start_save_caches(encoder_cache=self.cache)
        if self.worker.is_consumer:
            self.worker.start_load_caches(self.cache)
        for key in encode:
            self.cache[key] = embedding()
            self.encoded.append(key)
            self.worker.save_caches(self.cache, key)

    def finish(self, request: Request) -> Any:
        delayed, params = self.scheduler.request_finished(request)
        assert not delayed
        return params


@contextmanager
def engines(tmp_path: Path, transfer: str) -> Iterator[tuple[Engine, Engine]]:
    """An encoder and a consumer of its embeddings."""
    extra: dict[str, Any] = {"transfer": transfer, "wait_timeout": 20.0}
    if transfer == "storage":
        extra["shared_storage_path"] = str(tmp_path / "shared")
    with installed() as module:
        made = []
        try:
            made.append(Engine(module, tmp_path, producer=True, **extra))
            made.append(Engine(module, tmp_path, consumer=True, **extra))
            yield made[0], made[1]
        finally:
            for engine in made:
                engine.scheduler.shutdown()
                engine.worker.shutdown()
    assert not list(tmp_path.glob("triptych-shelf-*"))


@pytest.fixture(params=["storage", "zmq"])
def transfer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def encode(engine: Engine, name: str, *keys: str) -> dict[str, Any]:
    request = Request(name, [feature(key, data=PIXELS) for key in keys])
    assert engine.step(request)
    found = engine.finish(request)
    assert isinstance(found, dict)
    return found


def test_embeddings_travel_from_the_encoder_to_the_consumer(tmp_path: Path, transfer: str) -> None:
    with engines(tmp_path, transfer) as (encoder, consumer):
        params = encode(encoder, "e", CAT, DOG, CAT)
        assert params[CAT]["item_indices"] == [0, 2]
        assert params[CAT]["metadata"] == {"image_grid_thw": [1, 4, 4]}
        assert (params[CAT]["modality"], params[CAT]["shape"]) == ("image", [TOKENS, WIDTH])
        request = Request("p", [feature(CAT), feature(DOG), feature(CAT)], params)
        soon(lambda: consumer.step(request))
        assert consumer.cache[CAT].equal(embedding())
        assert consumer.finish(request) is None
        assert consumer.scheduler.take_unavailable_requests() == set()


def test_what_is_asked_for_again_is_published_again_without_encoding_it_again(tmp_path: Path, transfer: str) -> None:
    with engines(tmp_path, transfer) as (encoder, consumer):
        first = encode(encoder, "e", CAT)
        if transfer == "storage":
            (tmp_path / "shared" / CAT / "encoder_cache.safetensors").unlink()
        assert encode(encoder, "again", CAT) == first
        assert encoder.encoded == [CAT]
        request = Request("p", [feature(CAT)], first)
        soon(lambda: consumer.step(request))


def test_a_request_that_comes_before_its_embedding_waits_while_others_go_on(tmp_path: Path) -> None:
    with engines(tmp_path, "storage") as (encoder, consumer):
        early, text = Request("p", [feature(CAT)]), Request("t", [])
        assert not consumer.step(early)
        assert consumer.step(text)
        assert not consumer.step(early)
        encode(encoder, "e", CAT)
        soon(lambda: consumer.step(early))
        assert consumer.cache[CAT].equal(embedding())


def test_an_embedding_that_is_lost_fails_its_request_alone(tmp_path: Path, transfer: str) -> None:
    with engines(tmp_path, transfer) as (encoder, consumer):
        params = encode(encoder, "e", CAT)
        params[CAT]["where"] = {**params[CAT]["where"], "key": DOG}
        lost = Request("lost", [feature(CAT)], params)
        soon(lambda: not consumer.step(lost) and consumer.scheduler.take_unavailable_requests() == {"lost"})
        assert consumer.finish(lost) is None
        good = encode(encoder, "good", DOG)
        request = Request("p", [feature(DOG)], good)
        soon(lambda: consumer.step(request))


def test_media_that_came_along_is_encoded_here_when_its_embedding_is_lost(tmp_path: Path, transfer: str) -> None:
    with engines(tmp_path, transfer) as (_, consumer):
        request = Request("p", [feature(CAT, data=PIXELS)], {CAT: {"where": {"transport": transfer}}})
        soon(lambda: consumer.step(request))
        assert consumer.encoded == [CAT]
        plain = Request("q", [feature(DOG, data=PIXELS)])
        assert consumer.step(plain), "of which nothing was said: at once"


def test_what_is_computed_already_is_not_waited_for(tmp_path: Path) -> None:
    with engines(tmp_path, "storage") as (_, consumer):
        assert consumer.scheduler.ensure_cache_available(Request("d", [feature(CAT, offset=3)]), 3 + TOKENS)


def test_an_item_without_a_hash_for_a_name_is_never_said_to_be_published(tmp_path: Path, transfer: str) -> None:
    with engines(tmp_path, transfer) as (encoder, _):
        params = encode(encoder, "e", "../evil")
        assert params == {"../evil": {"item_indices": [0], "metadata": {}, "modality": "image"}}
        assert not list(tmp_path.rglob("evil"))


def test_text_has_no_params(tmp_path: Path) -> None:
    with engines(tmp_path, "storage") as (encoder, consumer):
        for engine in (encoder, consumer):
            request = Request("t", [])
            assert engine.step(request)
            assert engine.finish(request) is None


def test_deepstack_levels_make_embeddings_wider(tmp_path: Path) -> None:
    with installed() as module:
        shared = str(tmp_path / "shared")
        engine = Engine(module, tmp_path, consumer=True, levels=2, shared_storage_path=shared)
        module.Shelf(tmp_path / "shared").put(CAT, torch.zeros(TOKENS, 3 * WIDTH))
        request = Request("p", [feature(CAT)])
        soon(lambda: engine.step(request))
        assert engine.cache[CAT].shape == (TOKENS, 3 * WIDTH)
        engine.scheduler.shutdown()


def test_a_wrong_configuration_stops_the_engine_and_leaves_nothing(tmp_path: Path) -> None:
    with installed() as module:
        with pytest.raises(ValueError, match="shared_storage_path"):
            Engine(module, tmp_path, consumer=True)
        (tmp_path / "file").touch()
        with pytest.raises(Exception, match="cannot use the storage folder"):
            Engine(module, tmp_path, consumer=True, shared_storage_path=str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
