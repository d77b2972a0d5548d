"""The data plane of nodes, in this process: real stores, servers and encoders, over loopback."""

import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptd.agent.cells import CellServer, Peers
from ckptd.agent.decode import DecodeService
from ckptd.agent.fetch import Outcome, SegmentFetch
from ckptd.agent.protect import EncodeRun
from ckptd.agent.reader import CellReader
from ckptd.agent.store import Store, read_segment_sidecar, verify_cells
from ckptd.digest import cell_count, cell_span, digest, pack
from ckptd.errors import Gone
from ckptd.ids import SnapshotId
from ckptd.keys import NONCE_BYTES, ClusterKey
from ckptd.manifest import Extent, Group, JobManifest, Member
from ckptd.segment import Sidecar, TensorSpec, checked_record, plan_layout, sidecar_path
from ckptd.wire import (
    GetDecoded,
    GetEncoded,
    GetRecoded,
    Message,
    Source,
    encode,
)

CELL_BYTES = 4096
DEADLINE_S = 60.0
ID = SnapshotId("job", 2, 40)
KEY = ClusterKey(bytes(range(32)))


def segment_of(rank: int, world_size: int, rng: random.Random) -> bytes:
    """A segment of some cells, the last one mostly short."""
    layout = plan_layout([TensorSpec("model.w", "U8", (rng.randrange(4 * CELL_BYTES),))], 64)
    header = layout.header(ID, rank, world_size, 64)
    return header + rng.randbytes(layout.size_bytes - layout.data_begin)


class Node:
    """One agent's data plane."""

    def __init__(self, name: str, host: str, root: Path) -> None:
        self.name, self.store, self.peers = name, Store(root), Peers(KEY)
        self.reader = CellReader(name, self.store, self.peers)
        self.run: EncodeRun | None = None
        self.job_manifest: JobManifest | None = None
        decode = DecodeService(self.reader, lambda id: self.job_manifest)
        self.decoded: list[GetDecoded | GetRecoded] = []

        def decoded(request: GetDecoded | GetRecoded) -> memoryview:
            self.decoded.append(request)
            return decode(request)

        self.server = CellServer(host, 0, name, self.store, KEY, self._row, decoded)
        self.address = self.server.address

    def _row(self, request: GetEncoded) -> memoryview:
        if self.run is None or request.id != ID:
            raise Gone(f"{self.name} does not encode {request.id} (yet)")
        return self.run.row(request)

    def seal(self, rank: int, raw: bytes, world_size: int) -> None:
        name = f"job/segment-{rank}.safetensors"
        self.store.allocate(name, len(raw))
        path = self.store.path(name)
        with path.open("r+b") as file:
            file.write(raw)
        spans = [
            cell_span(n, len(raw), CELL_BYTES) for n in range(cell_count(len(raw), CELL_BYTES))
        ]
        digests = pack(digest(raw[begin : begin + length]) for begin, length in spans)
        sidecar = Sidecar(ID, rank, world_size, len(raw), CELL_BYTES, digests)
        sidecar_path(path).write_bytes(checked_record(sidecar))
        self.store.check_segment(name, ID, rank)

    def segment(self, rank: int) -> Path:
        return self.store.path(f"job/segment-{rank}.safetensors")

    @property
    def parity(self) -> Path:
        return self.store.path("job/parity-0.cells")

    def close(self) -> None:
        if self.run is not None:
            self.run.stop()
        self.server.close()
        self.peers.close()
        self.store.close()


class Cluster:
    """Nodes a, b, c … in one group, with some ranks each, and the segments they sealed."""

    def __init__(
        self, directory: Path, ranks: list[int], parity_shards: int, rng: random.Random
    ) -> None:
        """`ranks`: how many ranks each node has."""
        self.directory = directory
        self.nodes = [
            Node(chr(ord("a") + n), f"127.0.0.{n + 1}", directory / str(n))
            for n in range(len(ranks))
        ]
        self.everybody = list(self.nodes)
        self.segments = {rank: segment_of(rank, sum(ranks), rng) for rank in range(sum(ranks))}
        order = list(self.segments)
        rng.shuffle(order)
        self.ranks: dict[str, list[int]] = {}
        members = []
        for node, count in zip(self.nodes, ranks, strict=True):
            own, order = sorted(order[:count]), order[count:]
            self.ranks[node.name] = own
            for rank in own:
                node.seal(rank, self.segments[rank], sum(ranks))
            members.append(
                Member(node.name, tuple(Extent(rank, len(self.segments[rank])) for rank in own))
            )
        self.group = Group(tuple(members), parity_shards)
        self.manifest = JobManifest(ID, sum(ranks), (self.group,), "zfec", CELL_BYTES, ())
        self.addresses = {node.name: node.address for node in self.nodes}
        self.outcomes: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def encode(
        self,
        node: Node,
        addresses: dict[str, str] | None = None,
        kind: Callable[..., EncodeRun] = EncodeRun,
    ) -> EncodeRun:
        number = self.nodes.index(node)
        held = len(self.manifest.stripe_map(0).parity_of(number))
        node.store.keep_manifest(self.manifest)
        node.job_manifest = self.manifest
        node.run = kind(
            self.manifest,
            node.name,
            self.addresses if addresses is None else addresses,
            node.store,
            node.reader,
            node.parity,
            held * CELL_BYTES,
            lambda reason: self.outcomes.put((node.name, reason)),
        )
        node.run.start()
        return node.run

    def wait_encoded(self, count: int) -> None:
        for _ in range(count):
            assert self.outcomes.get(timeout=DEADLINE_S)[1] is None

    def protect(self) -> None:
        for node in self.nodes:
            self.encode(node)
        self.wait_encoded(len(self.nodes))

    def newcomer(self, name: str = "z") -> Node:
        """A node that holds nothing, and keeps nothing between calls."""
        number = len(self.everybody)
        node = Node(name, f"127.0.0.{90 + number}", self.directory / str(number))
        self.everybody.append(node)
        return node

    def source(self, lost: tuple[Node, ...] = (), listed: bool = False) -> Source:
        """What is left without these nodes; `listed`: nobody has noticed yet."""
        there = [node for node in self.nodes if listed or node not in lost]
        return Source(
            self.manifest,
            {rank: (node.name,) for node in there for rank in self.ranks[node.name]},
            {rank: len(raw) for rank, raw in self.segments.items()},
            tuple(node.name for node in there),
            {node.name: node.address for node in there},
        )

    def fetch(self, node: Node, rank: int, source: Source, name: str = "job/new") -> Outcome:
        """Bring a segment to `node`, and see that it is whole."""
        name += ".safetensors"
        node.store.allocate(name, len(self.segments[rank]))
        path = node.store.path(name)
        outcome = SegmentFetch(node.reader, ID, rank, source).run(path, present=False)
        assert path.read_bytes() == self.segments[rank]
        sidecar = read_segment_sidecar(path)
        assert sidecar == outcome.sidecar
        verify_cells(path, sidecar)
        node.store.delete(name)
        return outcome

    def close(self) -> None:
        for node in self.everybody:
            node.close()


Build = Callable[..., Cluster]


@contextmanager
def clusters(directory: Path) -> Iterator[Build]:
    """Builds clusters, and closes them all."""
    built: list[Cluster] = []

    def make(ranks: list[int], parity_shards: int, seed: int = 1) -> Cluster:
        built.append(
            Cluster(directory / str(len(built)), ranks, parity_shards, random.Random(seed))
        )
        return built[-1]

    try:
        yield make
    finally:
        for cluster in built:
            cluster.close()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def places_of(cluster: Cluster, node: Node, rank: int, cell: int) -> tuple[int, int]:
    """(stripe, shard) of a cell."""
    number = cluster.nodes.index(node)
    cells_of = list(cluster.group.members[number].cell_ranks(CELL_BYTES))
    return cluster.manifest.stripe_map(0).locate(number, cells_of.index((rank, cell)))


def flip_parity(cluster: Cluster, stripe: int, row: int) -> None:
    """A bit of the first byte of a parity cell at rest."""
    keeper = cluster.manifest.stripe_map(0).stripes[stripe].parity[row]
    index = cluster.manifest.stripe_map(0).parity_of(keeper)
    flip(cluster.nodes[keeper].parity, index.index((stripe, row)) * CELL_BYTES)


def forge_parity(keeper: Node) -> None:
    """Parity with the right digests, but made of other bytes."""
    with keeper.store.parity(ID) as parity:
        sidecar, index = parity.sidecar, list(parity.index)
    for number in range(len(index)):
        flip(keeper.parity, number * CELL_BYTES)
    kept = keeper.parity.read_bytes()
    digests = pack(
        digest(kept[n * CELL_BYTES :][:length]) for n, length in enumerate(sidecar.lengths)
    )
    made = type(sidecar)(ID, 0, sidecar.member, CELL_BYTES, sidecar.lengths, digests)
    keeper.store.publish_parity(keeper.parity, made, index)


def shake_hands(conn: socket.socket, key: ClusterKey, role: bytes) -> None:
    """The challenge, from the side of `role`."""
    other = b"client" if role == b"server" else b"server"
    ours = bytes(NONCE_BYTES)
    conn.sendall(ours)
    theirs = read_exactly(conn, NONCE_BYTES)
    conn.sendall(key.proof(role, ours, theirs))
    assert read_exactly(conn, 32) == key.proof(other, theirs, ours)


def read_exactly(conn: socket.socket, length: int) -> bytes:
    raw = b""
    while len(raw) < length:
        piece = conn.recv(length - len(raw))
        assert piece, "the peer hung up"
        raw += piece
    return raw


def framed(message: Message) -> bytes:
    frame = encode(message)
    return struct.pack("!I", len(frame)) + frame


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    conn = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return conn


class FakeServer:
    """Answers one request on one connection."""

    def __init__(self, answer: bytes, hang_up: bool = False, drip_s: float = 0.0) -> None:
        """`drip_s`: the pause before each byte of the answer, until the peer has had enough."""
        self._drip_s = drip_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._answer, self._hang_up = answer, hang_up
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as conn:
            shake_hands(conn, KEY, b"server")
            (length,) = struct.unpack("!I", read_exactly(conn, 4))
            read_exactly(conn, length)
            if self._drip_s:
                self._drip(conn)
            else:
                conn.sendall(self._answer)
            if not self._hang_up:
                conn.recv(1)

    def _drip(self, conn: socket.socket) -> None:
        for byte in self._answer:
            time.sleep(self._drip_s)
            try:
                conn.sendall(bytes((byte,)))
            except OSError:
                return

    def close(self) -> None:
        self._thread.join(DEADLINE_S)
