"""NVIDIA's Inspector, a profiler plugin of NCCL: its files of JSON lines become `Collective`s.

A process writes one file, a line for each operation that has ended, and never shortens it. It is
read as it grows, the newest part of it where it grew too fast. NCCL counts the operations of each
kind in each communicator apart, so these are groups of their own, which have times and nothing
else. Whatever the file holds costs records, never more.
"""

import os
import stat
from pathlib import Path
from typing import Annotated

import msgspec

from ckptd.agent.flight_recorder import Reading
from ckptd.collectives import Collective, GroupInfo

READ_LIMIT_BYTES = 1 << 20
"""At a time: some 3,000 operations."""
LINE_LIMIT_BYTES = 64 << 10
"""With all of its events (NCCL_INSPECTOR_DUMP_VERBOSE=1) a line has up to about 12 KiB."""
_GROUPS_LIMIT = 1024
_FUTURE_S = 5.0
_RESOLUTION_S = {"kernel_gpu": 1e-6, "kernel_cpu": 1e-3}
"""By whose clock: the GPU's, or that of a thread that looks at the kernel again and again."""
_OPS = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "AllGatherV": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
    "All2All": "all_to_all",
}

_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Name = Annotated[str, msgspec.Meta(max_length=256)]


class _Header(msgspec.Struct):
    id: _Name
    n_ranks: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    comm_name: _Name = ""


class _Metadata(msgspec.Struct):
    dump_timestamp_us: _Number
    pid: int
    hostname: _Name = ""


class _Starts(msgspec.Struct):
    coll_start_ts: _Number = 0


class _Performed(msgspec.Struct):
    coll: _Name
    coll_sn: _Number
    coll_exec_time_us: _Number
    coll_msg_size_bytes: int = 0
    coll_timing_source: str = ""
    event_trace_ts: _Starts = msgspec.field(default_factory=_Starts)


class _Line(msgspec.Struct):
    header: _Header
    metadata: _Metadata
    coll_perf: _Performed | None = None
    """None: a send or receive. Each end numbers those by itself, so that no two can be matched."""


class InspectorReader:
    """Reads the file of one process, again and again. Used by one thread at a time."""

    def __init__(self, path: Path, pid: int, rank: int, began_at: float) -> None:
        """`began_at`: start of the process, in seconds since the epoch; nothing is older."""
        self._path, self._pid, self._rank, self.began_at = path, pid, rank, began_at
        self._host = path.name.removesuffix(f"-pid{pid}.log")
        self._file: tuple[int, int] | None = None
        """Device and number of the file that was read last."""
        self._offset = 0
        self._decoder = msgspec.json.Decoder(_Line)
        self.groups: dict[str, GroupInfo] = {}
        """By name, those that were seen; never changed, but replaced."""

    def read(self, now: float) -> Reading:
        """What has ended since the last time; nothing while there is no file. Raises OSError.

        What makes no sense, or is of another process, counts as dropped. Operations that are not
        there are no gaps: the plugin leaves out small ones, and what it cannot keep up with.
        """
        reading = Reading()
        for raw in self._lines():
            try:
                if len(raw) > LINE_LIMIT_BYTES:
                    raise ValueError("no line is as long as that")
                line = self._decoder.decode(raw)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                reading.dropped += 1
                continue
            if not self._is_ours(line.metadata, now):
                reading.dropped += 1
            elif (record := self._collective(line)) is not None:
                reading.collectives.append(record)
        return reading

    def _lines(self) -> list[bytes]:
        """Whole lines that are new; what was skipped, because it was too much, is gone."""
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise OSError(f"{self._path} is no plain file")
            if self._file != (state.st_dev, state.st_ino) or state.st_size < self._offset:
                self._file, self._offset = (state.st_dev, state.st_ino), 0
            is_cut = state.st_size - self._offset > READ_LIMIT_BYTES
            if is_cut:
                self._offset = state.st_size - READ_LIMIT_BYTES
            raw = os.pread(handle, READ_LIMIT_BYTES, self._offset)
        finally:
            os.close(handle)
        whole = raw[: raw.rfind(b"\n") + 1]
        if not whole and len(raw) > LINE_LIMIT_BYTES:
            whole = raw  # its end would never come
        self._offset += len(whole)
        return whole.splitlines()[is_cut:]

    def _is_ours(self, told: _Metadata, now: float) -> bool:
        at = told.dump_timestamp_us / 1e6
        timed = self.began_at - 1.0 <= at <= now + _FUTURE_S
        return timed and told.pid == self._pid and told.hostname in ("", self._host)

    def _collective(self, line: _Line) -> Collective | None:
        """None for what is of no use: alone in its communicator, or timed by another clock."""
        header, each = line.header, line.coll_perf
        if each is None or header.n_ranks < 2 or each.coll not in _OPS:
            return None
        # Before it was told, clocks were the processor's or the GPU's.
        resolution_s = _RESOLUTION_S.get(each.coll_timing_source or "kernel_cpu")
        group = f"nccl {header.id} {each.coll}"
        if resolution_s is None or not self._knows(group, header, each.coll):
            return None
        duration_s = each.coll_exec_time_us / 1e6
        ended_at = line.metadata.dump_timestamp_us / 1e6
        entered_at = each.event_trace_ts.coll_start_ts / 1e6
        return Collective(
            group=group,
            seq=each.coll_sn + 1,
            op=_OPS[each.coll],
            size_bytes=each.coll_msg_size_bytes if 0 < each.coll_msg_size_bytes < 1 << 62 else 0,
            rank=self._rank,
            entered_at=entered_at or max(self.began_at, ended_at - duration_s),
            resolution_s=resolution_s,
            ended=True,
            duration_s=duration_s,
        )

    def _knows(self, group: str, header: _Header, op: str) -> bool:
        if group not in self.groups and len(self.groups) < _GROUPS_LIMIT:
            named = header.comm_name not in ("", "unknown")
            text = f"{op} of {header.comm_name if named else f'communicator {header.id}'}"
            info = GroupInfo(group, (), "nccl", text, header.n_ranks, times_only=True)
            self.groups = {**self.groups, group: info}
        return group in self.groups
