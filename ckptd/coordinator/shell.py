"""The coordinator's process: one ZeroMQ socket and a clock around the decider."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket as sockets
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any
from urllib.parse import urlparse

import structlog
import zmq
import zmq.asyncio

from ckptd.control import server_socket, start_authenticator
from ckptd.coordinator.claim import Claim
from ckptd.coordinator.decider import Coordinator, Send, Settings
from ckptd.coordinator.diagnosis.actuators import check
from ckptd.coordinator.diagnosis.shared import Run
from ckptd.coordinator.kubernetes_lease import KubernetesLease
from ckptd.coordinator.lease import FileLease, Lease, NoLease
from ckptd.coordinator.programs import run_program
from ckptd.coordinator.view import status
from ckptd.errors import ConfigError, ProtocolError, Superseded
from ckptd.keys import ClusterKey, check_bind
from ckptd.logs import BadMessages
from ckptd.wire import (
    AgentMessage,
    Answer,
    AskStatus,
    ClientMessage,
    Decoder,
    Order,
    encode,
)

_CONFIRM_S = 3.0  # less than the CLI waits
_LOOK_AGAIN_S = 0.05
_NODES_NAMED = 8

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """Settings of the coordinator, from the flags of `ckptd coordinator`."""

    listen: str
    """ZeroMQ address to bind, such as tcp://127.0.0.1:7070; port 0 or *: any."""
    settings: Settings = field(default_factory=Settings)
    key_file: Path | None = None
    """Cluster key; needed as soon as anything leaves loopback."""
    announce: Path | None = None
    """File that gets the bound address, once it is bound."""
    take_over: bool = False
    """Begin a new term although another coordinator may be alive."""
    lease_file: Path | None = None
    """File whose lock makes its holder the only coordinator."""
    kubernetes_lease: str = ""
    """A Lease that does so, as [NAMESPACE/]NAME."""


class CoordinatorProcess:
    """Feeds the decider and sends what it decides."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._key = ClusterKey.read(config.key_file)
        parts = urlparse(config.listen)
        if parts.scheme != "ipc":  # who may enter its directory may come
            if parts.scheme != "tcp" or not parts.hostname:
                raise ConfigError(
                    f"--listen {config.listen}: give an address like tcp://127.0.0.1:7070"
                )
            check_bind(parts.hostname, self._key, "--listen")
        self._messages: Decoder[AgentMessage | ClientMessage] = Decoder(
            AgentMessage | ClientMessage
        )
        self._lease: Lease = NoLease()
        if config.lease_file is not None:
            self._lease = FileLease(config.lease_file)
        elif config.kubernetes_lease:
            self._lease = KubernetesLease(config.kubernetes_lease)
        check(config.settings.diagnosis.actuator)
        self._bad = BadMessages()
        self._beside: set[asyncio.Task[None]] = set()
        """Orders whose answers wait for agents, and programs that carry out a decision."""
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Let `run()` shut down and return."""
        self._stopping.set()

    async def run(self, signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        """Serve until told to stop, also by one of the signals.

        Raises Superseded when another coordinator is the cluster's.
        """
        loop = asyncio.get_running_loop()
        for number in signals:
            loop.add_signal_handler(number, self._stopping.set)
        stopped = asyncio.create_task(self._stopping.wait())
        seen_term = await self._acquire(stopped)
        if seen_term is None:
            return
        context = zmq.asyncio.Context()
        authenticator = start_authenticator(context, self._key)
        self._socket = server_socket(context, self._key)
        try:
            self._socket.bind(self._config.listen)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"cannot listen on {self._config.listen}: {error}; is another coordinator "
                "running? Stop it, or choose another --listen"
            ) from error
        endpoint = self._socket.last_endpoint.decode().rstrip("\0")
        claim = Claim(
            secrets.token_hex(8),
            _reachable(endpoint),
            self._config.take_over or self._lease.exclusive,
            seen_term,
        )
        self._decider = Coordinator(self._config.settings, monotonic(), claim)
        self._decider.supervisors.shared.wall_s = time() - monotonic()
        if self._config.announce is not None:
            _announce(self._config.announce, endpoint)
        log.info(
            "coordinator ready",
            listen=endpoint,
            encrypted=bool(self._key.secret),
            coordinator=claim.coordinator,
        )
        tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._keep_time())]
        waiting: set[asyncio.Task[Any]] = {*tasks, stopped}
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, *self._beside):
            task.cancel()
        await asyncio.gather(*self._beside, return_exceptions=True)
        if authenticator is not None:
            authenticator.stop()
        self._socket.close()
        context.destroy(linger=0)
        self._lease.release()
        for task in done - {stopped}:
            task.result()
        if self._decider.ended:
            raise Superseded(self._decider.ended)

    async def _acquire(self, stopped: asyncio.Task[Any]) -> int | None:
        """The highest term that the lease has seen; None: it was told to stop while it waited."""
        acquiring = asyncio.ensure_future(asyncio.to_thread(self._lease.acquire))
        await asyncio.wait({acquiring, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if acquiring.done():
            return acquiring.result()
        self._lease.release()
        with contextlib.suppress(Superseded, ConfigError):
            await acquiring
            self._lease.release()  # it had just got it
        return None

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            peer, frame = frames[0], frames[-1]
            try:
                message = self._messages.decode(frame)
            except ProtocolError as error:
                self._bad.drop("a client", error)
                # An agent of another version cannot read our orders, but a CLI gets its answer.
                await self._reply(peer, encode(Answer(b"", str(error))))
                continue
            if isinstance(message, ClientMessage):
                await self._answer(peer, message)
            else:
                actions = self._decider.handle(peer, message, monotonic())
                self._lease.record(self._decider.term)
                await self._send(actions)
            self._log_events()
            if self._decider.ended:
                return

    async def _keep_time(self) -> None:
        while True:
            if self._lease.lost:
                raise Superseded(self._lease.lost)
            now = monotonic()
            await self._send(self._decider.tick(now))
            while self._decider.runs:
                self._begin(self._run(self._decider.runs.popleft()))
            self._log_events()
            delay = self._decider.next_deadline(now) - monotonic()
            await asyncio.sleep(min(max(delay, 0.01), 0.2))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _run(self, run: Run) -> None:
        """Run the programs one after another, as long as they succeed."""
        for program in run.programs:
            failure = await run_program(program, run.timeout_s)
            self._decider.ran(run.incident, str(program), failure, monotonic())
            if failure:
                return

    async def _answer(self, peer: bytes, message: ClientMessage) -> None:
        if isinstance(message, AskStatus):
            await self._show(peer, "")
            return
        error = self._decider.obey(message, monotonic())
        await self._send(self._decider.take_actions())
        if error:
            await self._show(peer, error)
            return
        # Not here: what agents say of it must be heard meanwhile.
        self._begin(self._confirm(peer))

    async def _confirm(self, peer: bytes) -> None:
        """Answer when all live agents keep what was asked for, so that it outlives this process."""
        error, deadline = "", monotonic() + _CONFIRM_S
        while not error and (nodes := self._decider.forgetful):
            await asyncio.sleep(_LOOK_AGAIN_S)
            if monotonic() > deadline:
                some = ", ".join(nodes[:_NODES_NAMED]) + " …" * (len(nodes) > _NODES_NAMED)
                error = (
                    f"it is noted, but {some} ha{'s' if len(nodes) == 1 else 've'} not stored it "
                    "yet: should the coordinator end now, it may be forgotten; ask once more"
                )
        await self._show(peer, error)

    async def _show(self, peer: bytes, error: str) -> None:
        now = monotonic()
        document = status(self._decider, now, time() - now, self._bad.count)
        await self._reply(peer, encode(Answer(json.dumps(document).encode(), error)))

    async def _send(self, actions: list[Send]) -> None:
        for action in actions:
            decider = self._decider
            order = Order(decider.term, decider.claim.coordinator, action.message)
            await self._reply(action.peer, encode(order))

    async def _reply(self, peer: bytes, frame: bytes) -> None:
        with contextlib.suppress(zmq.Again, zmq.ZMQError):
            # A peer that is gone or reads nothing says Hello when it comes back.
            await self._socket.send_multipart([peer, frame], zmq.DONTWAIT)

    def _log_events(self) -> None:
        while self._decider.news:
            event = self._decider.news.popleft()
            log.info(event.kind, text=event.text, **({"job": event.job} if event.job else {}))


def _reachable(endpoint: str) -> str:
    """The address as others know it: one that is bound on all interfaces names no host."""
    for anywhere in ("//0.0.0.0:", "//[::]:"):
        endpoint = endpoint.replace(anywhere, f"//{sockets.gethostname()}:")
    return endpoint


def _announce(path: Path, endpoint: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(endpoint + "\n")
    os.replace(new, path)


def run_coordinator(config: CoordinatorConfig) -> None:
    """Run the coordinator until it is stopped.

    Raises ConfigError if it cannot start, and Superseded if another one is the cluster's.
    """
    asyncio.run(CoordinatorProcess(config).run())
