"""The parts of the proxy that read what others send, each as a function of bytes that checks what must always hold.

A target returns whether the input was taken, false if it was refused as it should be; whatever else is raised is a
finding. None of them does I/O.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import orjson
from hypothesis.strategies import SearchStrategy

from bench.fuzzing import bodies, wire
from bench.fuzzing.peers import Connected
from proxy import openai
from proxy.core import BOTH, Api, Handle, Instance, Job, Stage
from proxy.dialects import Speakers
from proxy.dialects.base import BadReply, Options
from proxy.errors import BadRequest, ProxyError, Refused, within_200
from proxy.http.content import unpack
from proxy.http.message import HttpError
from proxy.intake import wishes
from proxy.intake.limits import Limits
from proxy.media import formats, splice
from proxy.media.addresses import Remote, Rules, is_public
from proxy.media.sizes import grid_of
from proxy.media.splice import Media
from proxy.openai import Identity
from proxy.relay import StreamCheck
from proxy.resume import Tape
from proxy.sglang import pieces
from proxy.sse import EventTooLong, Splitter

Run = Callable[[bytes, Random], bool]

LIMITS = Limits(items=8, text_bytes=1 << 16, rules=Rules())
_IDENTITIES = (Identity(), Identity(b"tenant"), Identity(trust_client=True))
_UNPACKED = 1 << 16  # bytes that a compressed body may become
_MEDIA_LOOKS = 600  # of one header reader into the rest of the media, at the most
_HANDLE = Handle("0" * 64, "image", {"image_grid_thw": [1, 4, 4]}, {"metadata": {}, "where": {"transport": "shm"}})
_PLAIN_CHAT = b'{"messages":[{"role":"user","content":[{"image_url":"data:image/png;base64,AAAA"}]}]}'


@dataclass(frozen=True, slots=True)
class Target:
    """`share`: of all inputs, by weight."""

    name: str
    seeds: Callable[[], SearchStrategy[bytes]]
    run: Run
    share: int


# ---- requests


def _instances() -> list[Instance]:
    facts: Mapping[str, Any] = {"engine_ids": {"0": "a", "1": "b"}, "bootstrap": "http://p:1", "version": "0.32.1"}
    families = ("native", "vllm", "ascend", "sglang")
    return [Instance(f"http://h:{n}", BOTH, family, facts=facts) for n, family in enumerate(families)]


_INSTANCES = _instances()
_SPEAKERS = Speakers(Options())


def body(data: bytes, dice: Random) -> bool:
    """A request's body, up to what each family's engines get of it."""
    api, identity = dice.choice((Api.CHAT, Api.CHAT, Api.CHAT, Api.COMPLETIONS)), dice.choice(_IDENTITIES)
    try:
        job = openai.parse(data, api, "id", identity, {"x-ttft-target": "1"}, limits=LIMITS)
        wishes.priority(job)
        wishes.first_token(job)
        for instance in _INSTANCES:
            _spoken(job, instance)
    except BadRequest:
        return False
    if len(job.items) > LIMITS.items or job.prompt_tokens < 0:
        raise AssertionError(f"a job beyond all limits: {job}")
    return True


def _spoken(job: Job, instance: Instance) -> None:
    dialect = _SPEAKERS(instance)
    handles = dict.fromkeys(range(len(job.items)), _HANDLE)
    sent: list[Any] = []
    if job.items and instance.dialect != "sglang":
        sent += [{**dialect.encode(job, items), **dialect.expects(items, 1)} for items in dialect.batches(job.items)]
    for known in ({}, handles):
        sent.append(dialect.whole(job, known))
        sent.append(dialect.prefill(job, known, dialect.rendezvous(job, 1) or None))
        sent.append(dialect.decode(job, known, {"transfer_id": "t"}, "http://m/v1/metaserver"))
    for one in sent:
        written = openai.encoded(one, job)
        whole = b"".join(written) if isinstance(written, list) else written
        if not isinstance(orjson.loads(whole), dict):
            raise AssertionError("what an engine would get is no JSON object")


def part(data: bytes, dice: Random) -> bool:
    """What a language server sends to the virtual encoder."""
    try:
        pieces.cut([pieces.read(data)])
    except BadRequest:
        return False
    return True


def large(data: bytes, dice: Random) -> bool:
    """A body so large that its media are cut out first: it must read as it would in one piece."""
    filled = data.replace(b";base64,", b";base64," + b"A" * (splice.LARGE + dice.randrange(8)), 1)
    try:
        job = openai.parse(filled, Api.CHAT, "id", Identity(), limits=LIMITS)
    except BadRequest:
        return False
    if orjson.loads(b"".join(_listed(splice.dumps(job.body)))) != orjson.loads(filled):
        raise AssertionError("a body changed on its way")
    return True


def _listed(written: Any) -> list[Any]:
    return written if isinstance(written, list) else [written]


def url(data: bytes, dice: Random) -> bool:
    """A media URL: what is let through leads to no private address that is written in it."""
    text = data.decode("utf-8", "replace")
    try:
        found = LIMITS.rules.judge(text) if LIMITS.rules else None
    except BadRequest:
        return False
    if isinstance(found, Remote):
        host = (
            found.origin.partition("://")[2].rpartition("]")[0].lstrip("[")
            or found.origin.rpartition("/")[2].partition(":")[0]
        )
        try:
            public = is_public(host)
        except ValueError:
            public = not host.rstrip(".").rpartition(".")[2].isdigit()
        if not public or any(char <= " " for char in found.path):
            raise AssertionError(f"let through: {found}")
    return True


def header(data: bytes, dice: Random) -> bool:
    """The bytes of media: whatever they are, their size is told after a bounded number of looks."""
    looks = 0

    def more(start: int, count: int) -> bytes:
        nonlocal looks
        looks += 1
        return data[start : start + count]

    head, nbytes = data[: dice.choice((16, 64, len(data)))], dice.choice((len(data), len(data), 1 << 40))
    shape = formats.measure(dice.choice(("image", "video", "audio")), head, nbytes, dice.choice((None, more, more)))
    if looks > _MEDIA_LOOKS * 8:
        raise AssertionError(f"{looks} looks")
    told = [shape.width, shape.height, shape.frames, shape.seconds]
    if any(value is not None and value <= 0 for value in told):
        raise AssertionError(f"an impossible shape: {shape}")
    return any(value is not None for value in told)


def base64(data: bytes, dice: Random) -> bool:
    """Base64 of media: hashed only if there is one way to read it."""
    found: Media | None = splice.digest(data, b"")
    if found is not None and (decoded := splice.decode(data)) is not None and len(decoded) != found.nbytes:
        raise AssertionError("a length that is none")
    return found is not None


def packed(data: bytes, dice: Random) -> bool:
    """A compressed body: unpacked within its limit."""
    try:
        out = unpack(data, dice.choice(("gzip", "zstd", "x-gzip", "br", "identity")), _UNPACKED)
    except HttpError:
        return False
    if len(out) > max(_UNPACKED, len(data)):
        raise AssertionError(f"{len(out)} bytes")
    return True


# ---- engines' answers


def _cuts(data: bytes, dice: Random) -> Sequence[bytes]:
    """`data` as it might come from the network."""
    at = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice((0, 1, 3, 9))))
    return [data[a:b] for a, b in itertools.pairwise((0, *at, len(data)))]


def events(data: bytes, dice: Random) -> bool:
    """An event stream: no byte is lost or changed, wherever it was cut."""
    splitter = Splitter(limit=1 << 16)
    try:
        raws = [event.raw for chunk in _cuts(data, dice) for event in splitter.feed(chunk)]
    except EventTooLong:
        return False
    raws += [event.raw for event in splitter.end()]
    if b"".join(raws) + splitter.rest != data:
        raise AssertionError("bytes were lost")
    return bool(raws)


def stream(data: bytes, dice: Random) -> bool:
    """An engine's stream on its way to the client: the same wherever it was cut."""
    first, second = _relayed([data]), _relayed(_cuts(data, dice))
    if first != second:
        raise AssertionError(f"{first} in one piece, {second} in several")
    return first[1]


def _relayed(chunks: Sequence[bytes]) -> tuple[bytes, bool, str]:
    check, out = StreamCheck(Stage.DECODE), b""
    for chunk in (*filter(None, chunks), b""):
        out += check.feed(chunk)
        if check.done or check.error is not None:
            break
    return out, check.done, "" if check.error is None else check.error.message


def _job() -> Job:
    return openai.parse(_PLAIN_CHAT, Api.CHAT, "id", Identity())


_JOB = _job()


def tape(data: bytes, dice: Random) -> bool:
    """An answer that could go on elsewhere, whole or streamed."""
    instance = dice.choice(_INSTANCES)
    kept = Tape(_JOB, _SPEAKERS(instance), resumes=True)
    try:
        if (answer := _answer(data)) is not None:
            kept.whole(answer)
        else:
            for chunk in _cuts(data, dice):
                kept.feed(chunk)
        kept.check()
    except ProxyError as error:
        kept.usable(error)
        return False
    return True


def _answer(data: bytes) -> bytes | None:
    """`data` if it is what `relay.whole` lets through."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    well = isinstance(parsed, dict) and "error" not in parsed and isinstance(parsed.get("choices"), list)
    return data if well else None


def reply(data: bytes, dice: Random) -> bool:
    """An engine's own words, well or not."""
    Refused(dice.choice((200, 400, 404, 500, 999)), data, stage=Stage.ENCODE, retry_after=dice.choice((None, "1", "x")))
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(parsed, dict):
        return False
    within_200(parsed, stage=Stage.DECODE).json()
    dialect = _SPEAKERS(dice.choice(_INSTANCES))
    for read in (lambda: dialect.read_encode(_JOB.items, parsed), lambda: dialect.read_prefill(parsed)):
        try:
            found = read()
        except (BadReply, NotImplementedError):
            return False
        for handle in found.values():
            if isinstance(handle, Handle):
                grid_of(handle.metadata)
    return True


# ---- HTTP


class Http:
    """A client's connection, or with `answers` an engine's. Both within a running loop, which `bench.fuzz` has."""

    def __init__(self, peers: Connected) -> None:
        self._peers = peers

    def requests(self, data: bytes, dice: Random) -> bool:
        return self._peers.served(_cuts(data, dice))

    def answers(self, data: bytes, dice: Random) -> bool:
        return self._peers.answered(_cuts(data, dice))


def targets(peers: Connected) -> list[Target]:
    http = Http(peers)
    return [
        Target("request body", bodies.bodies, body, 30),
        Target("large request body", bodies.bodies, large, 4),
        Target("encoder call", bodies.encoder_calls, part, 5),
        Target("media URL", lambda: bodies.urls().map(str.encode), url, 10),
        Target("media header", bodies.media, header, 12),
        Target("base64", bodies.texts, base64, 2),
        Target("compressed body", bodies.packed, packed, 3),
        Target("HTTP requests", wire.requests, http.requests, 10),
        Target("HTTP answers", wire.answers, http.answers, 8),
        Target("events", wire.streams, events, 4),
        Target("streamed answer", wire.streams, stream, 6),
        Target("kept answer", lambda: wire.streams() | wire.replies(), tape, 3),
        Target("engine's reply", wire.replies, reply, 3),
    ]
