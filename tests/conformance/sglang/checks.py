"""What a fleet of real SGLang servers behind our proxy must do. A check raises AssertionError and leaves it serving.

Right is what the same version answers with an encoder of its own, asked directly.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.conformance.sglang.server import Sglang
from tests.support.cluster import Answer, Client
from tests.support.pictures import image_file, image_part
from tests.support.waiting import eventually
from tests.system.cases import CASES, Case

MAX_TOKENS = 12
PATIENCE = 120.0
RECOVERY = 300.0


@dataclass(frozen=True)
class Fleet:
    """A proxy with the virtual encoder, and the servers behind it.

    right: what each case is to be answered with.   ours: the URL of our own encoder, which may join.
    """

    proxy: Client
    language: Sglang
    encoders: tuple[Sglang, ...]
    ours: str
    right: Mapping[str, str]

    async def ask(self, case: Case, **fields: Any) -> Answer:
        return await self.proxy.chat(case.content, timeout=PATIENCE, **{"max_tokens": MAX_TOKENS, **fields})

    async def serves(self, case: Case = CASES[2]) -> None:
        """The same process as before, that is: a server that died would be down for as long as it takes to start."""
        answer = await self.ask(case)
        assert answer.status == 200, f"{answer.status} {answer.body}"
        assert answer.text == self.right[case.name], f"{answer.text!r} instead of {self.right[case.name]!r}"
        path = answer.headers["x-triptych-route"].partition(";")[0]
        assert path == ("EPD" if case.images else "PD"), path
        assert self.language.alive

    async def tell(self, path: str, body: Mapping[str, str]) -> None:
        """The proxy, as an admin would."""
        async with aiohttp.ClientSession() as http, http.post(self.proxy.url + path, json=body) as response:
            assert response.status == 200, await response.text()

    async def states(self, states: Mapping[str, str]) -> None:
        """Until the proxy says these of these URLs."""

        async def so() -> bool:
            listed = {i["url"]: i["state"] for i in (await self.proxy.get("/instances"))["instances"]}
            return all(listed.get(url) == state for url, state in states.items())

        await eventually(so, RECOVERY)


Check = Callable[[Fleet], Awaitable[None]]


def same_answer(case: Case) -> Check:
    async def check(fleet: Fleet) -> None:
        await fleet.serves(case)

    return check


async def known(fleet: Fleet) -> None:
    """The proxy was told nothing about the language server but where it is."""
    listed = {i["url"]: i for i in (await fleet.proxy.get("/instances"))["instances"]}
    found = listed[fleet.language.url]
    assert (found["dialect"], found["facts"]["version"]) == ("sglang", fleet.language.version), found


async def streamed(fleet: Fleet) -> None:
    for case in (CASES[0], CASES[1]):
        answer = await fleet.ask(case, stream=True)
        assert answer.status == 200 and answer.done, (answer.status, answer.error)
        assert answer.text == fleet.right[case.name], answer.text


async def two_choices(fleet: Fleet) -> None:
    answer = await fleet.ask(CASES[0], n=2)
    assert answer.status == 200, f"{answer.status} {answer.body}"
    texts = [choice["message"]["content"] for choice in answer.choices]
    assert texts == [fleet.right[CASES[0].name]] * 2, texts


async def many_at_once(fleet: Fleet) -> None:
    asked = [case for case in CASES for _ in range(3)]
    answers = await asyncio.gather(*(fleet.ask(case, stream=bool(n % 2)) for n, case in enumerate(asked)))
    wrong = [(c.name, a.status, a.error) for c, a in zip(asked, answers, strict=True) if a.text != fleet.right[c.name]]
    assert not wrong, wrong


async def bad_image(fleet: Fleet) -> None:
    """Garbage, and a picture that breaks off after its header: the client is told, and no server dies of it."""
    whole = image_file(64, 48, seed=secrets.randbits(40))
    for data in (b"\x89PNG\r\n\x1a\n" + base64.b64decode("AAAA") * 20, whole[: len(whole) // 2]):
        answer = await fleet.proxy.chat([image_part(data)], timeout=PATIENCE, max_tokens=MAX_TOKENS)
        assert answer.status == 400 and answer.error is not None, f"{answer.status} {answer.body}"
        assert answer.error["message"], answer.body
        await fleet.serves()


async def client_leaves(fleet: Fleet) -> None:
    """While its server waits for an embedding."""
    case = Case("fresh", (image_file(64, 48, seed=secrets.randbits(40)), "What is this?"))
    for encoder in fleet.encoders:
        encoder.signal(signal.SIGSTOP)
    try:
        await fleet.proxy.chat(case.content, timeout=2.0, max_tokens=MAX_TOKENS)
        raise AssertionError("a stopped encoder has answered")
    except TimeoutError:
        await asyncio.sleep(1.0)
    finally:
        for encoder in fleet.encoders:
            encoder.signal(signal.SIGCONT)
    await fleet.states({encoder.url: "READY" for encoder in fleet.encoders})
    await asyncio.sleep(2.0)
    await fleet.serves()


async def encoder_killed(fleet: Fleet) -> None:
    """The other one takes over at once."""
    await fleet.encoders[0].kill()
    for _ in range(3):
        await fleet.serves()


async def our_encoder_joins(fleet: Fleet) -> None:
    """Beside a real one, and then alone."""
    await fleet.tell("/instances", {"role": "encode", "url": f"sglang+{fleet.ours}"})
    await fleet.states({fleet.ours: "READY"})
    for case in CASES:
        await fleet.serves(case)
    await fleet.encoders[1].kill()
    for case in CASES:
        await fleet.serves(case)


async def no_encoder_left(fleet: Fleet) -> None:
    """Media are refused before a server hears of them, text goes on; once an encoder is back, all does."""
    await fleet.tell("/instances/drain", {"url": fleet.ours})
    await fleet.states({encoder.url: "DOWN" for encoder in fleet.encoders})
    answer = await fleet.ask(CASES[1])
    assert answer.status == 503 and answer.error is not None, f"{answer.status} {answer.body}"
    assert answer.error["stage"] == "encode", answer.body
    await fleet.serves(CASES[0])
    await fleet.encoders[0].start()
    await fleet.states({fleet.encoders[0].url: "READY"})
    await fleet.serves()


CHECKS: Mapping[str, Check] = {
    "detected": known,
    **{case.name: same_answer(case) for case in CASES},
    "streaming": streamed,
    "n=2": two_choices,
    "many at once": many_at_once,
    "bad image": bad_image,
    "client leaves": client_leaves,
    "encoder killed": encoder_killed,
    "our encoder": our_encoder_joins,
    "no encoder left": no_encoder_left,
}
