"""Rules about the tree that no linter knows."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HALVES = ("proxy", "engines", "deploy", "bench")
EXEMPT = {"__init__.py", "__main__.py"}


def sources() -> list[Path]:
    return [
        file.relative_to(ROOT) for half in HALVES for file in (ROOT / half).rglob("*.py") if file.name not in EXEMPT
    ]


@pytest.mark.parametrize("source", sources(), ids=str)
def test_every_source_file_has_its_test_file(source: Path) -> None:
    test = Path("tests") / source.parent / f"test_{source.name}"
    assert (ROOT / test).exists(), f"{source} has no {test}"


@pytest.mark.parametrize("source", sources(), ids=str)
def test_every_source_file_opens_by_saying_what_it_is(source: Path) -> None:
    assert (ROOT / source).read_text().startswith('"""'), source
