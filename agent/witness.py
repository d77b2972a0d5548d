"""The second witness: what the kernel, the driver and the process itself say of a trainer.

Evidence only: nothing here decides that somebody is at fault. Two samples, some time apart, say
whether a process makes progress: timing alone must never kill a job.
"""

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ckptd.agent import worker_client
from ckptd.errors import Gone, ProtocolError
from ckptd.watching import (
    PULSE_SUFFIX,
    SOCKET_SUFFIX,
    Introduction,
    read_pulse,
    started_ticks,
)

STACKS_LIMIT_BYTES = 256 << 10
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "a zombie",
    "X": "dead",
    "I": "idle",
}
_THREADS_LIMIT = 512
_SIGNAL_WAIT_S = 0.5
_OLD_PULSE_S = 1.5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_IDENTITY = re.compile(r"0x[0-9a-f]+|\d+\.\d+")


@dataclass(frozen=True, slots=True)
class Sample:
    """A trainer at one instant."""

    at: float
    """Seconds since the epoch."""
    rank: int
    pid: int
    state: str
    """As the kernel has it, in words: "stopped", "waiting for a device" …; "gone": no process."""
    cpu_s: dict[int, float] = field(default_factory=dict)
    """By thread, how long it has run on a processor."""
    waits_in: dict[int, str] = field(default_factory=dict)
    """By thread, the kernel function that it sleeps in, where the kernel tells."""
    read_bytes: int = 0
    write_bytes: int = 0
    stacks: str = ""
    """Python stacks of all threads; "" if they could not be had."""
    stacks_failure: str = ""
    """Why not."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two samples of one trainer say together."""

    rank: int
    state: str
    cpu_s: float
    """How long its threads ran between the two."""
    same_stacks: bool | None
    """Whether all threads were where they had been; None: not known."""
    moved_bytes: int
    """Read and written between the two."""
    progress: bool
    """Whether it does anything: it ran, did I/O, or its stacks have changed."""
    sentence: str


async def sample(told: Introduction, directory: Path, timeout_s: float = 2.0) -> Sample:
    """Look at a trainer once; never raises, and takes no longer than `timeout_s` and a bit."""
    pid = told.pid
    if started_ticks(pid) != told.started_ticks:
        return Sample(time.time(), told.rank, pid, "gone")
    state = process_state(pid)
    stacks, failure = "", "it is stopped, and can say nothing"
    if "stopped" not in state:
        stacks, failure = await _stacks(told, directory, timeout_s)
    cpu_s, waits_in = _threads(pid)
    moved = _io(pid)
    return Sample(
        time.time(), told.rank, pid, state, cpu_s, waits_in, *moved,
        stacks[:STACKS_LIMIT_BYTES], failure,
    )  # fmt: skip


async def sample_twice(
    told: Introduction, directory: Path, apart_s: float = 1.0, timeout_s: float = 2.0
) -> tuple[Sample, Sample]:
    """Two samples of one trainer."""
    first = await sample(told, directory, timeout_s)
    await asyncio.sleep(apart_s)
    return first, await sample(told, directory, timeout_s)


def compare(first: Sample, second: Sample) -> Comparison:
    """What has happened between two samples of one trainer."""
    ran_s = sum(max(0.0, t - first.cpu_s.get(n, 0.0)) for n, t in second.cpu_s.items())
    moved = max(0, second.read_bytes - first.read_bytes)
    moved += max(0, second.write_bytes - first.write_bytes)
    same = None
    if first.stacks and second.stacks:
        same = _places(first.stacks) == _places(second.stacks)
    apart_s = second.at - first.at
    # The pulse, the worker server and the recorder's thread run a little, too.
    busy = ran_s > 0.1 * apart_s
    alive = second.state not in ("gone", "stopped", "stopped by a debugger", "a zombie")
    progress = alive and (busy or same is False)
    words = [f"rank {second.rank} is {second.state}", f"ran {ran_s:.2f} s in {apart_s:.1f} s"]
    if same is not None:
        words.append("its stacks are the same" if same else "its stacks have changed")
    elif second.stacks_failure:
        words.append(f"no stacks: {second.stacks_failure}")
    return Comparison(second.rank, second.state, ran_s, same, moved, progress, ", ".join(words))


def process_state(pid: int) -> str:
    """In words; "gone" if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        letter = stat.rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "gone"
    return _STATES.get(letter, letter)


def host_health() -> dict[str, Any]:
    """Memory, load, pressure, throttling and, where there is one, the GPU driver's own words."""
    found: dict[str, Any] = {"load": os.getloadavg(), "pressure": _pressure()}
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    found["memory"] = {"total_bytes": memory.total, "available_bytes": memory.available}
    found["swap_used_bytes"] = swap.used
    found["cpu_throttled"] = _cgroup("cpu.stat")
    found["memory_events"] = _cgroup("memory.events")
    found["gpus"] = _gpus()
    found["driver_messages"] = _xids()
    return found


def _threads(pid: int) -> tuple[dict[int, float], dict[int, str]]:
    cpu_s, waits_in = {}, {}
    try:
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (OSError, ValueError):
        return {}, {}
    for number in numbers[:_THREADS_LIMIT]:
        base = Path(f"/proc/{pid}/task/{number}")
        try:
            fields = (base / "stat").read_bytes().rpartition(b")")[2].split()
            cpu_s[number] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
            where = (base / "wchan").read_text().strip()
        except (OSError, ValueError, IndexError):
            continue
        if where and where != "0":
            waits_in[number] = where
    return cpu_s, waits_in


def _io(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        fields = dict(line.split(": ") for line in lines)
        return int(fields["rchar"]), int(fields["wchar"])
    except (OSError, ValueError, KeyError):
        return 0, 0


async def _stacks(told: Introduction, directory: Path, timeout_s: float) -> tuple[str, str]:
    """Stacks, or why there are none: from the worker server, or else by the signal.

    The server's handler takes the interpreter lock (the signal's does not): if something holds it,
    it is not asked, for each question would keep one of its few threads.
    """
    if _holds_lock(told, directory) and (text := await _stacks_by_signal(told, directory)):
        return text, ""
    failure = "it has no worker server"
    if told.socket and "/" not in told.socket:
        try:
            return await worker_client.stacks(directory / told.socket, timeout_s), ""
        except TimeoutError:
            failure = f"its worker server did not answer within {timeout_s:.1f} s"
        except (Gone, ProtocolError) as error:
            failure = str(error)
    text = await _stacks_by_signal(told, directory)
    return (text, "") if text else ("", failure)


def _holds_lock(told: Introduction, directory: Path) -> bool:
    """Whether no Python thread of the process has run for a while."""
    pulse = read_pulse(directory / told.socket.replace(SOCKET_SUFFIX, PULSE_SUFFIX))
    return pulse is not None and pulse.at < time.time() - _OLD_PULSE_S


async def _stacks_by_signal(told: Introduction, directory: Path) -> str:
    """Stacks that the trainer's signal handler writes; "" where that is not safe to ask for."""
    number = told.stack_signal
    if not number or "/" in told.stacks or not _is_caught(told.pid, number):
        return ""
    path = directory / told.stacks
    try:
        before = path.stat().st_size
        os.kill(told.pid, number)
        for _ in range(10):
            await asyncio.sleep(_SIGNAL_WAIT_S / 10)
            if path.stat().st_size > before:
                await asyncio.sleep(_SIGNAL_WAIT_S / 10)
                break
        with path.open("rb") as file:
            file.seek(before)
            return file.read(STACKS_LIMIT_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _is_caught(pid: int, number: int) -> bool:
    """Whether the process handles the signal: else it would be killed by it."""
    if number not in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
        return False
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError):
        pass
    return False


def _places(stacks: str) -> str:
    """Stacks without what differs between two dumps of the same place: addresses, and our own."""
    threads = [t for t in stacks.split("\n\n") if "_beat" not in t and "no Python frame" not in t]
    return _IDENTITY.sub("", "\n\n".join(t.replace("Current thread", "Thread") for t in threads))


def _pressure() -> dict[str, str]:
    """How long tasks have waited for processor, memory and disk, as the kernel counts (PSI)."""
    found = {}
    for kind in ("cpu", "memory", "io"):
        try:
            found[kind] = Path(f"/proc/pressure/{kind}").read_text().strip()[:500]
        except OSError:
            continue
    return found


def _cgroup(name: str) -> dict[str, int]:
    for base in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        try:
            lines = Path(base, name).read_text().splitlines()
            return {key: int(value) for key, value in (line.split() for line in lines[:40])}
        except (OSError, ValueError):
            continue
    return {}


def _gpus() -> list[dict[str, Any]]:
    """Temperature, clocks, why they are throttled, and memory errors; [] without nvidia-ml-py."""
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        found = [_gpu(pynvml, number) for number in range(pynvml.nvmlDeviceGetCount())]
        pynvml.nvmlShutdown()
        return found
    except Exception as error:  # of a library that may be of any version
        return [{"error": str(error)[:200]}]


def _gpu(nvml: Any, number: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    asked: dict[str, Callable[[], Any]] = {
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, 0),
        "throttled": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        "clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, 1),
        "uncorrected_memory_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, 1, 0),
        "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    }
    found: dict[str, Any] = {"gpu": number}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except Exception as error:  # not every GPU has everything
            found[name] = str(error)[:100]
    return found


def _xids() -> list[str]:
    """The GPU driver's error messages (XID) in the kernel's log, where this user may read it."""
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    found: list[str] = []
    try:
        for _ in range(10_000):
            line = os.read(handle, 8192).decode(errors="replace")
            if "NVRM: Xid" in line:
                found.append(line.strip()[:300])
    except OSError:
        pass
    finally:
        os.close(handle)
    return found[-20:]
