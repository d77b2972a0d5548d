"""One node of `ckptd bench network | protect | rebuild`: `ckptd.agent.bench NAME ROOT HOST`.

It has the data plane of an agent (store, cell server, encoder, fetcher) and no coordinator: it does
what its standard input says, a JSON object a line, and answers each on standard output.
"""

import os
import queue
import random
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import msgspec
import psutil

from ckptd.agent.again import RecodeRun
from ckptd.agent.buffers import give_large_buffers_back
from ckptd.agent.cells import CellServer, Peers
from ckptd.agent.decode import DecodeService
from ckptd.agent.fetch import SegmentFetch
from ckptd.agent.lifecycle import parity_cells
from ckptd.agent.protect import EncodeRun
from ckptd.agent.reader import CellReader
from ckptd.agent.store import Store
from ckptd.digest import cell_count, cell_span, digest, pack
from ckptd.errors import Gone
from ckptd.ids import SnapshotId
from ckptd.keys import ClusterKey
from ckptd.manifest import JobManifest
from ckptd.segment import Sidecar, TensorSpec, checked_record, plan_layout, sidecar_path
from ckptd.wire import GetCell, GetEncoded, Source

DEVICE = "eth0"
_KEY = ClusterKey(bytes(32))
_JOB = "bench"
_PARITY = f"{_JOB}/parity.cells"
_OBJECTS_BYTES = 64
_PIECE_BYTES = 1 << 20
_ENCODE_LIMIT_S = 600.0


class Request(msgspec.Struct, frozen=True, tag=True):
    """What a node is told to do."""


class Seal(Request, frozen=True):
    """Have a sealed segment of about so many bytes; answers its exact size."""

    id: SnapshotId
    rank: int
    world_size: int
    size_bytes: int
    cell_bytes: int


class Prepare(Request, frozen=True):
    """Have room for the parity of this snapshot, as an agent has before the first one."""

    manifest: JobManifest


class Encode(Request, frozen=True):
    """Protect the snapshot, together with the others; or, with `ranks`, as `Protect`, again."""

    manifest: JobManifest
    cells: dict[str, str]
    ranks: dict[int, tuple[str, ...]] = {}


class Fetch(Request, frozen=True):
    """Bring a segment here."""

    id: SnapshotId
    rank: int
    source: Source


class PullCells(Request, frozen=True):
    """Fetch every cell of a segment from one peer, `connections` at a time, and verify them."""

    id: SnapshotId
    rank: int
    cells: int
    cell_bytes: int
    address: str
    connections: int


class PullPlain(Request, frozen=True):
    """Receive so many bytes over plain sockets: the limit."""

    address: str
    size_bytes: int
    connections: int


class Ready(msgspec.Struct, frozen=True):
    """A node's first line: where it serves cells, and plain bytes."""

    cells: str
    plain: str


class Answer(msgspec.Struct, frozen=True):
    """What a request has come to; traffic is that of the node's own network device, if any.

    `own_bytes`: resident memory that is no slot.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    size_bytes: int = 0
    own_bytes: int = 0
    error: str = ""


Command = Seal | Prepare | Encode | Fetch | PullCells | PullPlain


class BenchNode:
    """Does what a Command says."""

    def __init__(self, name: str, root: Path, host: str) -> None:
        self._name, self._store, self._peers = name, Store(root), Peers(_KEY)
        self._reader = CellReader(name, self._store, self._peers)
        self._run: EncodeRun | None = None
        self._manifest: JobManifest | None = None
        decode = DecodeService(self._reader, lambda id: self._manifest)
        self._server = CellServer(host, 0, name, self._store, _KEY, self._row, decode)
        self._plain = socket.create_server((host, 0))
        threading.Thread(target=self._serve_plain, daemon=True).start()
        plain_host, plain_port = self._plain.getsockname()[:2]
        self.ready = Ready(self._server.address, f"{plain_host}:{plain_port}")

    def do(self, request: Command) -> Answer:
        """Carry it out, and measure."""
        before, cpu_s, began = _traffic(), process_time(), perf_counter()
        size_bytes, error = 0, ""
        try:
            match request:
                case Seal():
                    size_bytes = self._seal(request)
                case Prepare():
                    self._prepare(request)
                case Encode():
                    error = self._encode(request)
                case Fetch():
                    self._fetch(request)
                case PullCells():
                    self._pull_cells(request)
                case PullPlain():
                    self._pull_plain(request)
        except Exception as problem:  # the parent says what it was
            error = f"{type(problem).__name__}: {problem}"
        seconds, after = perf_counter() - began, _traffic()
        return Answer(
            seconds,
            process_time() - cpu_s,
            after[0] - before[0],
            after[1] - before[1],
            size_bytes,
            _own_bytes(),
            error,
        )

    def _row(self, request: GetEncoded) -> memoryview:
        run = self._run
        if run is None:
            raise Gone(f"{self._name} does not encode yet")
        return run.row(request)

    def _seal(self, request: Seal) -> int:
        layout = plan_layout([TensorSpec("model.w", "U8", (request.size_bytes,))], _OBJECTS_BYTES)
        header = layout.header(request.id, request.rank, request.world_size, _OBJECTS_BYTES)
        name = f"{_JOB}/segment-{request.rank}.safetensors"
        self._store.allocate(name, layout.size_bytes)
        path = self._store.path(name)
        numbers, digests = random.Random(request.rank), []
        with path.open("r+b") as file:
            for index in range(cell_count(layout.size_bytes, request.cell_bytes)):
                _, length = cell_span(index, layout.size_bytes, request.cell_bytes)
                cell = numbers.randbytes(length)
                if index == 0:
                    cell = header + cell[len(header) :]
                digests.append(digest(cell))
                file.write(cell)
        sidecar = Sidecar(
            request.id,
            request.rank,
            request.world_size,
            layout.size_bytes,
            request.cell_bytes,
            pack(digests),
        )
        sidecar_path(path).write_bytes(checked_record(sidecar))
        self._store.check_segment(name, request.id, request.rank)
        return layout.size_bytes

    def _prepare(self, request: Prepare) -> None:
        place = request.manifest.place_of(self._name)
        if self._run is not None:
            self._run.stop()
            self._run = None
            self._store.release(_PARITY)
        self._manifest = request.manifest
        if place is not None:
            size_bytes = parity_cells(request.manifest, *place) * request.manifest.cell_bytes
            path = self._store.path(_PARITY)
            if not path.exists() or path.stat().st_size < size_bytes:
                self._store.allocate(_PARITY, size_bytes)

    def _encode(self, request: Encode) -> str:
        outcomes: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._store.keep_manifest(request.manifest)
        path = self._store.path(_PARITY)
        self._run = (partial(RecodeRun, request.ranks) if request.ranks else EncodeRun)(
            request.manifest,
            self._name,
            request.cells,
            self._store,
            self._reader,
            path,
            path.stat().st_size,
            outcomes.put,
        )
        self._run.start()
        reason = outcomes.get(timeout=_ENCODE_LIMIT_S)
        return "" if reason is None else reason or "stopped"

    def _fetch(self, request: Fetch) -> None:
        name = f"{_JOB}/fetched.safetensors"
        size_bytes = request.source.sizes[request.rank]
        path = self._store.path(name)
        if not path.exists() or path.stat().st_size != size_bytes:
            self._store.allocate(name, size_bytes)
        self._store.release(name)
        fetch = SegmentFetch(self._reader, request.id, request.rank, request.source)
        self._store.publish_segment(path, fetch.run(path, False).sidecar)

    def _pull_cells(self, request: PullCells) -> None:
        def pull(first: int) -> None:
            into = memoryview(bytearray(request.cell_bytes))
            for index in range(first, request.cells, request.connections):
                ask = GetCell(request.id, request.rank, index)
                length, want = self._peers.fetch(request.address, ask, into)
                if digest(into[:length]) != want:
                    raise ConnectionError(f"cell {index} was damaged on the way")

        _in_threads(pull, request.connections)

    def _pull_plain(self, request: PullPlain) -> None:
        host, _, port = request.address.rpartition(":")

        def pull(number: int) -> None:
            left = request.size_bytes // request.connections
            into = memoryview(bytearray(min(_PIECE_BYTES, max(left, 1))))
            with socket.create_connection((host, int(port))) as conn:
                conn.sendall(left.to_bytes(8, "big"))
                while left:
                    got = conn.recv_into(into[: min(left, len(into))])
                    if not got:
                        raise ConnectionError("the plain server hung up")
                    left -= got

        _in_threads(pull, request.connections)

    def _serve_plain(self) -> None:
        while True:
            conn, _ = self._plain.accept()
            threading.Thread(target=self._send_plain, args=(conn,), daemon=True).start()

    def _send_plain(self, conn: socket.socket) -> None:
        """As many bytes as the peer wants, from a file on tmpfs, again and again the same."""
        with conn, os.fdopen(os.memfd_create("plain"), "r+b") as file:
            file.truncate(_PIECE_BYTES)
            left = int.from_bytes(conn.recv(8, socket.MSG_WAITALL), "big")
            while left:
                left -= os.sendfile(conn.fileno(), file.fileno(), 0, min(left, _PIECE_BYTES))


def _in_threads(work: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def _traffic() -> tuple[int, int]:
    """Bytes received and sent by this node's own device; zeros where it has none."""
    device = psutil.net_io_counters(pernic=True).get(DEVICE)
    return (device.bytes_recv, device.bytes_sent) if device is not None else (0, 0)


def _own_bytes() -> int:
    """Resident memory that belongs to no file, in bytes: buffers, not slots."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """NAME, ROOT and HOST are the arguments."""
    give_large_buffers_back()
    name, root, host = sys.argv[1:4]
    node = BenchNode(name, Path(root), host)
    answer: msgspec.Struct = node.ready
    decoder = msgspec.json.Decoder(Command)
    while True:
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        answer = node.do(decoder.decode(line))


if __name__ == "__main__":
    main()
