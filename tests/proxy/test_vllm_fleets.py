"""Fleets of scripted vLLM engines behind the proxy, over real sockets: every topology, and what kills or loses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from blake3 import blake3

from proxy.breaker import Circuit
from proxy.core import State
from tests.fakes.deployment import deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, data_url, image, part
from tests.fakes.native import PIECES
from tests.fakes.vllm import Failed, Vllm, World

TEXT = "".join(PIECES)
A, B = image(8, 8), image(16, 8)
VIDEO = {"type": "video_url", "video_url": {"url": "http://media.example/v.mp4"}}
SOUND = {"type": "audio_url", "audio_url": {"url": "http://media.example/a.wav"}}
SPEECH = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}


def hash_of(data: bytes) -> str:
    return blake3(data).hexdigest()


def fleet(topology: str, world: World | None = None, **settings: Any) -> Any:
    return deployment(topology, "auto", (world or World()).engines(), **settings)


def whole(answer: Any) -> str:
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


def served(engine: Any) -> list[Any]:
    found: Vllm = engine
    return found.served


TOPOLOGIES = [
    ("1b", "nixl", "PD", "EPD"),
    ("1e1b", "nixl", "PD", "E-PD"),
    ("1p1d", "nixl", "P-D", "EP-D"),
    ("1e1p1d", "nixl", "P-D", "E-P-D"),
    ("1e1p1d", "example", "P-D", "E-P-D"),
    ("1e1p1d", "mooncake", "P-D", "E-P-D"),
    ("1p1d", "mooncake", "P-D", "EP-D"),
    ("2e2p2d1b", "nixl", "P-D", "E-P-D"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("version", ["0.12.0", "0.32.0", "0.33.0"])
@pytest.mark.parametrize(("topology", "kv", "text_path", "media_path"), TOPOLOGIES)
async def test_every_topology_serves_text_and_media(
    topology: str, kv: str, text_path: str, media_path: str, version: str, stream: bool
) -> None:
    async with fleet(topology, World(version=version, kv=kv)) as d:
        text = await d.post(chat(stream=stream))
        media = await d.post(chat(part(A), part(B), part(A), VIDEO, SOUND, SPEECH, stream=stream, odd={"z": 1}))
        for answer, path in ((text, text_path), (media, media_path)):
            assert answer.status == 200, answer.body
            assert answer.route.startswith(f"{path}; "), answer.route
            if not stream:
                assert whole(answer) == TEXT
        for engine in d.engines:
            assert all(call.body["odd"] == {"z": 1} for call in served(engine) if "odd" in call.body)
            assert not engine.dead
        assert sum(len(encoder.encoded) for encoder in d.encoders) in (0, 5), "the same image once"


async def test_each_stage_gets_its_part_of_a_request() -> None:
    async with fleet("1e1p1d", World(ec="mooncake")) as d:
        answer = await d.post(chat(part(A), part(B), max_tokens=9, odd=[1]), x_request_id="me")
        assert whole(answer) == TEXT
        (encode,), (prefill,), (decode,) = served(d.encoders[0]), served(d.prefills[0]), served(d.decodes[0])
        assert [p["uuid"] for p in encode.body["messages"][0]["content"]] == [hash_of(A), hash_of(B)]
        assert (encode.id, prefill.id, decode.id) == ("me:0", "me", "me")
        for call in (prefill, decode):
            assert [p["type"] for p in call.body["messages"][0]["content"]] == ["text", "image_embeds", "image_embeds"]
        told = encode.body["ec_transfer_params"]
        assert told["consumer_zmq"] == f"tcp://{d.prefills[0].netloc}"
        names = [{"mm_hash": h, **item} for h, item in zip((hash_of(A), hash_of(B)), told["ec_items"], strict=True)]
        assert set(prefill.body["ec_transfer_params"]) == {hash_of(A), hash_of(B), "ec_items"}
        assert prefill.body["ec_transfer_params"]["ec_items"] == names
        assert "ec_transfer_params" not in decode.body
        assert decode.body["kv_transfer_params"]["remote_request_id"].startswith("chatcmpl-me-")
        assert (prefill.body["max_tokens"], decode.body["max_tokens"]) == (1, 9)
        assert all(call.body["odd"] == [1] for call in (encode, prefill, decode))


async def test_large_media_reach_all_stages_as_they_came() -> None:
    data = A + bytes(300_000)
    async with fleet("1e1p1d", media_to_prefill="always") as d:
        assert whole(await d.post(chat(part(data), part(B)))) == TEXT
        for engine in d.engines:
            (call,) = served(engine)
            items = [p for p in call.body["messages"][0]["content"] if p["type"] == "image_url"]
            assert items == [part(data) | {"uuid": hash_of(data)}, part(B) | {"uuid": hash_of(B)}]


# ---- what is lethal, or would be


@pytest.mark.parametrize("topology", ["1e1b", "1e1p1d"])
async def test_files_that_somebody_deleted_kill_nobody(topology: str) -> None:
    world = World()
    async with fleet(topology, world) as d:
        assert whole(await d.post(chat(part(A)))) == TEXT
        world.files.clear()  # the encoder has it in its cache, reports it, and does not write it again
        assert whole(await d.post(chat(part(A)))) == TEXT
        first = (d.prefills or d.combined)[0]
        assert [whence for _, whence in first.seen[-1]] == ["encoded"]
        assert not any(engine.dead for engine in d.engines)


async def test_told_that_files_stay_metadata_go_alone_and_a_deleted_one_is_fatal() -> None:
    world = World()
    async with fleet("1e1b", world, media_to_prefill="never") as d:
        assert whole(await d.post(chat(part(A)))) == TEXT
        assert served(d.combined[0])[-1].body["messages"][0]["content"][1]["type"] == "image_embeds"
        world.files.clear()
        assert (await d.post(chat(part(A)))).status >= 500
        assert d.combined[0].dead, "as measured: this is what `auto` is for"


@pytest.mark.parametrize("topology", ["1e1b", "1e1p1d"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_embedding_missed_without_harm_is_made_up_for_by_the_media(topology: str, stream: bool) -> None:
    world = World(ec="mooncake")
    async with fleet(topology, world) as d:
        assert (await d.post(chat(part(A)))).status == 200
        world.loses = True
        answer = await d.post(chat(part(A), stream=stream))
        assert answer.status == 200 and b"error" not in answer.body
        first = (d.prefills or d.combined)[0]
        calls = served(first)[1:]
        assert [call.body["messages"][0]["content"][1]["type"] for call in calls] == ["image_embeds", "image_url"]
        assert first.encoded == [hash_of(A)] and not first.dead


@pytest.mark.parametrize("topology", ["1e2b", "1e2p2d"])
async def test_who_takes_the_place_of_the_one_that_embeddings_were_pushed_to_gets_media(topology: str) -> None:
    async with fleet(topology, World(ec="mooncake")) as d:
        (d.prefills or d.combined)[0].always = Fault(Kind.STATUS, status=500, error="ill")
        for _ in range(3):
            assert whole(await d.post(chat(part(A)))) == TEXT
        well = (d.prefills or d.combined)[1]
        assert "encoded" in {whence for call in well.seen for _, whence in call}


async def test_an_engine_that_is_ill_is_asked_twice_at_the_most() -> None:
    async with fleet("1e1b") as d:
        d.combined[0].always = Fault(Kind.STATUS, status=500, error="ill")
        for body in (chat(part(A)), chat()):
            before = len(d.combined[0].calls)
            answer = await d.post(body)
            assert (answer.status, answer.error["message"]) == (500, "ill")
            assert len(d.combined[0].calls) - before == (2 if isinstance(body["messages"][0]["content"], list) else 1)


async def test_kv_that_decode_cannot_fetch_is_made_again_for_the_same_engine() -> None:
    world = World()
    async with fleet("1p1d", world) as d:
        original = d.decodes[0].work

        async def forgetful(call: Any) -> Any:
            if call.id == "me":
                world.prefilled.clear()
            return await original(call)

        d.decodes[0].work = forgetful
        assert whole(await d.post(chat(), x_request_id="me")) == TEXT
        assert [call.id for call in served(d.prefills[0])] == ["me", "me-2"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat({"type": "image_embeds", "image_embeds": {}, "uuid": "x"}), "messages[0].content[1]"),
        (chat({"image_embeds": {}}), "messages[0].content[1]"),
        (chat(ec_transfer_params={}), "ec_transfer_params"),
        (chat(kv_transfer_params={"do_remote_decode": True}), "kv_transfer_params"),
        (chat({"type": "image_url", "image_url": None, "uuid": "x"}), "messages[0].content[1]"),
    ],
)
async def test_clients_cannot_say_what_kills_or_leaks(body: Any, param: str) -> None:
    async with fleet("1e1b") as d:
        answer = await d.post(body)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert not any(served(engine) for engine in d.engines)


async def test_a_clients_uuid_reaches_no_engine() -> None:
    async with fleet("1e1b") as d:
        for mine in ("../../etc/passwd", hash_of(B)):
            assert whole(await d.post(chat(part(A) | {"uuid": mine}))) == TEXT
        keys = {key for call in d.combined[0].seen for key, _ in call}
        assert keys == {hash_of(A)}


async def test_two_hashes_of_one_image_under_processor_settings() -> None:
    async with fleet("1e1b") as d:
        settings = {"mm_processor_kwargs": {"max_pixels": 9}}
        remote = {"type": "image_url", "image_url": "http://m.example/i.png"}
        for body in (chat(part(A)), chat(part(A), **settings), chat(remote, **settings)):
            assert whole(await d.post(body)) == TEXT
        assert [whence for call in d.combined[0].seen for _, whence in call] == ["fetched"] * 3
        assert len(d.encoders[0].encoded) == 3


async def test_settings_that_the_engine_does_not_trust_are_its_own_error() -> None:
    async with fleet("1e1b", World(trusts_kwargs=False)) as d:
        answer = await d.post(chat(part(A), mm_processor_kwargs={"max_pixels": 9}))
        assert (answer.status, answer.error["stage"]) == (400, "encode")
        assert "--trust-request-mm-kwargs" in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_bad_image_is_the_clients_400(stream: bool) -> None:
    async with fleet("1e1p1d") as d:
        bad = {"type": "image_url", "image_url": {"url": data_url(b"no image")}}
        answer = await d.post(chat(bad, stream=stream))
        assert (answer.status, answer.error["stage"], answer.error["attempts"]) == (400, "encode", 1)
        assert not served(d.prefills[0])


@pytest.mark.parametrize("topology", ["2e1b", "2b", "2p1d"])
async def test_urls_that_lead_nowhere_keep_no_engine_from_others(topology: str) -> None:
    async with fleet(topology, breaker_failures=2) as d:
        lost = {"type": "image_url", "image_url": {"url": "http://nowhere.example/i.png"}}
        for _ in range(6):
            answer = await d.post(chat(lost))
            assert (answer.status, answer.error["message"]) == (500, "Cannot connect to host nowhere.example")
        assert {d.proxy.health.circuit(instance) for instance in d.proxy.fleet} == {Circuit.CLOSED}
        assert whole(await d.post(chat())) == TEXT


@pytest.mark.parametrize("form", ["string", "no type"])
async def test_media_in_other_forms_that_vllm_takes(form: str) -> None:
    item = {"type": "image_url", "image_url": data_url(A)} if form == "string" else {"image_url": {"url": data_url(A)}}
    async with fleet("1e1b") as d:
        assert whole(await d.post(chat(item))) == TEXT
        assert d.encoders[0].encoded == [hash_of(A)]


# ---- who fails is replaced


async def test_kv_that_nobody_holds_any_more_is_told_within_a_stream_and_made_again() -> None:
    world = World()
    async with fleet("1p2d", world) as d:

        def forgetful(call: Any) -> Any:
            world.prefilled.clear()
            return original(call)

        broken = d.decodes[0]
        original, broken.work = broken.work, forgetful
        answers = [await d.post(chat(stream=True)) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        assert all(b"error" not in answer.body and answer.body.endswith(b"[DONE]\n\n") for answer in answers)
        assert len(served(d.prefills[0])) > 2, "what one decode engine could not fetch was made anew for another"


@pytest.mark.parametrize("stage", ["encoders", "prefills", "decodes"])
@pytest.mark.parametrize("kv", ["nixl", "mooncake"])
async def test_a_killed_engine_is_worked_around(kv: str, stage: str) -> None:
    async with fleet("2e2p2d", World(kv=kv)) as d:
        assert whole(await d.post(chat(part(A)))) == TEXT
        await getattr(d, stage)[0].stop()
        for _ in range(3):
            assert whole(await d.post(chat(part(A), part(B)))) == TEXT


async def test_a_restarted_encoder_encodes_anew_and_everybody_lives() -> None:
    world = World()
    async with fleet("1e1b", world, probe_failures=1) as d:
        assert whole(await d.post(chat(part(A)))) == TEXT
        await d.encoders[0].stop()
        world.files.clear()
        await d.proxy.health.tick()
        assert (await d.post(chat(part(A)))).status == 503
        await d.encoders[0].start()
        await d.proxy.health.tick()
        assert whole(await d.post(chat(part(A)))) == TEXT
        assert [whence for _, whence in d.combined[0].seen[-1]] == ["fetched"]


# ---- both at once (MooncakeConnector)


async def test_both_are_called_at_once_and_told_of_each_other() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        gate = d.prefills[0].gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(stream=True), x_request_id="me"))
        await d.decodes[0].until(lambda: d.decodes[0].running == 1)
        await d.prefills[0].until(lambda: d.prefills[0].running == 1)
        gate.set()
        assert (await asking).status == 200
        (prefill,), (decode,) = served(d.prefills[0]), served(d.decodes[0])
        told = decode.body["kv_transfer_params"]
        assert told["transfer_id"] == prefill.body["kv_transfer_params"]["transfer_id"]
        assert told["remote_engine_id"] == d.prefills[0].engine_ids["0"]
        assert told["remote_bootstrap_addr"] == f"http://127.0.0.1:{d.prefills[0].bootstrap_port}"


async def test_a_prompt_whose_answer_ends_at_once_is_handed_over_all_the_same() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        d.prefills[0].stops = True
        assert whole(await d.post(chat(min_tokens=0))) == TEXT


async def test_a_failed_prefill_ends_the_decode_that_waits_for_it() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        d.prefills[0].fail(Fault(Kind.STATUS, status=500, error="ill"))
        answer = await d.post(chat(stream=True))
        assert (answer.status, answer.error["stage"], answer.error["message"]) == (500, "prefill", "ill")
        await d.decodes[0].until(lambda: d.decodes[0].aborted == 1)


async def test_a_failed_decode_ends_the_prefill() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        d.prefills[0].gate = asyncio.Event()
        d.decodes[0].always = Fault(Kind.STATUS, status=500, error="ill")
        answer = await d.post(chat(stream=True))
        assert (answer.status, answer.error["stage"], answer.error["message"]) == (500, "decode", "ill")
        await d.prefills[0].until(lambda: d.prefills[0].aborted == 2)


async def test_a_client_that_leaves_ends_both() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        d.prefills[0].gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(stream=True)))
        for engine in (d.prefills[0], d.decodes[0]):
            await engine.until(lambda engine=engine: engine.running == 1)
        asking.cancel()
        for engine in (d.prefills[0], d.decodes[0]):
            await engine.until(lambda engine=engine: engine.aborted == 1)


async def test_a_prefill_that_takes_long_does_not_use_up_decodes_time() -> None:
    async with fleet("1p1d", World(kv="mooncake"), first_token_timeout=0.5) as d:
        gate = d.prefills[0].gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(stream=True)))
        await d.decodes[0].until(lambda: d.decodes[0].running == 1)
        await asyncio.sleep(0.7)
        gate.set()
        assert (await asking).status == 200


async def test_a_prefill_that_breaks_off_before_decode_has_answered_is_told() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        d.prefills[0].fail(Fault(Kind.TRUNCATED))
        d.decodes[0].gate = asyncio.Event()
        answer = await d.post(chat())
        assert (answer.status, answer.error["stage"]) == (502, "prefill")


async def test_one_that_fails_later_changes_nothing() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        prefill = d.prefills[0]
        answered = asyncio.Event()
        original = prefill.work

        async def work(call: Any) -> Any:
            await original(call)
            await answered.wait()
            raise Failed(500, "too late")

        prefill.work = work
        async with d.http.post(f"{d.url}/v1/chat/completions", json=chat(stream=True)) as response:
            assert response.status == 200
            answered.set()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_one_that_never_says_that_it_is_done_is_not_waited_for() -> None:
    async with fleet("1p1d", World(kv="mooncake")) as d:
        prefill = d.prefills[0]
        original = prefill.work

        async def work(call: Any) -> Any:
            await original(call)
            await asyncio.Event().wait()

        prefill.work = work
        assert whole(await d.post(chat())) == TEXT
        await prefill.until(lambda: prefill.aborted == 1)


# ---- before they serve


async def test_an_engine_serves_after_one_real_request() -> None:
    async with fleet("1e1p1d") as d:
        for engine in d.engines:
            assert [call.id for call in engine.calls] == ["warm-up"]
            assert engine.calls[0].body["model"] == "tiny"
        shown = {i["url"]: i for i in (await d.get("/instances")).json["instances"]}
        for engine in d.engines:
            facts = shown[engine.url]["facts"]
            assert facts["version"] == "0.32.0"
            assert facts["known_by"] == "GET /v1/models is owned by vllm, GET /version says 0.32.0"
            assert shown[engine.url]["dialect"] == "vllm"


async def test_one_that_fails_it_or_hangs_in_it_holds_nobody_up() -> None:
    async with fleet("2b", probe_interval=0.05, probe_timeout=0.2) as d:
        hanging, well = d.combined
        instance = d.proxy.fleet.get(hanging.url)
        assert instance is not None
        await hanging.stop()
        while instance.state is not State.DOWN:
            await asyncio.sleep(0.01)
        hanging.faults.append(Fault(Kind.STATUS, status=500, error="no kernels"))
        hanging.faults.append(Fault(Kind.HANG))
        await hanging.start()
        async with asyncio.timeout(10):
            while hanging.faults or not hanging.running:
                await asyncio.sleep(0.01)
            assert "its warm-up request failed: no kernels" in instance.reason
            other = d.proxy.fleet.get(well.url)
            assert other is not None
            await well.stop()
            while other.state is not State.DOWN:
                await asyncio.sleep(0.01)
            await well.start()
            while other.state is not State.READY:
                await asyncio.sleep(0.01)
            assert instance.state is State.DOWN
            assert whole(await d.post(chat())) == TEXT
        await hanging.stop()
