"""How fast the engines' cores are beside `transformers` doing the same work, in one process and one run.

Prefill and decode go through the language engine's runner, images through the encoder's model, both on one small
checkpoint in float32; HTTP and transfers are not in these figures. Every compared pair is measured in turns, and the
medians are compared. `--model DIR` measures a checkpoint of your own.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from bench.pictures import image_file
from bench.reference import Reference, load_reference
from bench.report import Report, add_arguments
from deploy.up import tiny_checkpoint
from engines.encoder.cutting import Prepared
from engines.encoder.model import VisionModel
from engines.language.kv import KVCache, KVLayout
from engines.language.model import LanguageModel
from engines.language.runner import Runner
from engines.language.sequence import SamplingParams, Scheduled, Sequence

BLOCK_SIZE = 16
CONTEXT = 64
STEPS = 16
BATCHES = (1, 8, 32)
PROMPTS = (512, 2048)
PICTURES = ((448, 336), (336, 448), (512, 288), (280, 280))

NOT_SLOWER = 0.97
"""The same forward on both sides differs by 2 % from run to run."""

Work = Callable[[], float]  # does it once; seconds


@dataclass(frozen=True)
class Ours:
    """The language engine's model side with a cache that holds every benchmark's sequences."""

    runner: Runner
    blocks: itertools.count[int]

    @classmethod
    def load(cls, folder: Path) -> Ours:
        model = LanguageModel.load(folder, torch.float32)
        facts = model.facts
        layout = KVLayout(facts.num_layers, 4096, BLOCK_SIZE, facts.num_kv_heads, facts.head_dim, torch.float32)
        return cls(Runner(model, KVCache(layout)), itertools.count())

    def sequences(self, count: int, prompt: list[int], room: int) -> list[Sequence]:
        """Fresh sequences with blocks for `room` more tokens each; blocks are used round and round."""
        need = -(-(len(prompt) + room) // BLOCK_SIZE)
        tables = [[next(self.blocks) % 4096 for _ in range(need)] for _ in range(count)]
        params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
        return [
            Sequence(f"s{n}", list(prompt), len(prompt), params, block_table=table) for n, table in enumerate(tables)
        ]

    def step(self, sequences: list[Sequence]) -> None:
        """Run everything that is not computed yet, and append the sampled tokens."""
        batch = [Scheduled(seq, seq.num_computed, seq.remaining, sample=True) for seq in sequences]
        for seq, sampled in zip(sequences, self.runner.run(batch), strict=True):
            seq.num_computed = seq.num_tokens
            seq.token_ids.append(sampled.token_id)

    def steps(self, sequences: list[Sequence], count: int) -> None:
        for _ in range(count):
            self.step(sequences)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def prefill_ours(ours: Ours, prompt: list[int]) -> Work:
    def work() -> float:
        sequences = ours.sequences(1, prompt, room=1)
        return timed(lambda: ours.step(sequences))

    return work


def prefill_theirs(reference: Reference, prompt: list[int]) -> Work:
    ids = torch.tensor([prompt])

    @torch.inference_mode()
    def forward() -> None:
        output = reference.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        output.logits[0, -1].argmax().item()

    return lambda: timed(forward)


def decode_ours(ours: Ours, batch: int, prompt: list[int]) -> Work:
    """Seconds for `STEPS` tokens of each of `batch` sequences, prefill not counted."""

    def work() -> float:
        sequences = ours.sequences(batch, prompt, room=STEPS + 1)
        ours.step(sequences)
        return timed(lambda: ours.steps(sequences, STEPS))

    return work


def decode_theirs(reference: Reference, batch: int, prompt: list[int]) -> Work:
    ids = torch.tensor([prompt] * batch)

    @torch.inference_mode()
    def work() -> float:
        output = reference.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache, token = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)

        def steps() -> None:
            nonlocal token
            for _ in range(STEPS):
                logits = reference.model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)

        return timed(steps)

    return work


def prepare(reference: Reference) -> list[Prepared]:
    prepared = []
    for number, (width, height) in enumerate(PICTURES):
        picture = Image.open(io.BytesIO(image_file(width, height, seed=number)))
        pixels = reference.images(images=[picture], return_tensors="pt")
        t, h, w = pixels["image_grid_thw"][0].tolist()
        tokens = t * h * w // reference.images.merge_size**2
        prepared.append(Prepared(pixels["pixel_values"], (t, h, w), tokens))
    return prepared


def encode_ours(model: VisionModel, items: list[Prepared]) -> Work:
    outputs = [torch.empty(item.tokens, model.width) for item in items]
    return lambda: timed(lambda: model.encode(items, outputs))


def encode_theirs(reference: Reference, items: list[Prepared]) -> Work:
    grids = [torch.tensor([item.grid]) for item in items]

    @torch.inference_mode()
    def forward() -> None:
        for item, grid in zip(items, grids, strict=True):
            reference.model.model.get_image_features(item.pixels, grid)

    return lambda: timed(forward)


def interleave(works: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one unmeasured turn; the order turns round each time, so none is always second."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            seconds[name].append(works[name]())
    return {name: median(values) for name, values in seconds.items()}


def measure(folder: Path, repeats: int) -> Report:
    report = Report("engines")
    progress = report.progress
    progress("loading the engines' model and the reference")
    ours, reference, vision = Ours.load(folder), load_reference(folder), VisionModel.load(folder, dtype="float32")
    text = [index % 200 for index in range(max(PROMPTS))]

    for length in PROMPTS:
        progress(f"prefill {length} tokens")
        works = {
            "triptych": prefill_ours(ours, text[:length]),
            "transformers": prefill_theirs(reference, text[:length]),
        }
        seconds = interleave(works, repeats)
        compare(report, f"prefill {length} tokens", "tokens/s", length, seconds)
        report.bar(f"prefill {length}: ours / transformers", ratio(seconds), NOT_SLOWER, ">=")

    rate: dict[int, float] = {}
    for batch in BATCHES:
        progress(f"decode at batch {batch}")
        prompt = text[:CONTEXT]
        works = {
            "triptych": decode_ours(ours, batch, prompt),
            "transformers": decode_theirs(reference, batch, prompt),
        }
        seconds = interleave(works, repeats)
        compare(report, f"decode batch {batch}", "tokens/s", batch * STEPS, seconds)
        rate[batch] = batch * STEPS / seconds["triptych"]
    report.bar("decode: batch 32 / one by one", rate[32] / rate[1], 5.0, ">=")

    progress(f"encode {len(PICTURES)} images")
    items = prepare(reference)
    seconds = interleave(
        {"triptych": encode_ours(vision, items), "transformers": encode_theirs(reference, items)}, repeats
    )
    compare(report, f"encode {len(PICTURES)} images", "images/s", len(PICTURES), seconds)
    report.bar("encode: ours / transformers", ratio(seconds), NOT_SLOWER, ">=")
    return report


def ratio(seconds: Mapping[str, float]) -> float:
    return seconds["transformers"] / seconds["triptych"]


def compare(report: Report, name: str, unit: str, amount: float, seconds: Mapping[str, float]) -> None:
    rates: dict[str, Any] = {who: round(amount / value, 1) for who, value in seconds.items()}
    report.row(work=name, unit=unit, **rates, ratio=round(ratio(seconds), 2))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: a tiny random Qwen3-VL")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="torch threads, for both sides")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.model or asyncio.run(tiny_checkpoint("qwen3_vl", Path(".checkpoints/qwen3_vl")))
    sys.exit(measure(folder, arguments.repeats).emit(arguments))


if __name__ == "__main__":
    main()
