"""How many more losses a snapshot survives, from what nodes report."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def slow_margin(where: Where, parity_shards: int) -> int:
    """By trying all losses."""
    members = [(str(rank), name) for rank, name in enumerate(NAMES)]

    def survives(lost: tuple[str, ...]) -> bool:
        held = set("".join(ranks for name, (ranks, _) in where.items() if name not in lost))
        parity = {name for name, (_, parity) in where.items() if parity and name not in lost}
        whole = sum(rank in held and name in parity for rank, name in members)
        return held.issuperset("0123") or whole >= len(NAMES) - parity_shards

    for losses in range(1, parity_shards + 1):
        if not all(survives(lost) for lost in combinations(sorted({*NAMES, *where}), losses)):
            return losses - 1
    return parity_shards


RANKS = st.sets(st.sampled_from("0123")).map(lambda ranks: "".join(sorted(ranks)))
HELD = st.dictionaries(st.sampled_from("abcdxyz"), st.tuples(RANKS, st.booleans()))


@given(HELD, st.integers(1, 3))
def test_the_margin_is_what_trying_all_losses_finds(where: Where, parity_shards: int) -> None:
    found = recovery.margin(manifest_of(parity_shards), holdings_of(where))
    assert found == slow_margin(where, parity_shards)


@given(HELD, st.integers(1, 3))
def test_without_a_search_it_is_never_more_and_the_same_at_home(where: Where, m: int) -> None:
    home = {
        name: (ranks + str(NAMES.index(name)) if name in NAMES else ranks, parity)
        for name, (ranks, parity) in where.items()
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recovery, "_TRIED", 0)
        assert recovery.margin(manifest_of(m), holdings_of(where)) <= slow_margin(where, m)
        assert recovery.margin(manifest_of(m), holdings_of(home)) == slow_margin(home, m)


def test_a_large_group_takes_no_search() -> None:
    """Half of the ranks have a second copy; trying all losses of 32 of 128 would never end."""
    names = [f"n{number:03}" for number in range(128)]
    members = tuple(Member(n, (Extent(r, SIZE_BYTES),)) for r, n in enumerate(names))
    manifest = JobManifest(ID, len(names), (Group(members, 32),), "zfec", 4, ())
    holdings = {
        name: Holding(ID, 128, tuple(Extent(r, SIZE_BYTES) for r in {rank, rank & ~1}), True)
        for rank, name in enumerate(names)
    }
    assert recovery.margin(manifest, holdings) == 32
    del holdings["n001"]
    assert recovery.margin(manifest, holdings) == 31
