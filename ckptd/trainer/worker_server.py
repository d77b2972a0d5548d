"""PyTorch's worker server in a trainer, and what else shows it to the agent of its node.

The server (C++, in threads of its own) answers the agent with the Flight Recorder's entries even
while something holds Python's interpreter lock. For stacks it takes that lock itself, so there is a
signal, too, whose handler does not. A small Python thread publishes the process groups, which
gloo's recorder does not know, and a pulse.

None of it is needed to train: what cannot be had is a problem in the introduction, which status
shows.
"""

import atexit
import faulthandler
import logging
import os
import secrets
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist

from ckptd.collectives import GroupInfo
from ckptd.config import (
    ENV_WATCH,
    FLIGHT_RECORDER_ENTRIES,
    FLIGHT_RECORDER_SIZES,
    WatchConfig,
    watch_config,
)
from ckptd.trainer import embedded
from ckptd.watching import (
    GROUPS_SUFFIX,
    INTRODUCTION_SUFFIX,
    PULSE_SUFFIX,
    SOCKET_SUFFIX,
    UNIX_PATH_LIMIT_BYTES,
    Introduction,
    Pulse,
    launcher_of,
    make_private,
    publish,
    seal_pulse,
    started_ticks,
    trainers_dir,
)

_PULSE_EVERY_S = 0.25
_GROUPS_LIMIT = 4096
_STACK_SIGNAL = signal.SIGRTMIN + 11
"""Hardly anybody's; taken only if nobody handles it."""
_STACKS_SUFFIX = ".stacks"
_RING_SUFFIX = ".ring"

log = logging.getLogger("ckptd")


class Shown:
    """What this process shows to its agent. `start()` makes the one that there is."""

    def __init__(self, config: WatchConfig) -> None:
        """Begin to show it. Never raises: what fails is a problem that the agent can read."""
        self._stem = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._problems: list[str] = []
        self._server: Any = None
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._stacks: Any = None
        self._groups: list[GroupInfo] = []
        self._mutex = threading.Lock()
        socket = config.agent or str(embedded.places().socket)
        self.directory = trainers_dir(socket)
        self.introduction = Introduction(
            pid=os.getpid(),
            started_ticks=started_ticks(os.getpid()),
            job=config.job,
            rank=config.rank,
            world_size=config.world_size,
            recorder_entries=self._recorder(config),
            place=config.place,
            ras=config.ras,
            inspector=config.inspector,
            launcher_pid=(launcher := launcher_of(os.getpid())),
            launcher_ticks=started_ticks(launcher) if launcher else 0,
        )
        if config.inspector_problem:
            self._problem(config.inspector_problem)
        try:
            make_private(self.directory)
        except OSError as error:
            self._problem(f"nothing of this trainer is seen: {error}")
            return
        self._start_server()
        self._register_stacks()
        self.introduce()
        threading.Thread(target=self._beat, name="ckptd-pulse", daemon=True).start()
        atexit.register(self.close)

    def path(self, suffix: str) -> Path:
        """A file of this process in the agent's keep."""
        return self.directory / (self._stem + suffix)

    def ring_path(self) -> Path:
        """Where to put the ring of timing records: in memory, whatever the socket lies on."""
        return Path("/dev/shm") / f"ckptd-{os.getuid()}-{self._stem}{_RING_SUFFIX}"

    def introduce(self, **changed: Any) -> None:
        """Publish who this process is, again when fields of it have changed."""
        with self._mutex:
            self.introduction = msgspec.structs.replace(
                self.introduction, **changed, problems=tuple(self._problems)
            )
            try:
                publish(self.path(INTRODUCTION_SUFFIX), self.introduction)
            except OSError as error:
                log.warning("ckptd: this trainer cannot show itself: %s", error)

    def add_problem(self, text: str) -> None:
        """Something is not seen; say so to the agent."""
        self._problem(text)
        self.introduce()

    def publish_groups(self) -> list[GroupInfo]:
        """Write down the process groups there are, or were; returns them as they are in the file.

        A group keeps its place; one that is made anew under its name comes later.
        """
        with self._mutex:
            for info in process_groups():
                if info not in self._groups and len(self._groups) < _GROUPS_LIMIT:
                    self._groups.append(info)
            publish(self.path(GROUPS_SUFFIX), self._groups)
            return list(self._groups)

    def close(self) -> None:
        """Stop the server and take the files away. A forked child does nothing."""
        if os.getpid() != self._pid or self._closing.is_set():
            return
        self._closing.set()
        if self._server is not None:
            self._server.shutdown()
        ring = [Path(self.introduction.ring)] if self.introduction.ring else []
        suffixes = (SOCKET_SUFFIX, INTRODUCTION_SUFFIX, GROUPS_SUFFIX, PULSE_SUFFIX, _STACKS_SUFFIX)
        with self._mutex:
            for path in [*map(self.path, suffixes), *ring]:
                path.unlink(missing_ok=True)

    def _problem(self, text: str) -> None:
        if text not in self._problems:
            self._problems.append(text)
            log.warning("ckptd: %s", text)

    def _recorder(self, config: WatchConfig) -> int:
        """Have the Flight Recorder on, and small, if it is not too late; returns its size."""
        entries = config.recorder_entries
        if entries < 0 and dist.is_available() and dist.is_initialized():
            return 2000  # torch's own default, taken when the first group was made
        if entries < 0:
            os.environ[FLIGHT_RECORDER_SIZES[0]] = str(FLIGHT_RECORDER_ENTRIES)
            return FLIGHT_RECORDER_ENTRIES
        if entries == 0:
            self._problem(
                "collectives are not seen: PyTorch's Flight Recorder is off; set "
                f"{FLIGHT_RECORDER_SIZES[0]}={FLIGHT_RECORDER_ENTRIES}, or unset it"
            )
        return entries

    def _start_server(self) -> None:
        path = self.path(SOCKET_SUFFIX)
        if len(os.fsencode(path)) > UNIX_PATH_LIMIT_BYTES:
            self._problem(
                f"collectives and stacks are not seen: {path} is longer than "
                f"{UNIX_PATH_LIMIT_BYTES} bytes; give the agent a shorter --socket"
            )
            return
        try:
            from torch._C._distributed_c10d import _WorkerServer

            self._server = _WorkerServer(str(path), -1)
            os.chmod(path, 0o600)
        except Exception as error:  # a PyTorch without it, or one that is built otherwise
            self._problem(
                "collectives and stacks are not seen: PyTorch's worker server does not start: "
                f"{error}; it needs PyTorch 2.6 or later with torch.distributed"
            )
            return
        self.introduction = msgspec.structs.replace(self.introduction, socket=path.name)

    def _register_stacks(self) -> None:
        """Have a signal that writes all stacks, for when the server does not answer."""
        if signal.getsignal(_STACK_SIGNAL) is not signal.SIG_DFL:
            return
        try:
            path = self.path(_STACKS_SUFFIX)
            self._stacks = path.open("ab", buffering=0)
            faulthandler.register(_STACK_SIGNAL, file=self._stacks, all_threads=True)
        except (OSError, ValueError, RuntimeError):
            return
        self.introduction = msgspec.structs.replace(
            self.introduction, stack_signal=int(_STACK_SIGNAL), stacks=path.name
        )

    def _beat(self) -> None:
        """The pulse thread."""
        known = -1
        try:
            with self.path(PULSE_SUFFIX).open("wb", buffering=0) as file:
                while not self._closing.wait(_PULSE_EVERY_S):
                    os.pwrite(file.fileno(), seal_pulse(_pulse()), 0)
                    if known != (made := _groups_made()):
                        self.publish_groups()
                        known = made
        except Exception as error:
            if not self._closing.is_set():
                self.add_problem(f"no pulse, and process groups are not seen: {error}")


_shown: Shown | None = None


def start(config: WatchConfig | None = None) -> Shown | None:
    """Show this process to its agent, once; None if it is switched off. Never raises."""
    global _shown
    if _shown is not None and _shown._pid == os.getpid():
        return _shown
    config = config or watch_config()
    if not config.watch:
        log.info("ckptd: this trainer is not watched: %s is 0", ENV_WATCH)
        return None
    try:
        _shown = Shown(config)
    except Exception as error:  # diagnosis must never cost the training
        log.warning("ckptd: this trainer is not watched: %s", error)
        return None
    return _shown


def process_groups() -> list[GroupInfo]:
    """The process groups of this process, by the names that the recorder gives them."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    world = dist.distributed_c10d._world
    return [
        GroupInfo(
            group=str(name),
            ranks=tuple(dist.get_process_group_ranks(group)),
            backend=_backend(group),
            description=str(getattr(group, "group_desc", "") or ""),
        )
        for group, name in list(world.pg_names.items())
    ]


def _backend(group: dist.ProcessGroup) -> str:
    """One, or several by device; PyTorch calls those that it has chosen itself "undefined"."""
    name = str(dist.get_backend(group))
    return str(dist.get_backend_config(group)) if name == "undefined" else name


def dump_recorder(entries: bool) -> bytes:
    """What the Flight Recorder of this process holds, as JSON; without `entries` in microseconds.

    Raises ImportError or AttributeError where PyTorch has none.
    """
    from torch._C import _distributed_c10d as c10d

    dumped: bytes = c10d._dump_fr_trace_json(entries, False)  # type: ignore[attr-defined] # no stub
    return dumped


def _groups_made() -> int:
    """Changes when a group is made or destroyed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    return hash(tuple(map(str, dist.distributed_c10d._world.pg_names.values()))) & 0x7FFFFFFF


def _pulse() -> Pulse:
    """Counters of the recorder, which cost microseconds, without its entries."""
    try:
        from torch._C import _distributed_c10d as c10d

        told = msgspec.json.decode(dump_recorder(entries=False))
        status = dict(told.get("pg_status", {}))
        if hasattr(c10d, "_dump_nccl_trace_json"):
            told = msgspec.json.decode(c10d._dump_nccl_trace_json(False, False))
            status |= {f"nccl {group}": each for group, each in told["pg_status"].items()}
        return Pulse(
            time.time(),
            {group: int(each["last_enqueued_collective"]) for group, each in status.items()},
            {group: int(each["last_completed_collective"]) for group, each in status.items()},
        )
    except Exception:  # another version of it: the pulse says only that there is one
        return Pulse(time.time())
