"""The trainer's end of the Unix socket: one connection, one small thread.

The training thread never waits for the agent: what it sends is put into the socket's buffer or,
when that is full, left to the thread. Only `attach`, `ask_resume`, `restore`, `open_layout` and
`detach` wait, and those are called before or after training (or once per layout).
"""

import logging
import os
import queue
import select
import socket
import struct
import threading
from time import monotonic
from typing import TypeVar

import msgspec

from ckptd import errors
from ckptd.errors import AgentUnreachable, CkptdError, ProtocolError, ResumeImpossible
from ckptd.ids import SnapshotId
from ckptd.wire import (
    TRAINER_FRAME_LIMIT_BYTES,
    AgentToTrainer,
    AskResume,
    Attach,
    Attached,
    CaptureFailed,
    Decoder,
    Detach,
    Detached,
    Granted,
    LayoutOpened,
    Message,
    OpenLayout,
    Outcome,
    Progress,
    Rejected,
    Restore,
    Restored,
    Revoked,
    SaveAll,
    Sealed,
    Ticket,
    Waiting,
    encode,
)

_RECONNECT_S = 0.5
_FIRST_WORD_S = 2.0
_REPEAT_S = 10.0
_OUTBOX_LIMIT = 64
_PEERCRED = struct.Struct("3i")

_Answer = TypeVar("_Answer", bound=Message)

log = logging.getLogger("ckptd")


class AgentClient:
    """Talks to the agent on this node for one rank."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._sock: socket.socket | None = None
        self._attach: Attach | None = None
        self._layout: OpenLayout | None = None
        self._answers: queue.Queue[AgentToTrainer] = queue.Queue()
        self._tickets: dict[int, Ticket] = {}
        self._outbox: list[bytes] = []
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._decoder: Decoder[AgentToTrainer] = Decoder(AgentToTrainer, TRAINER_FRAME_LIMIT_BYTES)
        self.cell_bytes = 0
        self.save_all = ""
        """Why this rank shall not divide what it shares with others, once it shall not."""
        self._awaited = False
        self._asked: Message | None = None
        """The request that an answer is awaited for; asked again if the agent was restarted."""

    @property
    def connected(self) -> bool:
        """Whether the agent is there now."""
        return self._sock is not None

    # Calls that wait.

    def attach(self, request: Attach, deadline: float) -> None:
        """Connect and introduce this rank. Raises AgentUnreachable after `deadline` (monotonic)."""
        left_s = deadline - monotonic()
        say = _Waiting(f"up to {left_s:.0f} s for the agent at {self._path}")
        while True:
            try:
                self._connect()
                break
            except OSError as error:
                reason = _why_not(self._path, error)
                if isinstance(error, PermissionError) or monotonic() >= deadline:
                    raise AgentUnreachable(reason) from error
                say(reason)
                self._closing.wait(min(_RECONNECT_S, max(0.0, deadline - monotonic())))
        self._attach = request
        self._awaited = True
        self._send(request)
        threading.Thread(target=self._listen, name="ckptd-client", daemon=True).start()
        what = f"the agent at {self._path} to answer"
        self.cell_bytes = self._wait_for(Attached, deadline, what).cell_bytes

    def ask_resume(self, rejected: tuple[SnapshotId, ...], deadline: float) -> Granted:
        """Rank 0: a new life. Raises ResumeImpossible when none can be had before `deadline`."""
        what = "the coordinator to grant a life"
        granted = self._ask(AskResume(rejected), Granted, deadline, what)
        while granted.id is not None and granted.id in rejected:
            # The answer to the question before, which was asked twice.
            granted = self._wait_for(Granted, deadline, what)
        return granted

    def restore(self, life: int, id: SnapshotId, rank: int, deadline: float) -> str:
        """The path of the verified segment of `rank` of `id` on this node."""
        what = f"rank {rank}'s segment of {id}"
        answer = self._ask(Restore(life, id, rank), Restored, deadline, what)
        while (answer.id, answer.rank) != (id, rank):  # of a question that was asked twice
            answer = self._wait_for(Restored, deadline, what)
        return answer.path

    def open_layout(self, request: OpenLayout, deadline: float) -> tuple[str, ...]:
        """Have slots for this layout; returns the paths of those that are free.

        Raises MemoryTooSmall, which says how much is needed.
        """
        self._layout = request
        what = "the agent to reserve memory"
        return self._ask(request, LayoutOpened, deadline, what, again=False).paths

    def detach(self, finished: bool, timeout_s: float) -> None:
        """Say goodbye, and close."""
        if self.connected:
            self._send(Detach(finished))
            try:
                self._wait_for(Detached, monotonic() + timeout_s, "the agent to let go")
            except CkptdError as error:
                log.warning("ckptd: %s", error)
        self._closing.set()
        self._disconnect()

    # Calls of the training thread.

    def tell(self, message: Message) -> None:
        """Send without waiting for an answer."""
        self._send(message)

    def set_life(self, life: int) -> None:
        """Reconnect under this life from now on."""
        if self._attach is not None:
            self._attach = msgspec.structs.replace(self._attach, life=life)

    def progress(self, step: int) -> Ticket | None:
        """Report `step`, and take its ticket if there is one.

        A ticket for a step that has gone by is reported as skipped.
        """
        with self._mutex:
            late = [self._tickets.pop(s) for s in sorted(self._tickets) if s < step]
            ticket = self._tickets.pop(step, None)
        for missed in late:
            self.failed(missed.id, "skipped", f"it was at step {step} already")
        self._send(Progress(step), important=False)
        return ticket

    def sealed(self, id: SnapshotId) -> None:
        """The segment for `id` is complete."""
        self._send(Sealed(id))

    def failed(self, id: SnapshotId, outcome: Outcome, reason: str) -> None:
        """The ticket for `id` cannot be honoured."""
        self._send(CaptureFailed(id, outcome, reason[:500]))

    # The connection.

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self._path)
            _, uid, _ = _PEERCRED.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            )
            if uid not in (0, os.getuid()):
                raise PermissionError(f"it belongs to user {uid}")
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        self._sock = sock

    def _disconnect(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
        with self._mutex:
            self._tickets.clear()
            self._outbox.clear()

    def _send(self, message: Message, important: bool = True) -> None:
        sock = self._sock
        if sock is None or os.getpid() != self._pid:
            return
        frame = encode(message)
        with self._mutex:
            if self._outbox and important:
                self._outbox = [*self._outbox, frame][-_OUTBOX_LIMIT:]
                return
        try:
            sock.send(frame)
        except BlockingIOError:
            if important:
                with self._mutex:
                    self._outbox = [*self._outbox, frame][-_OUTBOX_LIMIT:]
        except OSError:
            pass  # the thread notices, and reconnects

    def _flush_outbox(self, sock: socket.socket) -> None:
        with self._mutex:
            while self._outbox:
                try:
                    sock.send(self._outbox[0])
                except OSError:
                    return
                self._outbox.pop(0)

    def _listen(self) -> None:
        """The client thread: take in what the agent says; come back when it was away."""
        warned = False
        while not self._closing.is_set():
            sock = self._sock
            if sock is None:
                if not self._reconnect():
                    if not warned:
                        log.warning(
                            "ckptd: the agent at %s is gone; training goes on, without new "
                            "snapshots until it is back",
                            self._path,
                        )
                        warned = True
                    self._closing.wait(_RECONNECT_S)
                elif warned:
                    log.warning("ckptd: the agent at %s is back", self._path)
                    warned = False
                continue
            frame = self._receive(sock)
            if frame == b"":
                self._disconnect()
                self._closing.wait(_RECONNECT_S)
            elif frame is not None:
                try:
                    self._take_in(self._decoder.decode(frame))
                except ProtocolError as error:
                    log.warning("ckptd: a message of the agent was dropped: %s", error)

    def _receive(self, sock: socket.socket) -> bytes | None:
        """The next frame, None if there is none for a while, b"" when the agent has hung up."""
        poll = select.poll()  # select() takes no descriptor beyond 1023
        poll.register(sock, select.POLLIN)
        ready = poll.poll(200)
        self._flush_outbox(sock)
        try:
            return sock.recv(TRAINER_FRAME_LIMIT_BYTES) if ready else None
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _reconnect(self) -> bool:
        try:
            self._connect()
        except OSError:
            return False
        if self._attach is not None:
            self._send(self._attach)
        if self._layout is not None:
            self._send(self._layout)
        asked = self._asked
        if asked is not None:
            self._send(asked)
        return True

    def _take_in(self, message: AgentToTrainer) -> None:
        match message:
            case Ticket():
                with self._mutex:
                    self._tickets[message.id.step] = message
            case Revoked():
                with self._mutex:
                    held = self._tickets.pop(message.id.step, None)
                if held is not None and held.id == message.id:
                    self.failed(message.id, "dropped", "the ticket was revoked")
            case SaveAll():
                self.save_all = message.reason
            case Rejected() if not self._awaited:
                log.warning("ckptd: the agent says: %s", message.reason)
            case _:
                self._answers.put(message)

    def _ask(
        self,
        request: Message,
        kind: type[_Answer],
        deadline: float,
        what: str,
        again: bool = True,
    ) -> _Answer:
        """Ask, and ask again if the agent was restarted before it answered."""
        self._asked = request if again else None
        self._awaited = True
        try:
            self._send(request)
            return self._wait_for(kind, deadline, what)
        finally:
            self._asked = None

    def _wait_for(self, kind: type[_Answer], deadline: float, what: str) -> _Answer:
        """The next answer of `kind`; says from time to time what it waits for."""
        self._awaited = True
        try:
            return self._next_answer(kind, deadline, what)
        finally:
            self._awaited = False

    def _next_answer(self, kind: type[_Answer], deadline: float, what: str) -> _Answer:
        say = _Waiting(f"for {what}")
        reason = ""
        while True:
            left = deadline - monotonic()
            if left <= 0:
                detail = f": still waiting for {reason}" if reason else ""
                if kind in (Granted, Restored):
                    raise ResumeImpossible(
                        f"gave up waiting for {what}{detail}; training must not start from "
                        "nothing while a snapshot may exist"
                    )
                raise AgentUnreachable(f"gave up waiting for {what}{detail}")
            try:
                answer = self._answers.get(timeout=min(left, 0.5))
            except queue.Empty:
                say(reason or ("" if self.connected else "the agent is gone"))
                continue
            if isinstance(answer, kind):
                return answer
            if isinstance(answer, Rejected):
                raise _error(answer)
            if isinstance(answer, Waiting):
                reason = answer.reason
                say(reason)


class _Waiting:
    """Says on the log what is waited for: after two seconds, and again when it changes."""

    def __init__(self, what: str) -> None:
        self._what, self._said = what, ""
        self._next = monotonic() + _FIRST_WORD_S

    def __call__(self, reason: str) -> None:
        now = monotonic()
        if now >= self._next or (self._said and _stem(reason) != self._said):
            self._said, self._next = _stem(reason), now + _REPEAT_S
            log.warning("ckptd: waiting %s%s", self._what, f": {reason}" if reason else "")


def _stem(reason: str) -> str:
    return "".join(c for c in reason if not c.isdigit())


def _error(answer: Rejected) -> CkptdError:
    kind = getattr(errors, answer.kind, None)
    if isinstance(kind, type) and issubclass(kind, CkptdError):
        return kind(answer.reason)
    return CkptdError(answer.reason)


def _why_not(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return (
            f"no agent listens at {path}; start one with `ckptd agent --socket {path} ...`, or set "
            "CKPTD_AGENT to the socket of this node's agent"
        )
    if isinstance(error, PermissionError):
        return (
            f"the agent socket {path} is not this user's ({error}); run the agent as the user who "
            "trains, and set CKPTD_AGENT to its socket"
        )
    return f"the agent at {path} cannot be reached: {error}; is it running?"
