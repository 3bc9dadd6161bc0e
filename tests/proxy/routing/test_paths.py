"""Text never touches an encoder; media always do."""

from proxy.core import Path, Role
from proxy.routing import paths


def test_text_takes_no_encoder_and_media_one() -> None:
    assert all(Role.ENCODE not in path.roles for path in paths.candidates(False))
    assert all(path.roles[0] is Role.ENCODE for path in paths.candidates(True))


def test_without_encoders_the_same_engines_go_on() -> None:
    assert [paths.inline(path) for path in paths.MEDIA] == [Path.EP_D, Path.EPD]
    assert all(paths.inline(path).generation == path.generation for path in paths.MEDIA)
