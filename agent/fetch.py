"""Bringing one rank's segment to this node: from here, from a peer, or decoded from its stripes.

One function serves restore, rebuild and repair: every cell is taken from the first source that has
it with the right digest, and decoded from the other cells of its stripe where no source has.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ckptd.agent.protect import codec_for
from ckptd.agent.reader import CellReader
from ckptd.agent.store import wrong_cells
from ckptd.digest import cell_count, cell_span, digest, unpack_one
from ckptd.erasure import CodecError, StripeMap
from ckptd.errors import CorruptData, Gone, PeerError, Unrecoverable
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest, NodeManifest, SegmentDigests
from ckptd.segment import LENGTH_BYTES, Sidecar, checked_record, sidecar_path
from ckptd.wire import Source

_THREADS = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many cells came whole from peers, and how many were decoded."""

    sidecar: Sidecar
    fetched_cells: int
    rebuilt_cells: int


class SegmentFetch:
    """Fetches the segment of `rank` of `id` into `path`."""

    def __init__(self, reader: CellReader, id: SnapshotId, rank: int, source: Source) -> None:
        self._reader, self._id, self._rank, self._source = reader, id, rank, source
        manifest = source.manifest
        self._manifest = manifest
        self._cell_bytes = manifest.cell_bytes if manifest is not None else 0
        self._stripes: StripeMap | None = None
        self._places: list[list[tuple[int, int]]] = []
        self._known: dict[str, NodeManifest] = {}
        self._mutex = threading.Lock()
        self._fetched = 0
        self._rebuilt = 0

    def run(self, path: Path, present: bool) -> Outcome:
        """Fill the file and seal it; `present`: verify and repair what is there.

        Raises Unrecoverable, naming what is missing, and other PeerErrors.
        """
        segment = self._segment(self._rank)
        if self._manifest is None:
            # Cells as they were captured, whatever the cluster's cell size is by now.
            self._cell_bytes = next(
                m.cell_bytes for m in self._known.values() if segment in m.segments
            )
        cells = range(cell_count(segment.size_bytes, self._cell_bytes))
        if present:
            needed = wrong_cells(path, segment.size_bytes, self._cell_bytes, segment.digests)
            if not needed:
                return Outcome(self._sidecar(segment), 0, 0)
        else:
            needed = list(cells)
        with path.open("r+b", buffering=0) as file:
            head = file.read(LENGTH_BYTES)
        _write_head(path, bytes(LENGTH_BYTES))  # not a segment until it is whole
        try:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="ckptd-fetch") as pool:
                for index, first in pool.map(
                    lambda index: self._one_cell(path, segment, index), needed
                ):
                    if index == 0:
                        head = first
        except BaseException:
            if present:
                _write_head(path, head)  # no more cells are wrong than there were
            raise
        sidecar = self._sidecar(segment)
        sidecar_path(path).write_bytes(checked_record(sidecar))
        _write_head(path, head)
        return Outcome(sidecar, self._fetched, self._rebuilt)

    def _one_cell(self, path: Path, segment: SegmentDigests, index: int) -> tuple[int, bytes]:
        """Write one cell, but for the header length, which publishes; returns its first bytes."""
        offset, length = cell_span(index, segment.size_bytes, self._cell_bytes)
        buffer = memoryview(bytearray(length))
        try:
            self._reader.cell(
                self._id,
                segment,
                index,
                self._cell_bytes,
                self._addresses(self._source.ranks.get(self._rank, ())),
                buffer,
            )
            with self._mutex:
                self._fetched += 1
        except (PeerError, OSError) as error:
            self._decode(segment, index, buffer, error)
            with self._mutex:
                self._rebuilt += 1
        skip = LENGTH_BYTES if index == 0 else 0
        with path.open("r+b", buffering=0) as file:
            file.seek(offset + skip)
            file.write(buffer[skip:])
        return index, bytes(buffer[:LENGTH_BYTES])

    def _decode(
        self, segment: SegmentDigests, index: int, into: memoryview, why: Exception
    ) -> None:
        """Decode one cell from the other cells of its stripe."""
        manifest = self._manifest
        what = f"cell {index} of rank {segment.rank} of {self._id}"
        if manifest is None:
            raise Unrecoverable(f"{what} is not to be had ({why}), and there is no parity yet")
        group_index, member = manifest.group_of(segment.rank)
        group = manifest.groups[group_index]
        if not group.parity_shards:
            raise Unrecoverable(f"{what} is not to be had ({why}); its group has no parity")
        stripes, places = self._geometry(manifest, group_index)
        number, wanted = stripes.locate(member, places[member].index((segment.rank, index)))
        stripe = stripes.stripes[number]
        shards: dict[int, memoryview] = {}
        longest = len(into)
        missing = [str(why)]
        for shard, (other, cell) in enumerate(stripe.data):
            if shard == wanted or len(shards) == group.data_shards:
                continue
            buffer = memoryview(bytearray(manifest.cell_bytes))
            if cell is not None:
                rank, at = places[other][cell]
                try:
                    length = self._reader.cell(
                        self._id,
                        self._segment(rank),
                        at,
                        manifest.cell_bytes,
                        self._addresses(self._source.ranks.get(rank, ())),
                        buffer,
                    )
                    longest = max(longest, length)
                except (PeerError, OSError) as error:
                    missing.append(str(error))
                    continue
            shards[shard] = buffer
        for row, keeper in enumerate(stripe.parity):
            if len(shards) == group.data_shards:
                break
            node = group.members[keeper].node
            if node not in self._source.parity:
                missing.append(f"{node} has no parity")
                continue
            buffer = memoryview(bytearray(manifest.cell_bytes))
            address = "" if node == self._reader.node else self._source.cells.get(node)
            if address is None:
                missing.append(f"{node} is not there")
                continue
            try:
                length = self._reader.parity(self._id, group_index, number, row, address, buffer)
                longest = max(longest, length)
                shards[group.data_shards + row] = buffer
            except (PeerError, OSError) as error:
                missing.append(str(error))
        if len(shards) < group.data_shards:
            raise Unrecoverable(
                f"{what} cannot be rebuilt: {len(shards)} of the {group.data_shards} cells that "
                f"stripe {number} needs are there ({'; '.join(missing[:4])})"
            )
        codec = codec_for(manifest, group)
        out = memoryview(bytearray(longest))
        try:
            codec.decode({n: view[:longest] for n, view in shards.items()}, {wanted: out})
        except CodecError as error:
            raise Unrecoverable(f"{what} cannot be decoded: {error}") from error
        if digest(out[: len(into)]) != unpack_one(segment.digests, index):
            raise CorruptData(f"{what}, decoded from stripe {number}, does not have its digest")
        into[:] = out[: len(into)]

    def _geometry(
        self, manifest: JobManifest, group: int
    ) -> tuple[StripeMap, list[list[tuple[int, int]]]]:
        """The stripes of this rank's group and each member's cells, made at the first use."""
        with self._mutex:
            if self._stripes is None:
                members = manifest.groups[group].members
                self._places = [list(m.cell_ranks(manifest.cell_bytes)) for m in members]
                self._stripes = manifest.stripe_map(group)
            return self._stripes, self._places

    def _segment(self, rank: int) -> SegmentDigests:
        """Size and digests of a rank's segment, from any node that knows them."""
        askable: list[tuple[str, list[str]]] = [
            (node, self._addresses([node])) for node in self._source.ranks.get(rank, ())
        ]
        if self._manifest is not None:
            group, member = self._manifest.group_of(rank)
            members = self._manifest.groups[group].members
            keepers = self._addresses([m.node for m in members])
            askable.append((members[member].node, keepers))
        failure: Exception = Gone(f"nobody knows the digests of rank {rank} of {self._id}")
        for node, addresses in askable:
            try:
                with self._mutex:
                    manifest = self._known.get(node)
                if manifest is None:
                    manifest = self._reader.node_manifest(self._id, node, addresses)
                    with self._mutex:
                        self._known[node] = manifest
                segment = manifest.segment(rank)
            except KeyError:
                failure = Gone(f"{node} has no rank {rank} of {self._id}")
                continue
            except (PeerError, OSError) as error:
                failure = error
                continue
            if len(segment.digests) == 8 * cell_count(segment.size_bytes, manifest.cell_bytes):
                return segment
        raise Unrecoverable(f"the digests of rank {rank} of {self._id} are lost: {failure}")

    def _addresses(self, nodes: list[str] | tuple[str, ...]) -> list[str]:
        cells = self._source.cells
        return [cells[n] for n in nodes if n in cells and n != self._reader.node]

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


def _write_head(path: Path, head: bytes) -> None:
    """Write the header length, which publishes a segment or takes it back."""
    with path.open("r+b", buffering=0) as file:
        file.write(head)
