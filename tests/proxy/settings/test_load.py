"""Flags, environment and YAML: which wins, and what a person reads when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.core import Order
from proxy.settings import ProxySettings, Sources, Wrong
from proxy.settings.fleet import FleetSettings as EngineFlags
from proxy.settings.listening import ListeningSettings as ProcessFlags
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


URLS = """\
decode-servers-urls:
  - http://d:1
  - http://d:2
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "1: expected the node content, but found '<stream end>'"),
        ("port: 1\n  host: x\n", "2: mapping values are not allowed here"),
        ("port: 1\nhost: x\nport: 2\n", "3: port is there twice"),
        ("- port\n", "1: these are no settings: each line is one, like port: 8000"),
        ("# nothing\n\nnope: 1\n", "3: nope: there is no such setting"),
        ("max-quue: 1\n", "1: max-quue: there is no such setting: is it max-queue?"),
        ("host: x\nport: much\n", "2: port: Input should be a valid integer"),
        ("host: x\n\npolicy: magic\n", "3: policy: no policy 'magic' (known: affinity"),
        (URLS + "  - d:3\n", "4: d:3: an engine's URL looks like http://host:port"),
        (URLS + "encode_servers_urls:\n  - http://d:2\n", "5: http://d:2 is listed twice: an engine has one role"),
    ],
)
def test_a_wrong_file_is_explained_with_its_line(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text(text)
    argv = ["--config", str(file), *([] if "decode" in text else D)]
    assert f"triptych proxy: {file}:{says}" in refused(argv, capsys)


def test_who_said_the_wrong_thing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("port: 1\nmax_queue: 2\n")
    monkeypatch.setenv("TRIPTYCH_MAX_QUEUE", "-1")
    said = refused([*D, "--config", str(file), "--port", "70000"], capsys)
    assert "--port: Input should be less than or equal to 65535" in said
    assert "TRIPTYCH_MAX_QUEUE: Input should be greater than or equal to 0" in said
    assert str(file) not in said, "what the file says is well"


def test_a_file_may_be_empty_or_change_between_two_readings(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("")
    sources = Sources.of([*D, "--config", str(file), "--host", "here"])
    assert sources.read().port == 8000
    file.write_text("port: 1\nhost: there\n")
    assert (sources.read().port, sources.read().host) == (1, "here")
    file.write_bytes(b"\xff")
    with pytest.raises(Wrong, match="cannot be read"):
        sources.read()


def test_help_teaches_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in ProxySettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text and field.description
    assert "seconds to connect to an engine" in text
    assert "(default: )" not in text and "(default: None)" not in text


def test_help_is_grouped_by_subject(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("--help")
    text = capsys.readouterr().out
    places = [
        text.index(what)
        for what in (EngineFlags.__doc__ or "", "\n  --dialect ", ProcessFlags.__doc__ or "", "\n  --port ")
    ]
    assert places == sorted(places), "each heading stands before its flags"
    _, _, ungrouped = text.partition("options:")
    assert ungrouped.split("\n\n")[0].count("--") == 1, "nothing but --help is without a subject"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*D, "--config", "/does/not/exist"], "--config: there is no file /does/not/exist"),
        ([*D, "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
