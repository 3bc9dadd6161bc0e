"""Which engines stand behind which proxy, and which checks they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.vllm import checks
from tests.conformance.vllm.checks import Check, same_answer, streamed
from tests.conformance.vllm.engine import Vllm
from tests.system.cases import CASES

NIXL = "NixlConnector"
CONNECTOR = {"ec_connector": "TriptychECConnector", "ec_connector_module_path": "engines.ec_connector.vllm"}
WAIT = 5.0

BASIC: dict[str, Check] = {
    "recognised": checks.recognised,
    **{case.name: same_answer(case) for case in CASES},
    **{f"{case.name}, streamed": streamed(case) for case in CASES[1:3]},
}
THOROUGH: dict[str, Check] = {
    **BASIC,
    "n=2": checks.two_choices,
    "sixteen at once": checks.many_at_once,
    "bad image": checks.bad_image,
    "metadata from a client": checks.metadata_of_nothing,
}


@dataclass(frozen=True)
class Plan:
    """A fleet to be: names of engines, `ours` for `triptych encoder`."""

    name: str
    encoder: str  # empty: who prefills encodes
    decode: str
    prefill: str = ""
    routes: tuple[str, str] = ("PD", "E-PD")  # of requests without and with images
    ours: Sequence[str] = ()  # arguments of `triptych encoder`, where it encodes
    in_folder: bool = True  # embeddings travel through the shared folder
    checks: Mapping[str, Check] = field(default_factory=dict)

    @property
    def engines(self) -> list[str]:
        return [name for name in (self.encoder, self.prefill, self.decode) if name != "ours" and name]


def engines(model: Path, storage: Path) -> dict[str, Vllm]:
    """Every engine of every plan, none of them started."""
    shared = {"shared_storage_path": str(storage)}

    def example(role: str) -> dict[str, Any]:
        return {"ec_connector": "ECExampleConnector", "ec_role": role, "ec_connector_extra_config": shared}

    def ours(role: str, **extra: Any) -> dict[str, Any]:
        return {**CONNECTOR, "ec_role": role, "ec_connector_extra_config": {"wait_timeout": WAIT, **extra}}

    made = [
        Vllm("e", model, ec=example("ec_producer")),
        Vllm("pd", model, ec=example("ec_consumer")),
        Vllm("p", model, ec=example("ec_consumer"), kv={"kv_connector": NIXL, "kv_role": "kv_producer"}),
        Vllm("d", model, kv={"kv_connector": NIXL, "kv_role": "kv_consumer"}),
        Vllm("e-folder", model, ec=ours("ec_producer", **shared)),
        Vllm("pd-folder", model, ec=ours("ec_consumer", **shared)),
        Vllm("e-zmq", model, ec=ours("ec_producer", transfer="zmq")),
        Vllm("pd-zmq", model, ec=ours("ec_consumer", transfer="zmq")),
    ]
    return {engine.name: engine for engine in made}


def plans(storage: Path) -> list[Plan]:
    """In the order in which they run: neighbours share engines."""
    folder = ("--transfer", "storage", "--storage-path", str(storage))
    files = {"files deleted": checks.files_deleted}
    again = {"published again": checks.published_again}
    return [
        Plan("E+PD", "e", "pd", checks={**THOROUGH, **files, "encoder killed": checks.encoder_killed}),
        Plan("our encoder + PD", "ours", "pd", ours=folder, checks={**BASIC, **files, **again}),
        Plan("PD alone", "", "pd", routes=("PD", "EPD"), checks=BASIC),
        Plan(
            "E+P+D over NIXL",
            "e",
            "d",
            prefill="p",
            routes=("P-D", "E-P-D"),
            checks={**THOROUGH, **files, "decode killed": checks.decode_killed},
        ),
        Plan("P+D over NIXL", "", "d", prefill="p", routes=("P-D", "EP-D"), checks=BASIC),
        Plan(
            "E+PD, our connector, folder",
            "e-folder",
            "pd-folder",
            checks={
                **THOROUGH,
                **files,
                **again,
                "prefill before encode": checks.prefill_before_encode,
                "embedding never comes": checks.embedding_never_comes,
            },
        ),
        Plan(
            "E+PD, our connector, zmq",
            "e-zmq",
            "pd-zmq",
            in_folder=False,
            checks={
                **THOROUGH,
                "embedding never comes": checks.embedding_never_comes,
                "encoder killed": checks.encoder_killed,
            },
        ),
        Plan(
            "our encoder + PD, our connector, zmq",
            "ours",
            "pd-zmq",
            ours=("--transfer", "zmq"),
            in_folder=False,
            checks=BASIC,
        ),
    ]
