"""Bringing one rank's segment to this node: from here, from a peer, or decoded from its stripes.

One function serves restore, rebuild and repair: every cell is taken from the first source that has
it with the right digest, and decoded from the other cells of its stripe where no source has.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ckptd.agent.decode import CellDecoder
from ckptd.agent.reader import CellReader
from ckptd.agent.store import wrong_cells
from ckptd.digest import cell_count, cell_span, digest, unpack_one
from ckptd.errors import PeerError, Unrecoverable
from ckptd.ids import SnapshotId
from ckptd.manifest import SegmentDigests
from ckptd.segment import LENGTH_BYTES, Sidecar, checked_record, sidecar_path
from ckptd.wire import Source

_THREADS = 16
HELPERS_ASKED = 2
_DECODED_AT_ONCE = 2  # each needs as much memory as a stripe's data
HELPER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many cells came whole from peers, and how many were decoded."""

    sidecar: Sidecar
    fetched_cells: int
    rebuilt_cells: int


class SegmentFetch:
    """Fetches the segment of `rank` of `id` into `path`."""

    def __init__(
        self,
        reader: CellReader,
        id: SnapshotId,
        rank: int,
        source: Source,
        moved: Callable[[int, int], None] = lambda done, cells: None,
    ) -> None:
        """`moved` is told, in any thread, how many of the cells that are needed are here."""
        self._moved = moved
        self._reader, self._id, self._rank, self._source = reader, id, rank, source
        manifest = source.manifest
        self._manifest = manifest
        self._cell_bytes = manifest.cell_bytes if manifest is not None else 0
        self._decoder = CellDecoder(reader, id, source)
        self._decoding = threading.BoundedSemaphore(_DECODED_AT_ONCE)
        self._silent: set[str] = set()
        self._mutex = threading.Lock()
        self._fetched = 0
        self._rebuilt = 0

    def run(self, path: Path, present: bool) -> Outcome:
        """Fill the file and seal it; `present`: verify and repair what is there.

        Raises Unrecoverable, naming what is missing, and other PeerErrors.
        """
        segment, cell_bytes = self._decoder.segment(self._rank)
        if self._manifest is None:
            self._cell_bytes = cell_bytes  # as it was captured, whatever the cluster has by now
        cells = range(cell_count(segment.size_bytes, self._cell_bytes))
        if present:
            needed = wrong_cells(path, segment.size_bytes, self._cell_bytes, segment.digests)
            if not needed:
                sidecar = self._sidecar(segment)
                _write_sidecar(path, sidecar)  # another process may have damaged it
                return Outcome(sidecar, 0, 0)
        else:
            needed = list(cells)
        with path.open("r+b", buffering=0) as file:
            head = file.read(LENGTH_BYTES)
        _write_head(path, bytes(LENGTH_BYTES))  # not a segment until it is whole
        try:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="ckptd-fetch") as pool:
                cells_here = pool.map(lambda index: self._one_cell(path, segment, index), needed)
                for done, (index, first) in enumerate(cells_here, start=1):
                    self._moved(done, len(needed))
                    if index == 0:
                        head = first
        except BaseException:
            if present:
                _write_head(path, head)  # no more cells are wrong than there were
            raise
        sidecar = self._sidecar(segment)
        _write_sidecar(path, sidecar)
        _write_head(path, head)
        return Outcome(sidecar, self._fetched, self._rebuilt)

    def _one_cell(self, path: Path, segment: SegmentDigests, index: int) -> tuple[int, bytes]:
        """Write one cell, but for the header length, which publishes; returns its first bytes."""
        offset, length = cell_span(index, segment.size_bytes, self._cell_bytes)
        with self._reader.buffers.lend(self._cell_bytes) as (whole,):
            return self._into(whole[:length], path, offset, segment, index)

    def _into(
        self, buffer: memoryview, path: Path, offset: int, segment: SegmentDigests, index: int
    ) -> tuple[int, bytes]:
        try:
            self._reader.cell(
                self._id,
                segment,
                index,
                self._cell_bytes,
                self._decoder.holders(self._rank),
                buffer,
            )
            with self._mutex:
                self._fetched += 1
        except (PeerError, OSError) as error:
            self._rebuild(segment, index, buffer, error)
            with self._mutex:
                self._rebuilt += 1
        skip = LENGTH_BYTES if index == 0 else 0
        with path.open("r+b", buffering=0) as file:
            file.seek(offset + skip)
            file.write(buffer[skip:])
        return index, bytes(buffer[:LENGTH_BYTES])

    def _rebuild(
        self, segment: SegmentDigests, index: int, into: memoryview, why: Exception
    ) -> None:
        """Have a cell decoded by somebody who holds a part of its stripe, or decode it here.

        Only one cell then comes to this node, not as many as the code has data shards, and all
        that survived share the work.
        """
        what = f"cell {index} of rank {segment.rank} of {self._id}"
        try:
            group, stripe, _ = self._decoder.stripe_of(segment.rank, index)
        except Unrecoverable as error:
            raise Unrecoverable(f"{what} is not to be had ({why}), and {error}") from error
        if len(stripe.data) > 1:
            request = self._decoder.request(segment.rank, index, group, stripe)
            want = unpack_one(segment.digests, index)
            helpers = [h for h in self._decoder.helpers(group, stripe) if h not in self._silent]
            for helper in helpers[:HELPERS_ASKED]:
                try:
                    length, _ = self._reader.peers.fetch(helper, request, into, HELPER_TIMEOUT_S)
                    if length == len(into) and digest(into) == want:
                        return
                    self._reader.damage.found(helper, what)
                except PeerError:
                    continue  # it cannot; perhaps this node can
                except OSError:
                    self._silent.add(helper)
        with self._decoding:
            self._decoder.decode(segment, index, into, str(why))

    def _sidecar(self, segment: SegmentDigests) -> Sidecar:
        world_size = (
            self._manifest.world_size if self._manifest is not None else len(self._source.sizes)
        )
        return Sidecar(
            self._id,
            segment.rank,
            world_size,
            segment.size_bytes,
            self._cell_bytes,
            segment.digests,
        )


def _write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write it, unless it is there already: somebody may be reading it."""
    where, record = sidecar_path(path), checked_record(sidecar)
    if not where.exists() or where.read_bytes() != record:
        where.write_bytes(record)


def _write_head(path: Path, head: bytes) -> None:
    """Write the header length, which publishes a segment or takes it back."""
    with path.open("r+b", buffering=0) as file:
        file.write(head)
