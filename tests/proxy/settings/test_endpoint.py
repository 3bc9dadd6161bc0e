"""How engines are written."""

from __future__ import annotations

import pytest

from proxy.settings import Endpoint
from tests.support.settings import refused

D = ["--decode-servers-urls", "http://d:1"]


def test_a_url_may_say_where_its_engine_stands() -> None:
    found = Endpoint.parse("http://d:1?host=h1&rack=r1&bootstrap_port=8998", "vllm")
    assert found == Endpoint("http://d:1", "vllm", {"bootstrap_port": 8998, "labels": {"host": "h1", "rack": "r1"}})


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--decode-servers-urls", "d:1"], "an engine's URL looks like http://host:port"),
        (
            ["--decode-servers-urls", "http://d:1?port=2"],
            "a URL may say ?bootstrap_port=PORT, ?ec_port=PORT, ?zone=NAME, ?rack=NAME, ?host=NAME and nothing else",
        ),
        (["--decode-servers-urls", "http://d:1?bootstrap_port=x"], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1?host="], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1/v1"], "give the base URL only, like http://d:1"),
        (["--decode-servers-urls", "http://d:99999"], "out of range"),
        (["--decode-servers-urls", "magic+http://d:1"], "no dialect 'magic' (known: auto, native"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
