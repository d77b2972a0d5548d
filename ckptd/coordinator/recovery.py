"""What can be restored from the cells that live nodes report. Pure functions."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb

from ckptd.manifest import Group, JobManifest
from ckptd.wire import Holding, Source

RANKS_NAMED = 8
_TRIED = 500  # sets of nodes: some milliseconds

Holdings = Mapping[str, Holding]  # node to what it holds of one snapshot; live nodes only


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a snapshot can be restored, from where, and why (not)."""

    restorable: bool
    tiers: tuple[str, ...]
    reason: str


def rank_holders(holdings: Holdings) -> dict[int, tuple[str, ...]]:
    """Rank to the nodes that hold its whole segment."""
    found: dict[int, list[str]] = {}
    for node, holding in sorted(holdings.items()):
        for extent in holding.extents:
            found.setdefault(extent.rank, []).append(node)
    return {rank: tuple(nodes) for rank, nodes in found.items()}


def parity_holders(holdings: Holdings) -> tuple[str, ...]:
    """Nodes that hold all their parity cells."""
    return tuple(sorted(node for node, holding in holdings.items() if holding.parity))


def judge(manifest: JobManifest | None, world_size: int, holdings: Holdings) -> Verdict:
    """Can the snapshot be restored from `holdings`?"""
    held = rank_holders(holdings)
    missing = [rank for rank in range(world_size) if rank not in held]
    if not missing:
        protected = manifest is not None and is_protected(manifest, holdings)
        return Verdict(True, ("memory", "group") if protected else ("memory",), "")
    if manifest is None:
        return Verdict(
            False, (), f"no live node holds {name_ranks(missing)}, and there is no parity yet"
        )
    for index, group in enumerate(manifest.groups):
        data = {
            number
            for number, member in enumerate(group.members)
            if all(extent.rank in held for extent in member.extents)
        }
        parity = {
            number
            for number, member in enumerate(group.members)
            if (holding := holdings.get(member.node)) is not None and holding.parity
        }
        if len(data) == len(group.members):
            continue
        if (
            not group.parity_shards
            or next(manifest.stripe_map(index).unrestorable(data, parity), None) is not None
        ):
            gone = [
                member.node
                for number, member in enumerate(group.members)
                if number not in data or number not in parity
            ]
            return Verdict(
                False,
                (),
                f"group {index} needs {group.data_shards} of {len(group.members)} nodes, and the "
                f"cells of {', '.join(gone)} are not all there",
            )
    return Verdict(True, ("group",), f"{name_ranks(missing)} can be rebuilt from parity")


def is_protected(manifest: JobManifest, holdings: Holdings) -> bool:
    """Whether every group that has parity holds all of it, and all its data."""
    held = rank_holders(holdings)
    return any(group.parity_shards for group in manifest.groups) and all(
        (member.node in holdings and holdings[member.node].parity)
        and all(extent.rank in held for extent in member.extents)
        for group in manifest.groups
        if group.parity_shards
        for member in group.members
    )


def has_all_parity(manifest: JobManifest | None, holdings: Holdings) -> bool:
    """Whether all parity that there ever was is there, so that it surely was protected."""
    groups = manifest.groups if manifest is not None else ()
    places = [member for group in groups if group.parity_shards for member in group.members]
    return bool(places) and all(
        place.node in holdings and holdings[place.node].parity for place in places
    )


def was_protected(holdings: Holdings) -> bool:
    """Whether all parity of some edition is there, whoever has been given a place since."""
    manifests = {
        held.manifest.edition: held.manifest for held in holdings.values() if held.manifest
    }
    return any(has_all_parity(manifest, holdings) for manifest in manifests.values())


def margin(manifest: JobManifest | None, holdings: Holdings) -> int:
    """How many more nodes of each group may surely be lost, whichever they are.

    Copies count, wherever they are; but no more losses than there is parity for. Where data has
    moved away from the parity of its place, and the group is large, the truth may be more: only
    a search through all sets of nodes could tell.
    """
    if manifest is None:
        return 0
    held = {rank: frozenset(nodes) for rank, nodes in rank_holders(holdings).items()}
    return min((_margin(group, held, holdings) for group in manifest.groups), default=0)


def _margin(group: Group, held: Mapping[int, frozenset[str]], holdings: Holdings) -> int:
    copies = [
        {held.get(extent.rank, frozenset[str]()) for extent in member.extents}
        for member in group.members
    ]
    takes: Counter[str] = Counter()
    """By node, twice the number of members with data and parity that its loss takes, at most."""
    left, moved = 0, False
    for member, places in zip(group.members, copies, strict=True):
        if all(places) and member.node in holdings and holdings[member.node].parity:
            left += 1
            takes[member.node] += 2
            others = _takes(member.node, places)
            takes.update(others)
            moved |= bool(others)
    spare = left - group.data_shards
    # Data is gone with all nodes of one of these; nothing rebuilds it once too few are left.
    losses = (_losses(nodes, takes, spare) for nodes in set().union(*copies))
    sure = max(0, min([group.parity_shards, *(number - 1 for number in losses)]))
    nodes = sorted(set(takes).union(*(nodes for places in copies for nodes in places)))
    while moved and sure < group.parity_shards and comb(len(nodes), sure + 1) <= _TRIED:
        if not all(_survives(group, held, holdings, t) for t in combinations(nodes, sure + 1)):
            break
        sure += 1
    return sure


def _survives(
    group: Group,
    held: Mapping[int, frozenset[str]],
    holdings: Holdings,
    lost: tuple[str, ...],
) -> bool:
    """Whether all data is left, or data and parity of as many members as the code needs."""
    whole = [
        all(held.get(extent.rank, frozenset()).difference(lost) for extent in member.extents)
        for member in group.members
    ]
    left = (
        data
        and member.node not in lost
        and member.node in holdings
        and holdings[member.node].parity
        for data, member in zip(whole, group.members, strict=True)
    )
    return all(whole) or sum(left) >= group.data_shards


def _takes(place: str, copies: Iterable[frozenset[str]]) -> dict[str, int]:
    """What other nodes take of a member's data: twice all of it, or half of that if one of many."""
    found: dict[str, int] = {}
    for nodes in copies:
        if place not in nodes:
            for node in nodes:
                found[node] = max(found.get(node, 0), 2 if len(nodes) == 1 else 1)
    return found


def _losses(nodes: frozenset[str], takes: Counter[str], spare: int) -> int:
    """The fewest losses, of these nodes among others, that take more than `spare` members."""
    gone = sum(takes[node] for node in nodes)
    losses = len(nodes)
    for node, number in takes.most_common():
        if gone >= 2 * (spare + 1):
            break
        if node not in nodes:
            gone += number
            losses += 1
    return losses


def source(manifest: JobManifest | None, holdings: Holdings, cells: Mapping[str, str]) -> Source:
    """Where an agent can fetch a snapshot from; `cells` has the cell servers of live nodes."""
    extents = [extent for holding in holdings.values() for extent in holding.extents]
    if manifest is not None:
        extents += [e for group in manifest.groups for m in group.members for e in m.extents]
    return Source(
        manifest=manifest,
        ranks=rank_holders(holdings),
        sizes={extent.rank: extent.size_bytes for extent in extents},
        parity=parity_holders(holdings),
        cells=dict(cells),
    )


def name_ranks(ranks: list[int]) -> str:
    """Ranks in words, however many there are."""
    some = ", ".join(map(str, ranks[:RANKS_NAMED]))
    some += " …" if len(ranks) > RANKS_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"
