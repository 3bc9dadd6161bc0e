"""Every example is read by the real settings, and serves the paths that its name says."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from proxy.core import Role, State
from proxy.dialects import DIALECTS, INLINE
from proxy.errors import BadRequest
from proxy.keys import Keys
from proxy.routing import paths, router
from proxy.settings import ProxySettings
from tests.support.commands import settings_of

FOLDER = Path(__file__).parents[2] / "deploy/examples"
KEYS = FOLDER / "keys.yaml"
FILES = sorted(file for file in FOLDER.glob("*.yaml") if file != KEYS)

SERVED = {  # the path of text, and that of media where there is one
    "ascend-e-p-d": ("P-D", "E-P-D"),
    "ascend-p-d-pull": ("P-D", "EP-D"),
    "mixed": ("PD", "E-PD"),
    "native-e-p-d": ("P-D", "E-P-D"),
    "native-e-pd": ("PD", "E-PD"),
    "native-p-d": ("P-D", None),
    "native-pd": ("PD", None),
    "production": ("P-D", "E-P-D"),
    "sglang-e-pd": ("PD", "E-PD"),
    "sglang-p-d": ("P-D", "EP-D"),
    "vllm-e-p-d": ("P-D", "E-P-D"),
    "vllm-e-pd": ("PD", "E-PD"),
    "vllm-e-pd-inline": ("PD", "E-PD"),
    "vllm-epd": ("PD", "EPD"),
    "vllm-p-d-mooncake": ("P-D", "EP-D"),
}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def loaded(file: Path) -> ProxySettings:
    settings = settings_of(["proxy", "--config", str(file)])
    assert isinstance(settings, ProxySettings)
    return settings


def test_there_is_one_for_each_path_and_dialect() -> None:
    assert {file.stem for file in FILES} == SERVED.keys()
    assert {path for served in SERVED.values() for path in served if path} == {path.label for path in paths.Path}
    dialects = {endpoint.dialect for file in FILES for _, endpoint in loaded(file).fleet()}
    assert dialects == DIALECTS.keys()


def test_it_serves_what_its_name_says(file: Path) -> None:
    fleet = loaded(file).fleet()
    dialects = {endpoint.dialect for _, endpoint in fleet}
    assert dialects == {file.stem.partition("-")[0]} or file.stem in ("mixed", "production")
    census = {role: {State.READY: count} for role, count in Counter(role for role, _ in fleet).items()}
    inline = paths.INLINE if dialects <= INLINE and Role.ENCODE not in census else ()

    text, media = SERVED[file.stem]
    assert router.route(0, census).path.label == text
    if media is None:
        with pytest.raises(BadRequest, match="no encoder"):
            router.route(1, census, inline=inline)
    else:
        assert router.route(1, census, inline=inline).path.label == media


def test_the_engines_of_its_comments_start_so(file: Path) -> None:
    text = re.sub(r"\\\n#\s*", "", file.read_text())
    commands = re.findall(r"^#.*?triptych ((?:encoder|language) .*)$", text, re.MULTILINE)
    started = {getattr(settings_of(shlex.split(command)), "role", "encode") for command in commands}
    listed = {role.label for role, endpoint in loaded(file).fleet() if endpoint.dialect == "native"}
    assert started == listed


def test_the_keys_are_read() -> None:
    assert list(Keys.parse(KEYS.read_text())) == ["team-search", "batch-jobs", "on-call"]
