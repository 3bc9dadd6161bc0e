import inspect

import msgspec
import pytest

from engines.transfer import TRANSPORTS, base, create
from engines.transfer.base import Address, TransferError

ERRORS = [kind for kind in vars(base).values() if inspect.isclass(kind) and issubclass(kind, TransferError)]


def test_the_docstring_is_the_error_tree():
    for kind in ERRORS:
        if kind is not TransferError:
            line = next(line for line in base.__doc__.splitlines() if line.split()[:1] == [kind.__name__])
            assert line.endswith(" not") != kind.retryable, line


def test_an_address_is_json_able_and_short_in_logs():
    address = Address("10.0.0.1", 4000, "ab" * 16, "m", 7, 8)
    assert msgspec.convert(msgspec.to_builtins(address), Address) == address
    assert str(address) == "10.0.0.1:4000/abababab"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("carrier-pigeon", {}, "choose one of shm"),
        ("shm", {"rdma": True}, "needs the mooncake transport"),
        ("shm", {"storage_path": "/x"}, "no other takes one"),
        ("storage", {}, "needs a storage path"),
    ],
)
def test_impossible_combinations_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)


@pytest.mark.parametrize("name", TRANSPORTS)
async def test_a_transfer_that_was_never_started_closes_without_a_trace(name, tmp_path):
    try:
        transfer = create(name, storage_path=tmp_path if name == "storage" else None)
    except base.TransportUnavailable as error:
        pytest.skip(str(error))
    transfer.allocate("arena", 4096)
    await transfer.close()
    await transfer.close()
    assert set(transfer.audit().values()) == {0}
