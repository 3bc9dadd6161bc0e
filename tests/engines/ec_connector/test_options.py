import re

import pytest

from engines.ec_connector.options import Options


def test_vllms_own_words_are_enough_for_a_shared_folder() -> None:
    options = Options.read({"shared_storage_path": "/mnt/embeddings"})
    assert (options.transfer, options.shared_storage_path) == ("storage", "/mnt/embeddings")


def test_another_transfer_needs_no_folder() -> None:
    assert Options.read({"transfer": "zmq", "transfer_host": "10.0.0.1"}).shared_storage_path is None


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({}, "needs shared_storage_path"),
        ({"transfer": "zmq", "shared_storage_path": "/mnt"}, "no other takes it"),
        ({"transfer": "carrier pigeon"}, "carrier pigeon"),
        ({"shared_storage_path": "/mnt", "wait_timeout": 0}, "wait_timeout"),
        ({"shared_storage_path": "/mnt", "wait_timeuot": 3}, "wait_timeuot"),
    ],
)
def test_what_is_wrong_is_named(extra: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"ec_connector_extra_config.*{re.escape(complaint)}"):
        Options.read(extra)
