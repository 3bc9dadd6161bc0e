"""Flags, environment and YAML: who wins, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from engines.errors import SetupError
from engines.settings import EncoderSettings, EngineSettings, LanguageSettings, load

BOTH = pytest.mark.parametrize("cls", [EncoderSettings, LanguageSettings])


@BOTH
def test_every_setting_is_a_flag_with_a_help_line(
    cls: type[EngineSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        load(cls, ["--help"], prog="triptych engine")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, field in cls.model_fields.items():
        assert "--" + (field.alias or name).replace("_", "-") in text
        assert field.description, f"{name} has no description"


@BOTH
def test_only_the_model_is_required(cls: type[EngineSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIPTYCH_MODEL", raising=False)
    assert load(cls, ["--model", "/models/tiny"], prog="x").name == "tiny"
    with pytest.raises(SetupError, match="--model is required"):
        load(cls, [], prog="x")


def test_flags_win_over_environment_over_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("port: 1\nhost: yaml\ngrace: 3\nmax-items: 7\nmodel: /models/tiny\n")
    monkeypatch.setenv("TRIPTYCH_PORT", "2")
    monkeypatch.setenv("TRIPTYCH_HOST", "environment")
    settings = load(EncoderSettings, ["--port", "3", "--config", str(path)], prog="x")
    assert (settings.port, settings.host, settings.grace, settings.max_items) == (3, "environment", 3.0, 7)


def test_the_config_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: /models/tiny\nallowed_media_roots: [/a, /b]\n")
    monkeypatch.setenv("TRIPTYCH_CONFIG", str(path))
    assert load(EncoderSettings, [], prog="x").allowed_media_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize("given", [["/a,/b"], ["/a", "/b"]])
def test_folders_come_with_commas_or_repeated(given: list[str]) -> None:
    flags = [part for value in given for part in ("--allowed-media-roots", value)]
    settings = load(EncoderSettings, ["--model", "m", *flags], prog="x")
    assert settings.allowed_media_roots == (Path("/a"), Path("/b"))


def test_folders_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_ALLOWED_MEDIA_ROOTS", "/a,/b")
    assert load(EncoderSettings, ["--model", "m"], prog="x").allowed_media_roots == (Path("/a"), Path("/b"))


def test_sizes_are_written_as_people_write_them() -> None:
    assert load(EncoderSettings, ["--model", "m", "--cache-bytes", "2GiB"], prog="x").cache_bytes == 2 << 30


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "many"], "--port: .*got 'many'"),
        (["--cache-bytes", "0"], "--cache-bytes: must be more than 0"),
        (["--fetch-timeout", "0"], "--fetch-timeout"),
        (["--transfer", "storage"], "needs --storage-path"),
        (["--rdma"], "--rdma needs --transfer mooncake"),
        (["--embedding-store", "10.0.0.1:50051,here"], "--embedding-store: here should look like HOST:PORT"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
    ],
)
def test_a_mistake_names_its_flag(flags: list[str], says: str) -> None:
    with pytest.raises(SetupError, match=says):
        load(EncoderSettings, ["--model", "m", *flags], prog="x")


@pytest.mark.parametrize(
    ("content", "says"), [("prot: 1", "unknown setting prot"), ("[1]", "mapping"), ("a: [", "--config")]
)
def test_a_mistake_in_the_file_names_the_file(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(content)
    with pytest.raises(SetupError, match=says):
        load(EncoderSettings, ["--model", "m", "--config", str(path)], prog="x")


def test_settings_are_frozen_and_ignore_the_environment_when_made_in_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_PORT", "5")
    settings = LanguageSettings(model=Path("m"))
    assert settings.port == 8100
    with pytest.raises(ValidationError):
        settings.port = 1


def test_a_secret_is_not_repeated_and_certificates_come_whole() -> None:
    with pytest.raises(SetupError, match="--key: ") as raised:
        load(EncoderSettings, ["--model", "m", "--key", ""], prog="x")
    assert "got" not in str(raised.value)
    for name in ("tls-key", "tls-client-ca"):
        with pytest.raises(SetupError, match=f"--{name} needs --tls-cert"):
            load(EncoderSettings, ["--model", "m", f"--{name}", "file"], prog="x")


def test_a_setting_whose_field_has_another_name_is_written_as_its_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: m\nregister: http://a:1\n")
    assert load(EncoderSettings, ["--config", str(path)], prog="x").proxies == ("http://a:1",)
    monkeypatch.setenv("TRIPTYCH_REGISTER", "http://b:1,http://c:1")
    assert load(EncoderSettings, ["--config", str(path)], prog="x").proxies == ("http://b:1", "http://c:1")
    assert load(EncoderSettings, ["--model", "m", "--register", "https://d:1"], prog="x").proxies == ("https://d:1",)
    with pytest.raises(SetupError, match="--register: a:1: a proxy's URL looks like http://host:port"):
        load(EngineSettings, ["--model", "m", "--register", "a:1"], prog="x")
