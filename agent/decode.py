"""Finding cells of a snapshot, and decoding those that nobody has from the rest of their stripe."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import combinations

from ckptd.agent.protect import codec_for, encode_cells
from ckptd.agent.reader import CellReader, Read
from ckptd.digest import cell_count, cell_span, digest, unpack_one
from ckptd.erasure import CodecError, Stripe, StripeMap
from ckptd.errors import CorruptData, Gone, PeerError, Unrecoverable
from ckptd.ids import SnapshotId
from ckptd.manifest import Group, JobManifest, NodeManifest, SegmentDigests
from ckptd.wire import GetDecoded, GetRecoded, Source

_AT_ONCE = 2  # each needs as much memory as a stripe's data
_ROOM_WAIT_S = 15.0
_SNAPSHOTS_KNOWN = 4


class Geometry:
    """What does not depend on who is there: the stripes of a snapshot, and its node manifests."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.manifests: dict[str, NodeManifest] = {}
        self._stripes: dict[int, tuple[StripeMap, list[list[tuple[int, int]]]]] = {}

    def of_group(
        self, manifest: JobManifest, group: int
    ) -> tuple[StripeMap, list[list[tuple[int, int]]]]:
        """The stripes of a group, and (rank, index) of each member's cells; made once."""
        with self.mutex:
            if group not in self._stripes:
                members = manifest.groups[group].members
                places = [list(m.cell_ranks(manifest.cell_bytes)) for m in members]
                self._stripes[group] = manifest.stripe_map(group), places
            return self._stripes[group]


class CellDecoder:
    """Knows where the cells of one snapshot are, by `source`. Thread-safe."""

    def __init__(
        self,
        reader: CellReader,
        id: SnapshotId,
        source: Source,
        known: Geometry | None = None,
    ) -> None:
        """`known`: what another decoder of this snapshot has found out already."""
        self._reader, self._id, self._source = reader, id, source
        self._known = known if known is not None else Geometry()
        reader.damage.meet(source.cells)

    def segment(self, rank: int) -> tuple[SegmentDigests, int]:
        """Size and digests of a rank's segment, and the bytes in a cell, from whoever knows them.

        Raises Unrecoverable if nobody does.
        """
        askable: list[tuple[str, list[str]]] = [
            (node, self.addresses([node])) for node in self._source.ranks.get(rank, ())
        ]
        job = self._source.manifest
        if job is not None:
            group, member = job.group_of(rank)
            members = job.groups[group].members
            keepers = self.addresses([m.node for m in members])
            askable.append((members[member].origin, keepers))
        failure: Exception = Gone(f"nobody knows the digests of rank {rank} of {self._id}")
        for node, addresses in askable:
            try:
                with self._known.mutex:
                    manifest = self._known.manifests.get(node)
                if manifest is None or all(each.rank != rank for each in manifest.segments):
                    manifest = self._reader.node_manifest(self._id, node, addresses, rank)
                    with self._known.mutex:
                        self._known.manifests[node] = manifest
                segment = manifest.segment(rank)
            except (PeerError, OSError) as error:
                failure = error
                continue
            if len(segment.digests) == 8 * cell_count(segment.size_bytes, manifest.cell_bytes):
                return segment, manifest.cell_bytes
        raise Unrecoverable(f"the digests of rank {rank} of {self._id} are lost: {failure}")

    def addresses(self, nodes: list[str] | tuple[str, ...]) -> list[str]:
        """Where the agents of these nodes serve cells, as far as they are there, and not here."""
        cells = self._source.cells
        return [cells[n] for n in nodes if n in cells and n != self._reader.node]

    def holders(self, rank: int) -> list[str]:
        """The addresses of those who hold the whole segment of `rank`."""
        return self.addresses(self._source.ranks.get(rank, ()))

    def stripe_of(self, rank: int, index: int) -> tuple[int, Stripe, int]:
        """(group, stripe, shard) of a cell. Raises Unrecoverable if no parity protects it."""
        manifest = self._source.manifest
        if manifest is None:
            raise Unrecoverable("there is no parity yet")
        try:
            group, member = manifest.group_of(rank)
        except KeyError:
            raise Gone(f"{self._id} has no rank {rank}") from None
        if not manifest.groups[group].parity_shards:
            raise Unrecoverable("its group has no parity")
        stripes, _ = self._known.of_group(manifest, group)
        before = 0
        for extent in manifest.groups[group].members[member].extents:
            cells = cell_count(extent.size_bytes, manifest.cell_bytes)
            if extent.rank == rank and index < cells:
                number, shard = stripes.locate(member, before + index)
                return group, stripes.stripes[number], shard
            before += cells
        raise Gone(f"rank {rank} of {self._id} has no cell {index}")

    def helpers(self, group: int, stripe: Stripe) -> list[str]:
        """Addresses of those who hold a cell of the stripe, each stripe beginning with another."""
        manifest = self._source.manifest
        if manifest is None:
            return []
        members = manifest.groups[group].members
        there = [
            member.node
            for member in members
            if member.node in self._source.parity
            or any(
                member.node in self._source.ranks.get(extent.rank, ()) for extent in member.extents
            )
        ]
        found = self.addresses(there)
        first = stripe.number % max(1, len(found))
        return found[first:] + found[:first]

    def request(self, rank: int, index: int, group: int, stripe: Stripe) -> GetDecoded:
        """What to ask a helper for: all that it must know to decode the cell of this stripe."""
        ranks = {r for r, _ in self._cells_of(group, stripe) if r != rank}
        nodes = [self._group(group).members[member].node for member in stripe.parity]
        source = self._source
        where = {r: source.ranks[r] for r in sorted(ranks) if r in source.ranks}
        parity = tuple(node for node in nodes if node in source.parity)
        named = {*parity, *(node for held in where.values() for node in held)}
        cells = {node: source.cells[node] for node in sorted(named) if node in source.cells}
        return GetDecoded(self._id, rank, index, where, parity, cells)

    def recoders(self, group: int, stripe: Stripe) -> list[str]:
        """Addresses of those who hold a data cell of the stripe; each turn begins with another."""
        found = [h for rank, _ in self._cells_of(group, stripe) for h in self.holders(rank)[:1]]
        turn = stripe.number // len(self._group(group).members)
        first = turn % max(1, len(found))
        return found[first:] + found[:first]

    def row_request(self, group: int, stripe: Stripe, row: int) -> GetRecoded:
        """What to ask one of them for."""
        source = self._source
        ranks = sorted({rank for rank, _ in self._cells_of(group, stripe)})
        where = {rank: source.ranks[rank] for rank in ranks if rank in source.ranks}
        named = sorted({node for held in where.values() for node in held})
        cells = {node: source.cells[node] for node in named if node in source.cells}
        return GetRecoded(self._id, group, stripe.number, row, where, cells)

    def row_length(self, group: int, stripe: int, row: int) -> int:
        """Bytes in a parity row: those of its stripe's longest data cell.

        Raises Gone if there is no such row.
        """
        manifest = self._job()
        missing = Gone(f"{self._id} has no row {row} of stripe {stripe} of group {group}")
        if group >= len(manifest.groups) or row >= manifest.groups[group].parity_shards:
            raise missing
        stripes, _ = self._known.of_group(manifest, group)
        if stripe >= len(stripes.stripes) or stripes.stripes[stripe].is_void:
            raise missing
        extents = (e for member in manifest.groups[group].members for e in member.extents)
        sizes = {extent.rank: extent.size_bytes for extent in extents}
        cells = self._cells_of(group, stripes.stripes[stripe])
        return max(cell_span(index, sizes[rank], manifest.cell_bytes)[1] for rank, index in cells)

    def decode(self, segment: SegmentDigests, index: int, into: memoryview, why: str = "") -> None:
        """Decode one data cell from the other cells of its stripe, whichever can be had.

        `why`: why it cannot be had itself, for an error.

        Raises Unrecoverable if they are too few, CorruptData if what comes out is wrong.
        """
        what = f"cell {index} of rank {segment.rank} of {self._id}"
        group_index, stripe, wanted = self.stripe_of(segment.rank, index)
        manifest, group = self._job(), self._group(group_index)
        with self._reader.buffers.lend(manifest.cell_bytes, group.data_shards + 1) as buffers:
            out, *free = buffers
            shards: dict[int, tuple[memoryview, int]] = {}
            missing = [why] if why else []
            sources = self._sources(group_index, stripe, wanted)
            while len(shards) < group.data_shards and sources:
                batch = sources[: group.data_shards - len(shards)]
                del sources[: len(batch)]
                views = [free.pop() for _ in batch]
                lengths = self._reader.read_all([read for _, read in batch], views)
                for (shard, _), view, got in zip(batch, views, lengths, strict=True):
                    if isinstance(got, int):
                        shards[shard] = view, got
                    else:
                        missing.append(str(got))
                        free.append(view)
            if len(shards) < group.data_shards:
                raise Unrecoverable(
                    f"{what} cannot be rebuilt: {len(shards)} of the {group.data_shards} cells "
                    f"that stripe {stripe.number} needs are there ({'; '.join(missing[:4])})"
                )
            codec, want = codec_for(manifest, group), unpack_one(segment.digests, index)

            def is_right() -> bool:
                longest = max(len(into), *(length for _, length in shards.values()))
                for view, length in shards.values():
                    view[length:longest] = bytes(longest - length)
                found = {n: view[:longest] for n, (view, _) in shards.items()}
                try:
                    codec.decode(found, {wanted: out[:longest]})
                except CodecError as error:
                    raise Unrecoverable(f"{what} cannot be decoded: {error}") from error
                return digest(out[: len(into)]) == want

            if not is_right() and not self._other_parity_is_right(shards, sources, group, is_right):
                raise CorruptData(
                    f"{what}, decoded from stripe {stripe.number}, does not have its digest"
                )
            into[:] = out[: len(into)]

    def _other_parity_is_right(
        self,
        shards: dict[int, tuple[memoryview, int]],
        sources: list[tuple[int, Read]],
        group: Group,
        is_right: Callable[[], bool],
    ) -> bool:
        """Try the rest of the parity in place of what was read of it.

        Data had the digests of its capture, but a row of parity only the one that it was stored
        with: it may have been computed wrongly.
        """
        rows = {n: shards.pop(n) for n in list(shards) if n >= group.data_shards}
        data, used = dict(shards), set(rows)
        with self._reader.buffers.lend(self._job().cell_bytes, len(sources)) as views:
            lengths = self._reader.read_all([read for _, read in sources], views)
            for (row, _), view, got in zip(sources, views, lengths, strict=True):
                if isinstance(got, int):
                    rows[row] = view, got
            for chosen in combinations(rows, len(used)):
                shards.clear()
                shards.update(data | {row: rows[row] for row in chosen})
                if set(chosen) != used and is_right():
                    return True
        return False

    def encode(self, group: int, stripe: int, row: int, into: memoryview) -> None:
        """Compute a parity row anew from the data of its stripe.

        Raises Gone, CorruptData or OSError if not all of the data can be had.
        """
        manifest = self._job()
        stripes, _ = self._known.of_group(manifest, group)
        if not 0 <= stripe < len(stripes.stripes):
            raise Gone(f"{self._id} has {len(stripes.stripes)} stripes")
        wanted = stripes.stripes[stripe]
        code = manifest.groups[group]
        data = [read for _, read in self._sources(group, wanted, None)[: code.data_shards]]
        with self._reader.buffers.lend(manifest.cell_bytes, code.parity_shards) as buffers:
            rows = [buffer[: len(into)] for buffer in buffers]
            codec = codec_for(manifest, code)
            encode_cells(self._reader, codec, manifest.cell_bytes, data, rows)
            into[:] = rows[row]

    def _sources(self, group: int, stripe: Stripe, wanted: int | None) -> list[tuple[int, Read]]:
        """Each shard of the stripe but the one that is wanted, and how to read it, data first."""
        manifest = self._job()
        _, places = self._known.of_group(manifest, group)
        found: list[tuple[int, Read]] = []
        for shard, (member, cell) in enumerate(stripe.data):
            if shard == wanted:
                continue
            if cell is None:
                found.append((shard, lambda into: 0))
                continue
            found.append((shard, partial(self._read_cell, *places[member][cell])))
        for row, keeper in enumerate(stripe.parity):
            node = manifest.groups[group].members[keeper].node
            read = partial(self._read_parity, group, stripe.number, row, node)
            found.append((len(stripe.data) + row, read))
        return found

    def _read_cell(self, rank: int, index: int, into: memoryview) -> int:
        segment, cell_bytes = self.segment(rank)
        return self._reader.cell(self._id, segment, index, cell_bytes, self.holders(rank), into)

    def _read_parity(self, group: int, stripe: int, row: int, node: str, into: memoryview) -> int:
        if node not in self._source.parity:
            raise Gone(f"{node} has no parity")
        address = "" if node == self._reader.node else self._source.cells.get(node)
        if address is None:
            raise Gone(f"{node} is not there")
        return self._reader.parity(self._id, group, stripe, row, address, into)

    def _job(self) -> JobManifest:
        if self._source.manifest is None:
            raise Unrecoverable("there is no parity yet")
        return self._source.manifest

    def _group(self, number: int) -> Group:
        return self._job().groups[number]

    def _cells_of(self, group: int, stripe: Stripe) -> list[tuple[int, int]]:
        _, places = self._known.of_group(self._job(), group)
        return [places[member][cell] for member, cell in stripe.data if cell is not None]


def source_when_protected(manifest: JobManifest, cells: dict[str, str]) -> Source:
    """Where everything is while all of a protected snapshot's nodes are there."""
    members = [member for group in manifest.groups for member in group.members]
    return Source(
        manifest,
        {extent.rank: (member.node,) for member in members for extent in member.extents},
        {extent.rank: extent.size_bytes for member in members for extent in member.extents},
        tuple(member.node for member in members),
        cells,
    )


class DecodeService:
    """Answers GetDecoded and GetRecoded: makes cells here for a node that has lost them."""

    def __init__(
        self, reader: CellReader, manifest_of: Callable[[SnapshotId], JobManifest | None]
    ) -> None:
        self._reader, self._manifest_of = reader, manifest_of
        self._mutex = threading.Lock()
        self._geometries: OrderedDict[SnapshotId, Geometry] = OrderedDict()
        self._room = threading.BoundedSemaphore(_AT_ONCE)

    def __call__(self, request: GetDecoded | GetRecoded) -> memoryview:
        """The cell. Raises Gone, CorruptData or Unrecoverable."""
        manifest = self._manifest_of(request.id)
        if manifest is None:
            raise Gone(f"{self._reader.node} has no manifest of {request.id}")
        if not self._room.acquire(timeout=_ROOM_WAIT_S):
            raise Gone(f"{self._reader.node} decodes as much as it can")
        try:
            parity = request.parity if isinstance(request, GetDecoded) else ()
            source = Source(manifest, request.ranks, {}, parity, request.cells)
            known = self.geometry(request.id)
            decoder = CellDecoder(self._reader, request.id, source, known)
            if isinstance(request, GetDecoded):
                return _decoded(decoder, request)
            return _recoded(decoder, request)
        except OSError as error:
            raise Gone(f"{self._reader.node} cannot decode it: {error}") from error
        finally:
            self._room.release()

    def geometry(self, id: SnapshotId) -> Geometry:
        """Of one snapshot, made once as long as not many others are asked for."""
        with self._mutex:
            found = self._geometries.pop(id, None) or Geometry()
            self._geometries[id] = found
            while len(self._geometries) > _SNAPSHOTS_KNOWN:
                self._geometries.popitem(last=False)
            return found


def _decoded(decoder: CellDecoder, request: GetDecoded) -> memoryview:
    decoder.stripe_of(request.rank, request.cell)  # there is such a cell
    segment, cell_bytes = decoder.segment(request.rank)
    _, length = cell_span(request.cell, segment.size_bytes, cell_bytes)
    into = memoryview(bytearray(length))
    decoder.decode(segment, request.cell, into)
    return into


def _recoded(decoder: CellDecoder, request: GetRecoded) -> memoryview:
    into = memoryview(bytearray(decoder.row_length(request.group, request.stripe, request.row)))
    decoder.encode(request.group, request.stripe, request.row, into)
    return into
