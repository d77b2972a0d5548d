"""What a snapshot consists of: job manifests, node manifests, job records.

A job manifest gives the whole geometry (who holds which ranks, in which group), so that everybody
computes the same stripe map from it. A node manifest gives the digests of one node's cells.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated

import msgspec

from ckptd.digest import cell_count
from ckptd.erasure import StripeMap
from ckptd.ids import Count, JobId, NodeId, Rank, SnapshotId, WorldSize

CELLS_LIMIT = 1 << 25
"""Most cells of one group; each takes some 100 bytes while a stripe map is in use."""


class Extent(msgspec.Struct, frozen=True, array_like=True, order=True):
    """The size of one rank's segment."""

    rank: Rank
    size_bytes: Count


class Member(msgspec.Struct, frozen=True):
    """One node of a group and the ranks whose segments make up its image, in rank order.

    `captured_on`: the node that had the place first, if `node` has taken it over; its name is the
    one under which the group keeps the node manifest of the place.
    """

    node: NodeId
    extents: tuple[Extent, ...]
    captured_on: NodeId | None = None

    @property
    def origin(self) -> str:
        """The node that captured the segments."""
        return self.captured_on or self.node

    def cells(self, cell_bytes: int) -> int:
        """Number of cells of this member's image."""
        return sum(cell_count(extent.size_bytes, cell_bytes) for extent in self.extents)

    def cell_ranks(self, cell_bytes: int) -> Iterator[tuple[int, int]]:
        """(rank, index of the cell in that rank's segment) for each cell of the image, in order."""
        for extent in self.extents:
            for index in range(cell_count(extent.size_bytes, cell_bytes)):
                yield extent.rank, index


class Group(msgspec.Struct, frozen=True):
    """Nodes that protect one another."""

    members: tuple[Member, ...]
    parity_shards: Count

    @property
    def data_shards(self) -> int:
        return len(self.members) - self.parity_shards


class Ancestor(msgspec.Struct, frozen=True, array_like=True):
    """Snapshots of `life` up to and including `step` lie on the path to a snapshot."""

    life: Count
    step: Count


class JobManifest(msgspec.Struct, frozen=True):
    """Identity, geometry and ancestry of one snapshot.

    Another `edition` differs only in the names of nodes that have taken the places of lost ones;
    the highest is true. Places and sizes stay, and with them the stripe map and all parity.
    """

    id: SnapshotId
    world_size: WorldSize
    groups: tuple[Group, ...]
    codec: str
    cell_bytes: Annotated[int, msgspec.Meta(ge=1)]
    ancestors: tuple[Ancestor, ...]
    edition: Count = 0

    def __post_init__(self) -> None:
        """Raises ValueError where no stripe map can be made; decoding does, with the reason."""
        for number, group in enumerate(self.groups):
            if group.parity_shards and group.data_shards < 1:
                raise ValueError(
                    f"group {number} has {len(group.members)} members, and of these "
                    f"{group.parity_shards} for parity"
                )
            cells = sum(member.cells(self.cell_bytes) for member in group.members)
            if cells > CELLS_LIMIT:
                raise ValueError(
                    f"group {number} has {cells} cells of {self.cell_bytes} bytes; more than "
                    f"{CELLS_LIMIT} are not possible: choose a larger --cell-size"
                )

    @property
    def nodes(self) -> set[str]:
        """All nodes with a place in a group."""
        return {member.node for group in self.groups for member in group.members}

    def with_nodes(self, taken: Mapping[tuple[int, int], str]) -> "JobManifest":
        """The next edition: other nodes in some places, given as (group, member)."""
        groups = []
        for number, group in enumerate(self.groups):
            members = list(group.members)
            for place, member in enumerate(members):
                if (number, place) in taken:
                    node = taken[number, place]
                    members[place] = Member(node, member.extents, member.origin)
            groups.append(Group(tuple(members), group.parity_shards))
        return msgspec.structs.replace(self, groups=tuple(groups), edition=self.edition + 1)

    def stripe_map(self, group: int) -> StripeMap:
        """The stripes of one group; every node computes the same."""
        who = self.groups[group]
        counts = [member.cells(self.cell_bytes) for member in who.members]
        return StripeMap(counts, who.data_shards, who.parity_shards)

    def group_of(self, rank: int) -> tuple[int, int]:
        """(group, member) whose image holds `rank`. Raises KeyError if none does."""
        for group_index, group in enumerate(self.groups):
            for member_index, member in enumerate(group.members):
                if any(extent.rank == rank for extent in member.extents):
                    return group_index, member_index
        raise KeyError(rank)

    def place_of(self, node: str) -> tuple[int, int] | None:
        """(group, member) of `node`, or None if it has no part in this snapshot."""
        for group_index, group in enumerate(self.groups):
            for member_index, member in enumerate(group.members):
                if member.node == node:
                    return group_index, member_index
        return None


class SegmentDigests(msgspec.Struct, frozen=True):
    """One segment's size and the packed digests of its cells (see `ckptd.digest`)."""

    rank: Rank
    size_bytes: Count
    digests: bytes


class NodeManifest(msgspec.Struct, frozen=True):
    """One node's part of a snapshot."""

    id: SnapshotId
    node: NodeId
    cell_bytes: Annotated[int, msgspec.Meta(ge=1)]
    segments: tuple[SegmentDigests, ...]

    def segment(self, rank: int) -> SegmentDigests:
        """The entry of `rank`. Raises KeyError if this node has none."""
        for segment in self.segments:
            if segment.rank == rank:
                return segment
        raise KeyError(rank)


class GivenUp(msgspec.Struct, frozen=True, array_like=True):
    """A rollback to `step` of `life` gave up all newer snapshots of lives before `before`."""

    life: Count
    step: Count
    before: Count

    def covers(self, id: SnapshotId) -> bool:
        """Whether it gave up `id`."""
        return id.life < self.before and (id.life, id.step) > (self.life, self.step)

    def without(self, path: tuple[Ancestor, ...]) -> "Iterator[GivenUp]":
        """What of it stays given up, of what is older than the end of `path`, and not on it."""
        ends = [(past.life, past.step) for past in path]
        here = self.life, self.step
        for (life, step), (next_life, _) in pairwise([here, *(e for e in ends if e > here)]):
            before = min(self.before, next_life)
            if life < before:
                yield GivenUp(life, step, before)


class JobRecord(msgspec.Struct, frozen=True):
    """What must be known of a job to decide whether it may start from nothing, and from where.

    Given to every agent of the cluster when a life is granted, so that it outlives the coordinator
    and the nodes of the job. `nodes` maps each node of the life to the token of its memory
    directory: another token means that the node came back with nothing. `keep`: how many protected
    snapshots are kept. `holders`: other nodes that hold something of what the life begins from.
    `term`: in which it was granted. Of two records of a life, one was granted in vain, as nobody is
    left who could have told rank 0: that of the lower term.
    """

    job: JobId
    life: Count
    nodes: dict[str, str]
    ancestors: tuple[Ancestor, ...]
    keep: Annotated[int, msgspec.Meta(ge=1)] = 1
    given_up: tuple[GivenUp, ...] = ()
    holders: tuple[NodeId, ...] = ()
    term: Count = 0

    def is_later(self, other: "JobRecord | None") -> bool:
        """Whether it counts instead of `other`."""
        return other is None or (self.life, self.term) > (other.life, other.term)

    def has_given_up(self, id: SnapshotId) -> bool:
        """Whether a rollback went back past `id`, so that the job must not go on from it."""
        return any(each.covers(id) for each in self.given_up)


def is_ancestor(id: SnapshotId, of: SnapshotId, ancestors: tuple[Ancestor, ...]) -> bool:
    """Whether training went through `id` on its way to `of`."""
    if id.job != of.job or id == of:
        return False
    if id.life == of.life:
        return id.step < of.step
    return any(id.life == past.life and id.step <= past.step for past in ancestors)
