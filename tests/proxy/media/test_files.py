"""Files under roots, and every way out of these that clients and neighbours try."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy.media import files
from proxy.media.files import Outside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "a.png").write_bytes(b"pixels")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted" / "secret").write_bytes(b"secret")
    return root


def test_what_lies_under_a_root(root: Path) -> None:
    (root / "link").symlink_to("folder/a.png")
    (root.parent / "alias").symlink_to(root)
    for path in (root / "folder/a.png", root / "link", root.parent / "alias/link"):
        assert files.read(path, [Path("/nowhere"), root], 100) == b"pixels"
        assert files.read(path, [root.parent / "alias"], 3) == b"pix"


def test_no_way_out(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "secret")
    (root / "above").symlink_to(root.parent)
    os.mkfifo(root / "pipe")
    ways = ["out", "above/secret", "../secret", "../rooted/secret", "folder/../../secret", "folder", "pipe", "."]
    for way in ways:
        with pytest.raises((Outside, OSError)):
            files.read(root / way, [root], 100)
    with pytest.raises(Outside):
        files.read(Path("/proc/self/environ"), [root], 100)


def test_what_is_not_there(root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    for name in ("none", "loop", "folder/a.png/b"):
        with pytest.raises(OSError, match=r"No such file|symbolic links|Not a directory"):
            files.read(root / name, [root], 100)


@pytest.mark.parametrize("swapped", ["folder", "folder/a.png"])
def test_a_link_put_there_after_links_were_resolved_is_not_followed(
    root: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root.parent / "a.png").write_bytes(b"secret")
    resolved = os.path.realpath

    def swapping(path: str | os.PathLike[str]) -> str:
        found = resolved(path)
        if not (root / swapped).is_symlink() and str(found) == str(root):  # the last that is resolved
            (root / swapped).rename(root.parent / "moved")
            (root / swapped).symlink_to(root.parent if swapped == "folder" else root.parent / "secret")
        return found

    monkeypatch.setattr(os.path, "realpath", swapping)
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        files.read(root / "folder/a.png", [root], 100)
    assert (root / swapped).is_symlink()


def test_nothing_stays_open(root: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    files.read(root / "folder/a.png", [root], 100)
    for name in ("folder/none", "folder"):
        with pytest.raises((Outside, OSError)):
            files.read(root / name, [root], 100)
    assert opened() == before
