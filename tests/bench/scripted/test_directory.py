"""Listed engines, as a real proxy in this process finds them."""

from __future__ import annotations

from bench.scripted.candidates import free_port
from bench.scripted.directory import KEY, directory
from proxy.app import Proxy
from proxy.core import State
from tests.fakes.native import Decode, Encoder, Prefill
from tests.support.settings import load
from tests.support.waiting import until


async def test_a_proxy_finds_who_is_listed_and_drains_who_is_not() -> None:
    async with Encoder() as encoder, Prefill() as prefill, Decode() as decode, Decode() as other:
        urls = {"encode": (encoder.url,), "prefill": (prefill.url,), "decode": (decode.url, other.url)}
        port = free_port()
        async with directory(f"http://127.0.0.1:{port}", urls) as listed:
            settings = load(*listed.flags(), "--host", "127.0.0.1", "--port", str(port), "--probe-interval", "0.05")
            assert settings.register_key == KEY
            proxy = Proxy(settings)
            async with proxy.serving():

                def ready() -> set[str]:
                    return {instance.url for instance in proxy.fleet if instance.state is State.READY}

                await until(lambda: ready() == {encoder.url, prefill.url, decode.url, other.url})
                listed.drop(other.url)
                listed.drop(encoder.url)
                await until(lambda: ready() == {prefill.url, decode.url})
                listed.fail(True)
                listed.add(other.url)
                listed.add(encoder.url)
                await until(lambda: ready() == {prefill.url, decode.url, other.url})
                assert repr(listed) == "<Directory of 4 of 4 engines>"
                listed.fail(False)
                await listed.settled(10)
                assert encoder.url in ready()
