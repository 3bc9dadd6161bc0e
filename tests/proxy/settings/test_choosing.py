"""Flags about decisions."""

from __future__ import annotations

import pytest

from proxy.balancer import POLICIES
from proxy.core import ROLES
from tests.support.settings import load, refused

D = ["--decode-servers-urls", "http://d:1"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", ["affinity", *["least_loaded"] * 3]),
        ("round_robin", ["round_robin"] * 4),
        ("encode=round_robin", ["round_robin", *["least_loaded"] * 3]),
        ("round_robin, decode=least_loaded", ["round_robin", "round_robin", "least_loaded", "round_robin"]),
    ],
)
def test_policies_per_role_or_common(policy: str, expected: list[str]) -> None:
    found = load(*D, "--policy", policy).policies()
    assert [found[role] for role in ROLES] == expected


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*D, "--policy", "magic"], f"no policy 'magic' (known: {', '.join(POLICIES)})"),
        ([*D, "--policy", "chef=round_robin"], "no role 'chef'"),
        ([*D, "--vision", "m=llava"], "--vision: 'llava' is neither a family (qwen2_vl"),
        ([*D, "--hedge-after", "soon"], "--hedge-after: 'soon' is neither seconds like 0.5 nor a percentile like p95"),
        ([*D, "--link-rates", "moon=1"], "--link-rates: no link 'moon' (known: host, rack, zone, other)"),
        ([*D, "--max-attempts", "0"], "--max-attempts: Input should be greater than 0"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
