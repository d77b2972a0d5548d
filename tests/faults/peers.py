"""Peers that lie, and wires that flip bits, between real nodes."""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from ckptd.agent.cells import Peers
from ckptd.errors import Gone
from ckptd.keys import NONCE_BYTES
from ckptd.wire import Decoder, NotHere, Payload, PeerReply, PeerRequest

from ..nodes import KEY, Node, connect, framed, read_exactly, shake_hands

_LARGEST_BYTES = 1 << 20
_PROOF_BYTES = 32
_requests: Decoder[PeerRequest] = Decoder(PeerRequest)
_replies: Decoder[PeerReply] = Decoder(PeerReply)

Lie = Callable[[PeerRequest, bytes], bytes | None]
"""What to put on the wire in place of the true bytes; None: the truth."""


class HangUp(Exception):
    """A lie that ends the connection, after some bytes."""

    def __init__(self, said: bytes = b"") -> None:
        self.said = said


class Silence(HangUp):
    """A lie that consists of saying nothing (more), with the connection left open."""


class HastyPeers(Peers):
    """Waits only half a second for a peer that has fallen silent."""

    def fetch(self, address, request, into, timeout_s=0.5):  # type: ignore[no-untyped-def]
        return super().fetch(address, request, into, min(timeout_s, 0.5))


class _Listener:
    """Accepts connections, each served by a thread; `close` ends them all."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._conns: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                conn, _ = self._listener.accept()
                self._conns.append(conn)
                threading.Thread(target=self._quietly, args=(conn,), daemon=True).start()

    def _quietly(self, conn: socket.socket) -> None:
        with suppress(OSError, AssertionError):
            self._serve(conn)

    def _serve(self, conn: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for conn in self._conns:
            with suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)
            conn.close()


class LyingPeer(_Listener):
    """A node that holds the cluster's key and answers as `honest` would, but for its lies."""

    def __init__(self, honest: Node, lie: Lie) -> None:
        self._honest, self._lie = honest, lie
        self._peers = Peers(KEY)
        self.asked: list[PeerRequest] = []
        super().__init__()

    def _serve(self, conn: socket.socket) -> None:
        shake_hands(conn, KEY, b"server")
        while True:
            (length,) = struct.unpack("!I", read_exactly(conn, 4))
            request = _requests.decode(read_exactly(conn, length))
            self.asked.append(request)
            into = memoryview(bytearray(_LARGEST_BYTES))
            try:
                length, value = self._peers.fetch(self._honest.address, request, into)
            except Gone as error:
                conn.sendall(framed(NotHere(str(error))))
                continue
            body = bytes(into[:length])
            try:
                said = self._lie(request, body)
            except Silence as last:
                conn.sendall(last.said)
                conn.recv(1)
                return
            except HangUp as last:
                conn.sendall(last.said)
                conn.close()
                return
            conn.sendall(framed(Payload(length, value)) + body if said is None else said)

    def close(self) -> None:
        super().close()
        self._peers.close()


class Wire(_Listener):
    """A proxy in front of a cell server that may change the bytes of an answer on their way.

    It follows the protocol without having the key, so that it can choose what to hit: `bend` gets
    the request and the bytes of its answer (no frames), and changes them in place.
    """

    def __init__(
        self, upstream: str, bend: Callable[[PeerRequest, bytearray], None] = lambda r, b: None
    ) -> None:
        self.upstream, self.bend = upstream, bend
        self.recorded: list[tuple[bytes, bytes]] = []
        """What client and server sent to prove that they have the key, by connection."""
        super().__init__()

    def _serve(self, conn: socket.socket) -> None:
        with connect(self.upstream) as server:
            self._conns.append(server)
            client_said = server_said = b""
            for length in (NONCE_BYTES, _PROOF_BYTES):
                piece = read_exactly(conn, length)
                server.sendall(piece)
                client_said += piece
                piece = read_exactly(server, length)
                conn.sendall(piece)
                server_said += piece
            self.recorded.append((client_said, server_said))
            while True:
                head = conn.recv(4, socket.MSG_WAITALL)
                if not head:
                    return
                raw = read_exactly(conn, *struct.unpack("!I", head))
                server.sendall(head + raw)
                request = _requests.decode(raw)
                head = read_exactly(server, 4)
                raw = read_exactly(server, *struct.unpack("!I", head))
                reply = _replies.decode(raw)
                conn.sendall(head + raw)
                if isinstance(reply, Payload):
                    body = bytearray(read_exactly(server, reply.length_bytes))
                    self.bend(request, body)
                    conn.sendall(body)


class BadWire(Wire):
    """Flips one bit in the answers to the requests of these kinds, `times` times in all."""

    def __init__(self, upstream: str, kinds: tuple[type[PeerRequest], ...], times: int) -> None:
        self.left = times
        self.hit: list[PeerRequest] = []
        self._kinds, self._mutex = kinds, threading.Lock()
        super().__init__(upstream, self._flip)

    def _flip(self, request: PeerRequest, body: bytearray) -> None:
        with self._mutex:
            if not isinstance(request, self._kinds) or not self.left:
                return
            self.left -= 1
            self.hit.append(request)
        body[len(body) // 2] ^= 0x08


class Replay(_Listener):
    """Says what somebody else once said, and keeps what it hears."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        self.heard: list[bytes] = []
        super().__init__()

    def _serve(self, conn: socket.socket) -> None:
        conn.sendall(self._said)
        heard = b""
        with suppress(OSError):
            while piece := conn.recv(4096):
                heard += piece
        self.heard.append(heard)
