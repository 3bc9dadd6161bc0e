import gzip
from contextlib import suppress

import orjson
import zstandard

from bench.fuzzing import bodies
from proxy import openai
from proxy.core import Api
from proxy.errors import BadRequest
from proxy.media import formats
from proxy.media.addresses import Rules
from proxy.openai import Identity
from tests.support.drawing import drawn


def test_bodies_are_json_of_which_some_are_requests_with_media() -> None:
    items = []
    for body in drawn(bodies.bodies(), 100):
        orjson.loads(body)
        with suppress(BadRequest):
            items.append(len(openai.parse(body, Api.CHAT, "id", Identity(trust_client=True)).items))
    assert 10 < len(items) < 100 and max(items) > 0


def test_media_are_of_formats_whose_size_is_known() -> None:
    heads = drawn(bodies.media(), 200)
    known = {
        modality
        for data in heads
        for modality in ("image", "video")
        if formats.measure(modality, data, len(data)).width
    }
    assert known == {"image", "video"}
    assert any(formats.measure("audio", data, len(data)).seconds for data in heads)


def test_urls_are_taken_and_refused() -> None:
    taken = []
    for url in drawn(bodies.urls(), 200):
        with suppress(BadRequest):
            Rules().judge(url)
            taken.append(url)
    assert {url[:5] for url in taken} >= {"data:", "https"} and len(taken) < 200


def test_calls_of_language_servers_are_json() -> None:
    assert all(isinstance(orjson.loads(call), dict) for call in drawn(bodies.encoder_calls()))


def test_packed_bodies_unpack() -> None:
    sizes = []
    for data in drawn(bodies.packed(), 50):
        with suppress(gzip.BadGzipFile):
            sizes.append(len(gzip.decompress(data)))
            continue
        sizes.append(len(zstandard.ZstdDecompressor().decompress(data)))
    assert max(sizes) == 1 << 20 and min(sizes) < 1000


def test_base64_is_short_and_long() -> None:
    lengths = [len(text) for text in drawn(bodies.texts(), 50)]
    assert max(lengths) > 200_000 and min(lengths) < 100
