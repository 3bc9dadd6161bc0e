import pytest

from bench.simulator.clock import Clock
from bench.simulator.encoders import Encoder, SimulatedEncoder
from bench.simulator.engines import Engine, SimulatedEngine
from bench.simulator.machines import Machine, Park
from bench.simulator.models import H100, QWEN3_VL_30B
from proxy.core import Role


def test_each_machine_is_simulated_as_what_it_is() -> None:
    encoder = Encoder(QWEN3_VL_30B.vision(H100))
    engine = Engine(QWEN3_VL_30B.language(H100, 8))
    park = Park(
        Clock(),
        (Machine("http://e", Role.ENCODE, encoder, slowness=2.0), Machine("http://p", Role.PREFILL, engine)),
    )
    assert isinstance(park.at("http://e"), SimulatedEncoder)
    assert isinstance(park.at("http://p"), SimulatedEngine)
    assert park.at("http://e").slowness == 2.0
    with pytest.raises(KeyError):
        park.at("http://nobody")


def test_the_proxy_is_told_of_room_for_kv() -> None:
    engine = Engine(QWEN3_VL_30B.language(H100, 8), kv_tokens=1000)
    assert Machine("http://d", Role.DECODE, engine, {"host": "a"}).told == {"kv_tokens": 1000, "host": "a"}
    encoder = Machine("http://e", Role.ENCODE, Encoder(QWEN3_VL_30B.vision(H100)), {"cache_tokens": 5})
    assert encoder.told == {"cache_tokens": 5}
