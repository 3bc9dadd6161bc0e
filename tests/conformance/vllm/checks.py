"""What a fleet of real engines behind our proxy must do. A check raises AssertionError and leaves the fleet serving.

Right is what the engine that answers says by itself when it is asked directly, with the media and no proxy.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.conformance.vllm.engine import Vllm
from tests.support.cluster import Answer, Client
from tests.support.pictures import image_file, image_part
from tests.support.waiting import eventually
from tests.system.cases import CASES, Case

MAX_TOKENS = 12
PATIENCE = 120.0
RECOVERY = 300.0


@dataclass(frozen=True)
class Fleet:
    """A proxy and the engines behind it.

    proxy, direct, encoding: clients of the proxy, of the engine whose answers clients get, of the one that encodes.
    answering, encoder: those engines as processes; no encoder where it is not vLLM's, or there is none.
    routes: the paths that requests without and with images take.
    storage: the folder that embeddings travel through, if they do.
    """

    proxy: Client
    direct: Client
    encoding: Client
    answering: Vllm
    encoder: Vllm | None
    routes: tuple[str, str]
    storage: Path | None

    async def ask(self, case: Case, **fields: Any) -> Answer:
        return await self.proxy.chat(case.content, timeout=PATIENCE, **{"max_tokens": MAX_TOKENS, **fields})

    async def right(self, case: Case) -> str:
        answer = await self.direct.chat(case.content, timeout=PATIENCE, max_tokens=MAX_TOKENS)
        assert answer.status == 200, f"asked directly: {answer.status} {answer.body}"
        return answer.text

    async def serves(self, case: Case) -> None:
        expected, answer = await self.right(case), await self.ask(case)
        assert answer.status == 200, f"{answer.status} {answer.body}"
        assert answer.text == expected, f"{answer.text!r} instead of {expected!r}"
        path = answer.headers["x-triptych-route"].partition(";")[0]
        assert path == self.routes[bool(case.images)], path

    async def ready(self) -> None:
        """Until the proxy sends to all of its engines."""

        async def all_ready() -> bool:
            return all(i["state"] == "READY" for i in (await self.proxy.get("/instances"))["instances"])

        await eventually(all_ready, RECOVERY)


Check = Callable[[Fleet], Awaitable[None]]


def fresh(seed: int | None = None) -> Case:
    """An image that no engine has seen, unless its seed is given again."""
    drawn = image_file(200, 140, seed=secrets.randbits(40) if seed is None else seed)
    return Case("fresh", (drawn, "What is this?"))


def same_answer(case: Case) -> Check:
    async def check(fleet: Fleet) -> None:
        await fleet.serves(case)

    return check


def streamed(case: Case) -> Check:
    async def check(fleet: Fleet) -> None:
        expected, answer = await fleet.right(case), await fleet.ask(case, stream=True)
        assert answer.status == 200 and answer.done, (answer.status, answer.error)
        assert answer.text == expected, f"{answer.text!r} instead of {expected!r}"

    return check


async def recognised(fleet: Fleet) -> None:
    """Nobody told the proxy what these engines are."""
    for instance in (await fleet.proxy.get("/instances"))["instances"]:
        family = "native" if instance["role"] == "encode" and fleet.encoder is None else "vllm"
        facts = instance["facts"]
        assert instance["dialect"] == family and facts["version"] and facts["known_by"], instance


async def two_choices(fleet: Fleet) -> None:
    case = CASES[1]
    # vLLM takes no n=2 at temperature 0; the likeliest token alone is the same
    expected, answer = await fleet.right(case), await fleet.ask(case, n=2, temperature=1, top_k=1)
    assert answer.status == 200, f"{answer.status} {answer.body}"
    assert [choice["message"]["content"] for choice in answer.choices] == [expected, expected], answer.body


async def many_at_once(fleet: Fleet) -> None:
    """Sixteen requests over few images: shared in flight, shared in the caches, and each one its own answer."""
    asked = [*CASES, *(fresh(seed % 3) for seed in range(6)), *CASES]
    expected = [await fleet.right(case) for case in asked]
    answers = await asyncio.gather(*(fleet.ask(case, stream=bool(n % 2)) for n, case in enumerate(asked)))
    wrong = [(n, a.status, a.error) for n, (a, e) in enumerate(zip(answers, expected, strict=True)) if a.text != e]
    assert not wrong, wrong


async def bad_image(fleet: Fleet) -> None:
    """The client is told with a 4xx, streaming or not, and which part it is; nobody ends of it."""
    broken = image_part(b"\x89PNG\r\n\x1a\n" + base64.b64decode("AAAA") * 20)
    for stream in (False, True):
        content = [{"type": "text", "text": "Look: "}, broken]
        answer = await fleet.proxy.chat(content, timeout=PATIENCE, max_tokens=MAX_TOKENS, stream=stream)
        assert 400 <= answer.status < 500, f"{answer.status} {answer.body}"
        assert answer.error is not None and answer.error["message"] and answer.error["type"], answer.body
    await fleet.serves(CASES[1])


async def metadata_of_nothing(fleet: Fleet) -> None:
    """What kills an engine when a client sends it directly does not pass the proxy."""
    part = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 4]}, "uuid": secrets.token_hex(32)}
    answer = await fleet.proxy.chat([part], timeout=PATIENCE)
    assert answer.status == 400, f"{answer.status} {answer.body}"
    await fleet.serves(CASES[1])


async def files_deleted(fleet: Fleet) -> None:
    """Somebody cleans the folder up while engines still think that their embeddings lie there."""
    case = fresh()
    await fleet.serves(case)
    clear(fleet)
    answer = await fleet.ask(case)
    assert answer.status == 200, f"{answer.status} {answer.body}"
    assert answer.text == await fleet.right(case)


async def published_again(fleet: Fleet) -> None:
    """Asked again, the encoder brings back what was deleted: a consumer needs nothing but the metadata."""
    case, key = fresh(), secrets.token_hex(32)
    assert isinstance(case.content, list)
    image, question = case.content
    expected = await fleet.right(case)
    await encode(fleet, image, key)
    clear(fleet)
    entry = await encode(fleet, image, key)
    embeds = {"type": "image_embeds", "image_embeds": entry["metadata"], "uuid": key}
    handles = {"ec_transfer_params": {key: entry}}
    answer = await fleet.direct.chat([embeds, question], timeout=PATIENCE, max_tokens=MAX_TOKENS, **handles)
    assert answer.status == 200 and answer.text == expected, (answer.status, answer.body, expected)


async def encoder_killed(fleet: Fleet) -> None:
    """Without its only encoder a fleet answers truthfully, and text goes on; once it is back, no old file is missed."""
    assert fleet.encoder is not None
    old = fresh()
    await fleet.serves(old)
    await fleet.encoder.kill()
    answer = await fleet.ask(fresh())
    honest = (
        answer.status in (502, 503, 504) and answer.error is not None and answer.error["stage"] in ("encode", "proxy")
    )
    assert honest or answer.status == 200, f"{answer.status} {answer.body}"
    await fleet.serves(CASES[0])
    clear(fleet)
    await fleet.encoder.start()
    await fleet.ready()
    await fleet.serves(old)
    await fleet.serves(fresh())


async def decode_killed(fleet: Fleet) -> None:
    """A stream whose engine dies ends with an error and no [DONE]; when the engine is back, so are the answers."""
    case = replace(CASES[1], parts=(*CASES[1].parts, "Tell me everything."))
    stream = asyncio.ensure_future(fleet.ask(case, stream=True, max_tokens=3000, ignore_eos=True))
    await asyncio.sleep(4.0)
    assert not stream.done(), f"it was over before the engine was killed: {stream.result()}"
    await fleet.answering.kill()
    answer = await stream
    assert answer.error is not None and not answer.done, (answer.status, answer.events[-2:])
    refused = await fleet.ask(CASES[0])
    assert refused.status in (502, 503, 504) and refused.error is not None, (refused.status, refused.body)
    await fleet.answering.start()
    await fleet.ready()
    await fleet.serves(CASES[0])
    await fleet.serves(case)


async def prefill_before_encode(fleet: Fleet) -> None:
    """Our connector alone: prefill is asked first, and waits for the embedding without holding up anybody."""
    case, key = fresh(), secrets.token_hex(32)
    expected = await fleet.right(case)
    assert isinstance(case.content, list)
    image, question = case.content
    embeds = {"type": "image_embeds", "image_embeds": {"image_grid_thw": await grid(fleet, image)}, "uuid": key}
    early = asyncio.ensure_future(fleet.direct.chat([embeds, question], timeout=PATIENCE, max_tokens=MAX_TOKENS))
    await asyncio.sleep(1.0)
    text = await fleet.direct.chat("Say something.", timeout=PATIENCE, max_tokens=MAX_TOKENS)
    assert text.status == 200 and not early.done(), (text.status, early)
    await encode(fleet, image, key)
    answer = await early
    assert answer.status == 200 and answer.text == expected, (answer.status, answer.body, expected)


async def embedding_never_comes(fleet: Fleet) -> None:
    """Our connector alone: the request fails, the engine that vLLM's own connector would have lost stays."""
    embeds = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 4]}, "uuid": secrets.token_hex(32)}
    answer = await fleet.direct.chat([embeds], timeout=PATIENCE, max_tokens=MAX_TOKENS)
    assert answer.status == 500 and fleet.answering.alive, (answer.status, answer.body)
    await fleet.serves(CASES[1])


async def encode(fleet: Fleet, image: dict[str, Any], key: str) -> Any:
    """What the encoder says when it is asked directly for one image."""
    answer = await fleet.encoding.chat([{**image, "uuid": key}], timeout=PATIENCE)
    assert answer.status == 200, f"{answer.status} {answer.body}"
    return answer.body["ec_transfer_params"][key]


async def grid(fleet: Fleet, image: dict[str, Any]) -> list[int]:
    found: list[int] = (await encode(fleet, image, secrets.token_hex(32)))["metadata"]["image_grid_thw"]
    return found


def clear(fleet: Fleet) -> None:
    """Delete every embedding that lies in a folder."""
    for path in fleet.storage.iterdir() if fleet.storage else ():
        shutil.rmtree(path)
