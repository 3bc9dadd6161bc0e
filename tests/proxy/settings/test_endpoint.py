"""How engines are written."""

from __future__ import annotations

import pytest

from proxy.settings import Endpoint
from proxy.settings.endpoint import written
from tests.support.settings import refused

D = ["--decode-servers-urls", "http://d:1"]


def test_a_url_may_say_where_its_engine_stands() -> None:
    found = Endpoint.parse("http://d:1?host=h1&rack=r1&bootstrap_port=8998", "vllm")
    assert found == Endpoint("http://d:1", "vllm", {"bootstrap_port": 8998, "labels": {"host": "h1", "rack": "r1"}})


def test_a_url_may_say_what_its_engine_weighs_and_asks_for() -> None:
    found = Endpoint.parse("http://d:1?weight=2.5&key=a%2Cb", "native")
    assert (found.weight, found.secret) == (2.5, "a,b")
    assert "a,b" not in repr(found)


def test_a_name_may_stand_for_engines() -> None:
    found = Endpoint.parse("dns+vllm+http://enc.svc:8000/?zone=z&weight=2", "auto")
    assert (found.finder, found.dialect, found.name) == ("dns", "vllm", "dns+http://enc.svc:8000")
    one = found.at("10.0.0.1:8000")
    assert one == Endpoint("http://10.0.0.1:8000", "vllm", {"labels": {"zone": "z"}}, 2.0)
    found = Endpoint.parse("k8s+https://prod?selector=app%3De,tier=x&port=http", "auto")
    assert found.asked == {"selector": "app=e,tier=x", "port": "http"}
    assert found.name == "k8s+https://prod?selector=app=e,tier=x&port=http"
    assert found.at("[fd00::1]:80").url == "https://[fd00::1]:80"


def test_a_mapping_of_a_yaml_file_is_written_as_a_url() -> None:
    entry = {"url": "vllm+http://d:1?host=h", "weight": 2, "key": "a,b&c", "labels": {"rack": "r 1"}}
    found = Endpoint.parse(written(entry), "auto")
    assert (found.weight, found.secret, found.facts) == (2.0, "a,b&c", {"labels": {"host": "h", "rack": "r 1"}})
    assert written("http://d:1") == "http://d:1"
    for wrong in ({"weight": 2}, {"url": "http://d:1", "labels": ["h1"]}):
        with pytest.raises(ValueError, match="an engine is its URL, or a mapping"):
            written(wrong)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--decode-servers-urls", "d:1"], "an engine's URL looks like http://host:port"),
        (
            ["--decode-servers-urls", "http://d:1?port=2"],
            "a URL may say ?bootstrap_port=PORT, ?ec_port=PORT, ?zone=NAME, ?rack=NAME, ?host=NAME, "
            "?weight=2, ?key= and nothing else",
        ),
        (["--decode-servers-urls", "http://d:1?weight=0"], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1?key=a%0D%0Ab"], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1", "--engine-key", "a b"], "--engine-key: "),
        (["--decode-servers-urls", "http://d:1?weight=x&key=s3cret"], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "dns+http://d"], "dns+http://name:port lists the addresses of a name"),
        (["--decode-servers-urls", "srv+http://_d._tcp.x:1"], "srv+http://_service._tcp.name lists hosts and ports"),
        (["--decode-servers-urls", "k8s+http://prod"], "k8s+http://NAMESPACE?selector="),
        (["--decode-servers-urls", "vllm+dns+http://d:1"], "no dialect 'vllm+dns'"),
        (["--decode-servers-urls", "http://d:1?bootstrap_port=x"], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1?host="], "a URL may say ?bootstrap_port=PORT"),
        (["--decode-servers-urls", "http://d:1/v1"], "give the base URL only, like http://d:1"),
        (["--decode-servers-urls", "http://d:99999"], "out of range"),
        (["--decode-servers-urls", "magic+http://d:1"], "no dialect 'magic' (known: auto, native"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(argv, capsys)
    assert says in told and "s3cret" not in told
