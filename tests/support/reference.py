"""The reference model of each family, loaded once per test process."""

from functools import cache

from bench.reference import Reference, load_reference
from tests.support.checkpoints import checkpoint


@cache
def reference(family: str) -> Reference:
    return load_reference(checkpoint(family))
