"""Flags, environment and YAML: which wins, and what a person reads when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.core import Order
from proxy.settings import ProxySettings
from tests.support.settings import load, refused

D = ["--decode-servers-urls", "http://d:1"]


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("decode-servers-urls: [http://y:1, http://y:2]\nport: 1\nhost: file\nkv_handoff: pull\n")
    monkeypatch.setenv("TRIPTYCH_PORT", "2")
    monkeypatch.setenv("TRIPTYCH_HOST", "env")
    found = load("--config", str(file), "--port", "3")
    assert (found.port, found.host, found.order, found.encode_timeout) == (3, "env", Order.SEQUENTIAL, 60.0)
    assert found.decode_servers_urls == "http://y:1,http://y:2"
    monkeypatch.setenv("TRIPTYCH_CONFIG", str(file))
    assert load().port == 2


@pytest.mark.parametrize(("text", "says"), [("nope: 1\n", "--nope: Extra inputs"), ("a: [", "--config: ")])
def test_a_wrong_file_is_explained(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        load(*D, "--config", str(file))
    assert says in capsys.readouterr().err


def test_help_teaches_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in ProxySettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text and field.description
    assert "seconds to connect to an engine" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*D, "--config", "/does/not/exist"], "--config: there is no file /does/not/exist"),
        ([*D, "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
