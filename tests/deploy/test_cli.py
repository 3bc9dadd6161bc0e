import subprocess
import sys

import pytest

from deploy import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["triptych", *arguments])
    cli.main()


def test_help_teaches_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        run(monkeypatch, *arguments)
        shown = capsys.readouterr().out
        assert all(f"  {command}" in shown for command in cli.COMMANDS)
        assert "--encode-servers-urls" in shown


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--version")
    assert capsys.readouterr().out.startswith("triptych 0.")


def test_an_unknown_command_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no command 'serve'; there are up, proxy"):
        run(monkeypatch, "serve")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    asked = [sys.executable, "-X", "importtime", "-m", "deploy.cli", command, "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    assert f"triptych {command}" in done.stdout
    assert "--" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers"}, "these take seconds"


def test_engines_without_torch_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'triptych\[engines\]'"):
        run(monkeypatch, "encoder", "--help")
