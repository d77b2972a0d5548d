"""The faults of `ckptd drill`: what is injected, what is to be said of it, and how soon."""

import os
from dataclasses import dataclass
from pathlib import Path

from ckptd.cli import netns
from ckptd.coordinator.diagnosis.finding import Kind
from ckptd.trainer.drill_messages import DDP, FSDP2, HSDP, PIPELINE

HANG, SILENT = Kind.NON_COMMUNICATION_HANG.value, Kind.COMMUNICATION_HANG.value
SLOW, SLOW_NETWORK = Kind.NON_COMMUNICATION_SLOW.value, Kind.COMMUNICATION_SLOW.value
DIED = "died"
"""What the coordinator says of a process that has ended, without the diagnosis."""
_ALL = (DDP, FSDP2, PIPELINE)
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Fault:
    """One sort of fault, or, without `kinds`, of a healthy job that looks odd."""

    name: str
    what: str
    kinds: tuple[str, ...] = ()
    """Any of these is right to be said."""
    jobs: tuple[str, ...] = _ALL
    """The sorts of jobs that have it, in turn."""
    strike: str = ""
    """What the rank does to itself; "" where it is done to it."""
    factor: float = 0.0
    seconds: float = 0.0
    oddity: str = ""
    needs_network: bool = False
    needs_cgroup: bool = False
    is_confirmed: bool = True
    """The second witness is to confirm it."""
    whole_node: bool = False
    """The node is to blame, not its rank."""
    within_s: float = 2.0
    """It is to be said within so many seconds, and ..."""
    within_steps: float = 3.0
    patience_steps: float = 75.0
    """It is waited for so long."""
    unseen: tuple[str, ...] = ()
    """Sorts of jobs in which the default source cannot show it."""

    @property
    def is_hang(self) -> bool:
        return HANG in self.kinds or SILENT in self.kinds

    @property
    def is_slow(self) -> bool:
        return SLOW in self.kinds or SLOW_NETWORK in self.kinds

    def why_not(self) -> str:
        """Why it cannot be injected here; "" if it can."""
        if self.needs_network:
            return netns.why_not()
        return _no_cgroup() if self.needs_cgroup else ""


def _slow(percent: int, within_steps: float) -> Fault:
    return Fault(
        f"slow-{percent}",
        f"a rank computes {percent} % longer",
        (SLOW,),
        strike="slow",
        factor=percent / 100,
        is_confirmed=False,
        within_s=0.0,
        within_steps=within_steps,
        patience_steps=150.0,
        unseen=(PIPELINE,),
    )


FAULTS = (
    Fault(
        "sleep-once",
        "a rank sleeps for 8 s, once",
        (HANG,),
        strike="sleep",
        seconds=8.0,
        is_confirmed=False,
    ),
    Fault("sleep", "a rank sleeps for ever", (HANG,), strike="sleep"),
    Fault("stop", "a rank is stopped (SIGSTOP)", (HANG, SILENT)),
    Fault(
        "spin",
        "a rank computes for ever, with Python's lock held",
        (HANG,),
        strike="spin",
        is_confirmed=False,
    ),
    Fault("deadlock", "a rank waits for a lock that it holds", (HANG,), strike="deadlock"),
    Fault("loader", "a rank's data loader stalls", (HANG,), strike="loader"),
    _slow(20, 100.0),
    _slow(50, 40.0),
    _slow(200, 40.0),
    Fault(
        "link-slow",
        "a node's link carries a tenth",
        (SLOW_NETWORK,),
        (HSDP,),
        needs_network=True,
        whole_node=True,
        is_confirmed=False,
        within_s=0.0,
        within_steps=100.0,
        patience_steps=150.0,
        unseen=(HSDP,),
    ),
    Fault(
        "link-drop",
        "a node's link drops everything",
        (SILENT, HANG),
        (PIPELINE,),
        needs_network=True,
        whole_node=True,
    ),
    Fault("mismatch", "a rank calls another operation", (SILENT,), strike="mismatch"),
    Fault(
        "exception",
        "a rank raises what nobody catches",
        (DIED,),
        strike="exception",
        is_confirmed=False,
        within_s=1.0,
        within_steps=0.0,
    ),
    Fault(
        "kill",
        "a rank is killed (SIGKILL)",
        (DIED,),
        is_confirmed=False,
        within_s=1.0,
        within_steps=0.0,
    ),
    Fault(
        "oom",
        "a rank is killed for its memory, in a cgroup",
        (DIED,),
        strike="oom",
        needs_cgroup=True,
        is_confirmed=False,
        within_s=1.0,
        within_steps=0.0,
    ),
    Fault("healthy", "nothing"),
    Fault("uneven", "batches that differ by a third", oddity="uneven"),
    Fault("evaluation", "rank 0 evaluates for 3 s, every 25 steps", oddity="evaluates"),
    Fault("checkpoint", "rank 0 writes a file for 3 s, every 25 steps", oddity="checkpoints"),
    Fault("first-step", "the first step takes 12 s and more", oddity="compiles"),
)


class Cgroup:
    """A memory limit for one process, as a container has it. Of either version of cgroups."""

    def __init__(self, name: str, pid: int, limit_bytes: int) -> None:
        """Raises OSError where the kernel does not allow it."""
        base, is_old = _memory_cgroups()
        self._path = base / name
        self._path.mkdir()
        limit = "memory.limit_in_bytes" if is_old else "memory.max"
        try:
            (self._path / limit).write_text(str(limit_bytes))
            (self._path / "cgroup.procs").write_text(str(pid))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Give it back; its process must have ended."""
        self._path.rmdir()


def _memory_cgroups() -> tuple[Path, bool]:
    """Where memory cgroups are made, and whether they are of the first version."""
    old = _CGROUPS / "memory"
    return (old, True) if old.is_dir() else (_CGROUPS, False)


def _no_cgroup() -> str:
    base, is_old = _memory_cgroups()
    if not (base / "cgroup.procs").exists():
        return f"no memory cgroups at {base}"
    if not is_old and "memory" not in (base / "cgroup.subtree_control").read_text():
        return f"{base} gives no memory limits to the groups below it"
    probe = base / f"ckptd-drill-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"no cgroup can be made: {error}"
    return ""
