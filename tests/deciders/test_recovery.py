"""How many more losses a snapshot survives, from what nodes report."""

from itertools import combinations

import pytest

from ckptd.coordinator import recovery
from ckptd.manifest import Extent, Group, JobManifest, Member
from ckptd.wire import Holding

from .fakes import SIZE_BYTES, snapshot

ID = snapshot(1, 1)
NAMES = ("a", "b", "c", "d")

Where = dict[str, tuple[str, bool]]
"""Node to the ranks that it holds, as digits, and whether it has parity."""


def manifest_of(parity_shards: int) -> JobManifest:
    """Rank r was captured on the r-th node."""
    members = tuple(Member(n, (Extent(r, SIZE_BYTES),)) for r, n in enumerate(NAMES))
    return JobManifest(ID, len(NAMES), (Group(members, parity_shards),), "zfec", 4, ())


def holdings_of(where: Where) -> dict[str, Holding]:
    def extents(ranks: str) -> tuple[Extent, ...]:
        return tuple(Extent(int(rank), SIZE_BYTES) for rank in ranks)

    return {n: Holding(ID, 4, extents(ranks), parity) for n, (ranks, parity) in where.items()}


@pytest.mark.parametrize(
    ("where", "margin"),
    [
        ({"a": ("0", True), "b": ("1", True), "c": ("2", True), "d": ("3", True)}, 2),
        ({"a": ("0", True), "b": ("1", True), "c": ("2", True)}, 1),
        ({"a": ("0", True), "b": ("1", True)}, 0),
        ({"a": ("0", False), "b": ("1", False), "c": ("2", False), "d": ("3", False)}, 0),
        # Copies count, wherever they are.
        ({"a": ("01", False), "b": ("12", False), "c": ("23", False), "d": ("30", False)}, 1),
        ({"a": ("0123", False), "x": ("0123", False), "y": ("0123", False)}, 2),
        # Ranks that have moved to one node are lost with it, all of them.
        ({"a": ("012", True), "b": ("", True), "c": ("", True), "d": ("3", True)}, 0),
        ({}, 0),
    ],
)
def test_margin(where: Where, margin: int) -> None:
    manifest, holdings = manifest_of(2), holdings_of(where)
    assert recovery.margin(manifest, holdings) == margin
    for lost in combinations(sorted(holdings), margin) if margin else ():
        left = {name: holding for name, holding in holdings.items() if name not in lost}
        assert recovery.judge(manifest, 4, left).restorable


def test_nothing_is_known_to_survive_without_a_manifest() -> None:
    assert recovery.margin(None, holdings_of({"a": ("0123", False)})) == 0
