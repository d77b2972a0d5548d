"""A node's memory directory, which outlives the agent; bytes are modelled by value."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ckptd.agent.events import Adopted
from ckptd.ids import SnapshotId
from ckptd.journal import Journal
from ckptd.manifest import JobManifest, JobRecord
from ckptd.segment import ParitySidecar, Sidecar
from ckptd.terms import KeptTerm

SIZE_BYTES = 12
CELL_BYTES = 4


class State(NamedTuple):
    """What a rank has in memory after a step; `path` tells one course of training from another."""

    job: str
    rank: int
    step: int
    path: str


class ParityOf(NamedTuple):
    """What a node's parity cells were computed from."""

    id: SnapshotId
    group: int
    member: int
    inputs: tuple[tuple[int, State], ...]
    """The segments of the group, by rank."""


class Damaged(NamedTuple):
    """Bytes that are not what was written."""

    was: object


@dataclass
class Seal:
    """The sidecar of a segment: what it is of, and the digests of its bytes."""

    id: SnapshotId
    rank: int
    world_size: int
    digests: State


@dataclass
class File:
    """A slot file. `header` is there once it is sealed, for a segment."""

    size_bytes: int
    data: object = None
    header: tuple[SnapshotId, int] | None = None
    writer: object = None
    """The process that captures into it."""


@dataclass
class Disk:
    """Files by name; sidecars lie beside them, under the same name, whoever wrote them."""

    token: str
    files: dict[str, File] = field(default_factory=dict)
    seals: dict[str, Seal] = field(default_factory=dict)
    parity_seals: dict[str, ParityOf] = field(default_factory=dict)
    manifests: dict[SnapshotId, JobManifest] = field(default_factory=dict)
    node_manifests: dict[tuple[SnapshotId, str], dict[int, State]] = field(default_factory=dict)
    records: dict[str, JobRecord] = field(default_factory=dict)
    term: KeptTerm | None = None
    log: Journal = field(default_factory=Journal)
    spoilt: int = 0
    """How often something in it had to be given up."""

    def delete(self, name: str) -> None:
        self.files.pop(name, None)
        self.seals.pop(name, None)
        self.parity_seals.pop(name, None)

    def unseal(self, name: str) -> None:
        file = self.files.get(name)
        if file is not None:
            file.header = None
        self.seals.pop(name, None)
        self.parity_seals.pop(name, None)

    def forget_manifests(self, id: SnapshotId) -> None:
        self.manifests.pop(id, None)
        for key in [key for key in self.node_manifests if key[0] == id]:
            del self.node_manifests[key]

    def segment(self, id: SnapshotId, rank: int) -> State | None:
        """The bytes of a segment that lies here whole."""
        for name, file in self.files.items():
            if file.header == (id, rank) and name in self.seals:
                seal = self.seals[name]
                if (seal.id, seal.rank, seal.digests) == (id, rank, file.data):
                    return seal.digests
        return None

    def parity(self, id: SnapshotId) -> ParityOf | None:
        """The parity that lies here whole."""
        for name, sealed in self.parity_seals.items():
            if sealed.id == id and name in self.files and self.files[name].data == sealed:
                return sealed
        return None

    def of(self, id: SnapshotId) -> list[str]:
        """The names of files that hold something of a snapshot, damaged or not."""
        segments = [
            name for name, file in self.files.items() if file.header and file.header[0] == id
        ]
        return segments + [name for name, sealed in self.parity_seals.items() if sealed.id == id]

    def adopt(self) -> Adopted:
        """Keep what is whole, delete or set aside the rest, as the agent's store does."""
        segments, parities, problems = [], [], []
        for name, file in sorted(self.files.items()):
            if "/parity-" in name:
                sealed = self.parity_seals.get(name)
                if sealed is None or file.data != sealed or sealed.id not in self.manifests:
                    self.delete(name)
                    continue
                sidecar = ParitySidecar(sealed.id, sealed.group, sealed.member, CELL_BYTES, (), b"")
                parities.append((name, file.size_bytes, sidecar))
                continue
            seal = self.seals.get(name)
            if file.header is None:
                self.delete(name)  # never sealed; a trainer may still write to it
            elif seal is None or (seal.id, seal.rank) != file.header:
                problems.append(f"{name} cannot be used")
                self.delete(name)
                self.spoilt += 1
                self.token = f"{self.token.split('~')[0]}~{self.spoilt}"
            else:
                segments.append((name, _sidecar(seal)))
        return Adopted(
            tuple(segments),
            tuple(parities),
            tuple(self.manifests.values()),
            tuple(self.records.values()),
            tuple(problems),
            self.term,
            self.log.entries,
        )


def _sidecar(seal: Seal) -> Sidecar:
    return Sidecar(seal.id, seal.rank, seal.world_size, SIZE_BYTES, CELL_BYTES, b"")


def check_segment(disk: Disk, name: str, id: SnapshotId, rank: int) -> Sidecar | str:
    """The sidecar of what was sealed in `name`, or why it is not what it should be."""
    file, seal = disk.files.get(name), disk.seals.get(name)
    if file is None or file.header is None:
        return "it was not sealed"
    if seal is None or (seal.id, seal.rank) != file.header:
        return "the header and the digests are not of one segment"
    if file.header != (id, rank):
        return f"it holds rank {file.header[1]} of {file.header[0]}"
    return _sidecar(seal)
