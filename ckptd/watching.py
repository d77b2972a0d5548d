"""How a trainer shows itself to the agent of its node: the files of a trainer in the agent's keep.

A trainer leaves an introduction, a list of its process groups, and a pulse in a directory beside
the agent's Unix socket that only their user can enter, and there its worker server listens. Nothing
in it is ever waited for by the trainer.
"""

import os
import zlib
from pathlib import Path
from typing import TypeVar

import msgspec

from ckptd.collectives import Collective, GroupInfo
from ckptd.errors import CorruptData

SOCKET_SUFFIX = ".sock"
INTRODUCTION_SUFFIX = ".json"
GROUPS_SUFFIX = ".groups"
PULSE_SUFFIX = ".pulse"
UNIX_PATH_LIMIT_BYTES = 107
FILE_LIMIT_BYTES = 4 << 20
STANDBY_NAME = "ckptd-standby"
"""Of the process that ranks are forked from; what is forked from it has the usual one."""
_TORCHRUN_VARIABLE = b"TORCHELASTIC_RUN_ID"

_Kind = TypeVar("_Kind")


class Place(msgspec.Struct, frozen=True):
    """Where a scheduler runs a trainer, by the scheduler's own names. Empty: not said."""

    slurm_job: str = ""
    slurm_node: str = ""
    namespace: str = ""
    pod: str = ""
    kubernetes_node: str = ""

    @property
    def told(self) -> dict[str, str]:
        """What was said."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value}


class Paused(msgspec.Struct, frozen=True):
    """The trainer does something else than training, on purpose."""

    what: str
    since: float
    """Of the monotonic clock, which is the same for all processes of a machine."""
    at_most_s: float
    """After so many seconds it counts no more."""


class Introduction(msgspec.Struct, frozen=True):
    """Who a trainer process is, and what can be asked of it. Empty: not there."""

    pid: int
    started_ticks: int
    """When the process began, as the kernel counts; tells it from a later one with its number."""
    job: str = ""
    rank: int = -1
    world_size: int = 0
    life: int = 0
    """0 until `resume()` was granted one, and for a script without a Checkpointer."""
    socket: str = ""
    """Name of the worker server's socket in the same directory."""
    recorder_entries: int = 0
    """Size of the Flight Recorder's buffer; 0: it is off."""
    ring: str = ""
    """Path of the ring of the timing source."""
    stack_signal: int = 0
    """Signal that has all stacks written to `stacks`; 0: none."""
    stacks: str = ""
    problems: tuple[str, ...] = ()
    """What is not seen, and how to switch it on."""
    launcher_pid: int = 0
    """What started it, and starts it anew; 0: nothing does."""
    launcher_ticks: int = 0
    paused: Paused | None = None
    place: Place = Place()
    ras: str = ""
    """HOST:PORT at which NCCL's RAS answers, if it runs; "": it is off."""
    inspector: str = ""
    """Path of the file that NCCL's Inspector writes for this process; "": it is off."""


class Pulse(msgspec.Struct, frozen=True):
    """What a small thread of the trainer writes a few times a second.

    An old one says that no Python thread of the process has run since: it is stopped, or something
    holds Python's interpreter lock.
    """

    at: float
    """Seconds since the epoch."""
    enqueued: dict[str, int] = {}
    """By the recorder's number of a group: operations put in. Counters, not sequence numbers."""
    completed: dict[str, int] = {}


class Gap(msgspec.Struct, frozen=True, array_like=True):
    """Operations of a group that a source has not seen: unknown, not absent."""

    group: str
    first_seq: int
    last_seq: int


class Observed(msgspec.Struct, frozen=True):
    """What one source has seen of one rank since it was last asked.

    An operation comes once when it was entered, and once more when it has ended.
    """

    job: str
    rank: int
    life: int
    source: str
    """"recorder" or "timing"."""
    at: float
    """When it was read, in seconds since the epoch: what was entered before is in it, or in a gap.
    """
    collectives: tuple[Collective, ...] = ()
    gaps: tuple[Gap, ...] = ()
    groups: tuple[GroupInfo, ...] = ()
    """All groups of the process, when they have changed."""
    dropped: int = 0
    """Records that made no sense."""


def trainers_dir(agent_socket: str | Path) -> Path:
    """Where trainers of the agent that listens at `agent_socket` leave their files."""
    path = Path(agent_socket)
    return path.with_name(path.name + ".trainers")


def make_private(directory: Path) -> None:
    """Make the directory for this user alone. Raises OSError if it is, or must be, another's."""
    for each in (directory.parent, directory):  # a mode counts for the last directory only
        each.mkdir(exist_ok=True, mode=0o700)
    found = os.stat(directory, follow_symlinks=False)
    if found.st_uid not in (0, os.getuid()):
        raise PermissionError(f"{directory} belongs to user {found.st_uid}")
    if found.st_mode & 0o077:
        os.chmod(directory, 0o700)


def publish(path: Path, content: msgspec.Struct | list[GroupInfo]) -> None:
    """Write a small file whole: no reader ever sees a part of it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(msgspec.json.encode(content))
    fresh.rename(path)


def read_introduction(path: Path) -> Introduction:
    """Raises CorruptData if it is none, OSError if it cannot be read."""
    return _decode(path, Introduction)


def read_groups(path: Path) -> tuple[GroupInfo, ...]:
    """Raises CorruptData if they are none, OSError if they cannot be read."""
    return _decode(path, tuple[GroupInfo, ...])


def seal_pulse(pulse: Pulse) -> bytes:
    """A pulse as it is written over the one before."""
    body = msgspec.json.encode(pulse)
    return zlib.crc32(body).to_bytes(4, "little") + len(body).to_bytes(4, "little") + body


def read_pulse(path: Path) -> Pulse | None:
    """The last pulse; None if there is none, or it is just being written."""
    try:
        with path.open("rb") as file:
            raw = file.read(64 << 10)
        body = raw[8 : 8 + int.from_bytes(raw[4:8], "little")]
        if zlib.crc32(body) != int.from_bytes(raw[:4], "little"):
            return None
        return msgspec.json.decode(body, type=Pulse)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def started_ticks(pid: int) -> int:
    """When the process began, as the kernel counts; 0 if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        return int(stat.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def launcher_of(pid: int) -> int:
    """The nearest ancestor that torchrun has not started, so torchrun itself; 0 if there is none.

    To be asked while it is there for certain: orphans are given to other parents.
    """
    started_by_torchrun = _has_variable(pid, _TORCHRUN_VARIABLE)
    while started_by_torchrun and pid > 1:
        pid = _parent(pid)
        started_by_torchrun = _has_variable(pid, _TORCHRUN_VARIABLE)
        if not started_by_torchrun:
            return pid
    return 0


def _has_variable(pid: int, name: bytes) -> bool:
    """Whether a process was started with it in its environment.

    One that was forked from a standby was not: it was told, and only itself can see that.
    """
    if pid == os.getpid() and name in os.environb:
        return True
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return any(one.startswith(name + b"=") for one in environ.split(b"\0"))


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def began_at(ticks: int) -> float:
    """Start of a process in seconds since the epoch, from its ticks; 0.0 if unknown."""
    try:
        for line in Path("/proc/stat").read_text().splitlines():
            if line.startswith("btime "):
                return int(line.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        pass
    return 0.0


def _decode(path: Path, kind: type[_Kind]) -> _Kind:
    with path.open("rb") as file:
        raw = file.read(FILE_LIMIT_BYTES + 1)
    if len(raw) > FILE_LIMIT_BYTES:
        raise CorruptData(f"{path} is larger than {FILE_LIMIT_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptData(f"{path} cannot be read: {error}") from error
