"""Every transport's plane has the members that `Plane` names, and none of the endpoint's work."""

import inspect
from importlib import import_module

import pytest

from engines.transfer.plane import Channel, Plane

PLANES = {
    "memory": ("memory", "MemoryPlane", "memory", "MemoryChannel"),
    "shm": ("shm", "ShmPlane", "shm", "ShmChannel"),
    "zmq": ("zmq", "ZmqPlane", "zmq", "ZmqChannel"),
    "mooncake": ("mooncake", "MooncakePlane", "mooncake_channel", "MooncakeChannel"),
}


def members(protocol):
    return {name for name in vars(protocol) if not name.startswith("_")}


@pytest.mark.parametrize("name", PLANES)
def test_a_plane_and_its_channel_are_complete(name):
    plane_module, plane, channel_module, channel = PLANES[name]
    plane_type = getattr(import_module(f"engines.transfer.{plane_module}"), plane)
    channel_type = getattr(import_module(f"engines.transfer.{channel_module}"), channel)
    assert plane_type.name == name
    for kind, protocol in ((plane_type, Plane), (channel_type, Channel)):
        for member in members(protocol):
            ours, theirs = getattr(kind, member), getattr(protocol, member)
            if inspect.isfunction(theirs):
                assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), member
