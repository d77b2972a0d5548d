"""PyTorch's Flight Recorder, read from outside: its JSON becomes `Collective` records.

PyTorch has two: one for operations on the processor (gloo), and one for those on streams of a GPU
(NCCL), where an event tells that an operation has ended. Pure: bytes in, records out. Whatever a
trainer answers, malformed or of another version, costs records, never more.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Annotated

import msgspec

from ckptd.collectives import Collective
from ckptd.errors import ProtocolError
from ckptd.watching import Gap

ENTRIES_LIMIT = 20_000
_KNOWN_VERSION = "2."
_FUTURE_S = 5.0
_GROUPS_LIMIT = 10_000
_EXACT_S = 1e-6
_BYTES = {
    "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4,
    "Long": 8, "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip
_OPS = {
    "_all_gather_base": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_reduce_sparse": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "alltoall": "all_to_all",
    "all_to_all_base": "all_to_all",
    "alltoall_base": "all_to_all",
}


_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
_Name = Annotated[str, msgspec.Meta(max_length=1024)]


class _Entry(msgspec.Struct):
    """The fields that are used; any but the first three may be missing."""

    process_group: tuple[_Name, _Name]
    collective_seq_id: _Number
    profiling_name: _Name
    record_id: Annotated[int, msgspec.Meta(ge=-1, le=1 << 62)] = -1
    time_created_ns: _Number = 0
    retired: bool | None = None
    state: str = ""
    duration_ms: float | None = None
    is_p2p: bool = False
    input_sizes: list[Annotated[list[_Number], msgspec.Meta(max_length=64)]] = []
    input_dtypes: list[str] = []


class _Dump(msgspec.Struct):
    version: str = ""
    entries: list[msgspec.Raw] = []


@dataclass(slots=True)
class Reading:
    """What one answer has brought."""

    collectives: list[Collective] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    dropped: int = 0
    """Entries that made no sense."""


class RecorderReader:
    """Reads the answers of one process, one after the other."""

    def __init__(self, rank: int, began_at: float, on_streams: bool = False) -> None:
        """`began_at`: start of the process, in seconds since the epoch; nothing is older.

        `on_streams`: it is the recorder of NCCL.
        """
        self._rank, self.began_at, self._on_streams = rank, began_at, on_streams
        self._last_id = -1
        self._last: dict[str, int] = {}
        """By group, the sequence number of its newest collective."""
        self._open: dict[int, Collective] = {}
        """By record id, what has not ended yet."""
        self._is_timed = False
        """Whether it has told a duration: TORCH_NCCL_ENABLE_TIMING=1."""
        self._untimed: set[int] = set()
        """Ids of what had ended at the last answer, its duration not told yet."""
        self.problems: set[str] = set()
        """What this version of the recorder does not tell."""

    def take(self, raw: bytes, now: float) -> Reading:
        """What is new since the last answer. Raises ProtocolError if it is no recorder's.

        `now`: when it was asked for. Sends and receives are left out: the recorder numbers them on
        each rank apart, so that no two ends can be matched.
        """
        try:
            dump = msgspec.json.decode(raw, type=_Dump)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"the recorder's answer cannot be read: {error}") from error
        if len(dump.entries) > ENTRIES_LIMIT:
            raise ProtocolError(f"the recorder's answer has {len(dump.entries)} entries")
        if not dump.version.startswith(_KNOWN_VERSION):
            self.problems.add(
                f"the recorder's format is {dump.version[:20]!r}, read as {_KNOWN_VERSION}x"
            )
        reading = Reading()
        entries = self._sensible(dump.entries, now, reading)
        self._restart_if_emptied(entries)
        for entry in _of_newest_groups(entries):
            self._take_entry(entry, now, reading)
        oldest = min((entry.record_id for entry in entries), default=0)
        self._untimed = {id for id in self._untimed if id in self._open}
        self._open = {id: each for id, each in self._open.items() if id >= oldest}
        return reading

    def _sensible(self, raws: list[msgspec.Raw], now: float, reading: Reading) -> list[_Entry]:
        """Entries that can be used, each once, in the order in which they were made."""
        found: dict[int, _Entry] = {}
        for place, raw in enumerate(raws):
            try:
                entry = msgspec.json.decode(raw, type=_Entry)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                reading.dropped += 1
                self._note_missing(error)
                continue
            if entry.record_id < 0:
                self.problems.add("the recorder does not number its entries: overruns are not seen")
                entry.record_id = self._number_of(entry, place)
            if not self._is_credible(entry, now) or entry.record_id in found:
                reading.dropped += 1
                continue
            found[entry.record_id] = entry
        return [found[id] for id in sorted(found)]

    def _is_credible(self, entry: _Entry, now: float) -> bool:
        at = entry.time_created_ns / 1e9
        return at == 0 or self.began_at - 1.0 <= at <= now + _FUTURE_S

    def _number_of(self, entry: _Entry, place: int) -> int:
        """Without a record id: by time, or by place in the answer."""
        return entry.time_created_ns or place

    def _restart_if_emptied(self, entries: list[_Entry]) -> None:
        """A recorder that was reset counts from 0 again."""
        if entries and entries[-1].record_id < self._last_id:
            self._last_id = -1
            self._open.clear()
            self._untimed.clear()
            self._last.clear()

    def _take_entry(self, entry: _Entry, now: float, reading: Reading) -> None:
        before = self._open.get(entry.record_id)
        if before is not None:
            if self._ended(entry):
                del self._open[entry.record_id]
                duration_s = self._duration_s(entry)
                changed = msgspec.structs.replace(before, ended=True, duration_s=duration_s)
                reading.collectives.append(changed)
            return
        if entry.record_id <= self._last_id:
            return
        self._last_id = entry.record_id
        if entry.is_p2p:
            return
        record = self._collective(entry, now)
        self._note_gap(record, reading)
        reading.collectives.append(record)
        if not record.ended:
            self._open[entry.record_id] = record

    def _note_gap(self, record: Collective, reading: Reading) -> None:
        last = self._last.get(record.group, 0)
        if len(self._last) > _GROUPS_LIMIT:
            self._last.clear()
        if record.seq > last + 1:
            reading.gaps.append(Gap(record.group, last + 1, record.seq - 1))
        self._last[record.group] = record.seq

    def _collective(self, entry: _Entry, now: float) -> Collective:
        exact = entry.time_created_ns > 0
        if not exact:
            self.problems.add("the recorder does not tell when an operation was entered")
        return Collective(
            group=entry.process_group[0],
            seq=entry.collective_seq_id,
            op=_op(entry.profiling_name),
            size_bytes=_size(entry),
            rank=self._rank,
            entered_at=entry.time_created_ns / 1e9 if exact else now,
            resolution_s=_EXACT_S if exact else 1.0,
            ended=self._ended(entry),
            duration_s=self._duration_s(entry),
        )

    def _ended(self, entry: _Entry) -> bool:
        if entry.retired is None and not entry.state:
            self.problems.add("the recorder does not tell which operations have ended")
        if not self._on_streams:
            return bool(entry.retired) or entry.state == "completed"
        if entry.state != "completed":
            return False  # if it is retired all the same, its time was up
        self._is_timed = self._is_timed or entry.duration_ms is not None
        if not self._is_timed or entry.duration_ms is not None or entry.record_id in self._untimed:
            return True
        # The recorder knows that it has ended before the watchdog, which takes its duration.
        self._untimed.add(entry.record_id)
        return False

    def _duration_s(self, entry: _Entry) -> float | None:
        known = entry.duration_ms is not None and 0 <= entry.duration_ms < 1e9
        return entry.duration_ms / 1e3 if known and entry.duration_ms is not None else None

    def _note_missing(self, error: Exception) -> None:
        text = str(error)
        if text.startswith("Object missing required field"):
            self.problems.add(f"the recorder's entries cannot be used: {text[:200]}")


def _of_newest_groups(entries: list[_Entry]) -> list[_Entry]:
    """Without those of a group that was destroyed, and made anew under the same name."""
    begins: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, entry in enumerate(entries):
        group = entry.process_group[0]
        if not entry.is_p2p:
            if entry.collective_seq_id < last.get(group, 0):
                begins[group] = place
            last[group] = entry.collective_seq_id
    return [e for place, e in enumerate(entries) if place >= begins.get(e.process_group[0], 0)]


def _op(profiling_name: str) -> str:
    """Without the backend's name."""
    name = profiling_name.partition(":")[2] or profiling_name
    return _OPS.get(name, name)[:40]


def _size(entry: _Entry) -> int:
    sizes = zip(entry.input_sizes, entry.input_dtypes, strict=False)
    return min(sum(prod(shape) * _BYTES.get(kind, 1) for shape, kind in sizes), 1 << 62)
