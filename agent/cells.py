"""Cells between agents: a threaded TCP server and a pool of client connections.

A connection begins with a mutual challenge over the cluster key. Then, again and again: a request
frame, a reply frame, and after a `Payload` its bytes, which go from tmpfs to the socket by
`sendfile` and from the socket into the caller's buffer by `recv_into`.
"""

import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from ckptd.agent.store import Store
from ckptd.agent.turns import Pace, Turns
from ckptd.agent.windows import Windows
from ckptd.digest import cell_span, digest, unpack_one
from ckptd.errors import CorruptData, Gone, ProtocolError, Unrecoverable
from ckptd.ids import SnapshotId
from ckptd.keys import NONCE_BYTES, ClusterKey
from ckptd.logs import BadMessages
from ckptd.manifest import NodeManifest
from ckptd.wire import (
    Decoder,
    GetBytes,
    GetCell,
    GetDecoded,
    GetEncoded,
    GetManifest,
    GetParity,
    GetRecoded,
    Message,
    NotHere,
    Payload,
    PeerReply,
    PeerRequest,
    Transfer,
    encode,
)

PEER_TIMEOUT_S = 10.0
_FRAME_LIMIT_BYTES = 16 << 10
_CONNECTIONS_LIMIT = 256
_KEEPALIVE_S = 20
_IDLE_PER_PEER = 8
_IDLE_S = 120.0
_MANIFEST_LIMIT_BYTES = 256 << 20
_ACCEPT_RETRY_S = 0.1
_SILENCE_S = 10.0
_PIECE_BYTES = 1 << 20
_SENT_AT_ONCE = 8
_UNSENT_BYTES = 256 << 10
_STALL_S = 0.2
_LEAST_BYTES_PER_S = 64 << 10
_TIMED_BYTES = 256 << 10
_HASTE_S = 60.0
_AHEAD = 1 << 62
"""More stripes than there are."""
_UNPACED = Pace(None)

EncodedRow = Callable[[GetEncoded], bytes | memoryview]
DecodedCell = Callable[[GetDecoded | GetRecoded], bytes | memoryview]


class CellServer:
    """Serves the store's cells, parity and manifests on `host:port` (port 0: any)."""

    def __init__(
        self,
        host: str,
        port: int,
        node: str,
        store: Store,
        key: ClusterKey,
        rows: EncodedRow,
        decoded: DecodedCell,
        send_bytes_per_s: float | None = None,
    ) -> None:
        self._node, self._store, self._key = node, store, key
        self._rows, self._decoded = rows, decoded
        self._requests: Decoder[PeerRequest] = Decoder(PeerRequest, _FRAME_LIMIT_BYTES)
        self._listener = socket.create_server((host, port), backlog=128)
        self.address = "{}:{}".format(*self._listener.getsockname()[:2])
        self._room = threading.BoundedSemaphore(_CONNECTIONS_LIMIT)
        self._turns, self._pace = Turns(_SENT_AT_ONCE), Pace(send_bytes_per_s)
        self._hastened: tuple[SnapshotId, float] | None = None
        self.bad = BadMessages()
        self._closed = False
        threading.Thread(target=self._accept, name="ckptd-cells", daemon=True).start()

    def hasten(self, id: SnapshotId) -> None:
        """For a while, what is asked of this snapshot goes before all else, at full speed."""
        self._hastened = id, time.monotonic() + _HASTE_S

    def _is_hastened(self, id: SnapshotId) -> bool:
        hastened = self._hastened
        return hastened is not None and hastened[0] == id and time.monotonic() < hastened[1]

    def close(self) -> None:
        """Stop accepting; open connections end when their peers let go."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                conn, peer = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_ACCEPT_RETRY_S)  # out of file descriptors, for one: that passes
                continue
            if not self._room.acquire(blocking=False):
                conn.close()
                continue
            threading.Thread(
                target=self._serve, args=(conn, peer[0]), name="ckptd-cells-peer", daemon=True
            ).start()

    def _serve(self, conn: socket.socket, who: str) -> None:
        try:
            with conn:
                _tune(conn)
                _challenge(conn, self._key, server=True)
                while True:
                    conn.settimeout(_IDLE_S)
                    conn.recv(1, socket.MSG_PEEK)  # between requests a peer may be silent
                    conn.settimeout(PEER_TIMEOUT_S)
                    frame = _receive_frame(conn)
                    if frame is None:
                        return
                    self._answer(conn, self._requests.decode(frame))
        except ProtocolError as error:
            self.bad.drop(f"cells: {who}", error)
        except OSError:
            pass  # the peer is gone or too slow; it will come again
        finally:
            self._room.release()

    def _answer(self, conn: socket.socket, request: PeerRequest) -> None:
        try:
            match request:
                case GetCell():
                    self._send_cell(conn, request)
                case GetParity():
                    self._send_parity(conn, request)
                case GetEncoded():
                    hastened = self._is_hastened(request.id)
                    self._send_bytes(conn, self._rows(request), request.stripe, hastened)
                case GetDecoded() | GetRecoded():
                    self._send_bytes(conn, self._decoded(request))
                case GetBytes():
                    self._send_bytes(conn, bytes(request.size_bytes))
                case GetManifest():
                    self._send_bytes(conn, msgspec.msgpack.encode(self._manifest(request)))
        except (Gone, CorruptData, Unrecoverable) as error:
            _send_frame(conn, NotHere(str(error)))

    def _manifest(self, request: GetManifest) -> NodeManifest:
        if request.node == self._node:
            return self._store.known_manifest(request.id, self._node)
        return self._store.read_node_manifest(request.id, request.node)

    def _send_cell(self, conn: socket.socket, request: GetCell) -> None:
        with self._store.segment(request.id, request.rank) as (path, sidecar):
            if not 0 <= request.cell < sidecar.cells:
                raise Gone(f"rank {request.rank} of {request.id} has {sidecar.cells} cells")
            offset, length = cell_span(request.cell, sidecar.size_bytes, sidecar.cell_bytes)
            with path.open("rb", buffering=0) as file:
                _send_frame(conn, Payload(length, unpack_one(sidecar.digests, request.cell)))
                hastened = self._is_hastened(request.id)
                self._send_file(conn, file.fileno(), offset, length, request.order, hastened)

    def _send_parity(self, conn: socket.socket, request: GetParity) -> None:
        with self._store.parity(request.id) as parity:
            offset, length, want = parity.cell(request.group, request.stripe, request.row)
            with parity.path.open("rb", buffering=0) as file:
                _send_frame(conn, Payload(length, want))
                self._send_file(conn, file.fileno(), offset, length)

    def _send_bytes(
        self,
        conn: socket.socket,
        body: bytes | memoryview,
        order: int = 0,
        hastened: bool = False,
    ) -> None:
        _send_frame(conn, Payload(len(body), digest(body)))
        whole = memoryview(body)

        def send(start: int, end: int) -> int:
            return conn.send(whole[start:end])

        self._send(conn, len(whole), order, send, hastened)

    def _send_file(
        self,
        conn: socket.socket,
        fd: int,
        offset: int,
        length: int,
        order: int = 0,
        hastened: bool = False,
    ) -> None:
        def send(start: int, end: int) -> int:
            return os.sendfile(conn.fileno(), fd, offset + start, end - start)

        self._send(conn, length, order, send, hastened)

    def _send(
        self,
        conn: socket.socket,
        length: int,
        order: int,
        send: Callable[[int, int], int],
        hastened: bool,
    ) -> None:
        """Send `length` bytes piece by piece; `send(start, end)` sends some without waiting."""
        pace = _UNPACED if hastened else self._pace
        order -= _AHEAD if hastened else 0
        conn.setblocking(False)
        writable = select.poll()  # select() takes no descriptor beyond 1023
        writable.register(conn, select.POLLOUT)
        sent = 0
        while sent < length:
            end = min(length, sent + _PIECE_BYTES)
            stalled = False
            with self._turns.one(order):
                while sent < end and not stalled:
                    try:
                        moved = send(sent, sent + pace.most_bytes(end - sent))
                    except BlockingIOError:
                        stalled = not writable.poll(_STALL_S * 1000)
                        continue
                    if not moved:
                        raise ConnectionResetError("the file is shorter than its manifest says")
                    sent += moved
                    pace.spend(moved)
            # A peer that takes nothing must not keep others from their turn.
            if stalled and not writable.poll(PEER_TIMEOUT_S * 1000):
                raise TimeoutError("the peer does not take the bytes")


class _Abandoned(Exception):
    """A connection has answers on the way that nobody will take."""


class Peers:
    """Client connections to other agents' cell servers, reused. Thread-safe."""

    def __init__(self, key: ClusterKey) -> None:
        self._key = key
        self._mutex = threading.Lock()
        self._idle: dict[str, list[socket.socket]] = {}
        self._silent_until: dict[str, float] = {}
        self._replies: Decoder[PeerReply] = Decoder(PeerReply, _FRAME_LIMIT_BYTES)
        self._moved: dict[str, tuple[int, int, float]] = {}
        self.windows = Windows()
        self.name_of: Callable[[str], str] = str
        """The node at an address."""

    def note_transfer(self, address: str, size_bytes: int, seconds: float) -> None:
        """A cell at rest has come from there. Small ones do not count: they are latency."""
        if size_bytes < _TIMED_BYTES:
            return
        with self._mutex:
            cells, total_bytes, total_s = self._moved.get(address, (0, 0, 0.0))
            self._moved[address] = cells + 1, total_bytes + size_bytes, total_s + seconds

    def take_transfers(self) -> tuple[Transfer, ...]:
        """By node, what has come since this was last asked; of nodes whose names are known."""
        with self._mutex:
            moved, self._moved = self._moved, {}
        named = {self.name_of(address): each for address, each in moved.items()}
        return tuple(Transfer(node, *each) for node, each in named.items() if ":" not in node)

    def close(self) -> None:
        with self._mutex:
            for connections in self._idle.values():
                for conn in connections:
                    conn.close()
            self._idle.clear()

    def fetch(
        self,
        address: str,
        request: PeerRequest,
        into: memoryview,
        timeout_s: float = PEER_TIMEOUT_S,
    ) -> tuple[int, int]:
        """Fill `into` with the payload; returns (length in bytes, digest that the peer gave).

        `timeout_s`: how long the peer may be silent.

        Raises Gone, ProtocolError (more than `into` holds), or OSError. The caller verifies.
        """
        with self._connection(address) as conn:
            conn.settimeout(timeout_s)
            began = time.monotonic()
            payload = self._ask(conn, address, request, len(into))
            _receive_into(conn, into[: payload.length_bytes], self.windows.arrived)
            if isinstance(request, GetCell | GetParity):  # others wait for what is computed
                self.note_transfer(address, payload.length_bytes, time.monotonic() - began)
            return payload.length_bytes, payload.digest

    def probe(self, address: str, size_bytes: int) -> float:
        """How long `size_bytes` take from there, in seconds; infinity if they do not come."""
        body = memoryview(bytearray(size_bytes))
        began = time.monotonic()
        try:
            self.fetch(address, GetBytes(size_bytes), body)
        except (Gone, ProtocolError, OSError):
            return float("inf")
        return time.monotonic() - began

    @contextmanager
    def pipeline(self, address: str) -> Iterator["Pipeline"]:
        """A connection for many requests, the next before the last is answered. Raises as `fetch`.

        It is reused afterwards if all has been answered.
        """
        with suppress(_Abandoned), self._connection(address) as conn:
            conn.settimeout(PEER_TIMEOUT_S)
            pipe = Pipeline(self, conn, address)
            yield pipe
            if pipe.unanswered:
                raise _Abandoned

    def fetch_manifest(self, address: str, request: GetManifest) -> NodeManifest:
        """Raises Gone, CorruptData, ProtocolError or OSError."""
        with self._connection(address) as conn:
            payload = self._ask(conn, address, request, _MANIFEST_LIMIT_BYTES)
            body = bytearray(payload.length_bytes)
            _receive_into(conn, memoryview(body))
        if digest(body) != payload.digest:
            raise CorruptData(f"the manifest from {address} was damaged on the way")
        try:
            manifest = msgspec.msgpack.decode(body, type=NodeManifest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"the manifest from {address} is malformed: {error}") from error
        if (manifest.id, manifest.node) != (request.id, request.node):
            raise ProtocolError(f"{address} sent the manifest of {manifest.node}, {manifest.id}")
        return manifest

    def _ask(
        self, conn: socket.socket, address: str, request: PeerRequest, limit_bytes: int
    ) -> Payload:
        _send_frame(conn, request)
        return self.reply(conn, address, limit_bytes)

    def reply(self, conn: socket.socket, address: str, limit_bytes: int) -> Payload:
        """The head of an answer. Raises as `fetch`."""
        frame = _receive_frame(conn)
        if frame is None:
            raise ConnectionResetError("the peer has hung up")
        reply = self._replies.decode(frame)
        if isinstance(reply, NotHere):
            raise Gone(reply.reason)
        if not 0 <= reply.length_bytes <= limit_bytes:
            raise ProtocolError(
                f"{address} wants to send {reply.length_bytes} bytes where at most "
                f"{limit_bytes} fit"
            )
        return reply

    @contextmanager
    def _connection(self, address: str) -> Iterator[socket.socket]:
        """A connection that nobody else uses; one that was silent is left alone for a while.

        Else every cell that is looked for at a node that hangs would wait for it anew.
        """
        if time.monotonic() < self._silent_until.get(address, 0.0):
            raise ConnectionError(f"{address} did not answer a moment ago")
        try:
            with self._open(address) as conn, self.windows.one(conn):
                yield conn
        except TimeoutError:
            self._silent_until[address] = time.monotonic() + _SILENCE_S
            raise
        self._silent_until.pop(address, None)

    @contextmanager
    def _open(self, address: str) -> Iterator[socket.socket]:
        conn = self._take_idle(address)
        if conn is None:
            conn = socket.create_connection(_host_port(address), timeout=PEER_TIMEOUT_S)
            try:
                _tune(conn)
                _challenge(conn, self._key, server=False)
            except BaseException:
                conn.close()
                raise
        try:
            yield conn
        except Gone:
            self._give_back(address, conn)
            raise
        except BaseException:
            conn.close()
            raise
        self._give_back(address, conn)

    def _take_idle(self, address: str) -> socket.socket | None:
        with self._mutex:
            while self._idle.get(address):
                conn = self._idle[address].pop()
                # A peer that has hung up meanwhile shows as readable.
                conn.setblocking(False)
                try:
                    if conn.recv(1, socket.MSG_PEEK) == b"":
                        raise OSError("hung up")
                    raise OSError("bytes that nobody asked for")
                except BlockingIOError:
                    conn.settimeout(PEER_TIMEOUT_S)
                    return conn
                except OSError:
                    conn.close()
        return None

    def _give_back(self, address: str, conn: socket.socket) -> None:
        with self._mutex:
            idle = self._idle.setdefault(address, [])
            if len(idle) < _IDLE_PER_PEER:
                idle.append(conn)
                return
        conn.close()


class Pipeline:
    """Requests and their answers, in the same order, on one connection."""

    def __init__(self, peers: Peers, conn: socket.socket, address: str) -> None:
        self._peers, self._conn, self._address = peers, conn, address
        self.unanswered = 0
        self._free_at = time.monotonic()
        """Since when the connection had nothing else to do than the oldest request."""
        self._timed: deque[bool] = deque()
        """For each request without an answer, whether its answer lies ready over there."""

    def ask(self, request: PeerRequest) -> None:
        """Send a request. Raises OSError."""
        if not self.unanswered:
            self._free_at = time.monotonic()
        self.unanswered += 1
        self._timed.append(isinstance(request, GetCell | GetParity))
        _send_frame(self._conn, request)

    def answer(self, into: memoryview) -> tuple[int, int]:
        """What `Peers.fetch` returns and raises, for the oldest request without an answer."""
        try:
            payload = self._peers.reply(self._conn, self._address, len(into))
        except Gone:
            self.unanswered -= 1
            self._timed.popleft()
            raise
        _receive_into(self._conn, into[: payload.length_bytes], self._peers.windows.arrived)
        now = time.monotonic()
        if self._timed.popleft():
            self._peers.note_transfer(self._address, payload.length_bytes, now - self._free_at)
        self._free_at = now
        self.unanswered -= 1
        return payload.length_bytes, payload.digest


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    try:
        return host, int(port)
    except ValueError:
        raise ProtocolError(f"{address!r} is not a cell server's address (host:port)") from None


def _tune(conn: socket.socket) -> None:
    conn.settimeout(PEER_TIMEOUT_S)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # What is in the kernel has had its turn.
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    # A peer whose machine has died says nothing: its connection must not be kept for ever.
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _challenge(conn: socket.socket, key: ClusterKey, *, server: bool) -> None:
    """Both ends prove that they hold the cluster key. Raises ProtocolError."""
    ours = secrets.token_bytes(NONCE_BYTES)
    conn.sendall(ours)
    theirs = _receive_exactly(conn, NONCE_BYTES)
    mine, other = (b"server", b"client") if server else (b"client", b"server")
    conn.sendall(key.proof(mine, ours, theirs))
    if not hmac.compare_digest(_receive_exactly(conn, 32), key.proof(other, theirs, ours)):
        raise ProtocolError("the peer does not have this cluster's key; see --key-file")


def _send_frame(conn: socket.socket, message: Message) -> None:
    frame = encode(message)
    conn.sendall(struct.pack("!I", len(frame)) + frame)


def _receive_frame(conn: socket.socket) -> bytes | None:
    """One frame, or None when the peer has hung up between frames."""
    first = conn.recv(4)
    if not first:
        return None
    head = first + (_receive_exactly(conn, 4 - len(first)) if len(first) < 4 else b"")
    (length,) = struct.unpack("!I", head)
    if length > _FRAME_LIMIT_BYTES:
        raise ProtocolError(f"a frame of {length} bytes is over the limit")
    return _receive_exactly(conn, length)


def _receive_exactly(conn: socket.socket, length: int) -> bytes:
    body = bytearray(length)
    _receive_into(conn, memoryview(body))
    return bytes(body)


def _receive_into(
    conn: socket.socket, into: memoryview, arrived: Callable[[int], None] = lambda size_bytes: None
) -> None:
    """Fill `into`. Raises OSError, also where the bytes only drip."""
    deadline = time.monotonic() + PEER_TIMEOUT_S + len(into) / _LEAST_BYTES_PER_S
    while len(into):
        received = conn.recv_into(into)
        if not received:
            raise ConnectionResetError("the peer hung up in the middle of a message")
        arrived(received)
        into = into[received:]
        if len(into) and time.monotonic() > deadline:
            raise TimeoutError(f"the peer sends less than {_LEAST_BYTES_PER_S} bytes a second")
