"""Pairs of started transfers, one per transport; whatever a test did, all of it must be gone afterwards."""

import pytest

from tests.engines.transfer.nodes import COPYING, Freed, Nodes


@pytest.fixture
def freed():
    return Freed()


@pytest.fixture
async def nodes(tmp_path):
    made = Nodes(tmp_path)
    try:
        yield made
        await made.idle()
    finally:
        await made.close()


@pytest.fixture(params=COPYING)
def transport(request):
    return request.param


@pytest.fixture
async def pair(nodes, transport):
    """(sender, receiver)"""
    return await nodes(transport, who="sender"), await nodes(transport, who="receiver")
