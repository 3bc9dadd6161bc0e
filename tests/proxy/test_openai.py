"""The parser: what it finds, what it refuses, and that it leaves the rest alone."""

from __future__ import annotations

import base64
import io
from typing import Any

import orjson
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from proxy import openai
from proxy.core import Api, Handle, Item, Job
from proxy.errors import BadRequest, ForbiddenField
from proxy.media.costs import Costs
from proxy.media.vision import DEFAULT, FAMILIES, UNKNOWN_TOKENS, Vision
from proxy.openai import Identity
from tests.fakes.media import chat, data_url, image, part

PNG, JPEG = image(56, 28), image(28, 28, "JPEG")
PLAIN = Identity()


class ByModel:
    def of(self, model: str) -> Vision:
        return FAMILIES.get(model, DEFAULT)


def parse(body: Any, identity: Identity = PLAIN, api: Api = Api.CHAT) -> Job:
    return openai.parse(orjson.dumps(body), api, "id-1", identity)


def test_items_come_in_reading_order_with_their_positions() -> None:
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "plain"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, part(PNG)]},
            {"role": "user", "content": [part(JPEG, "jpeg"), {"type": "input_audio", "input_audio": {"data": "aGk="}}]},
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "https://h/v.mp4"}}]},
        ],
    }
    items = parse(body).items
    assert [(item.index, item.message, item.part, item.modality) for item in items] == [
        (0, 1, 1, "image"),
        (1, 2, 0, "image"),
        (2, 2, 1, "audio"),
        (3, 3, 0, "video"),
    ]
    assert [item.mm_hash for item in items] == [
        blake3(PNG).hexdigest(),
        blake3(JPEG).hexdigest(),
        blake3(b"hi").hexdigest(),
        None,
    ]
    assert items[3].param == "messages[3].content[0]"


@pytest.mark.parametrize(
    "shape",
    [
        {"type": "image_url", "image_url": {"url": data_url(PNG)}},
        {"type": "image_url", "image_url": data_url(PNG)},
        {"image_url": {"url": data_url(PNG), "detail": "low"}},
        {"image_url": data_url(PNG).replace("data:", "DATA:")},
        {"type": "image_url", "image_url": {"url": data_url(PNG)}, "uuid": "../../etc/passwd"},
    ],
)
def test_every_way_to_write_an_image_is_the_same_item(shape: dict[str, Any]) -> None:
    (item,) = parse(chat(shape)).items
    assert item.mm_hash == item.identity == item.content["uuid"] == blake3(PNG).hexdigest()
    assert item.content["type"] == "image_url"
    assert item.content["image_url"] == shape["image_url"]


@pytest.mark.parametrize(
    "url",
    ["https://h/a.png", "file:///tmp/a.png", "data:image/png,raw", data_url(PNG) + "!", data_url(PNG)[:-3]],
)
def test_what_cannot_be_hashed_here_is_named_by_its_encoder(url: str) -> None:
    (item,) = parse(chat({"type": "image_url", "image_url": {"url": url}, "uuid": "mine"})).items
    assert (item.mm_hash, item.identity) == (None, url)
    assert "uuid" not in item.content


def test_salts_and_processor_settings_change_the_hash() -> None:
    def mm_hash(identity: Identity = PLAIN, **fields: Any) -> str | None:
        return parse(chat(part(PNG), **fields), identity).items[0].mm_hash

    hashes = [
        mm_hash(),
        mm_hash(Identity(b"tenant a")),
        mm_hash(Identity(b"tenant b")),
        mm_hash(mm_processor_kwargs={"max_pixels": 1}),
        mm_hash(Identity(b"tenant a"), mm_processor_kwargs={"max_pixels": 1}),
    ]
    assert len(set(hashes)) == len(hashes)
    assert mm_hash(mm_processor_kwargs={}) == mm_hash()


def test_a_trusted_client_names_its_items() -> None:
    trusting = Identity(trust_client=True)
    body = chat(part(PNG) | {"uuid": "mine"}, {"type": "image_embeds", "image_embeds": {}}, ec_transfer_params={})
    (item,) = parse(body, trusting).items
    assert item.mm_hash == item.content["uuid"] == "mine"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(kv_transfer_params={}), "kv_transfer_params"),
        (chat(ec_transfer_params=None), "ec_transfer_params"),
        (chat(prompt_embeds="x"), "prompt_embeds"),
        (chat({"type": "image_embeds", "image_embeds": {}}), "messages[0].content[1]"),
        (chat({"image_embeds": {}}), "messages[0].content[1]"),
        (chat(part(PNG) | {"audio_embeds": {}}), "messages[0].content[1]"),
    ],
)
def test_what_only_the_proxy_may_say_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ForbiddenField) as caught:
        parse(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b'{"messages":"x"}', "must be a list"),
        (b"{}", "must be a list"),
        (b'{"messages":[],"stream":"yes"}', "true or false"),
        (orjson.dumps({"messages": [], "model": "m" * 1025}), "more than 1024 characters"),
        (orjson.dumps(chat({"type": "image_url", "image_url": None, "uuid": "cached"})), "must hold the media"),
        (orjson.dumps(chat({"type": "image_url", "image_url": {"url": 3}})), "must hold the media"),
    ],
)
def test_mistakes_are_named(raw: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        openai.parse(raw, Api.CHAT, "id", PLAIN)


def test_a_prompt_is_needed_for_completions() -> None:
    with pytest.raises(BadRequest, match="prompt"):
        parse({"model": "m"}, api=Api.COMPLETIONS)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x" * 40}, 10),
        ({"prompt": [1, 2, 3]}, 3),
        ({"prompt": ["x" * 8, "y" * 8]}, 4),
        ({"prompt": [[1, 2], [3]]}, 3),
        ({"prompt": ""}, 1),
    ],
)
def test_the_size_of_a_prompt(body: dict[str, Any], tokens: int) -> None:
    assert parse(body, api=Api.COMPLETIONS).text_tokens == tokens


def test_text_counts_wherever_it_stands() -> None:
    plain = parse({"messages": [{"role": "user", "content": "x" * 400}]}).text_tokens
    parts = parse({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 400}]}]}).text_tokens
    assert plain == parts == 100
    assert parse({"messages": [{"role": "user", "content": "猫" * 400}]}).text_tokens == 300
    assert parse(chat(tools=[{"type": "function", "function": {"name": "f" * 400}}])).text_tokens > 100


def test_text_is_corrected_for_its_model_and_token_ids_are_not() -> None:
    costs = Costs()
    for _ in range(200):
        costs.text.learn("m", 4000, 2000)

    def read(model: Any, prompt: Any) -> Job:
        raw = orjson.dumps({"model": model, "prompt": prompt})
        return openai.parse(raw, Api.COMPLETIONS, "id", PLAIN, costs=costs)

    assert read("m", "x" * 4000).text_tokens == pytest.approx(2000, rel=0.02)
    assert read("n", "x" * 4000).text_tokens == read(["m"], "x" * 4000).text_tokens == 1000
    assert (read("m", "猫" * 9).text_bytes, read("m", "x").model, read(None, "x").model) == (27, "m", "")
    ids = read("m", [[1] * 100, "x" * 40])
    assert (ids.text_tokens, ids.text_bytes) == (110, 0), "told, and nothing to learn from"


def test_items_cost_what_their_pixels_do_to_the_model_they_are_for() -> None:
    costs = Costs(ByModel())

    def read(**fields: Any) -> Item:
        raw = orjson.dumps(chat(part(image(1280, 720)), **fields))
        return openai.parse(raw, Api.CHAT, "id", PLAIN, costs=costs).items[0]

    two, three = read(model="two"), read(model="qwen3_vl")
    assert (two.tokens, two.work, two.nbytes) == (1196, 1287, 1196 * 7168)
    assert (three.tokens, three.work, three.nbytes) == (880, 1307, 880 * 32768)
    assert read(model="two", mm_processor_kwargs={"max_pixels": 78400}).tokens <= 100


def test_a_large_profile_hides_no_images_size() -> None:
    out = io.BytesIO()
    Image.new("RGB", (1280, 720)).save(out, "JPEG", icc_profile=bytes(200_000))
    body = chat(part(out.getvalue(), "jpeg"), part(out.getvalue(), "jpeg"))
    assert [item.tokens for item in parse(body).items] == [1196, 1196]


def test_an_items_url_costs_what_an_encoder_told_of_it() -> None:
    costs = Costs()
    raw = orjson.dumps(chat({"type": "image_url", "image_url": {"url": "https://h/a.png"}}))
    item = openai.parse(raw, Api.CHAT, "id", PLAIN, costs=costs).items[0]
    assert item.tokens == UNKNOWN_TOKENS
    costs.sizes.learn(item, Handle("hash", "image", {"image_grid_thw": [1, 20, 20]}, {}))
    assert openai.parse(raw, Api.CHAT, "id", PLAIN, costs=costs).items[0].tokens == 100


def test_output_is_predicted_from_what_is_asked_for() -> None:
    assert parse(chat(max_tokens=16, n=3)).output_tokens == 48
    assert parse(chat(max_completion_tokens=8, max_tokens=99)).output_tokens == 8
    assert parse(chat(max_tokens=100_000)).output_tokens == parse(chat()).output_tokens
    assert parse(chat(max_tokens=1, n=2**62)).output_tokens == 128


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=5), json_values)
def test_unknown_fields_survive_and_odd_bodies_never_crash(fields: dict[str, Any], content: Any) -> None:
    body = fields | {"messages": [content, {"role": "user", "content": content}], "stream": False}
    try:
        job = parse(body)
    except BadRequest:
        return
    assert list(job.body.items()) == list(body.items())


@pytest.mark.parametrize(
    ("body", "api"),
    [
        ({"prompt": "x", "messages": -1}, Api.COMPLETIONS),
        ({"messages": [{"role": "user", "content": [{"type": [], "image_url": "x"}]}]}, Api.CHAT),
        ({"messages": [{"role": "user", "content": [{"type": {}, "text": 7}]}]}, Api.CHAT),
    ],
)
def test_values_of_other_types_are_the_engines_business(body: dict[str, Any], api: Api) -> None:
    assert parse(body, api=api).items == ()


@pytest.mark.parametrize("value", [True, [], "x", 3])
@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
def test_a_trusted_clients_parameters_are_objects(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match="must be an object"):
        openai.parse(orjson.dumps(chat(**{name: value})), Api.CHAT, "id", Identity(trust_client=True))


def test_a_line_break_in_a_cut_is_no_json() -> None:
    raw = orjson.dumps(chat({"image_url": "data:image/png;base64," + "A" * 80_000})).replace(b"AAA", b"A\nA", 1)
    with pytest.raises(BadRequest, match="not JSON"):
        openai.parse(raw, Api.CHAT, "id", PLAIN)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_job_or_a_bad_request(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        openai.parse(raw, Api.CHAT, "id", PLAIN)


@given(st.binary(min_size=1, max_size=200))
def test_the_hash_is_of_the_decoded_bytes(data: bytes) -> None:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    (item,) = parse(chat({"image_url": url})).items
    assert item.mm_hash == blake3(data).hexdigest()
