"""A real SGLang server as a child process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.server import ROOT, Server

FOLDER = ROOT / ".conformance" / "sglang"
VERSIONS = ("0.5.10", "0.5.23")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DO_NOT_TRACK": "1",
}
ENCODER = ("--encoder-only",)
LANGUAGE = (
    *("--language-only", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-overlap-schedule", "--disable-radix-cache", "--disable-cuda-graph"),
    *("--max-total-tokens", "4096", "--skip-server-warmup"),
)


@dataclass
class Sglang(Server):
    """`arguments`: ENCODER, or LANGUAGE with its `--encoder-urls`."""

    version: str
    arguments: tuple[str, ...]

    @property
    def log(self) -> Path:
        return FOLDER / "logs" / f"{self.version}-{self.name}.log"

    def command(self) -> Sequence[str]:
        python = str(FOLDER / self.version / "bin" / "python")
        options = ["--model-path", str(self.model), "--served-model-name", "tiny", "--host", "127.0.0.1"]
        options += ["--device", "cpu", "--port", str(self.port)]
        return [python, "-m", "sglang.launch_server", *options, *self.arguments]

    def environment(self) -> Mapping[str, str]:
        return ENVIRONMENT
