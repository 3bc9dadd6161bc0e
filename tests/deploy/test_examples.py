"""Every example is read by the real settings, and serves the paths that its name says."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from engines.settings import EngineSettings
from proxy.auth.keys import Keys
from proxy.core import Role, State
from proxy.dialects import DIALECTS, INLINE
from proxy.errors import BadRequest
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
    "registered": ("PD", "E-PD"),
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


def engines(file: Path) -> list[EngineSettings]:
    """Those of ours that its comments start."""
    text = re.sub(r"\\\n#\s*", "", file.read_text())
    commands = re.findall(r"^#.*?triptych ((?:encoder|language) .*)$", text, re.MULTILINE)
    started = [settings_of(shlex.split(command)) for command in commands]
    return [settings for settings in started if isinstance(settings, EngineSettings)]


def role_of(engine: EngineSettings) -> Role:
    return Role.named(getattr(engine, "role", "encode"))


def fleet(file: Path) -> list[tuple[Role, str]]:
    """Role and dialect of every engine that will be there."""
    listed = [(role, endpoint.dialect) for role, endpoint in loaded(file).fleet()]
    return listed + [(role_of(engine), "native") for engine in engines(file) if engine.proxies]


def test_there_is_one_for_each_path_and_dialect() -> None:
    assert {file.stem for file in FILES} == SERVED.keys()
    assert {path for served in SERVED.values() for path in served if path} == {path.label for path in paths.Path}
    assert {dialect for file in FILES for _, dialect in fleet(file)} == DIALECTS.keys()


def test_it_serves_what_its_name_says(file: Path) -> None:
    dialects = {dialect for _, dialect in fleet(file)}
    assert dialects == {file.stem.partition("-")[0]} or file.stem in ("mixed", "production", "registered")
    census = {role: {State.READY: count} for role, count in Counter(role for role, _ in fleet(file)).items()}
    inline = paths.INLINE if dialects <= INLINE and Role.ENCODE not in census else ()

    text, media = SERVED[file.stem]
    assert router.route(0, census).path.label == text
    if media is None:
        with pytest.raises(BadRequest, match="no encoder"):
            router.route(1, census, inline=inline)
    else:
        assert router.route(1, census, inline=inline).path.label == media


def test_its_comments_start_the_engines_of_ours_that_it_names(file: Path) -> None:
    started = {role_of(engine) for engine in engines(file)}
    assert started == {role for role, dialect in fleet(file) if dialect == "native"}


def test_engines_register_where_admins_are_answered_with_the_key_that_is_asked_for() -> None:
    (file,) = [file for file in FILES if file.stem == "registered"]
    for engine in engines(file):
        assert engine.register_key == loaded(file).register_key
        assert all(proxy.endswith(f":{loaded(file).admin_port}") for proxy in engine.proxies)


def test_the_keys_are_read() -> None:
    assert list(Keys.parse(KEYS.read_text())) == ["team-search", "batch-jobs", "on-call"]
