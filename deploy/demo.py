"""`make demo` and `make smoke`: one request with two real image files through a whole deployment.

Starts `triptych up`, asks by the `openai` client, prints route, answer and timings. The demo then stays up until
Ctrl-C; the smoke test compares the answer with that of one `transformers` model and fails unless they are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from bench.pictures import image_file, image_part
from deploy.processes import Child, StartError
from deploy.up import tiny_checkpoint

ROOT = Path(__file__).parents[1]
QUESTION = "What do these two pictures have in common?"
MAX_TOKENS = 48
TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What one streamed request brought: text, headers, and seconds as the client saw them."""

    model: str
    text: str
    route: str
    stages: str
    first_token: float
    total: float
    tokens: int


def pictures() -> list[tuple[bytes, str]]:
    """Two drawings of different size as (file, MIME type), one PNG and one JPEG."""
    return [(image_file(320, 240, seed=1), "image/png"), (image_file(200, 280, 2, "JPEG"), "image/jpeg")]


def messages() -> list[dict[str, Any]]:
    parts = [image_part(data, mime) for data, mime in pictures()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


async def ask(url: str) -> Answer:
    """One streamed chat completion; the text is echoed as it arrives."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT, max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        started = time.perf_counter()
        first, text, tokens = 0.0, "", 0
        create = client.chat.completions.with_raw_response.create
        raw = await create(
            model=model, messages=messages(), max_tokens=MAX_TOKENS, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        print("answer   ", end="", flush=True)
        async for chunk in raw.parse():
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                first = first or time.perf_counter() - started
                text += piece
                print(piece, end="", flush=True)
        print()
        headers = raw.headers
        route, stages = headers.get("x-triptych-route", ""), headers.get("server-timing", "")
        return Answer(model, text, route, stages, first, time.perf_counter() - started, tokens)


def show(answer: Answer) -> None:
    print(f"route    {answer.route}")
    stages = ", ".join(f"{name} {milliseconds} ms" for name, milliseconds in durations(answer.stages))
    decode = answer.total - answer.first_token
    rate = f" ({decode / max(answer.tokens - 1, 1) * 1e3:.1f} ms per token)"
    print(f"stages   {stages}, decode {decode * 1e3:.1f} ms{rate}")
    print(
        f"client   first token {answer.first_token * 1e3:.1f} ms, {answer.tokens} tokens in {answer.total * 1e3:.1f} ms"
    )


def durations(server_timing: str) -> list[tuple[str, str]]:
    """
    >>> durations("encode;dur=12.3, ttft;dur=60.0")
    [('encode', '12.3'), ('ttft', '60.0')]
    """
    entries = [entry.strip().split(";dur=") for entry in server_timing.split(",") if ";dur=" in entry]
    return [(name, milliseconds) for name, milliseconds in entries]


def expected(model: Path) -> str:
    """The reference: one `transformers` model in float32 on the same folder."""
    from bench.reference import load_reference

    parts: list[dict[str, Any]] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    images = [data for data, _ in pictures()]
    return load_reference(model).answer([{"role": "user", "content": parts}], images, MAX_TOKENS)


def curl_line(url: str, model: str, folder: Path) -> str:
    """Write the demo's request beside the checkpoint, and say how to send it again."""
    body = {"model": model, "messages": messages(), "max_tokens": MAX_TOKENS, "stream": True, "temperature": 0}
    file = folder / "demo-request.json"
    file.write_text(json.dumps(body))
    return f"curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d @{file.relative_to(ROOT)}"


async def run(arguments: argparse.Namespace) -> int:
    model = await tiny_checkpoint(arguments.family, ROOT / ".checkpoints" / arguments.family)
    flags = ["--model", str(model), "--port", str(arguments.port), "--topology", arguments.topology]
    deployment = Child("up", "deploy.up", flags, lambda _, line: print(line, file=sys.stderr, flush=True))
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"starting {arguments.topology} on {model.name}", flush=True)
    try:
        url = await deployment.start(timeout=300)
        answer = await ask(url)
        show(answer)
        if arguments.smoke:
            return verdict(answer.text, await asyncio.to_thread(expected, model))
        print(f"\n{curl_line(url, answer.model, model.parent)}\n\nup at {url}/v1 until Ctrl-C", flush=True)
        await stopped.wait()
        return 0
    finally:
        await deployment.stop(grace=30)


def verdict(answer: str, reference: str) -> int:
    if answer == reference:
        print("smoke    ok: the answer equals the reference model's")
        return 0
    print("smoke    FAILED: the answer differs from the reference model's")
    print(f"  got       {answer!r}\n  expected  {reference!r}")
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="compare with the reference model and stop")
    parser.add_argument("--family", choices=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), default="qwen3_vl")
    parser.add_argument("--topology", default="1e1p1d")
    parser.add_argument(
        "--port", type=int, default=None, help="default: 8000 for the demo, any free port for the smoke test"
    )
    arguments = parser.parse_args()
    if arguments.port is None:
        arguments.port = 0 if arguments.smoke else 8000
    try:
        sys.exit(asyncio.run(run(arguments)))
    except StartError as error:
        sys.exit(f"the deployment did not start: {error}")


if __name__ == "__main__":
    main()
