"""What can be restored from the cells that live nodes report. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from ckptd.manifest import Group, JobManifest
from ckptd.wire import Holding, Source

RANKS_NAMED = 8

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


def margin(manifest: JobManifest | None, holdings: Holdings) -> int:
    """How many more nodes of each group may surely be lost, whichever they are.

    Copies count, wherever they are; but no more losses than there is parity for.
    """
    if manifest is None:
        return 0
    held = rank_holders(holdings)
    return min((_margin(group, held, holdings) for group in manifest.groups), default=0)


def _margin(group: Group, held: Mapping[int, tuple[str, ...]], holdings: Holdings) -> int:
    ranks = [extent.rank for member in group.members for extent in member.extents]
    nodes = {member.node for member in group.members}
    nodes.update(*(held.get(rank, ()) for rank in ranks))
    for losses in range(1, group.parity_shards + 1):
        for lost in combinations(sorted(nodes), losses):
            if not _survives(group, held, holdings, lost):
                return losses - 1
    return group.parity_shards


def _survives(
    group: Group,
    held: Mapping[int, tuple[str, ...]],
    holdings: Holdings,
    lost: tuple[str, ...],
) -> bool:
    """Whether all data is left, or data and parity of as many members as the code needs."""
    whole = [
        all(set(held.get(extent.rank, ())).difference(lost) for extent in member.extents)
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
