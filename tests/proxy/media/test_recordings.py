"""Lengths and sizes out of the headers of films and sounds, wherever they stand."""

from __future__ import annotations

import pytest

from proxy.media import formats
from proxy.media.formats import Shape, measure
from tests.support import containers


def whole(modality: str, data: bytes) -> Shape:
    return measure(modality, data, len(data))


def far(modality: str, data: bytes, head: int) -> Shape:
    """As of media of which only a head was decoded."""
    return measure(modality, data[:head], len(data), lambda start, count: data[start : start + count])


@pytest.mark.parametrize("version", [0, 1])
def test_an_mp4_tells_its_size_its_length_and_its_frames(version: int) -> None:
    found = whole("video", containers.mp4((1920, 1080), 12.5, 300, version=version))
    assert (found.width, found.height, found.frames, found.seconds) == (1920, 1080, 300, 12.5)


def test_an_index_behind_the_frames_is_found() -> None:
    data = containers.mp4((1280, 720), 60, 1500, index_last=200_000)
    found = far("video", data, 1000)
    assert (found.width, found.height, found.frames, found.seconds) == (1280, 720, 1500, 60)
    assert measure("video", data[:1000], len(data)) == Shape("video", len(data)), "which a head alone does not show"


def test_what_of_an_index_is_there_counts() -> None:
    data = containers.mp4((1280, 720), 60, 1500)
    cut = data[: data.rindex(b"stsz")]
    found = measure("video", cut, len(data))
    assert (found.width, found.frames, found.seconds) == (1280, None, 60)


@pytest.mark.parametrize("unknown", [False, True])
def test_a_webm_tells_its_size_and_its_length(unknown: bool) -> None:
    found = whole("video", containers.webm((854, 480), 7.25, unknown=unknown))
    assert (found.width, found.height, found.frames, found.seconds) == (854, 480, None, 7.25)


@pytest.mark.parametrize(
    "data",
    [
        containers.wav(3.5),
        containers.flac(3.5),
        containers.opus(3.5),
        containers.vorbis(3.5),
        containers.mp4(seconds=3.5),
        containers.webm(seconds=3.5),
        containers.wav(3.5).replace(b"data" + (112000).to_bytes(4, "little"), b"data\xff\xff\xff\xff"),
    ],
    ids=["wav", "flac", "opus", "vorbis", "m4a", "webm", "wav of a stream"],
)
def test_sounds_tell_their_length(data: bytes) -> None:
    assert whole("audio", data).seconds == 3.5


def test_an_mp3_is_as_long_as_its_frames() -> None:
    seconds = 1000 * 1152 / 44100
    assert whole("audio", containers.mp3(1000, counted=True)).seconds == pytest.approx(seconds)
    assert whole("audio", containers.mp3(1000)).seconds == pytest.approx(seconds, rel=0.01), "of a constant rate"


def test_headers_far_behind_are_looked_up() -> None:
    assert far("audio", containers.opus(9.5, filler=300_000), 100).seconds == 9.5
    pictured = containers.mp3(1000, counted=True, picture=250_000)
    assert far("audio", pictured, 100).seconds == pytest.approx(1000 * 1152 / 44100)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_length_that_cannot_be_is_none(modality: str) -> None:
    assert whole(modality, containers.mp4(seconds=0)).seconds is None
    assert whole(modality, containers.webm(seconds=-1.0)).seconds is None
    assert whole(modality, containers.webm(seconds=float("nan"))).seconds is None
    assert whole(modality, containers.webm(seconds=10 * formats._AGE)).seconds is None
