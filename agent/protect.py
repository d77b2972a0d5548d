"""Protecting one snapshot on one node: encode this node's stripes, keep this node's parity.

The first parity node of a stripe is its encoder (design of REFT's in-memory coding, with one
encoder for each stripe): it pulls the k data cells, verifies them, computes all rows in one pass,
keeps the first, and hands the others to the nodes that keep them. Pulling bounds what is under way.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from time import monotonic
from typing import TypeVar

from msgspec import structs

from ckptd.agent.lanes import Lane, Wanted
from ckptd.agent.reader import CellReader, Read
from ckptd.agent.store import Store
from ckptd.config import erasure_engine
from ckptd.digest import cell_count, digest, pack, unpack_one
from ckptd.erasure import Codec, CodecError, Stripe, open_codec
from ckptd.errors import CorruptData, Gone, ProtocolError
from ckptd.manifest import Group, JobManifest, NodeManifest, SegmentDigests
from ckptd.segment import ParitySidecar
from ckptd.wire import GetCell, GetEncoded

ROWS_WINDOW = 8
_STRIPES_AHEAD = 6
_STRIPES_BYTES = 96 << 20  # at most, in the cells of stripes that are read at the same time
ROWS_AT_ONCE = 6
_RETRY_S = 0.2
_RETRY_MAX_S = 2.0
_ROW_WAIT_S = 5.0
_ROW_PATIENCE_S = 2.0
_TROUBLE_AFTER_S = 5.0
_DAMAGED_TRIES = 3

_codec = lru_cache(open_codec)  # opening runs its self-test


_T = TypeVar("_T")


def codec_for(manifest: JobManifest, group: Group) -> Codec:
    """The codec of a group, opened once. Raises ProtocolError for one that is not to be had."""
    try:
        codec = _codec(group.data_shards, group.parity_shards, erasure_engine())
    except CodecError as error:
        raise ProtocolError(f"{manifest.id} cannot be coded here: {error}") from error
    if codec.name != manifest.codec:
        raise ProtocolError(
            f"{manifest.id} is coded with {manifest.codec!r}, and this agent has {codec.name!r}; "
            "install the ckptd version that wrote it"
        )
    return codec


def encode_cells(
    reader: CellReader,
    codec: Codec,
    cell_bytes: int,
    reads: Sequence[Read],
    rows: Sequence[memoryview],
) -> None:
    """Read a stripe's data cells and compute all parity rows, which say how long it is.

    Raises what a read raises, and CorruptData if a cell is longer than the rows.
    """
    with reader.buffers.lend(cell_bytes, len(reads)) as buffers:
        lengths = []
        for got in reader.read_all(reads, buffers):
            if isinstance(got, Exception):
                raise got
            lengths.append(got)
        encode_read(codec, buffers, lengths, rows)


def encode_read(
    codec: Codec,
    buffers: Sequence[memoryview],
    lengths: Sequence[int],
    rows: Sequence[memoryview],
) -> None:
    """Compute all parity rows of the cells in `buffers`, of which so many bytes each are read.

    What is behind them there is overwritten. Raises CorruptData if a cell is longer than the rows.
    """
    length = len(rows[0])
    if max(lengths) > length:
        raise CorruptData(f"a data cell has {max(lengths)} bytes, and its parity has {length}")
    for buffer, got in zip(buffers, lengths, strict=True):
        buffer[got:length] = bytes(length - got)
    codec.encode([buffer[:length] for buffer in buffers], rows)


class Stopped(Exception):
    """The snapshot is no longer to be protected."""


class EncodeRun:
    """One node's share in protecting one snapshot. `done` is called once, from a thread.

    `done(None)` when all parity of this node is stored and published, `done(reason)` when it never
    will be (the reason is empty when it was stopped). `trouble(reason)` says what is tried again,
    `moved`, in any thread, how many of its parity cells are here.
    """

    def __init__(
        self,
        manifest: JobManifest,
        node: str,
        cells: dict[str, str],
        store: Store,
        reader: CellReader,
        path: Path | None,
        size_bytes: int,
        done: Callable[[str | None], None],
        trouble: Callable[[str], None] = lambda reason: None,
        moved: Callable[[int, int], None] = lambda done, cells: None,
    ) -> None:
        place = manifest.place_of(node)
        if place is None:
            raise ProtocolError(f"{node} has no part in {manifest.id}")
        self._manifest, self._node, self._store, self._reader = manifest, node, store, reader
        self._group_index, self._me = place
        self._group = manifest.groups[self._group_index]
        self._map = manifest.stripe_map(self._group_index)
        self._cells, self._path, self._size_bytes = cells, path, size_bytes
        self._done, self._trouble, self._moved = done, trouble, moved
        self._codec = codec_for(manifest, self._group)
        self._places = [
            list(member.cell_ranks(manifest.cell_bytes)) for member in self._group.members
        ]
        self._node_manifests: dict[int, NodeManifest] = {}
        self._manifests_ready = threading.Event()
        self._rows: dict[tuple[int, int], memoryview] = {}
        self._encoded: set[int] = set()
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._patience_s = _ROW_PATIENCE_S
        self._on_demand = path is None
        """Rows for others are computed when they are asked for, and not before."""
        self._index = {place: n for n, place in enumerate(self._map.parity_of(self._me))}
        self._parity: dict[tuple[int, int], tuple[int, int]] = {}

    def start(self) -> None:
        """Begin, in threads of its own. Without a path (serve only), rows are made on demand."""
        threading.Thread(target=self._run, name="ckptd-encode", daemon=True).start()

    def stop(self) -> None:
        """End as soon as possible."""
        self._stop.set()
        with self._change:
            self._change.notify_all()

    @property
    def damaged(self) -> bool:
        """Whether it has failed since bytes of others are not those that were captured."""
        return isinstance(self._failure, CorruptData)

    def update(
        self, manifest: JobManifest, cells: dict[str, str], ranks: dict[int, tuple[str, ...]]
    ) -> None:
        """Peers have other addresses now, or others have taken the places of lost ones.

        `ranks` is for those who need to know who holds which.
        """
        self._manifest, self._group = manifest, manifest.groups[self._group_index]
        self._cells = cells

    def row(self, request: GetEncoded) -> memoryview:
        """A parity row for the node that keeps it. Raises Gone if it cannot be had in time.

        A row is handed out once from the buffer and computed again if it is asked for again, so
        that the buffer stays small however slow a peer is.
        """
        stripe = self._stripe(request.stripe)
        if stripe.encoder != self._me or not 0 < request.row < self._group.parity_shards:
            raise Gone(f"{self._node} does not encode row {request.row} of {request.stripe}")
        key = (request.stripe, request.row)
        with self._change:
            self._change.wait_for(
                lambda: (
                    key in self._rows
                    or request.stripe in self._encoded
                    or self._on_demand
                    or self._stop.is_set()
                ),
                _ROW_WAIT_S,
            )
            if self._stop.is_set():
                raise Gone(f"{self._manifest.id} is no longer being protected")
            found = self._rows.pop(key, None)
            self._change.notify_all()
            if found is not None:
                return found
            if request.stripe not in self._encoded and not self._on_demand:
                raise Gone(f"stripe {request.stripe} is not encoded yet")
        if not self._manifests_ready.wait(_ROW_WAIT_S):
            raise Gone("the manifests of the group are not here yet")
        try:
            return self._encode(stripe)[request.row]
        except (CorruptData, OSError) as error:
            raise Gone(f"stripe {request.stripe} cannot be encoded again: {error}") from error

    def _run(self) -> None:
        try:
            self._collect_manifests()
            if self._path is None:
                return
            if not self._path.exists():
                self._store.allocate(
                    str(self._path.relative_to(self._store.root)), self._size_bytes
                )
            self._fill()
            if not self._stop.is_set():
                self._publish()
                self._done(None)
                return
        except Stopped:
            pass
        except Exception as error:
            self._fail(error)
        # Only now: no thread of this run writes to the parity file any more.
        failure = self._failure
        self._done("" if failure is None else str(failure) or type(failure).__name__)

    def _fill(self) -> None:
        """Have all parity of this node in its file."""
        collector = threading.Thread(target=self._collect_rows)
        collector.start()
        self._encode_own()
        collector.join()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            if not self._stop.is_set():
                work()
        except Stopped:
            pass
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._change:
            if not self._stop.is_set():
                self._failure = error
            self._stop.set()
            self._change.notify_all()

    def _collect_manifests(self) -> None:
        """Keep every node manifest of the group before any parity is made."""
        for number in range(len(self._group.members)):
            if not self._group.members[number].extents:
                continue  # it holds parity only
            manifest = self._again(partial(self._pull_manifest, number))
            member = self._group.members[number]
            sizes = {(s.rank, s.size_bytes) for s in manifest.segments}
            if not sizes >= {(e.rank, e.size_bytes) for e in member.extents}:
                raise ProtocolError(f"the manifest of {member.node} does not fit the job manifest")
            for segment in manifest.segments:
                cells = cell_count(segment.size_bytes, self._manifest.cell_bytes)
                if len(segment.digests) != 8 * cells:
                    raise ProtocolError(f"the manifest of {member.node} has missing digests")
            self._node_manifests[number] = manifest
            if member.node != self._node:
                # The group knows the place by its first name, whoever has it now.
                self._store.keep_node_manifest(structs.replace(manifest, node=member.origin))
        self._manifests_ready.set()

    def _pull_manifest(self, number: int) -> NodeManifest:
        """Of the node that has the place now."""
        member = self._group.members[number]
        rank = member.extents[0].rank
        addresses = self._addresses(member.node)
        return self._reader.node_manifest(self._manifest.id, member.node, addresses, rank)

    def _encode_own(self) -> None:
        """Read the stripes' cells, in order and a few stripes ahead, and encode what is whole."""
        own = [s for s in self._map.stripes if s.encoder == self._me and not s.is_void]
        width_bytes = len(self._group.members) * self._manifest.cell_bytes
        room = threading.Semaphore(max(1, min(_STRIPES_AHEAD, _STRIPES_BYTES // width_bytes)))
        with ThreadPoolExecutor(1, "ckptd-encode") as encoder, self._lanes() as lanes:
            for stripe in own:
                if not self._wait(room):
                    return
                self._pull(stripe, lanes, encoder, room)

    @contextmanager
    def _lanes(self) -> Iterator[list[Lane]]:
        """A lane from each member."""
        with ExitStack() as stack:
            lanes = []
            for member in self._group.members:
                lane = Lane(self._reader.peers, partial(self._address, member.node), self._stop)
                stack.callback(lane.close)
                lanes.append(lane)
            yield lanes

    def _wait(self, room: threading.Semaphore) -> bool:
        """Whether there is room; not, once the run has been stopped."""
        while not room.acquire(timeout=_RETRY_S):
            if self._stop.is_set():
                return False
        return True

    def _pull(
        self,
        stripe: Stripe,
        lanes: Sequence[Lane],
        encoder: ThreadPoolExecutor,
        room: threading.Semaphore,
    ) -> None:
        """Read the cells of a stripe, each in its member's lane; with the last, it is encoded."""
        stack = ExitStack()
        stack.callback(room.release)
        cell_bytes = self._manifest.cell_bytes
        buffers = stack.enter_context(self._reader.buffers.lend(cell_bytes, len(stripe.data)))
        lengths = [self._cell_length(member, cell) for member, cell in stripe.data]
        left = itertools.count(len(stripe.data) - 1, -1)  # next() is atomic

        def one_less() -> None:
            if next(left) == 0:
                encoder.submit(encode)

        def encode() -> None:
            with stack:
                self._guard(partial(self._encode_one, stripe, buffers, lengths))

        for (member, cell), buffer, length in zip(stripe.data, buffers, lengths, strict=True):
            if cell is None:
                one_less()
            else:
                lanes[member].put(self._wanted(stripe, member, cell, buffer[:length], one_less))

    def _wanted(
        self,
        stripe: Stripe,
        member: int,
        cell: int,
        into: memoryview,
        done: Callable[[], None],
    ) -> Wanted:
        """A cell as its lane asks for it."""
        rank, index = self._places[member][cell]
        want = unpack_one(self._segment(member, rank).digests, index)

        def take(length: int, _: int) -> bool:
            right = length == len(into) and digest(into) == want
            if right:
                done()
            else:
                what = f"cell {index} of rank {rank} of {self._manifest.id}"
                self._reader.damage.found_of(self._group.members[member].node, what)
            return right

        def with_patience() -> None:
            def again() -> None:
                self._again(lambda: self._read(stripe, member, cell, into))

            self._guard(again)
            done()

        request = GetCell(self._manifest.id, rank, index, stripe.number)
        return Wanted(request, into, take, with_patience)

    def _encode_one(
        self, stripe: Stripe, buffers: Sequence[memoryview], lengths: Sequence[int]
    ) -> None:
        rows = [memoryview(bytearray(self._row_length(stripe))) for _ in stripe.parity]
        encode_read(self._codec, buffers, lengths, rows)
        self._keep(stripe.number, 0, rows[0])
        with self._change:
            self._wait_for_room()
            if self._stop.is_set():
                raise Stopped
            for number in range(1, len(rows)):
                self._rows[stripe.number, number] = rows[number]
            self._encoded.add(stripe.number)
            self._change.notify_all()

    def _wait_for_room(self) -> None:
        """Wait until peers have taken rows; then give up the oldest, which can be made again.

        A peer that has its row from before this agent was restarted never asks for it.
        """
        taken = self._change.wait_for(
            lambda: len(self._rows) < ROWS_WINDOW or self._stop.is_set(), self._patience_s
        )
        if taken:
            self._patience_s = _ROW_PATIENCE_S
            return
        self._patience_s /= 2
        while len(self._rows) >= ROWS_WINDOW:
            del self._rows[next(iter(self._rows))]

    def _encode(self, stripe: Stripe) -> list[memoryview]:
        """All parity rows of one stripe, as long as its longest data cell."""
        rows = [memoryview(bytearray(self._row_length(stripe))) for _ in stripe.parity]
        reads = [partial(self._read, stripe, member, cell) for member, cell in stripe.data]
        encode_cells(self._reader, self._codec, self._manifest.cell_bytes, reads, rows)
        return rows

    def _read(self, stripe: Stripe, member: int, cell: int | None, into: memoryview) -> int:
        """A data cell's length; a virtual one has none."""
        if cell is None:
            return 0
        rank, index = self._places[member][cell]
        return self._reader.cell(
            self._manifest.id,
            self._segment(member, rank),
            index,
            self._manifest.cell_bytes,
            self._holders(member, rank),
            into,
            stripe.number,
        )

    def _holders(self, member: int, rank: int) -> list[str]:
        """Addresses of those who hold a segment of the member's, beside this node."""
        return self._addresses(self._group.members[member].node)

    def _collect_rows(self) -> None:
        """Get the rows that this node keeps of stripes that others encode."""
        room = threading.Semaphore(ROWS_AT_ONCE)
        with self._lanes() as lanes:
            for stripe_number, row in self._index:
                if row == 0:
                    continue
                if not self._wait(room):
                    return
                stripe = self._stripe(stripe_number)
                self._collect_row(stripe, row, lanes[stripe.encoder], room.release)

    def _collect_row(self, stripe: Stripe, row: int, lane: Lane, done: Callable[[], None]) -> None:
        encoder = self._group.members[stripe.encoder].node
        request = GetEncoded(self._manifest.id, self._group_index, stripe.number, row)
        stack = ExitStack()
        stack.callback(done)
        (buffer,) = stack.enter_context(self._reader.buffers.lend(self._manifest.cell_bytes))
        into = buffer[: self._row_length(stripe)]

        def take(length: int, want: int) -> bool:
            if not self._row_is_whole(encoder, request, into, length, want):
                return False
            with stack:
                self._guard(lambda: self._keep(stripe.number, row, into))
            return True

        def with_patience() -> None:
            def again() -> None:
                self._again(lambda: self._pull_row(encoder, request, into))
                self._keep(stripe.number, row, into)

            with stack:
                self._guard(again)

        lane.put(Wanted(request, into, take, with_patience))

    def _pull_row(self, encoder: str, request: GetEncoded, into: memoryview) -> None:
        try:
            length, want = self._reader.peers.fetch(self._address(encoder), request, into)
        except Gone as error:
            # Its encoder is not that far, or has begun again: worth another try.
            raise ConnectionError(str(error)) from error
        if not self._row_is_whole(encoder, request, into, length, want):
            raise ConnectionError(f"a parity row from {encoder} was damaged on the way")

    def _row_is_whole(
        self, encoder: str, request: GetEncoded, row: memoryview, length: int, want: int
    ) -> bool:
        whole = length == len(row) and digest(row) == want
        if not whole:
            what = f"parity row {request.row} of stripe {request.stripe} of {request.id}"
            self._reader.damage.found_of(encoder, what)
        return whole

    def _keep(self, stripe: int, row: int, cell: memoryview) -> None:
        """Write one parity cell to its place in the file."""
        if self._path is None:
            raise ProtocolError("there is no parity file to write to")
        number = self._index[stripe, row]
        with self._path.open("r+b", buffering=0) as file:
            file.seek(number * self._manifest.cell_bytes)
            file.write(cell)
        self._parity[stripe, row] = (len(cell), digest(cell))
        self._moved(len(self._parity), len(self._index))

    def _publish(self) -> None:
        index = list(self._index)
        kept = [self._parity[place] for place in index]
        sidecar = ParitySidecar(
            id=self._manifest.id,
            group=self._group_index,
            member=self._me,
            cell_bytes=self._manifest.cell_bytes,
            lengths=tuple(length for length, _ in kept),
            digests=pack(value for _, value in kept),
        )
        if self._path is not None:
            self._store.publish_parity(self._path, sidecar, index)

    def _again(self, attempt: Callable[[], _T]) -> _T:
        """Try until it works, the snapshot is stopped, or trying again cannot help."""
        wait_s, tell_at = _RETRY_S, monotonic() + _TROUBLE_AFTER_S
        damaged = 0
        while not self._stop.is_set():
            try:
                return attempt()
            except (CorruptData, ProtocolError):
                damaged += 1  # perhaps only on its way, and whole where it comes from
                if damaged == _DAMAGED_TRIES:
                    raise
            except OSError as error:
                if monotonic() >= tell_at:
                    self._trouble(f"{self._manifest.id} is not protected yet: {error}")
                    tell_at = math.inf
            self._stop.wait(wait_s)
            wait_s = min(2 * wait_s, _RETRY_MAX_S)
        raise Stopped

    def _addresses(self, node: str) -> list[str]:
        """Where to ask for what `node` has. Raises ConnectionError while it is away."""
        return [] if node == self._node else [self._address(node)]

    def _address(self, node: str) -> str:
        if node not in self._cells:
            raise ConnectionError(f"{node} is not there")
        return self._cells[node]

    def _stripe(self, number: int) -> Stripe:
        if not 0 <= number < len(self._map.stripes):
            raise Gone(f"{self._manifest.id} has {len(self._map.stripes)} stripes")
        return self._map.stripes[number]

    def _segment(self, member: int, rank: int) -> SegmentDigests:
        return self._node_manifests[member].segment(rank)

    def _row_length(self, stripe: Stripe) -> int:
        return max(self._cell_length(member, cell) for member, cell in stripe.data)

    def _cell_length(self, member: int, cell: int | None) -> int:
        if cell is None:
            return 0
        rank, index = self._places[member][cell]
        extent = next(e for e in self._group.members[member].extents if e.rank == rank)
        return min(self._manifest.cell_bytes, extent.size_bytes - index * self._manifest.cell_bytes)
