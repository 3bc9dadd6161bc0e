"""How fast the engines' cores are beside `transformers` doing the same work, in one process and one run.

Prefill and decode go through the language engine's runner, images through the encoder's cutter and model, all on one
small checkpoint in float32; HTTP and transfers are not in these figures. Every compared pair is measured in turns, and
the medians are compared. `--model DIR` measures a checkpoint of your own.

`--device cuda` measures random weights at the true shapes of served models on a GPU instead, beside `transformers` and
beside what the GPU could do at best: see `bench.device`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import device, shapes
from bench.pictures import draw, image_file
from bench.reference import Reference, load_reference
from bench.report import Report, add_arguments
from bench.stepping import Ours, Work, decode, interleave, prefill, timed
from deploy.up import tiny_checkpoint
from engines.devices import devices_of
from engines.encoder.cutting import Prepared, cutter_of
from engines.encoder.model import VisionModel
from engines.errors import SetupError
from engines.language.kv import KVCache, KVLayout
from engines.language.model import LanguageModel
from engines.language.runner import Runner

BLOCK_SIZE = 16
CONTEXT = 64
STEPS = 16
BATCHES = (1, 8, 32)
PROMPTS = (512, 2048)
PICTURES = ((448, 336), (336, 448), (512, 288), (280, 280))
LARGE = (1920, 1080)
UNSHRUNK = {"shortest_edge": 65_536, "longest_edge": 16_777_216}

NOT_SLOWER = 0.97
"""The same forward on both sides differs by 2 % from run to run."""


def load_ours(folder: Path) -> Ours:
    model = LanguageModel.load(folder, torch.float32)
    facts = model.facts
    layout = KVLayout(facts.num_layers, 4096, BLOCK_SIZE, facts.num_kv_heads, facts.head_dim, torch.float32)
    return Ours(Runner(model, KVCache(layout)))


def prefill_theirs(reference: Reference, prompt: list[int]) -> Work:
    ids = torch.tensor([prompt])

    @torch.inference_mode()
    def forward() -> None:
        output = reference.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        output.logits[0, -1].argmax().item()

    return lambda: timed(forward)


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


def cut_ours(folder: Path, picture: Image.Image) -> Work:
    cutter = cutter_of(folder)
    return lambda: timed(lambda: cutter.cut(picture, UNSHRUNK))


def cut_theirs(reference: Reference, picture: Image.Image) -> Work:
    return lambda: timed(lambda: reference.images(images=[picture], size=UNSHRUNK, return_tensors="pt"))


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


def measure(folder: Path, repeats: int) -> Report:
    report = Report("engines")
    progress = report.progress
    progress("loading the engines' model and the reference")
    ours, reference, vision = load_ours(folder), load_reference(folder), VisionModel.load(folder, dtype="float32")
    text = [index % 200 for index in range(max(PROMPTS))]

    for length in PROMPTS:
        progress(f"prefill {length} tokens")
        works = {
            "triptych": prefill(ours, text[:length]),
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
            "triptych": decode(ours, batch, prompt, STEPS),
            "transformers": decode_theirs(reference, batch, prompt),
        }
        seconds = interleave(works, repeats)
        compare(report, f"decode batch {batch}", "tokens/s", batch * STEPS, seconds)
        rate[batch] = batch * STEPS / seconds["triptych"]
    report.bar("decode: batch 32 / one by one", rate[32] / rate[1], 5.0, ">=")

    progress("cut a 1080p image")
    picture = draw(*LARGE)
    seconds = interleave(
        {"triptych": cut_ours(folder, picture), "transformers": cut_theirs(reference, picture)}, repeats
    )
    compare(report, "cut a 1080p image", "images/s", 1, seconds)
    report.bar("cut a 1080p image: ours / transformers", ratio(seconds), 2.0, ">=")

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
    parser.add_argument("--device", default="cpu", help="cpu, or the GPU that true shapes are measured on, e.g. cuda")
    parser.add_argument("--shapes", default=",".join(shapes.configs()), help="which of them, with commas between")
    parser.add_argument("--stages", default=",".join(device.STAGES), help="what is measured of them, likewise")
    parser.add_argument("--peak-tflops", type=float, help="what the GPU does at most; default: by its name")
    parser.add_argument("--peak-gbytes", type=float, help="GB/s of its memory; default: by its name")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device != "cpu":
        try:
            subjects = subjects_of(arguments)
        except (SetupError, LookupError) as error:
            parser.error(str(error.args[0]))
        sys.exit(on_gpu(subjects, arguments.repeats, arguments.stages.split(",")).emit(arguments))
    folder = arguments.model or asyncio.run(tiny_checkpoint("qwen3_vl", Path(".checkpoints/qwen3_vl")))
    sys.exit(measure(folder, arguments.repeats).emit(arguments))


def subjects_of(arguments: argparse.Namespace) -> list[device.Subject]:
    """What the flags ask for. Raises SetupError, LookupError."""
    chosen = devices_of(arguments.device)[0]
    if arguments.peak_tflops and arguments.peak_gbytes:
        peak = shapes.Peak(arguments.peak_tflops * 1e12, arguments.peak_gbytes * 1e9)
    else:
        peak = shapes.peak_of(device.told(chosen))
    known = shapes.configs()
    names = arguments.shapes.split(",")
    if unknown := set(names) - known.keys():
        raise LookupError(f"--shapes {','.join(unknown)}: known are {', '.join(known)}")
    if unknown := set(arguments.stages.split(",")) - set(device.STAGES):
        raise LookupError(f"--stages {','.join(unknown)}: known are {', '.join(device.STAGES)}")
    return [device.Subject(name, known[name], chosen, torch.bfloat16, peak) for name in names]


def on_gpu(subjects: Sequence[device.Subject], repeats: int, stages: Sequence[str]) -> Report:
    report = Report("engines")
    for subject in subjects:
        device.measure(report, subject, repeats, stages)
    return report


if __name__ == "__main__":
    main()
