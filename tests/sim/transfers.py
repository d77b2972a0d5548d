"""What moves between agents, by value: protecting a snapshot, and bringing a segment to a node.

Parity is modelled by what it was computed from. It yields a segment only together with enough data
and parity that was computed from the very same; anything else would decode to bytes whose digest
is not the one that the node manifests have.
"""

from typing import TYPE_CHECKING

from ckptd.agent import events as ev
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest

from .disk import Disk, File, ParityOf, Seal, State

if TYPE_CHECKING:
    from .agents import Agent

_AGAIN_S = (0.1, 0.4)
_DONE_S = (0.0001, 0.005)


class EncodeRun:
    """One node's share in protecting one snapshot, as `ckptd.agent.protect.EncodeRun` does it."""

    def __init__(self, agent: "Agent", action: ev.Encode) -> None:
        self._agent, self._manifest, self._name = agent, action.manifest, action.name
        self._size_bytes, self._serve_only = action.size_bytes, action.serve_only
        self.cells = action.cells
        self._stopped = self._ended = False
        place = action.manifest.place_of(agent.machine.name)
        assert place is not None
        self._group, self._me = place
        if not self._serve_only:
            agent.in_background(agent.plan.encode_s, self._collect_manifests)

    def stop(self) -> None:
        if not self._stopped and not self._ended and not self._serve_only:
            self._agent.in_background(_DONE_S, self._tell, ev.EncodeFailed(self._manifest.id, ""))
        self._stopped = True

    def _fail(self, reason: str) -> None:
        self._ended = True
        self._agent.in_background(_DONE_S, self._tell, ev.EncodeFailed(self._manifest.id, reason))

    def _tell(self, event: ev.Event) -> None:
        self._agent.feed(event)

    def _peer(self, node: str) -> "Agent | None":
        return self._agent.machine.reaches(node) if node in self.cells else None

    def _collect_manifests(self) -> None:
        """Keep every node manifest of the group before any parity is made."""
        if self._stopped:
            return
        id, disk = self._manifest.id, self._agent.disk
        for member in self._manifest.groups[self._group].members:
            peer = self._peer(member.node)
            found = self._agent.node_manifest(id, member.node)
            if found is None and peer is not None:
                found = peer.node_manifest(id, member.node)
                if found is None:
                    self._fail(f"{member.node} holds no segment of {id}")
                    return
            if found is None:
                self._agent.in_background(_AGAIN_S, self._collect_manifests)
                return
            if not {extent.rank for extent in member.extents} <= found.keys():
                self._fail(f"the manifest of {member.node} does not fit the job manifest")
                return
            if member.node != self._agent.machine.name:
                disk.node_manifests[id, member.node] = dict(found)
        self._encode()

    def _encode(self) -> None:
        """Read all data of the group, with the others' help, and keep this node's parity."""
        if self._stopped:
            return
        id = self._manifest.id
        inputs: list[tuple[int, State]] = []
        for member in self._manifest.groups[self._group].members:
            peer = self._peer(member.node)
            if peer is None or id not in peer.runs:  # it does not hand out rows yet
                self._agent.in_background(_AGAIN_S, self._encode)
                return
            digests = self._agent.node_manifest(id, member.node) or {}
            for extent in member.extents:
                data = peer.read(id, extent.rank)
                if data is None or data != digests.get(extent.rank):
                    self._fail(f"rank {extent.rank} of {id} from {member.node} is gone or damaged")
                    return
                inputs.append((extent.rank, digests[extent.rank]))
        disk = self._agent.disk
        file = disk.files.setdefault(self._name, File(self._size_bytes))
        file.data = disk.parity_seals[self._name] = ParityOf(
            id, self._group, self._me, tuple(sorted(inputs))
        )
        self._agent.parities[id] = self._name
        self._ended = True
        self._agent.world.truth.encoded(id, self._agent.machine.name, self._manifest)
        self._agent.in_background(_DONE_S, self._tell, ev.Encoded(id))


class Fetching:
    """Brings a segment to a node, as `ckptd.agent.fetch.SegmentFetch` does."""

    def __init__(self, agent: "Agent", action: ev.Fetch) -> None:
        self._agent, self._action = agent, action
        if not action.present:
            agent.disk.files.setdefault(action.name, File(action.size_bytes))
        agent.in_background(agent.plan.fetch_s, self._run)

    def _run(self) -> None:
        action, disk = self._action, self._agent.disk
        if action.name not in disk.files:
            disk.files[action.name] = File(action.size_bytes)
        file = disk.files[action.name]
        digests = self._digests(action.rank)
        if digests is None:
            self._fail("Unrecoverable", f"the digests of rank {action.rank} are lost")
            return
        if action.present and file.data == digests:
            self._agent.feed(ev.Fetched(action.name, 0, 0))
            return
        got, rebuilt = self._copy(action.rank, digests), 0
        if got is None:
            got, rebuilt = self._decode(digests), 3
        if got != digests:
            self._fail("Unrecoverable", f"rank {action.rank} of {action.id} cannot be rebuilt")
            return
        manifest = action.source.manifest
        world_size = manifest.world_size if manifest is not None else len(action.source.sizes)
        file.data = got
        disk.seals[action.name] = Seal(action.id, action.rank, world_size, digests)
        file.header = (action.id, action.rank)
        self._agent.segments[action.id, action.rank] = (action.name, digests)
        self._agent.feed(ev.Fetched(action.name, 3 - rebuilt, rebuilt))

    def _fail(self, kind: str, reason: str) -> None:
        self._agent.feed(ev.FetchFailed(self._action.name, kind, reason))

    def _peer(self, node: str) -> "Agent | None":
        return self._agent.machine.reaches(node) if node in self._action.source.cells else None

    def _digests(self, rank: int) -> State | None:
        """From those who hold the segment, then from the group of the node that sealed it."""
        id, source = self._action.id, self._action.source
        asked = [(node, [node]) for node in source.ranks.get(rank, ())]
        if source.manifest is not None:
            group, member = source.manifest.group_of(rank)
            members = source.manifest.groups[group].members
            asked.append((members[member].node, [other.node for other in members]))
        for node, keepers in asked:
            peers = [self._agent, *map(self._peer, keepers)]
            for peer in peers:
                found = peer.node_manifest(id, node) if peer is not None else None
                if found is not None and rank in found:
                    return found[rank]
        return None

    def _copy(self, rank: int, digests: State) -> State | None:
        here = self._agent.machine.name
        for node in (here, *self._action.source.ranks.get(rank, ())):
            peer = self._agent if node == here else self._peer(node)
            if peer is not None and peer.read(self._action.id, rank) == digests:
                return digests
        return None

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
            peer = self._peer(other.node)
            if other.node == self._agent.machine.name:
                peer = self._agent
            if peer is not None and other.node in self._action.source.parity:
                found_parity = peer.read_parity(self._action.id)
                if isinstance(found_parity, ParityOf) and found_parity.member == number:
                    parity[number] = found_parity
        return decode(manifest, group, member, self._action.rank, data, parity)

    def _whole(self, rank: int) -> State | None:
        digests = self._digests(rank)
        return self._copy(rank, digests) if digests is not None else None


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
    owner = (manifest.id, members[member].node)
    return decode(manifest, group, member, rank, data, parity) is not None and any(
        rank in disk.node_manifests.get(owner, {}) for disk in disks
    )
