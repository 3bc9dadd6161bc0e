"""A key that is made is one that is known."""

from __future__ import annotations

import pytest

from proxy.auth.keys import Keys
from proxy.auth.mint import main


def test_an_entry_can_be_put_into_the_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["acme"]) == main(["other", "--models", "qwen*, tiny", "--concurrent", "3", "--tenant", "o"]) == 0
    told = capsys.readouterr()
    keys = Keys.parse(told.out)
    acme, other = (keys.find(line.rpartition(": ")[2]) for line in told.err.splitlines())
    assert acme is not None and (acme.name, acme.models, acme.limited) == ("acme", ("*",), False)
    assert other is not None and (other.models, other.concurrent, other.tenant) == (("qwen*", "tiny"), 3, "o")
    assert "triptych-" not in told.out, "the file holds no key"


def test_no_two_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        main(["acme"])
    first, second = capsys.readouterr().err.splitlines()
    assert first != second


@pytest.mark.parametrize(
    "argv", [[], ["a b"], ["acme", "--concurrent", "0"], ["acme", "--requests-per-minute", "many"]]
)
def test_mistakes_are_told_and_nothing_is_made(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    told = capsys.readouterr()
    assert ended.value.code == 2 and "triptych key: error" in told.err and not told.out
