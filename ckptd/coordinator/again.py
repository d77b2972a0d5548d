"""What a snapshot that has lost parity needs, so that all its parity is there again. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptd.coordinator import recovery
from ckptd.coordinator.recovery import Holdings
from ckptd.manifest import Group, JobManifest, Member

Place = tuple[int, int]
"""(group, member)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who takes whose place, which groups can make their parity then, and what is in the way."""

    taken: dict[Place, str]
    groups: tuple[int, ...]
    hindrances: tuple[str, ...]
    homeless: tuple[Member, ...] = ()
    """Places of lost nodes whose segments others hold, and none that could take the place all."""


def has_parity(member: Member, holdings: Holdings) -> bool:
    """Whether all parity of the place is there."""
    return member.node in holdings and holdings[member.node].parity


def is_at_home(member: Member, node: str, holdings: Holdings) -> bool:
    """Whether `node` holds all segments of the place."""
    return node in holdings and set(member.extents) <= set(holdings[node].extents)


def plan(manifest: JobManifest, holdings: Holdings) -> Plan:
    """How the parity that no live node has can be made anew.

    A place whose node has not its segments is taken by one that has them all and has no place yet.
    One that holds parity made it for a place that it had: it can only take that one back, and does
    so as long as its heir has no parity.
    """
    held = recovery.rank_holders(holdings)
    members = manifest.nodes
    outside = [node for node in sorted(holdings) if node not in members]
    taken: dict[Place, str] = {}
    groups: list[int] = []
    hindrances: list[str] = []
    homeless: list[Member] = []
    for number, group in enumerate(manifest.groups):
        if not group.parity_shards:
            continue
        nodes = [member.node for member in group.members]
        lacking = [n for n, member in enumerate(group.members) if not has_parity(member, holdings)]
        for place in lacking:
            member = group.members[place]
            free = [node for node in outside if node not in taken.values()]
            heir = next(_heirs(member, (number, place), free, holdings), None)
            if is_at_home(member, member.node, holdings) and not (
                heir is not None and holdings[heir].parity
            ):
                continue
            if heir is None:
                hindrances.append(_why_not(member, held))
                if all(extent.rank in held for extent in member.extents):
                    homeless.append(member)
            else:
                taken[number, place] = nodes[place] = heir
        if _can_make(group, nodes, lacking, holdings, held):
            groups.append(number)
    return Plan(taken, tuple(groups), tuple(hindrances), tuple(homeless))


def _heirs(member: Member, place: Place, free: list[str], holdings: Holdings) -> Iterator[str]:
    """Who of those without a place may take this one, before others who has parity for it.

    That is as good as it was, wherever the segments of the place are by now.
    """
    for node in sorted(free, key=lambda name: (not holdings[name].parity, name)):
        held = holdings[node]
        if held.place == place if held.parity else is_at_home(member, node, holdings):
            yield node


def _why_not(member: Member, held: dict[int, tuple[str, ...]]) -> str:
    missing = [extent.rank for extent in member.extents if extent.rank not in held]
    if missing:
        return f"{recovery.name_ranks(missing)} of {member.node} must be brought back first"
    ranks = recovery.name_ranks([extent.rank for extent in member.extents])
    where = sorted({held[extent.rank][0] for extent in member.extents})
    return (
        f"{ranks} of {member.node}, which is lost, {'is' if len(member.extents) == 1 else 'are'} "
        f"now on {', '.join(where)}, and on no one node that has no place in the group yet"
    )


def _can_make(
    group: Group,
    nodes: list[str],
    lacking: list[int],
    holdings: Holdings,
    held: Mapping[int, tuple[str, ...]],
) -> bool:
    """Whether somebody can make its parity: a few from others' data, all from everybody's own.

    Or has some of it back, which the others are to hear of.
    """
    members = list(zip(group.members, nodes, strict=True))
    at_home = [is_at_home(member, node, holdings) for member, node in members]
    back = [n for n in lacking if nodes[n] in holdings and holdings[nodes[n]].parity]
    if len(lacking) - len(back) > group.parity_shards:
        return all(at_home)
    whole = all(extent.rank in held for member in group.members for extent in member.extents)
    return whole and (bool(back) or any(at_home[place] for place in lacking))
