"""On whose spare memory lost segments are rebuilt when nobody takes the lost node's place. Pure."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ckptd.coordinator.recovery import Holdings
from ckptd.manifest import Extent, JobManifest


@dataclass(frozen=True, slots=True)
class Placement:
    """Rank to the node that is to have its segment, and those for which nobody has room."""

    nodes: dict[int, str]
    left: tuple[Extent, ...]


def place(
    manifest: JobManifest,
    holdings: Holdings,
    lost: Collection[int],
    spare_bytes: Mapping[str, int],
    failed: Collection[tuple[int, str]] = (),
) -> Placement:
    """Give each lost rank to a node that has room for it; `failed` (rank, node) could not do it.

    All of a lost node's go to one outside all groups, if one has room for them, since that one can
    take the place and the parity, too. Else they are spread over the nodes of the same group, those
    with the most room first, and over others where these have too little.
    """
    rooms = dict(spare_bytes)
    found: dict[int, str] = {}
    left: list[Extent] = []
    for group in manifest.groups:
        given: Counter[str] = Counter()
        names = {member.node for member in group.members}
        for member in group.members:
            extents = sorted(
                (extent for extent in member.extents if extent.rank in lost),
                key=lambda extent: (-extent.size_bytes, extent.rank),
            )
            if not extents:
                continue
            whole = outsider(manifest, holdings, extents, rooms, failed)
            for extent in extents:
                able = [
                    node
                    for node, room in rooms.items()
                    if room >= extent.size_bytes and (extent.rank, node) not in failed
                ]
                if not able:
                    left.append(extent)
                    continue
                node = whole or min(
                    able, key=lambda name: (name not in names, given[name], -rooms[name], name)
                )
                found[extent.rank] = node
                rooms[node] -= extent.size_bytes
                given[node] += 1
    return Placement(found, tuple(left))


def outsider(
    manifest: JobManifest,
    holdings: Holdings,
    extents: Iterable[Extent],
    rooms: Mapping[str, int],
    failed: Collection[tuple[int, str]] = (),
) -> str | None:
    """A node that could take the place of the one that has lost these: none has a better claim.

    It has no place yet, no parity of one, and room for what it lacks: the node with the most.
    """
    wanted = set(extents)
    found: list[tuple[int, str]] = []
    for node, room in rooms.items():
        holding = holdings.get(node)
        lacking = wanted - set(holding.extents if holding is not None else ())
        if (
            node not in manifest.nodes
            and not (holding is not None and holding.parity)
            and room >= sum(extent.size_bytes for extent in lacking)
            and all((extent.rank, node) not in failed for extent in lacking)
        ):
            found.append((-room, node))
    return min(found)[1] if found else None
