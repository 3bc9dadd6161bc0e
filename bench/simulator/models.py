"""What engines cost: seconds, tokens and bytes, from architecture and hardware, with the source of every constant.

Analytic models, to be replaced by measured ones: anything with the same methods. Vision-token rounding and FLOPs are
exact for the architectures; host and effective rates are fits to published measurements, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from bench.simulator.requests import Media


class Cost(NamedTuple):
    """Of one item. `host` and `gpu` are seconds on an encoder of speed 1."""

    tokens: int
    nbytes: int  # of its embedding
    host: float  # decoding, resizing, hashing, moving to the GPU, launching
    gpu: float


class Vision(Protocol):
    """An encoder's model on its hardware."""

    def cost(self, media: Media) -> Cost: ...


class Language(Protocol):
    """A language model on its hardware."""

    @property
    def kv_bytes(self) -> int:
        """Per token."""

    @property
    def ranks(self) -> int:
        """GPUs that each need a copy of an embedding."""

    def prefill(self, tokens: int, context: int) -> float:
        """Seconds of a chunk of `tokens` that follows `context` others."""

    def step(self, batch: int, kv: int) -> tuple[float, float]:
        """Seconds of a decode step of `batch` sequences with `kv` tokens together, and how many more each later step
        of the same batch takes than the one before it."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU. `encode` is FLOP/s that a vision tower reaches there, `launch` seconds before each item's."""

    name: str
    encode: float
    launch: float = 1.3e-3


H100 = Hardware("H100", 443e12)  # 45 % of 989 TF: aiconfigurator's silicon data for Qwen3-VL, t = 1.3 ms + F / 443 TF/s
H20 = Hardware(
    "H20", 0.84 * 148e12
)  # of 148 TF: a fit to `scenarios.seed001`; TTFT slopes of SGLang there suggest 0.70


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision transformer's architecture (its config.json), and the width of what it gives out per vision token."""

    side: int  # pixels that a vision token covers, each way
    depth: int
    hidden: int
    mlp: int  # weights of one layer's MLP, as a multiple of hidden
    window: int  # patches that attend to each other in layers that are not full; 0: all layers are full
    full: int  # layers of full attention
    mergers: int
    merged: int  # width of a merger's input: 4 patches
    output: int  # width of the language model
    max_tokens: int = 16384

    def tokens(self, width: int, height: int) -> int:
        """Sides are rounded to whole vision tokens, and scaled down where there are too many."""
        across, down = max(1, round(width / self.side)), max(1, round(height / self.side))
        if across * down > self.max_tokens:
            scale = (self.max_tokens / (across * down)) ** 0.5
            across, down = max(1, int(across * scale)), max(1, int(down * scale))
        return across * down

    def flops(self, tokens: int) -> float:
        patches = 4 * tokens
        linear = self.depth * (4 * self.hidden**2 + self.mlp * self.hidden) * 2 * patches
        attention = 4 * patches * self.hidden * (self.full * patches + (self.depth - self.full) * self.window)
        merging = self.mergers * tokens * (self.merged**2 + self.merged * self.output) * 2
        return linear + attention + merging

    def embedding_bytes(self) -> int:
        """Per vision token, in bfloat16: deepstack sends one width per merger."""
        return 2 * self.mergers * self.output


def qwen2_5_vl(output: int) -> Tower:
    return Tower(28, 32, 1280, 3 * 3420, 64, 4, 1, 5120, output)


def qwen3_vl(output: int) -> Tower:
    return Tower(32, 27, 1152, 2 * 4304, 0, 27, 4, 4608, output)


@dataclass(frozen=True, slots=True)
class Host:
    """What a CPU process does for one item, in seconds: fixed, and per million pixels."""

    fixed: float
    per_megapixel: float


# A fit to `scenarios.seed000` (180 ms per 720p image) and `seed001` (640 ms per 2000² image), whose engines spent far
# longer on the way to the GPU than on it. SGLang's own figure for that time is 117 to 131 ms per 720p image on an H20.
SGLANG_2025_HOST = Host(0.0415, 0.15)
LEAN_HOST = Host(4e-3, 2e-3)  # a processor alone today: 5 to 12 ms up to 4 Mpx (vLLM #50390)


@dataclass(frozen=True)
class TowerOn:
    """A Vision: a tower on hardware, fed by a host process."""

    tower: Tower
    hardware: Hardware
    host: Host = LEAN_HOST
    _known: dict[tuple[int, int, int], Cost] = field(default_factory=dict, compare=False, repr=False)

    def cost(self, media: Media) -> Cost:
        key = media.width, media.height, media.frames
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._cost(*key)
        return known

    def _cost(self, width: int, height: int, frames: int) -> Cost:
        tokens = self.tower.tokens(width, height)
        pairs = (frames + 1) // 2  # two frames make one temporal patch
        host = self.host.fixed + frames * self.host.per_megapixel * width * height / 1e6
        gpu = self.hardware.launch + pairs * self.tower.flops(tokens) / self.hardware.encode
        return Cost(pairs * tokens, pairs * tokens * self.tower.embedding_bytes(), host, gpu)


@dataclass(frozen=True, slots=True)
class Linear:
    """A Language whose times are linear in tokens, sequences and KV."""

    kv_bytes: int
    ranks: int
    per_token: float  # of prefill
    fixed: float = 0.0  # of a prefill step
    step_fixed: float = 0.0
    per_sequence: float = 0.0
    per_kv: float = 0.0  # per token of KV

    def prefill(self, tokens: int, context: int) -> float:
        return self.fixed + tokens * self.per_token

    def step(self, batch: int, kv: int) -> tuple[float, float]:
        return self.step_fixed + batch * self.per_sequence + kv * self.per_kv, batch * self.per_kv


class Speed(NamedTuple):
    """Seconds per prefilled token, per prefill step, and of a decode step: fixed, per sequence, per token of KV."""

    per_token: float
    fixed: float
    step: float
    per_sequence: float
    per_kv: float


@dataclass(frozen=True, slots=True)
class Model:
    """A released vision language model; its times per token and step are by hardware and number of GPUs."""

    name: str
    tower: Tower
    kv_bytes: int
    speeds: Mapping[tuple[str, int], Speed]

    def vision(self, hardware: Hardware, host: Host = LEAN_HOST) -> TowerOn:
        """An encoder on one GPU."""
        return TowerOn(self.tower, hardware, host)

    def language(self, hardware: Hardware, ranks: int) -> Linear:
        """An engine on `ranks` GPUs, tensor parallel. Raises KeyError where nothing is known of that."""
        return Linear(self.kv_bytes, ranks, *self.speeds[hardware.name, ranks])


# On an H100: least squares, of relative errors, through the kernel times of aiconfigurator 0.12 for prompts of 1k to
# 16k tokens and 1 to 128 sequences of 4k (30B: 8k). Within 4 % for the 7B; within 27 % for the 30B, whose steps grow
# by less than the batch as its sequences share experts. KV is read at 80 % of 3.35 TB/s.
QWEN2_5_VL_7B = Model(
    "Qwen2.5-VL-7B",
    qwen2_5_vl(3584),
    57_344,
    {
        ("H100", 1): Speed(23.0e-6, 0.0, 5.95e-3, 0.0, 21e-9),
        ("H100", 4): Speed(7.9e-6, 1.2e-3, 2.41e-3, 2e-6, 5.3e-9),
    },
)
QWEN3_VL_30B = Model(
    "Qwen3-VL-30B-A3B",
    qwen3_vl(2048),
    98_304,
    {
        ("H100", 1): Speed(17.1e-6, 12.0e-3, 4.71e-3, 195e-6, 37e-9),
        ("H100", 4): Speed(8.25e-6, 6.0e-3, 3.28e-3, 55e-6, 9.2e-9),
        ("H100", 8): Speed(7.3e-6, 5.0e-3, 2.5e-3, 30e-6, 4.6e-9),  # decode: not told, scaled from 4 GPUs
    },
)

# On H20s nothing is published but whole runs. Time per prompt token and per decode step are fits to `scenarios.seed001`
# (prefill of 1.02 and 0.57 s there: 72 % and 32 % of the GPUs' FLOPs); the time per sequence is assumed.
QWEN2_5_VL_72B = Model(
    "Qwen2.5-VL-72B", qwen2_5_vl(8192), 327_680, {("H20", 8): Speed(169e-6, 0.0, 17.1e-3, 100e-6, 0.0)}
)
QWEN3_VL_235B = Model(
    "Qwen3-VL-235B-A22B", qwen3_vl(4096), 192_512, {("H20", 8): Speed(117.5e-6, 0.0, 13.3e-3, 100e-6, 0.0)}
)
