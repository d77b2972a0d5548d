"""What moves between agents, by value: protecting a snapshot, and bringing a segment to a node.

Parity is modelled by what it was computed from. It yields a segment only together with enough data
and parity that was computed from the very same; anything else would decode to bytes whose digest
is not the one that the node manifests have.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptd.agent import events as ev
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest

from .disk import Disk, File, ParityOf, Seal, State

if TYPE_CHECKING:
    from .agents import Agent

_AGAIN_S = (0.1, 0.4)
_DONE_S = (0.0001, 0.005)


Ranks = Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Places:
    """Where an agent can look for parts of a snapshot: as `Source`, and from this node."""

    agent: "Agent"
    id: SnapshotId
    manifest: JobManifest | None
    ranks: Ranks
    cells: Collection[str]
    """Nodes whose addresses are known."""

    def peer(self, node: str) -> "Agent | None":
        if node == self.agent.machine.name:
            return self.agent
        return self.agent.machine.reaches(node) if node in self.cells else None

    def digests(self, rank: int) -> State | None:
        """From those who hold the segment, then from the group of the node that sealed it."""
        asked = [(node, [node]) for node in self.ranks.get(rank, ())]
        if self.manifest is not None:
            group, member = self.manifest.group_of(rank)
            members = self.manifest.groups[group].members
            asked.append((members[member].origin, [other.node for other in members]))
        for node, keepers in asked:
            for peer in [self.agent, *map(self.peer, keepers)]:
                found = peer.node_manifest(self.id, node) if peer is not None else None
                if found is not None and rank in found:
                    return found[rank]
        return None

    def copy(self, rank: int, digests: State | None) -> State | None:
        """A whole copy of a segment, from here or from whoever holds it."""
        for node in (self.agent.machine.name, *self.ranks.get(rank, ())):
            peer = self.peer(node)
            if digests and peer is not None and peer.read(self.id, rank) == digests:
                return digests
        return None


class EncodeRun:
    """One node's share in protecting one snapshot, as `ckptd.agent.protect.EncodeRun` does it.

    With `ranks`, as `ckptd.agent.again.RecodeRun` does it: from whoever holds the segments.
    """

    def __init__(self, agent: "Agent", action: ev.Encode) -> None:
        self._agent, self._name, self._size_bytes = agent, action.name, action.size_bytes
        self._serve_only, self._again = action.serve_only, bool(action.ranks)
        self._stopped = self._ended = False
        self.update(action)
        place = action.manifest.place_of(agent.machine.name)
        assert place is not None
        self._group, self._me = place
        if not self._serve_only:
            agent.in_background(agent.plan.encode_s, self._collect_manifests)

    def update(self, action: ev.Encode) -> None:
        """The same order again: names and addresses may be new."""
        self._manifest, agent = action.manifest, self._agent
        self._places = Places(
            agent, action.manifest.id, action.manifest, action.ranks, action.cells
        )

    def stop(self) -> None:
        if not self._stopped and not self._ended and not self._serve_only:
            self._tell(ev.EncodeFailed(self._manifest.id, ""))
        self._stopped = True

    def _fail(self, reason: str, damaged: bool = False) -> None:
        self._ended = True
        self._tell(ev.EncodeFailed(self._manifest.id, reason, damaged))

    def _tell(self, event: ev.Event) -> None:
        self._agent.in_background(_DONE_S, self._agent.feed, event)

    def _collect_manifests(self) -> None:
        """Keep every node manifest of the group before any parity is made."""
        if self._stopped:
            return
        id = self._manifest.id
        for member in self._manifest.groups[self._group].members:
            ranks = [extent.rank for extent in member.extents]
            found: dict[int, State] | None = None
            if self._again:
                found = {rank: state for rank in ranks if (state := self._places.digests(rank))}
                found = found if len(found) == len(ranks) else None
            elif (peer := self._places.peer(member.node)) is not None:
                found = peer.node_manifest(id, member.node)
                if not set(ranks) <= (found or {}).keys():
                    self._fail(f"{member.node} does not hold its segments of {id}")
                    return
            if found is None:
                self._agent.in_background(_AGAIN_S, self._collect_manifests)
                return
            if member.node != self._agent.machine.name:
                self._agent.disk.node_manifests[id, member.origin] = dict(found)
        self._encode()

    def _encode(self) -> None:
        """Read all data of the group, with the others' help, and keep this node's parity."""
        if self._stopped:
            return
        id = self._manifest.id
        inputs: list[tuple[int, State]] = []
        for member in self._manifest.groups[self._group].members:
            peer = self._places.peer(member.node)
            if not self._again and (peer is None or id not in peer.runs):
                self._agent.in_background(_AGAIN_S, self._encode)  # it hands out no rows yet
                return
            for extent in member.extents:
                digests = self._places.digests(extent.rank)
                if self._again and self._places.copy(extent.rank, digests) is None:
                    self._agent.in_background(_AGAIN_S, self._encode)
                    return
                data = None if self._again or peer is None else peer.read(id, extent.rank)
                if not self._again and peer is not None and data != digests:
                    what = "gone" if data is None else "damaged"
                    reason = f"rank {extent.rank} of {id} from {member.node} is {what}"
                    self._fail(reason, damaged=data is not None)
                    return
                assert digests is not None
                inputs.append((extent.rank, digests))
        disk = self._agent.disk
        file = disk.files.setdefault(self._name, File(self._size_bytes))
        file.data = disk.parity_seals[self._name] = ParityOf(
            id, self._group, self._me, tuple(sorted(inputs))
        )
        self._agent.parities[id] = self._name
        self._ended = True
        self._agent.world.truth.encoded(id, self._agent.machine.name, self._manifest)
        self._tell(ev.Encoded(id))


class Fetching:
    """Brings a segment to a node, as `ckptd.agent.fetch.SegmentFetch` does."""

    def __init__(self, agent: "Agent", action: ev.Fetch) -> None:
        self._agent, self._action = agent, action
        source = action.source
        self._places = Places(agent, action.id, source.manifest, source.ranks, source.cells)
        if not action.present:
            agent.disk.files.setdefault(action.name, File(action.size_bytes))
        agent.in_background(agent.plan.fetch_s, self._run)

    def _run(self) -> None:
        action, disk = self._action, self._agent.disk
        if action.name not in disk.files:
            disk.files[action.name] = File(action.size_bytes)
        file = disk.files[action.name]
        digests = self._places.digests(action.rank)
        if digests is None:
            self._fail("Unrecoverable", f"the digests of rank {action.rank} are lost")
            return
        manifest = action.source.manifest
        world_size = manifest.world_size if manifest is not None else len(action.source.sizes)
        if action.present and file.data == digests:
            disk.seals[action.name] = Seal(action.id, action.rank, world_size, digests)
            self._agent.feed(ev.Fetched(action.name, 0, 0))
            return
        got, rebuilt = self._places.copy(action.rank, digests), 0
        if got is None:
            got, rebuilt = self._decode(digests), 3
        if got != digests:
            self._fail("Unrecoverable", f"rank {action.rank} of {action.id} cannot be rebuilt")
            return
        file.data = got
        disk.seals[action.name] = Seal(action.id, action.rank, world_size, digests)
        file.header = (action.id, action.rank)
        self._agent.segments[action.id, action.rank] = (action.name, digests)
        self._agent.feed(ev.Fetched(action.name, 3 - rebuilt, rebuilt))

    def _fail(self, kind: str, reason: str) -> None:
        self._agent.feed(ev.FetchFailed(self._action.name, kind, reason))

    def _decode(self, digests: State) -> State | None:
        """From the rest of its group, if that is enough, and of one snapshot."""
        manifest = self._action.source.manifest
        if manifest is None:
            return None
        group, member = manifest.group_of(self._action.rank)
        data = {}
        for number, other in enumerate(manifest.groups[group].members):
            found = {e.rank: state for e in other.extents if (state := self._whole(e.rank))}
            if len(found) == len(other.extents):
                data[number] = found
        parity = {}
        for number, other in enumerate(manifest.groups[group].members):
            peer = self._places.peer(other.node)
            if peer is not None and other.node in self._action.source.parity:
                found_parity = peer.read_parity(self._action.id)
                if isinstance(found_parity, ParityOf) and found_parity.member == number:
                    parity[number] = found_parity
        return decode(manifest, group, member, self._action.rank, data, parity)

    def _whole(self, rank: int) -> State | None:
        return self._places.copy(rank, self._places.digests(rank))


def decode(
    manifest: JobManifest,
    group: int,
    member: int,
    rank: int,
    data: dict[int, dict[int, State]],
    parity: dict[int, ParityOf],
) -> State | None:
    """The segment of `rank`, of the member `member`, from data and parity by member.

    None if they are too little, or not of one snapshot.
    """
    if member in data or not manifest.groups[group].parity_shards:
        return data.get(member, {}).get(rank)
    lost = manifest.stripe_map(group).unrestorable(data.keys(), parity.keys())
    if any(who == member and cell is not None for stripe in lost for who, cell in stripe.data):
        return None
    inputs = {kept.inputs for kept in parity.values()}
    known = {rank: state for found in data.values() for rank, state in found.items()}
    if len(inputs) != 1 or any(dict(*inputs).get(r, s) != s for r, s in known.items()):
        return None
    return dict(*inputs).get(rank)


def restorable(id: SnapshotId, ranks: int, disks: list[Disk]) -> bool:
    """Whether all of a snapshot can be had from what lies whole in these memory directories.

    Independent of what agents report, and of which agents are up.
    """
    whole = {}
    for rank in range(ranks):
        state = next((s for disk in disks if (s := disk.segment(id, rank)) is not None), None)
        if state is not None:
            whole[rank] = state
    missing = [rank for rank in range(ranks) if rank not in whole]
    if not missing:
        return True
    manifests: list[JobManifest] = []
    for disk in disks:
        if id in disk.manifests and disk.manifests[id] not in manifests:
            manifests.append(disk.manifests[id])
    kept = [parity for disk in disks if (parity := disk.parity(id)) is not None]
    return any(
        all(_decodes(manifest, rank, whole, kept, disks) for rank in missing)
        for manifest in manifests
    )


def _decodes(
    manifest: JobManifest,
    rank: int,
    whole: dict[int, State],
    kept: list[ParityOf],
    disks: list[Disk],
) -> bool:
    group, member = manifest.group_of(rank)
    members = manifest.groups[group].members
    data = {
        number: {e.rank: whole[e.rank] for e in other.extents}
        for number, other in enumerate(members)
        if all(e.rank in whole for e in other.extents)
    }
    parity = {found.member: found for found in kept if found.group == group}
    owner = (manifest.id, members[member].origin)
    return decode(manifest, group, member, rank, data, parity) is not None and any(
        rank in disk.node_manifests.get(owner, {}) for disk in disks
    )
