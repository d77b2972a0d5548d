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
            whole = _outsider(manifest, holdings, extents, rooms, failed)
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


def _outsider(
    manifest: JobManifest,
    holdings: Holdings,
    extents: Iterable[Extent],
    rooms: Mapping[str, int],
    failed: Collection[tuple[int, str]],
) -> str | None:
    """The node without a place that has the most room, if it has enough for all of these."""
    needed = sum(extent.size_bytes for extent in extents)
    free = [
        node
        for node, room in rooms.items()
        if node not in manifest.nodes
        and node not in holdings
        and room >= needed
        and all((extent.rank, node) not in failed for extent in extents)
    ]
    return min(free, key=lambda name: (-rooms[name], name), default=None)
