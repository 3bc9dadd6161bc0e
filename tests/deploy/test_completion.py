"""Completion: real shells are asked what they would complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy import completion

COMMANDS = {
    "proxy": ("proxy", "the front door"),
    "plan": ("deploy.plan", "how busy it is"),
    "bench": ("bench.load", "ask and measure"),
}
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_triptych
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "triptych"
    file.write_text(completion.script("bash", COMMANDS))
    return file


def completed(file: Path, *words: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", str(file), *words], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["triptych", "p"], ["proxy", "plan"]),
        (["triptych", "comp"], ["completion"]),
        (["triptych", "proxy", "--encode-s"], ["--encode-servers-urls"]),
        (["triptych", "plan", "--eng"], ["--engines"]),
        (["triptych", "bench", "--image-sh"], ["--image-share"]),
    ],
)
def test_bash_completes_commands_and_their_flags(bash: Path, words: list[str], wanted: list[str]) -> None:
    assert completed(bash, *words) == wanted


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_every_flag_too(shell: str) -> None:
    text = completion.script(shell, COMMANDS)
    assert "encode-servers-urls" in text and "image-share" in text


def test_a_part_is_run_up_to_its_flags_and_what_was_changed_for_that_is_back() -> None:
    before = list(sys.argv)
    assert completion.parser_of("deploy.plan", "plan").prog == "triptych plan"
    assert sys.argv == before
    with pytest.raises(LookupError, match="reads no flags"):
        completion.parser_of("bench.pictures", "pictures")


def test_the_command_says_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        completion.main(["--help"], COMMANDS)
    assert caught.value.code == 0
    assert "bash-completion/completions/triptych" in capsys.readouterr().out


def test_every_command_is_in_it() -> None:
    asked = [sys.executable, "-m", "deploy.cli", "completion", "bash"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=100, check=True)
    assert "--max-batched-tokens" in done.stdout and "--register" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=20, check=True)
