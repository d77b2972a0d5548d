"""The agent's process: sockets, files and threads around the lifecycle decider."""

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import socket
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from ckptd.agent import events as ev
from ckptd.agent.again import RecodeRun
from ckptd.agent.buffers import give_large_buffers_back
from ckptd.agent.cells import CellServer, Peers
from ckptd.agent.config import AgentConfig
from ckptd.agent.decode import CellDecoder, DecodeService, source_when_protected
from ckptd.agent.fetch import SegmentFetch
from ckptd.agent.lifecycle import Lifecycle
from ckptd.agent.protect import EncodeRun
from ckptd.agent.reader import CellReader
from ckptd.agent.reports import Reports
from ckptd.agent.scrub import Scrubber, ScrubStats
from ckptd.agent.state import Identity, Use
from ckptd.agent.store import Store
from ckptd.config import ENV_ERASURE_ENGINE, erasure_engine
from ckptd.control import client_socket
from ckptd.erasure import CodecError, ZfecCodec, engine_in_use
from ckptd.errors import CkptdError, ConfigError, Gone, ProtocolError
from ckptd.ids import SnapshotId
from ckptd.keys import ClusterKey, check_bind
from ckptd.logs import BadMessages
from ckptd.manifest import JobManifest
from ckptd.wire import (
    TRAINER_FRAME_LIMIT_BYTES,
    Decoder,
    GetEncoded,
    Hasten,
    LauncherMessage,
    Order,
    Rejected,
    TrainerMessage,
    encode,
)

_LOCAL_BACKLOG_MESSAGES = 256
_EXIT_GRACE_S = 0.5
_PROGRESS_EVERY_S = 0.5
_PEERCRED = struct.Struct("3i")

log = structlog.get_logger()


class LocalConnection:
    """One trainer or launcher on the Unix socket."""

    def __init__(self, number: int, sock: socket.socket, pid: int) -> None:
        self.number, self.sock, self.pid = number, sock, pid
        self.backlog: list[bytes] = []
        self.pidfd: int | None = None
        with contextlib.suppress(OSError):
            self.pidfd = os.pidfd_open(pid) if pid else None


class Agent:
    """One node's daemon. `run()` returns when it is told to stop."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._key = ClusterKey.read(config.key_file)
        check_bind(config.listen, self._key, "--listen")
        self._store = Store(config.memory_dir)
        self._peers = Peers(self._key)
        self._reader = CellReader(config.node, self._store, self._peers)
        self._runs: dict[SnapshotId, EncodeRun] = {}
        self._peer_cells: dict[str, str] = {}
        self._peers.name_of = self._reader.damage.name
        self._decode_service = DecodeService(self._reader, self._manifest_of)
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="ckptd-work")
        self._local: dict[int, LocalConnection] = {}
        self._next_conn = 1
        self._locals: Decoder[TrainerMessage | LauncherMessage] = Decoder(
            TrainerMessage | LauncherMessage, TRAINER_FRAME_LIMIT_BYTES
        )
        self._orders: Decoder[Order] = Decoder(Order)
        self._bad = BadMessages()
        self._reports = Reports(
            config.node,
            config.socket,
            lambda message: self._carry_out(ev.Report(message)),
            lambda text: self._handle(ev.Trouble(text)),
            self._pidfds,
            self._peers,
        )
        self._stopping = asyncio.Event()
        self._wake = asyncio.Event()
        self.ready = asyncio.Event()
        """Set once trainers can come."""

    @property
    def holds_snapshot(self) -> bool:
        """Whether a slot is captured into, or holds what a job may need."""
        return any(slot.id is not None for slot in self._lifecycle.slots.values())

    @property
    def local_connections(self) -> tuple[int, int]:
        """Trainers and launchers on the Unix socket: how many are there, and ever were."""
        return len(self._local), self._next_conn - 1

    def stop(self) -> None:
        """Let `run()` shut down and return."""
        self._stopping.set()

    async def run(self, signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        """Start up, serve until told to stop, also by one of the signals, shut down."""
        self._loop = asyncio.get_running_loop()
        engine, engine_reason = await self._loop.run_in_executor(self._pool, _erasure_engine)
        adopted = await self._loop.run_in_executor(self._pool, self._store.adopt)
        for problem in adopted.problems:
            log.warning("memory directory", problem=problem)
        self._server = CellServer(
            self._config.listen,
            self._config.port,
            self._config.node,
            self._store,
            # With a key that nobody else has, it serves nobody.
            ClusterKey(secrets.token_bytes(32)) if self._config.alone else self._key,
            self._encoded_row,
            self._decode_service,
            self._config.send_bytes_per_s,
        )
        identity = Identity(
            node=self._config.node,
            incarnation=secrets.token_hex(8),
            memory_token=self._store.token,
            address=self._config.listen,
            cells=self._server.address,
            domain=self._config.domain,
            spare=self._config.spare,
            codec=ZfecCodec.name,
            engine=engine,
            engine_reason=engine_reason,
            memory_dir=str(self._config.memory_dir),
            memory_limit_bytes=self._config.memory_limit_bytes,
            coordinator=self._config.coordinator,
            spare_memory_bytes=self._config.spare_memory_bytes,
        )
        self._lifecycle = Lifecycle(identity, adopted, monotonic())
        self._reader.damage.told = self._damaged
        self._context = zmq.asyncio.Context()
        self._control = client_socket(self._context, identity.incarnation.encode(), self._key)
        monitor = self._control.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        try:
            self._control.connect(self._config.coordinator)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"--coordinator {self._config.coordinator} is not an address: {error}; give one "
                "like tcp://127.0.0.1:7070"
            ) from error
        self._listener = _listen(self._config.socket)
        self._loop.add_reader(self._listener, self._accept)
        for number in signals:
            self._loop.add_signal_handler(number, self._stopping.set)
        tasks = [
            asyncio.create_task(work())
            for work in (
                self._receive_orders,
                lambda: self._watch_connection(monitor),
                self._reports.run,
                self._keep_time,
            )
        ]
        log.info(
            "agent ready",
            node=identity.node,
            socket=str(self._config.socket),
            cells=identity.cells,
            engine=engine,
            engine_reason=engine_reason,
            adopted_segments=len(adopted.segments),
        )
        self._scrubber = Scrubber(
            self._reader, self._config.scrub_bytes_per_s, self._decoder_of, self._scrubbed
        )
        if self._config.scrub_bytes_per_s:
            self._scrubber.start()
        self.ready.set()
        stopped = asyncio.create_task(self._stopping.wait())
        waiting: set[asyncio.Task[Any]] = {*tasks, stopped}
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await self._shut_down()
        for task in done - {stopped}:
            task.result()  # a bug in a task ends the agent with its traceback
        if self._lifecycle.dismissed:
            raise ConfigError(f"the coordinator refused this agent: {self._lifecycle.dismissed}")

    async def _shut_down(self) -> None:
        self._scrubber.stop()
        for run in self._runs.values():
            run.stop()
        self._listener.close()
        with contextlib.suppress(OSError):
            self._config.socket.unlink()
        self._server.close()
        self._peers.close()
        self._control.disable_monitor()
        self._control.close()
        self._context.destroy(linger=0)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._config.wipe_on_exit:
            self._store.destroy()
        elif self._config.alone:
            for slot in self._lifecycle.slots.values():
                if slot.id is None or slot.use is Use.RELEASING:
                    self._store.delete(slot.name)
            self._store.vacate()
        # The directory stays locked until the process ends: threads may still be writing.
        log.info("agent stopped", node=self._config.node)

    # Events in.

    def _handle(self, event: ev.Event) -> None:
        not_kept: set[SnapshotId] = set()
        for action in self._lifecycle.handle(event, monotonic()):
            if isinstance(action, ev.Encode) and action.manifest.id in not_kept:
                continue
            try:
                self._carry_out(action)
            except OSError as error:
                # A full tmpfs. What builds on this action must not happen either.
                log.error("cannot store", action=type(action).__name__, error=str(error))
                reason = f"cannot store in {self._config.memory_dir}: {error}"
                self._loop.call_soon(self._handle, ev.Trouble(reason))
                if isinstance(action, ev.KeepTerm):
                    self._handle(ev.TermNotKept(str(error)))
                if isinstance(action, ev.KeepManifest):
                    not_kept.add(action.manifest.id)
                    self._handle(ev.ManifestNotKept(action.manifest.id, reason))
                elif not isinstance(action, ev.KeepRecord):
                    break
        if self._lifecycle.dismissed:
            self._stopping.set()
        self._wake.set()

    async def _keep_time(self) -> None:
        while True:
            self._handle(ev.BadMessages(self._bad.count + self._server.bad.count))
            for action in self._lifecycle.tick(monotonic()):
                self._carry_out(action)
            with contextlib.suppress(OSError):  # it was said when it could not be written first
                if self._store.log.catch_up():
                    self._handle(ev.EntriesKept())
            self._wake.clear()
            delay = self._lifecycle.next_deadline() - monotonic()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, min(delay, 1.0)))

    async def _receive_orders(self) -> None:
        while True:
            frame = await self._control.recv()
            try:
                order = self._orders.decode(frame)
            except ProtocolError as error:
                self._bad.drop("coordinator", error)
                continue
            self._handle(ev.FromCoordinator(order.message, order.term, order.coordinator))

    async def _watch_connection(self, monitor: Any) -> None:
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                log.info("connected", coordinator=self._config.coordinator)
                self._handle(ev.Connected())
            else:
                log.warning("disconnected", coordinator=self._config.coordinator)
                self._handle(ev.Disconnected())

    def _pidfds(self, job: str, life: int) -> list[int]:
        """The attached trainers of a life of a job."""
        trainers = self._lifecycle.trainers.values()
        numbers = [each.conn for each in trainers if (each.job, each.life) == (job, life)]
        conns = [self._local[number] for number in numbers if number in self._local]
        return [conn.pidfd for conn in conns if conn.pidfd is not None]

    # The Unix socket.

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        pid, uid, _ = _PEERCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        )
        if uid not in (0, os.getuid()):
            log.warning("connection refused", uid=uid, pid=pid)
            sock.close()
            return
        sock.setblocking(False)
        conn = LocalConnection(self._next_conn, sock, pid)
        self._next_conn += 1
        self._local[conn.number] = conn
        self._loop.add_reader(sock, self._readable, conn)
        if conn.pidfd is not None:
            self._loop.add_reader(conn.pidfd, self._process_ended, conn)

    def _readable(self, conn: LocalConnection) -> None:
        for _ in range(64):
            try:
                frame = conn.sock.recv(TRAINER_FRAME_LIMIT_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:
                frame = b""
            if not frame:
                # At exit the socket closes a moment before the process ends.
                self._loop.remove_reader(conn.sock)
                grace_s = _EXIT_GRACE_S if conn.pidfd is not None else 0.0
                self._loop.call_later(grace_s, self._gone, conn, "it closed the connection")
                return
            try:
                message = self._locals.decode(frame)
            except ProtocolError as error:
                self._bad.drop(f"local process {conn.pid}", error)
                self._send_local(conn.number, _rejected(error))
                continue
            self._handle(ev.FromLocal(conn.number, message))

    def _gone(self, conn: LocalConnection, reason: str, dead: bool = False) -> None:
        """The connection has ended; without a pidfd that is all that can be known."""
        if self._local.pop(conn.number, None) is None:
            return
        self._loop.remove_reader(conn.sock)
        self._loop.remove_writer(conn.sock)
        conn.sock.close()
        self._handle(ev.LocalGone(conn.number, reason, dead or conn.pidfd is None))

    def _process_ended(self, conn: LocalConnection) -> None:
        if conn.pidfd is not None:
            self._loop.remove_reader(conn.pidfd)
            os.close(conn.pidfd)
        if conn.number in self._local:
            self._gone(conn, "its process ended", dead=True)
        else:
            self._handle(ev.ProcessEnded(conn.number))

    def _send_local(self, number: int, frame: bytes) -> None:
        conn = self._local.get(number)
        if conn is None:
            return
        if len(conn.backlog) >= _LOCAL_BACKLOG_MESSAGES:
            # It does not read: a stopped process. It will be told again when it reconnects.
            self._loop.call_soon(self._gone, conn, "it stopped reading")
            return
        conn.backlog.append(frame)
        self._drain(conn)

    def _drain(self, conn: LocalConnection) -> None:
        while conn.backlog:
            try:
                conn.sock.send(conn.backlog[0])
            except BlockingIOError:
                self._loop.add_writer(conn.sock, self._drain, conn)
                return
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    return  # its end is noticed by the reader
                log.error("message too large", bytes=len(conn.backlog[0]))
            conn.backlog.pop(0)
        self._loop.remove_writer(conn.sock)

    # Actions out.

    def _carry_out(self, action: ev.Action) -> None:
        match action:
            case ev.Report():
                # Without a coordinator it is lost; Hello will say it again.
                if self._lifecycle.connected:
                    sent = self._control.send(encode(action.message), zmq.DONTWAIT)
                    sent.add_done_callback(lambda done: done.cancelled() or done.exception())
            case ev.Diagnose():
                if isinstance(action.order, Hasten):
                    self._server.hasten(action.order.id)
                else:
                    self._reports.order(action.order)
            case ev.Tell():
                self._send_local(action.conn, encode(action.message))
            case ev.KeepTerm():
                self._store.keep_term(action.kept)
            case ev.KeepEntries():
                self._store.log.append(action.entries)
                self._handle(ev.EntriesKept())
            case ev.KeepRecord():
                self._store.keep_record(action.record)
            case ev.KeepManifest():
                self._store.keep_manifest(action.manifest)
            case ev.ForgetManifests():
                self._store.forget_manifests(action.id)
            case ev.ForgetJob():
                self._store.forget_job(action.job)
            case ev.Delete():
                self._store.delete(action.name)
            case ev.Allocate():
                self._in_background(
                    lambda: self._store.allocate(action.name, action.size_bytes),
                    lambda _: ev.Allocated(action.name),
                    lambda error: ev.AllocationFailed(action.name, str(error)),
                )
            case ev.CheckSegment():
                self._in_background(
                    lambda: self._store.check_segment(action.name, action.id, action.rank),
                    lambda sidecar: ev.SegmentChecked(action.name, sidecar),
                    lambda error: ev.SegmentChecked(action.name, None, str(error)),
                )
            case ev.Release():
                self._in_background(
                    lambda: self._store.release(action.name),
                    lambda _: ev.Released(action.name),
                    lambda error: ev.Released(action.name),
                )
            case ev.Encode():
                self._encode(action)
            case ev.StopEncode():
                run = self._runs.pop(action.id, None)
                if run is not None:
                    run.stop()
            case ev.Fetch():
                self._in_background(
                    lambda: self._fetch(action),
                    lambda event: event,
                    lambda error: ev.FetchFailed(action.name, type(error).__name__, str(error)),
                )

    def _in_background(
        self,
        work: Callable[[], Any],
        on_success: Callable[[Any], ev.Event],
        on_failure: Callable[[Exception], ev.Event],
    ) -> None:
        def job() -> ev.Event:
            try:
                return on_success(work())
            except (CkptdError, OSError) as error:
                return on_failure(error)
            except Exception as error:
                log.exception("bug in a background task")
                return on_failure(error)

        future = self._loop.run_in_executor(self._pool, job)
        future.add_done_callback(
            lambda done: None if done.cancelled() else self._handle(done.result())
        )

    def _encode(self, action: ev.Encode) -> None:
        id = action.manifest.id
        self._peer_cells = action.cells
        self._reader.damage.meet(action.cells)
        running = self._runs.get(id)
        if running is not None:
            running.update(action.manifest, action.cells, action.ranks)
            return
        path = None if action.serve_only else self._store.path(action.name)

        def done(reason: str | None) -> None:
            event = ev.Encoded(id) if reason is None else ev.EncodeFailed(id, reason, run.damaged)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._handle, event)

        try:
            run = self._encode_run(action, path, done)
        except (CkptdError, ValueError) as error:
            # A manifest that this agent cannot make sense of.
            self._loop.call_soon(self._handle, ev.EncodeFailed(id, str(error)))
            return
        self._runs[id] = run
        run.start()

    def _encode_run(
        self, action: ev.Encode, path: Path | None, done: Callable[[str | None], None]
    ) -> EncodeRun:
        id = action.manifest.id
        again = bool(action.ranks)
        return (partial(RecodeRun, action.ranks) if again else EncodeRun)(
            action.manifest,
            self._config.node,
            action.cells,
            self._store,
            self._reader,
            path,
            action.size_bytes,
            done,
            self._tell_trouble,
            self._progress(partial(ev.RecodeMoved, id)) if again else lambda done, cells: None,
        )

    def _decoder_of(self, id: SnapshotId) -> CellDecoder | None:
        """Called from the scrubber's thread."""
        manifest = self._manifest_of(id)
        if manifest is None:
            return None
        source = source_when_protected(manifest, dict(self._peer_cells))
        return CellDecoder(self._reader, id, source, self._decode_service.geometry(id))

    def _scrubbed(self, stats: ScrubStats, text: str) -> None:
        log.warning("scrubbing", found=text)
        event = ev.Scrubbed(stats.damaged_cells, stats.mended_cells, text)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._handle, event)

    def _damaged(self, node: str, cells: int) -> None:
        """Called from threads that read cells."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._handle, ev.Damaged(node, cells))

    def _tell_trouble(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._handle, ev.Trouble(reason))

    def _encoded_row(self, request: GetEncoded) -> memoryview:
        run = self._runs.get(request.id)
        if run is None:
            raise Gone(f"{self._config.node} does not encode {request.id} (yet)")
        return run.row(request)

    def _manifest_of(self, id: SnapshotId) -> JobManifest | None:
        """Called from threads of the cell server, which is there first."""
        lifecycle = getattr(self, "_lifecycle", None)
        return None if lifecycle is None else lifecycle.manifests.get(id)

    def _fetch(self, action: ev.Fetch) -> ev.Event:
        path = self._store.path(action.name)
        if not path.exists():
            self._store.allocate(action.name, action.size_bytes)
        moved = self._progress(partial(ev.FetchMoved, action.name))
        fetch = SegmentFetch(self._reader, action.id, action.rank, action.source, moved)
        outcome = fetch.run(path, action.present)
        self._store.publish_segment(path, outcome.sidecar)
        return ev.Fetched(action.name, outcome.fetched_cells, outcome.rebuilt_cells)

    def _progress(self, event: Callable[[int, int, float], ev.Event]) -> Callable[[int, int], None]:
        """What is to be told, in any thread, how many of so many cells are there."""
        began = told = monotonic()

        def moved(done: int, cells: int) -> None:
            nonlocal told
            if monotonic() - told >= _PROGRESS_EVERY_S:
                told = monotonic()
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    news = event(done, cells, told - began)
                    self._loop.call_soon_threadsafe(self._handle, news)

        return moved


def _rejected(error: Exception) -> bytes:
    return encode(Rejected(type(error).__name__, str(error)))


def _erasure_engine() -> tuple[str, str]:
    """What computes parity here, and why nothing better does. Raises ConfigError if nothing can."""
    choice = erasure_engine()
    try:
        return engine_in_use(choice)
    except CodecError as error:
        raise ConfigError(f"{error} ({ENV_ERASURE_ENGINE} is {choice})") from error


def _listen(path: Path) -> socket.socket:
    """A SOCK_SEQPACKET listener in a directory that only this user can enter."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                try:
                    probe.connect(str(path))
                except OSError:
                    path.unlink()  # its agent is dead
                else:
                    raise ConfigError(
                        f"another agent listens on {path}; stop it, or give this one another "
                        "--socket"
                    )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error}; choose another --socket") from error
    os.chmod(path, 0o600)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def run_agent(config: AgentConfig) -> None:
    """Run an agent until SIGTERM or SIGINT. Raises ConfigError if it cannot start."""
    give_large_buffers_back()
    asyncio.run(Agent(config).run())
