"""The engines' cores on one device with random weights at a served model's true shape, made there: nothing is read from
files. Each figure stands beside `transformers` with the same weights, and as a share of what the device does at best.

    encode     images of 1080p through the encoder's model       FLOP/s of the peak
    prefill    one prompt in one step of the runner              FLOP/s of the peak
    decode     batches of the runner                             the roofline's time over ours
    waiting    between two tokens, through the whole engine, while prompts of others are prefilled
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from bench.report import Report
from bench.shapes import Peak, decode_floor, grid_of, prefill_flops, tower_flops
from bench.stepping import Ours, Work, decode, interleave, prefill, timed
from engines import weights
from engines.encoder.cutting import Prepared
from engines.encoder.model import VisionModel
from engines.encoder.towers import tower_of
from engines.encoder.varlen import implementation
from engines.families import family_of
from engines.language.engine import LanguageEngine
from engines.language.kv import KVCache, KVLayout
from engines.language.model import LanguageModel, ModelFacts
from engines.language.runner import Runner, runner_of
from engines.language.scheduler import Limits
from engines.language.sequence import SamplingParams, Sequence
from engines.language.varlen import block_size_for

STAGES = ("encode", "prefill", "decode", "waiting")

PICTURE = (1920, 1080)
BATCH_PATCHES = 16384
PROMPTS = (2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXT = 1024
STEPS = 32
KV_TOKENS = 131072

DECODING = 16
TOKENS = 256
OTHERS = 4096
CHUNK = 256

PROMISED, PROMISED_PROMPT = "Qwen2.5-VL-7B", 4096
"""The shape that has bars for prefill, of so many tokens, and decode; each tower has its own."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A shape to measure, where, and in which dtype."""

    name: str
    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    peak: Peak


def measure(report: Report, subject: Subject, repeats: int, stages: Collection[str] = STAGES) -> None:
    """Add the subject's rows and bars of these stages."""
    with tempfile.TemporaryDirectory() as folder:
        subject.config.save_pretrained(folder)
        facts = ModelFacts.read(Path(folder))
    if "encode" in stages:
        encode(report, subject, repeats)
        tidy(subject.device)
    if not set(stages) - {"encode"}:
        return
    model = language_model(subject, facts)
    ours = Ours(runner_over(model))
    theirs = theirs_over(model, subject)
    if "prefill" in stages:
        prefills(report, subject, ours, theirs, repeats)
    if "decode" in stages:
        decodes(report, subject, ours, theirs, repeats)
    if "waiting" in stages:
        waiting(report, subject, ours.runner)
    del model, ours, theirs
    tidy(subject.device)


def tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- weights -----------------------------------------------------------------------------------------------------------


def filled(module: nn.Module, subject: Subject) -> nn.Module:
    """Random weights for a module built on meta; norms are one and biases nothing, so that numbers keep their size."""
    state = {}
    for name, tensor in module.state_dict().items():
        made = torch.empty(tensor.shape, dtype=subject.dtype, device=subject.device)
        state[name] = made.normal_(0, 0.02) if made.ndim > 1 else made.fill_(not name.endswith("bias"))
    return shared(module, state, subject.device)


def shared(module: nn.Module, state: dict[str, torch.Tensor], device: torch.device) -> nn.Module:
    """A module built on meta, over tensors that are there."""
    module.load_state_dict(state, strict=True, assign=True)
    weights.restore_buffers(module, str(device))
    return module.requires_grad_(False).eval()


def language_model(subject: Subject, facts: ModelFacts) -> LanguageModel:
    model = weights.on_meta(lambda: LanguageModel(subject.config))
    model.facts = facts
    filled(model, subject)
    if getattr(subject.config, "tie_word_embeddings", False):
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def theirs_over(model: LanguageModel, subject: Subject) -> nn.Module:
    """transformers' text model with its own attention, over our weights."""
    text = subject.config.text_config
    theirs = weights.on_meta(lambda: AutoModel.from_config(text, attn_implementation="sdpa"))
    return shared(theirs, model.model.state_dict(), subject.device)


def runner_over(model: LanguageModel) -> Runner:
    """As `triptych language` puts it together on this device."""
    facts = model.facts
    size = block_size_for("auto", model.dtype, model.device)
    layout = KVLayout(facts.num_layers, KV_TOKENS // size, size, facts.num_kv_heads, facts.head_dim, model.dtype)
    cache = KVCache(layout, device=str(model.device))
    return runner_of(model, cache, decoding=(max(BATCHES), CONTEXT + TOKENS))


# -- works -------------------------------------------------------------------------------------------------------------


def encode(report: Report, subject: Subject, repeats: int) -> None:
    config, device = subject.config, subject.device
    family, grid = family_of(subject.name, config), grid_of(*PICTURE, config)
    chosen = implementation(device, subject.dtype)
    tower = weights.on_meta(lambda: tower_of(family, config, chosen))
    filled(tower.module, subject)
    model = VisionModel(tower, config, weights.LoadReport((), 0), str(device))
    plain = weights.on_meta(lambda: tower_of(family, config))
    shared(plain.module, tower.module.state_dict(), device)

    items = [prepared(grid, config) for _ in range(max(1, BATCH_PATCHES // (grid[1] * grid[2])))]
    items = [model.stage(item) for item in items]
    outputs = [torch.empty(item.tokens, model.width, dtype=subject.dtype) for item in items]
    if device.type == "cuda":
        outputs = [output.pin_memory() for output in outputs]

    @torch.inference_mode()
    def one_by_one() -> None:
        for item, output in zip(items, outputs, strict=True):
            levels = plain(item.pixels.to(device), [item])
            output.copy_(torch.cat(levels, -1))

    report.progress(f"{subject.name}: encode {len(items)} images of 1080p")
    works: dict[str, Work] = {
        "triptych": lambda: timed(lambda: model.encode(items, outputs)),
        "transformers": lambda: timed(one_by_one),
    }
    seconds = interleave(works, repeats)
    share = len(items) * tower_flops(grid, config) / seconds["triptych"] / subject.peak.flops
    row(report, subject, "encode 1080p", ("images/s", len(items)), seconds, share)
    report.bar(f"{subject.name}: encode 1080p, share of peak FLOP/s", share, 0.45, ">=")


def prepared(grid: tuple[int, int, int], config: PretrainedConfig) -> Prepared:
    vision = config.vision_config
    pixels = torch.rand(grid[1] * grid[2], 3 * vision.temporal_patch_size * vision.patch_size**2)
    return Prepared(pixels, grid, grid[1] * grid[2] // vision.spatial_merge_size**2)


def prefills(report: Report, subject: Subject, ours: Ours, theirs: Any, repeats: int) -> None:
    head = ours.runner.model.lm_head
    for length in PROMPTS:
        report.progress(f"{subject.name}: prefill {length} tokens")
        prompt = text(length, subject.config)
        ids = torch.tensor([prompt], device=subject.device)

        @torch.inference_mode()
        def forward(ids: torch.Tensor = ids) -> None:
            head(theirs(ids, use_cache=True).last_hidden_state[:, -1]).argmax(-1).item()

        works: dict[str, Work] = {
            "triptych": prefill(ours, prompt),
            "transformers": lambda forward=forward: timed(forward),  # type: ignore[misc]
        }
        seconds = interleave(works, repeats)
        share = prefill_flops(length, subject.config) / seconds["triptych"] / subject.peak.flops
        row(report, subject, f"prefill {length} tokens", ("tokens/s", length), seconds, share)
        if subject.name == PROMISED and length == PROMISED_PROMPT:
            report.bar(f"{subject.name}: prefill {length}, share of peak FLOP/s", share, 0.5, ">=")


def decodes(report: Report, subject: Subject, ours: Ours, theirs: Any, repeats: int) -> None:
    prompt, itemsize = text(CONTEXT, subject.config), subject.dtype.itemsize
    for batch in BATCHES:
        report.progress(f"{subject.name}: decode at batch {batch}")
        works = {
            "triptych": decode(ours, batch, prompt, STEPS),
            "transformers": decode_theirs(ours.runner.model.lm_head, theirs, batch, prompt, subject.device),
        }
        seconds = interleave(works, repeats)
        floor = decode_floor(batch, CONTEXT + STEPS // 2, subject.config, itemsize, subject.peak)
        share = STEPS * floor / seconds["triptych"]
        row(report, subject, f"decode batch {batch}", ("tokens/s", batch * STEPS), seconds, share)
        if subject.name == PROMISED:
            report.bar(f"{subject.name}: decode batch {batch}, share of the roofline", share, 0.7, ">=")


def decode_theirs(head: nn.Module, model: Any, batch: int, prompt: list[int], device: torch.device) -> Work:
    ids = torch.tensor([prompt] * batch, device=device)

    @torch.inference_mode()
    def work() -> float:
        found = model(ids, use_cache=True)
        cache, token = found.past_key_values, head(found.last_hidden_state[:, -1:]).argmax(-1)
        token.tolist()

        def steps() -> None:
            nonlocal token
            for _ in range(STEPS):
                found = model(token, past_key_values=cache, use_cache=True)
                token = head(found.last_hidden_state).argmax(-1)
                token.tolist()

        return timed(steps)

    return work


def text(length: int, config: PretrainedConfig) -> list[int]:
    return [1 + index % (min(200, config.text_config.vocab_size) - 1) for index in range(length)]


def row(
    report: Report, subject: Subject, work: str, amount: tuple[str, float], seconds: dict[str, float], share: float
) -> None:
    unit, count = amount
    rates = {who: round(count / value, 1) for who, value in seconds.items()}
    ratio = seconds["transformers"] / seconds["triptych"]
    report.row(
        model=subject.name,
        work=work,
        unit=unit,
        **rates,
        ratio=round(ratio, 2),
        share_of_best=round(share, 3),
        device=told(subject.device),
    )
    # said at once, too: a later stage may end the run before its end
    report.progress(f"{subject.name}: {work}: {rates} {unit}, {share:.3f} of the best")


def told(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -- the whole engine --------------------------------------------------------------------------------------------------


def waiting(report: Report, subject: Subject, runner: Runner) -> None:
    """How long sequences wait from token to token while others' prompts are prefilled, chunk by chunk."""
    report.progress(f"{subject.name}: {DECODING} sequences decode while prompts come")
    alone, beside = asyncio.run(gaps(runner, subject.config))
    p50, p99 = median(beside), quantiles(beside, n=100)[98]
    report.row(
        model=subject.name,
        work=f"{DECODING} decode beside prompts of {OTHERS}",
        unit="ms/token",
        triptych=round(1000 * p50, 2),
        p99=round(1000 * p99, 2),
        alone=round(1000 * median(alone), 2),
        device=told(subject.device),
    )
    report.progress(f"{subject.name}: {1000 * p50:.2f} ms from token to token, p99 {1000 * p99:.2f} ms")
    if subject.name == PROMISED:
        report.bar(f"{subject.name}: between tokens beside prefill, p99 / p50", p99 / p50, 1.5)


async def gaps(runner: Runner, config: PretrainedConfig) -> tuple[list[float], list[float]]:
    """Seconds between the tokens of each of `DECODING` sequences: before prompts of others come, and while they do."""
    layout = runner.cache.layout
    limits = Limits(layout.num_blocks, layout.block_size, OTHERS + TOKENS, 2 * DECODING, 2 * OTHERS, False, CHUNK)
    engine = LanguageEngine(limits, runner, runner.cache)
    engine.start()
    times: list[list[float]] = [[] for _ in range(DECODING)]
    settled = asyncio.Event()

    async def run(name: str, prompt: list[int], tokens: int, seen: list[float]) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        async for batch in engine.submit(Sequence(name, list(prompt), len(prompt), params)):
            seen.extend(time.perf_counter() for _ in batch)
            if all(len(seen) >= TOKENS // 4 for seen in times):
                settled.set()

    try:
        async with asyncio.TaskGroup() as group:
            short = text(CONTEXT, config)
            decoding = [group.create_task(run(f"d{n}", short, TOKENS, seen)) for n, seen in enumerate(times)]
            await settled.wait()
            began = ended = time.perf_counter()
            while not any(task.done() for task in decoding):
                await run("p", text(OTHERS, config), 1, [])
                ended = time.perf_counter()
    finally:
        await engine.close()
    pairs = [pair for seen in times for pair in pairwise(seen)]
    started = max(seen[0] for seen in times)
    alone = [b - a for a, b in pairs if started <= a and b <= began]
    return alone, [b - a for a, b in pairs if began <= a and b <= ended]
