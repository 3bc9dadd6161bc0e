"""A real vLLM server as a child process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.scripted.candidates import free_port
from tests.conformance.server import ROOT, Server

FOLDER = ROOT / ".conformance" / "vllm"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CACHE_ROOT": str(FOLDER / "cache"),
    "PYTHONPATH": str(ROOT),  # where --ec-transfer-config finds our connector
}
ARGUMENTS = (
    *("--served-model-name", "tiny", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
    *("--no-enable-prefix-caching", "--max-num-batched-tokens", "8192", "--max-model-len", "4096"),
)


@dataclass
class Vllm(Server):
    """`ec`, `kv`: its transfer configurations."""

    ec: Mapping[str, Any] | None = None
    kv: Mapping[str, Any] | None = None
    side_port: int = field(default_factory=free_port)

    @property
    def log(self) -> Path:
        return FOLDER / "logs" / f"{self.name}.log"

    def command(self) -> Sequence[str]:
        command = [str(FOLDER / "venv/bin/vllm"), "serve", str(self.model), "--port", str(self.port), *ARGUMENTS]
        for flag, config in (("--ec-transfer-config", self.ec), ("--kv-transfer-config", self.kv)):
            command += [flag, json.dumps(config)] if config else []
        return command

    def environment(self) -> Mapping[str, str]:
        return {**ENVIRONMENT, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_port)}
