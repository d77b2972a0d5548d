"""The agent's memory directory: slot files, parity files, manifests and records on tmpfs.

The lifecycle decider says what lives where; the store does it, and lets the threads that serve,
encode and fetch look up and pin what is published. Thread-safe.

    <memory>/.lock                                  held while an agent runs
    <memory>/.token                                 tells one memory from an emptied one
    <memory>/.term                                  KeptTerm: the coordinator that is obeyed
    <memory>/.log                                   the journal; see `ckptd.agent.log_file`
    <memory>/<job>/record                           JobRecord
    <memory>/<job>/segment-<n>.safetensors          a slot; with .digests beside it once sealed
    <memory>/<job>/parity-<n>.cells                 parity cells; with .digests beside it
    <memory>/<job>/<life>.<step>.manifest           JobManifest
    <memory>/<job>/<life>.<step>.of.<node>          NodeManifest of a node of the group
"""

import ctypes
import fcntl
import mmap
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ckptd.agent.events import Adopted
from ckptd.agent.log_file import LogFile
from ckptd.digest import cell_count, cell_span, digest, unpack_one
from ckptd.errors import CkptdError, ConfigError, CorruptData, Gone, MemoryTooSmall
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest, JobRecord, NodeManifest, SegmentDigests
from ckptd.segment import (
    LENGTH_BYTES,
    ParitySidecar,
    Sidecar,
    checked_record,
    parse_header,
    read_checked_record,
    sidecar_path,
)
from ckptd.terms import KeptTerm, Term

_UNSEALED = bytes(LENGTH_BYTES)
_DAMAGED = ".damaged"
# Names that begin with a dot cannot be a job's.
_LOCK, _TOKEN, _NEW = ".lock", ".token", ".new."
_TERM, _LOG = ".term", ".log"
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap module does not name it


@dataclass(frozen=True, slots=True)
class Parity:
    """Published parity: the file, and where each (stripe, row) lies in it."""

    path: Path
    sidecar: ParitySidecar
    index: dict[tuple[int, int], int]

    def cell(self, group: int, stripe: int, row: int) -> tuple[int, int, int]:
        """(offset, length, digest) of a parity cell in the file. Raises Gone if it is not kept."""
        number = self.index.get((stripe, row))
        if number is None or self.sidecar.group != group:
            raise Gone(f"row {row} of stripe {stripe} of {self.sidecar.id} is not kept here")
        return (
            number * self.sidecar.cell_bytes,
            self.sidecar.lengths[number],
            unpack_one(self.sidecar.digests, number),
        )


class Store:
    """Owns the memory directory. Raises ConfigError if another agent does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if root.stat().st_mode & 0o002:
                raise ConfigError(
                    f"the memory directory {root} is everybody's; give the agent one of its own "
                    f"with --memory-dir, such as {root / 'ckptd'}"
                )
            os.chmod(root, 0o700)
            self._lock_file = open(root / _LOCK, "a")  # noqa: SIM115 (held for our lifetime)
        except OSError as error:
            raise ConfigError(
                f"cannot use the memory directory {root}: {error.strerror}; choose a writable "
                "directory on tmpfs with --memory-dir"
            ) from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ConfigError(
                f"another agent uses the memory directory {root}; stop it, or give this one "
                "another --memory-dir"
            ) from error
        self._mutex = threading.Lock()
        self._unpinned = threading.Condition(self._mutex)
        self._segments: dict[tuple[SnapshotId, int], tuple[Path, Sidecar]] = {}
        self._parities: dict[SnapshotId, Parity] = {}
        self._pins: Counter[Path] = Counter()
        self.token = self._read_token()
        self.log = LogFile(root / _LOG)

    def close(self) -> None:
        """Let another agent use the directory."""
        self._lock_file.close()

    def destroy(self) -> None:
        """Delete everything, the directory itself included."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.close()

    def vacate(self) -> None:
        """Delete the directory if no job, and nothing of anybody else's, is left in it."""
        for path in self.root.iterdir():
            with suppress(OSError):
                path.rmdir()
        if {path.name for path in self.root.iterdir()} <= {_LOCK, _TOKEN, _TERM, _LOG}:
            self.destroy()

    def path(self, name: str) -> Path:
        """The file of a slot name."""
        return self.root / name

    # Files.

    def allocate(self, name: str, size_bytes: int) -> None:
        """Make a reserved, prefaulted file. Raises MemoryTooSmall if there is no room."""
        path = self.path(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sidecar_path(path).unlink(missing_ok=True)
        # Always another file: truncating one that a trainer has mapped would kill the trainer.
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if size_bytes:
                os.posix_fallocate(fd, 0, size_bytes)
                _prefault(fd, size_bytes)
        except (OSError, OverflowError) as error:
            path.unlink(missing_ok=True)
            free = os.statvfs(self.root)
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise MemoryTooSmall(
                f"cannot reserve {size_bytes} bytes in {self.root}: {why}; "
                f"{free.f_bavail * free.f_frsize} bytes are free there; give the agent a larger "
                "tmpfs with --memory-dir, or a smaller state"
            ) from error
        finally:
            os.close(fd)

    def delete(self, name: str) -> None:
        """Remove a file that holds nothing."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        sidecar_path(path).unlink(missing_ok=True)

    def release(self, name: str) -> None:
        """Unpublish a segment or parity file, waiting until nothing pins it."""
        path = self.path(name)
        with self._unpinned:
            for key in [k for k, (where, _) in self._segments.items() if where == path]:
                del self._segments[key]
            for id in [k for k, parity in self._parities.items() if parity.path == path]:
                del self._parities[id]
            self._unpinned.wait_for(lambda: not self._pins[path])
        if path.suffix == ".safetensors":
            with path.open("r+b") as file:
                file.write(_UNSEALED)
        sidecar_path(path).unlink(missing_ok=True)

    # Segments.

    def check_segment(self, name: str, id: SnapshotId, rank: int) -> Sidecar:
        """Publish a segment that a trainer sealed. Raises CorruptData if it did not."""
        path = self.path(name)
        sidecar = read_segment_sidecar(path)
        if (sidecar.id, sidecar.rank) != (id, rank):
            raise CorruptData(
                f"{name} holds rank {sidecar.rank} of {sidecar.id}, not rank {rank} of {id}"
            )
        self.publish_segment(path, sidecar)
        return sidecar

    def publish_segment(self, path: Path, sidecar: Sidecar) -> None:
        with self._mutex:
            self._segments[sidecar.id, sidecar.rank] = (path, sidecar)

    @contextmanager
    def segment(self, id: SnapshotId, rank: int) -> Iterator[tuple[Path, Sidecar]]:
        """Pin a published segment. Raises Gone if it is not here."""
        with self._mutex:
            found = self._segments.get((id, rank))
            if found is None:
                raise Gone(f"rank {rank} of {id} is not here")
            self._pins[found[0]] += 1
        try:
            yield found
        finally:
            self._unpin(found[0])

    def published(self) -> dict[SnapshotId, tuple[int, ...]]:
        """Each snapshot of which something is published, and the ranks of its segments."""
        with self._mutex:
            found: dict[SnapshotId, list[int]] = {id: [] for id in self._parities}
            for id, rank in self._segments:
                found.setdefault(id, []).append(rank)
        return {id: tuple(sorted(ranks)) for id, ranks in found.items()}

    def node_manifest(self, id: SnapshotId, node: str) -> NodeManifest:
        """This node's manifest, from the sidecars of its own segments. Raises Gone."""
        with self._mutex:
            sidecars = sorted(
                (s for (of, _), (_, s) in self._segments.items() if of == id),
                key=lambda s: s.rank,
            )
        if not sidecars:
            raise Gone(f"{node} holds no segment of {id}")
        return NodeManifest(
            id,
            node,
            sidecars[0].cell_bytes,
            tuple(SegmentDigests(s.rank, s.size_bytes, s.digests) for s in sidecars),
        )

    def known_manifest(self, id: SnapshotId, node: str) -> NodeManifest:
        """This node's manifest, with what its group told it of segments that it had before.

        It may have been emptied and hold others' now, while its name still stands for the place
        that it had first. Raises Gone or CorruptData.
        """
        try:
            kept = self.read_node_manifest(id, node)
        except (Gone, CorruptData):
            return self.node_manifest(id, node)
        try:
            own = self.node_manifest(id, node)
        except Gone:
            return kept
        here = {segment.rank for segment in own.segments}
        before = (segment for segment in kept.segments if segment.rank not in here)
        return NodeManifest(id, node, own.cell_bytes, (*own.segments, *before))

    # Parity.

    def publish_parity(
        self, path: Path, sidecar: ParitySidecar, index: list[tuple[int, int]]
    ) -> None:
        """Store the sidecar, then let the cells be served."""
        _write_published(sidecar_path(path), checked_record(sidecar))
        with self._mutex:
            places = {place: number for number, place in enumerate(index)}
            self._parities[sidecar.id] = Parity(path, sidecar, places)

    @contextmanager
    def parity(self, id: SnapshotId) -> Iterator[Parity]:
        """Pin published parity. Raises Gone if it is not here."""
        with self._mutex:
            found = self._parities.get(id)
            if found is None:
                raise Gone(f"there is no parity of {id} here")
            self._pins[found.path] += 1
        try:
            yield found
        finally:
            self._unpin(found.path)

    # Manifests and records.

    def keep_term(self, kept: KeptTerm) -> None:
        _write_published(self.root / _TERM, checked_record(kept))

    def keep_record(self, record: JobRecord) -> None:
        directory = self.root / record.job
        directory.mkdir(mode=0o700, exist_ok=True)
        _write_published(directory / "record", checked_record(record))

    def keep_manifest(self, manifest: JobManifest) -> None:
        directory = self.root / manifest.id.job
        directory.mkdir(mode=0o700, exist_ok=True)
        path = directory / f"{manifest.id.life}.{manifest.id.step}.manifest"
        _write_published(path, checked_record(manifest))

    def keep_node_manifest(self, manifest: NodeManifest) -> None:
        id = manifest.id
        path = self.root / id.job / f"{id.life}.{id.step}.of.{manifest.node}"
        _write_published(path, checked_record(manifest))

    def read_node_manifest(self, id: SnapshotId, node: str) -> NodeManifest:
        """Another node's manifest, as its group keeps it. Raises Gone or CorruptData."""
        path = self.root / id.job / f"{id.life}.{id.step}.of.{node}"
        try:
            return read_checked_record(path, NodeManifest)
        except FileNotFoundError:
            raise Gone(f"there is no manifest of {node} for {id} here") from None

    def forget_manifests(self, id: SnapshotId) -> None:
        for path in (self.root / id.job).glob(f"{id.life}.{id.step}.*"):
            path.unlink(missing_ok=True)

    def forget_job(self, job: str) -> None:
        """Delete the record and what was set aside; the slots go one by one."""
        (self.root / job / "record").unlink(missing_ok=True)
        for path in (self.root / job).glob("*" + _DAMAGED):
            path.unlink(missing_ok=True)

    # Coming back.

    def adopt(self) -> Adopted:
        """Check all that lies here, publish what is whole, and say what is not."""
        segments, parities, manifests, records = [], [], [], []
        problems: list[str] = []
        spoilt = False
        for path in sorted(p for d in self.root.iterdir() if d.is_dir() for p in d.iterdir()):
            name = str(path.relative_to(self.root))
            try:
                if path.name.startswith(_NEW):
                    path.unlink()
                elif ".of." in path.name:
                    pass  # a node manifest: read, and checked, when it is asked for
                elif path.suffix == ".safetensors":
                    sidecar = self._adopt_segment(path, problems)
                    if sidecar is not None:
                        segments.append((name, sidecar))
                elif path.name.startswith("parity-") and path.suffix == ".cells":
                    parity = read_checked_record(sidecar_path(path), ParitySidecar)
                    parities.append((name, path.stat().st_size, parity))
                elif path.suffix == ".manifest":
                    manifests.append(read_checked_record(path, JobManifest))
                elif path.name == "record":
                    records.append(read_checked_record(path, JobRecord))
                elif path.suffix == _DAMAGED:
                    problems.append(f"{name} is of no use, until the job is forgotten")
                elif path.name.endswith(".digests"):
                    if not path.with_suffix("").exists():
                        path.unlink()
                else:
                    problems.append(f"foreign file {name} in the memory directory: left alone")
            except FileNotFoundError:
                path.unlink(missing_ok=True)  # parity that was never finished
            except (CkptdError, OSError) as error:
                aside = _set_aside(path)
                spoilt = True
                problems.append(
                    f"{name} cannot be used and is now {aside.name}, {aside.stat().st_size} bytes, "
                    f"until the job is forgotten: {error}"
                )
        if spoilt:
            # A snapshot may be lost with it: this is not the memory that the cluster knew.
            self.token = self._new_token()
        by_id = {manifest.id: manifest for manifest in manifests}
        kept = []
        for name, size_bytes, parity in parities:
            try:
                self._adopt_parity(self.path(name), size_bytes, parity, by_id.get(parity.id))
                kept.append((name, size_bytes, parity))
            except (CkptdError, OSError) as error:
                problems.append(f"{name} cannot be used and was deleted: {error}")
                self.delete(name)
        entries = self.log.read(problems)
        term = self._adopt_term(problems)
        if term is None and entries:
            # Who spoke last is unknown, but no lower term is to be obeyed again.
            term = KeptTerm(Term(max(entry.term for entry in entries)), 0.0)
        return Adopted(
            tuple(segments),
            tuple(kept),
            tuple(manifests),
            tuple(records),
            tuple(problems),
            term,
            entries,
        )

    def _adopt_term(self, problems: list[str]) -> KeptTerm | None:
        path = self.root / _TERM
        try:
            return read_checked_record(path, KeptTerm)
        except FileNotFoundError:
            return None
        except (CkptdError, OSError) as error:
            problems.append(f"{_TERM} cannot be used: {error}")
            return None

    def _adopt_segment(self, path: Path, problems: list[str]) -> Sidecar | None:
        with path.open("rb") as file:
            if file.read(LENGTH_BYTES) == _UNSEALED:
                # Never sealed. A trainer may still write to it, so it is not used again.
                self.delete(str(path.relative_to(self.root)))
                return None
        sidecar = read_segment_sidecar(path)
        wrong = wrong_cells(path, sidecar.size_bytes, sidecar.cell_bytes, sidecar.digests)
        if wrong:
            problems.append(
                f"{path.name}: cells {wrong[:8]} do not have their digests; they count as lost"
            )
        self.publish_segment(path, sidecar)
        return sidecar

    def _adopt_parity(
        self, path: Path, size_bytes: int, sidecar: ParitySidecar, manifest: JobManifest | None
    ) -> None:
        if manifest is None:
            raise CorruptData(f"the job manifest of {sidecar.id} is not here")
        try:
            index = manifest.stripe_map(sidecar.group).parity_of(sidecar.member)
        except (IndexError, ValueError):
            raise CorruptData(
                f"{path.name} is of a group that {sidecar.id} does not have"
            ) from None
        if (
            sidecar.cell_bytes != manifest.cell_bytes
            or len(index) != len(sidecar.lengths)
            or len(sidecar.digests) != 8 * len(index)
            or size_bytes < len(index) * sidecar.cell_bytes
        ):
            raise CorruptData(f"{path.name} does not fit the stripes of {sidecar.id}")
        with path.open("rb") as file:
            for number, length in enumerate(sidecar.lengths):
                file.seek(number * sidecar.cell_bytes)
                if digest(file.read(length)) != unpack_one(sidecar.digests, number):
                    raise CorruptData(f"parity cell {number} of {sidecar.id} has another digest")
        with self._mutex:
            places = {place: number for number, place in enumerate(index)}
            self._parities[sidecar.id] = Parity(path, sidecar, places)

    def _read_token(self) -> str:
        path = self.root / _TOKEN
        return path.read_text() if path.exists() else self._new_token()

    def _new_token(self) -> str:
        token = secrets.token_hex(8)
        _write_published(self.root / _TOKEN, token.encode())
        return token

    def _unpin(self, path: Path) -> None:
        with self._unpinned:
            self._pins[path] -= 1
            if not self._pins[path]:
                del self._pins[path]
                self._unpinned.notify_all()


def read_segment_sidecar(path: Path) -> Sidecar:
    """The sidecar of a sealed segment, checked against its header. Raises CorruptData."""
    with path.open("rb") as file:
        if file.read(LENGTH_BYTES) == _UNSEALED:
            raise CorruptData(f"{path.name} was not sealed")
        try:
            sidecar = read_checked_record(sidecar_path(path), Sidecar)
        except FileNotFoundError:
            raise CorruptData(f"{path.name} has no digests beside it") from None
        if not os.fstat(file.fileno()).st_size:
            raise CorruptData(f"{path.name} is empty")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as segment,
        ):
            header = parse_header(segment, path.name)
    said = (sidecar.id, sidecar.rank, sidecar.size_bytes)
    if (header.id, header.rank, header.size_bytes) != said:
        raise CorruptData(f"{path.name}: the header and the digests are not of one segment")
    if sidecar.cell_bytes < 1 or len(sidecar.digests) != 8 * cell_count(
        sidecar.size_bytes, sidecar.cell_bytes
    ):
        raise CorruptData(f"{path.name}: {len(sidecar.digests)} bytes of digests do not fit")
    return sidecar


def wrong_cells(path: Path, size_bytes: int, cell_bytes: int, digests: bytes) -> list[int]:
    """Cells of a segment file whose bytes do not have their digest."""
    wrong = []
    buffer = memoryview(bytearray(min(cell_bytes, max(size_bytes, 1))))
    with path.open("rb", buffering=0) as file:
        for index in range(cell_count(size_bytes, cell_bytes)):
            _, length = cell_span(index, size_bytes, cell_bytes)
            view = buffer[:length]
            if file.readinto(view) != length or digest(view) != unpack_one(digests, index):
                wrong.append(index)
    return wrong


def verify_cells(path: Path, sidecar: Sidecar) -> None:
    """Raises CorruptData if any cell of a segment does not have its digest."""
    wrong = wrong_cells(path, sidecar.size_bytes, sidecar.cell_bytes, sidecar.digests)
    if wrong:
        raise CorruptData(f"cells {wrong[:8]} of {path.name} do not have their digests")


def _write_published(path: Path, content: bytes) -> None:
    new = path.with_name(_NEW + path.name)
    new.write_bytes(content)
    os.replace(new, path)


def _set_aside(path: Path) -> Path:
    return path.rename(path.with_name(path.name + _DAMAGED))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _prefault(fd: int, size_bytes: int) -> None:
    """Touch every page once: the first touch of shared memory is several times slower."""
    with mmap.mmap(fd, size_bytes) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if _libc.madvise(address, size_bytes, _MADV_POPULATE_WRITE) != 0:
            for offset in range(0, size_bytes, mmap.PAGESIZE):  # a kernel before 5.14
                mapped[offset] = 0
