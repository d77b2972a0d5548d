"""Sketches: what an agent tells the diagnosis about the collectives of its trainers.

A node has eight ranks, each in a handful of process groups, with hundreds of operations a second.
An agent sends none of these, but for each rank and group how far it has come, and the times of a
few operations: the same few on every node, chosen by sequence number alone, so that times can be
compared over ranks without anybody agreeing on anything.
"""

import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Annotated, NamedTuple

import msgspec

from ckptd.collectives import (
    MEETING,
    POINT_TO_POINT,
    Collective,
    GroupInfo,
    plain_op,
    size_class,
)
from ckptd.ids import Count, JobId, NodeId

SAMPLES_PER_SKETCH = 8
"""Most operations of one rank and group whose times are in a sketch."""
_LEVEL_MAX = 24
_OPEN_MAX = 512
"""Operations that are kept until they end; older ones count as never seen to end."""
_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


SEQ_END = 1 << 62
"""Above all numbers of operations."""
Seq = Annotated[int, msgspec.Meta(ge=0, lt=SEQ_END)]
"""Number of an operation; it fits a column of 64 bits."""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """The part of a process group that is on one node."""

    group: str
    size: Count
    """Ranks in the whole group."""
    ranks: tuple[Count, ...]
    """Its ranks on this node."""
    description: str = ""
    enqueued: bool = False
    """Entering means that it was put on a stream of the GPU."""
    pair: tuple[Count, Count] | None = None
    """Source and destination, where this stands for the point-to-point operations of two ranks."""
    times_only: bool = False
    """Its operations are those of other parts, with how long they took."""


class Sample(NamedTuple):
    """Times of one operation. Packed it has `SAMPLE_BYTES`, little-endian, in this order."""

    slot: int
    """Index into the sketch's slots: its parts' ranks, one after another. 32 bits, unsigned."""
    kind: int
    """Index into the sketch's kinds. 32 bits, unsigned."""
    seq: int
    """64 bits."""
    entered_s: float
    """When it was entered, before the sketch's own time: an age. 64 bits."""
    duration_s: float
    """NaN where the source has none. 64 bits."""


_SAMPLE = struct.Struct("<IIqdd")
SAMPLE_BYTES = _SAMPLE.size


def pack(samples: Iterable[Sample]) -> bytes:
    """As they are in a sketch: the reader takes in those of all nodes at once."""
    return b"".join(_SAMPLE.pack(*each) for each in samples)


def unpack(packed: bytes) -> list[Sample]:
    """What `pack` was given."""
    return list(map(Sample._make, _SAMPLE.iter_unpack(packed)))


class Sketch(msgspec.Struct, frozen=True, array_like=True):
    """How far the ranks of one node have come, and a few times. Small, whatever happened."""

    job: JobId
    life: Count
    node: NodeId
    layout: Count
    """Number of `parts`: a new one each time they change."""
    at: float
    """Seconds since the epoch, by the node's clock."""
    entered: tuple[Seq, ...]
    """Last operation that was entered, for each slot."""
    ended: tuple[Seq, ...]
    """Last operation that is known to have ended, with all before it, for each slot."""
    waiting_s: tuple[float, ...] = ()
    """How long ago the first that has not ended was entered; NaN: unknown, or all have."""
    waited_s: tuple[float, ...] = ()
    """Seconds spent in operations that wait for all, since this agent's start; NaN: not known.
    Where the source has no durations it is the lateness of the others, for groups that are wholly
    on this node. Only differences within a group, over time, mean anything."""
    samples: bytes = b""
    """Of single operations, packed."""
    kinds: tuple[tuple[str, Count], ...] = ()
    """Operation and size class."""
    resolution_s: float = 0.0
    """How exact the times of this node are among themselves."""
    unknown: Count = 0
    """Operations that were missed since the sketch before: gaps, never taken for absence."""
    parts: tuple[Part, ...] | None = None
    """None: as they were in the sketch that first had this `layout`."""
    still_s: tuple[float, ...] = ()
    """How long ago each rank of the parts, in order, last entered anything, or is known to have
    ended it; NaN: unknown."""
    read_s: tuple[float, ...] = ()
    """How long ago its records were read, or it did not answer: nothing is known of it since."""
    gap_s: float = nan
    """Longest time without an entry or end of one of these ranks, of those that were over since
    the sketch before; NaN: none was seen."""
    open_kinds: tuple[Count, ...] = ()
    """For each slot the kind of the first operation that has not ended: its index, and one; 0:
    unknown, or all have. Empty: none has one."""


def is_sampled(seq: int, level: int) -> bool:
    """Whether operation `seq` is one of those sampled at `level`: one in 2**level.

    The samples of a level are among those of the level below, so agents that choose different
    levels still have operations in common. At each level a bit drawn from the block's number
    decides which half to keep: no period of the program can fall in step with that.
    """
    for height in range(1, level + 1):
        mixed = (((seq >> height) + height) * _MIX) & _MASK
        mixed ^= mixed >> 29
        if (seq >> (height - 1)) & 1 != (mixed >> 17) & 1:
            return False
    return True


def sample(seqs: Iterable[int], limit: int) -> list[int]:
    """Of sequence numbers those of the lowest level at which at most `limit` are left."""
    left = list(seqs)
    for level in range(1, _LEVEL_MAX):
        if len(left) <= limit:
            break
        left = [seq for seq in left if is_sampled(seq, level)]
    return left[:limit]


@dataclass(slots=True)
class _Track:
    """One rank in one group."""

    entered: int = 0
    ended: int = 0
    recorded: int = 0
    """Last operation of which there was a record."""
    open: dict[int, Collective] = field(default_factory=dict)
    """Entered, not known to have ended."""
    done: deque[Collective] = field(default_factory=lambda: deque(maxlen=4096))
    """Ended since the last sketch."""
    waited_s: float = nan
    is_summed: bool = True
    """Whether `waited_s` lacks no operation that had a duration."""


@dataclass(slots=True)
class _Signs:
    """When a rank showed that it goes on. Seconds since the epoch."""

    last_at: float = nan
    read_at: float = nan


class Aggregator:
    """Turns the records of one node's ranks, of one life, into sketches.

    `learn` its groups, `add` records as they are polled (again and again is harmless), `position`
    what a group's status says, then `sketch`. Holds a bounded number of records.
    """

    def __init__(self, job: str, life: int, node: str) -> None:
        self.job, self.life, self.node = job, life, node
        self._groups: dict[str, GroupInfo] = {}
        self._parts: dict[str, Part] = {}
        self._meetings: dict[str, dict[int, dict[int, float]]] = {}
        """Group wholly on this node, and operation, to when each rank entered it."""
        self._tracks: dict[tuple[str, int], _Track] = {}
        self._signs: dict[int, _Signs] = {}
        self._gap_s = nan
        self._resolution_s = 0.0
        self._unknown = 0
        self._layout = 0
        self._changed = True

    def learn(self, info: GroupInfo) -> None:
        """A process group that ranks of this node are in."""
        self._groups[info.group] = info

    def add(self, record: Collective) -> None:
        """What a source says about one operation; what it says later adds to it."""
        track = self._track(record)
        if track is None:
            return
        known = track.open.get(record.seq)
        if known is not None and known.entered_at != record.entered_at:
            # Its end is told with the time of its entry: before the clock was set.
            record = msgspec.structs.replace(record, entered_at=known.entered_at)
        self._resolution_s = max(self._resolution_s, record.resolution_s)
        self._note_sign(record)
        if record.seq > track.recorded:
            if track.recorded and record.seq > track.recorded + 1:
                self._unknown += record.seq - track.recorded - 1
                if record.ended and record.duration_s is not None:
                    track.is_summed, track.waited_s = False, nan
            track.recorded = record.seq
            track.entered = max(track.entered, record.seq)
            track.open[record.seq] = record
        elif record.seq in track.open:
            track.open[record.seq] = record
        if record.ended and track.open.pop(record.seq, None) is not None:
            self._end(track, record)
        while len(track.open) > _OPEN_MAX:
            del track.open[min(track.open)]
        self._settle(track)

    def read(self, rank: int, at: float) -> None:
        """All that a rank had entered before `at`, epoch seconds, has been added."""
        self._signs.setdefault(rank, _Signs()).read_at = at

    def shift(self, by_s: float) -> None:
        """The clock was set by so much, and all times that are remembered move with it."""
        for signs in self._signs.values():
            signs.last_at += by_s
            signs.read_at += by_s
        for track in self._tracks.values():
            track.open = {seq: _shifted(record, by_s) for seq, record in track.open.items()}
            track.done = deque((_shifted(r, by_s) for r in track.done), track.done.maxlen)
        for meetings in self._meetings.values():
            for seq, meeting in meetings.items():
                meetings[seq] = {rank: at + by_s for rank, at in meeting.items()}

    def position(self, group: str, rank: int, entered: int, ended: int) -> None:
        """What the group's own status says: cheaper than records, and so more often asked."""
        info = self._groups.get(group)
        if info is None:
            return
        track = self._open_track(group, rank, info, None)
        track.entered = max(track.entered, entered)
        track.ended = max(track.ended, min(ended, track.entered))
        for seq in [seq for seq in track.open if seq <= track.ended]:
            self._end(track, track.open.pop(seq))

    def sketch(self, at: float, whole: bool = False) -> Sketch:
        """What there is to say at `at` (epoch seconds). `whole`: the parts too, as first time."""
        if self._changed:
            self._layout += 1
        parts = tuple(self._parts.values())
        kinds: dict[tuple[str, int], int] = {}
        samples: list[Sample] = []
        tracks = [self._tracks[part.group, rank] for part in parts for rank in part.ranks]
        for slot, track in enumerate(tracks):
            chosen = set(sample((r.seq for r in track.done), SAMPLES_PER_SKETCH))
            for record in track.done:
                if record.seq in chosen:
                    kind = (plain_op(record.op), size_class(record.size_bytes))
                    number = kinds.setdefault(kind, len(kinds))
                    duration_s = nan if record.duration_s is None else record.duration_s
                    age_s = at - record.entered_at
                    samples.append(Sample(slot, number, record.seq, age_s, duration_s))
            track.done.clear()
        open_kinds = tuple(self._open_kind(track, kinds) for track in tracks)
        signs = [self._signs.get(rank, _Signs()) for rank in ranks_of(parts)]
        made = Sketch(
            job=self.job,
            life=self.life,
            node=self.node,
            layout=self._layout,
            at=at,
            entered=tuple(track.entered for track in tracks),
            ended=tuple(track.ended for track in tracks),
            waiting_s=tuple(_oldest_s(track, at) for track in tracks),
            waited_s=tuple(track.waited_s for track in tracks),
            samples=pack(samples),
            kinds=tuple(kinds),
            resolution_s=self._resolution_s,
            unknown=self._unknown,
            parts=parts if self._changed or whole else None,
            still_s=tuple(at - each.last_at for each in signs),
            read_s=tuple(at - each.read_at for each in signs),
            gap_s=self._gap_s,
            open_kinds=open_kinds if any(open_kinds) else (),
        )
        self._gap_s = nan
        self._changed = False
        self._unknown = 0
        return made

    def _note_sign(self, record: Collective) -> None:
        """An operation that is told of twice, when it was entered and when it had ended, is one."""
        signs = self._signs.setdefault(record.rank, _Signs())
        ended_at = record.entered_at + (record.duration_s or 0.0)
        for at in (record.entered_at, ended_at):
            if at > signs.last_at:
                self._gap_s = _larger(self._gap_s, at - signs.last_at)
            if not at <= signs.last_at:
                signs.last_at = at

    @staticmethod
    def _open_kind(track: _Track, kinds: dict[tuple[str, int], int]) -> int:
        if not track.open:
            return 0
        record = track.open[min(track.open)]
        kind = (plain_op(record.op), size_class(record.size_bytes))
        return 1 + kinds.setdefault(kind, len(kinds))

    def _track(self, record: Collective) -> _Track | None:
        info = self._groups.get(record.group)
        if info is None:
            return None
        op = plain_op(record.op)
        if op not in POINT_TO_POINT or record.peer is None:
            return self._open_track(record.group, record.rank, info, None)
        sends = op == "send"
        pair = (record.rank, record.peer) if sends else (record.peer, record.rank)
        return self._open_track(pair_name(record.group, *pair), record.rank, info, pair)

    def _open_track(
        self, group: str, rank: int, info: GroupInfo, pair: tuple[int, int] | None
    ) -> _Track:
        track = self._tracks.get((group, rank))
        if track is not None:
            return track
        size = info.size if pair is None else 2
        part = self._parts.get(group)
        ranks = (*(part.ranks if part is not None else ()), rank)
        self._parts[group] = Part(
            group, size, ranks, info.description, info.enqueued, pair, info.times_only
        )
        self._changed = True
        return self._tracks.setdefault((group, rank), _Track())

    def _end(self, track: _Track, record: Collective) -> None:
        track.done.append(record)
        if plain_op(record.op) not in MEETING:
            return
        if record.duration_s is not None:
            if track.is_summed:
                track.waited_s = record.duration_s + _or_zero(track.waited_s)
        elif record.peer is None:
            self._meet(record)

    def _meet(self, record: Collective) -> None:
        """When the last rank of a group has told of an operation, all have waited for it."""
        ranks = self._parts[record.group].ranks
        info = self._groups[record.group]
        if info.enqueued or len(ranks) != info.size:
            return
        meetings = self._meetings.setdefault(record.group, {})
        meeting = meetings.setdefault(record.seq, {})
        meeting[record.rank] = record.entered_at
        if len(meeting) == len(ranks):
            del meetings[record.seq]
            last = max(meeting.values())
            for rank, entered_at in meeting.items():
                track = self._tracks[record.group, rank]
                track.waited_s = last - entered_at + _or_zero(track.waited_s)
        elif len(meetings) > _OPEN_MAX:
            del meetings[next(iter(meetings))]

    @staticmethod
    def _settle(track: _Track) -> None:
        """All before the first open operation have ended."""
        first_open = min(track.open, default=track.entered + 1)
        track.ended = max(track.ended, first_open - 1)


def ranks_of(parts: Iterable[Part]) -> list[int]:
    """The ranks of a node, in order."""
    return sorted({rank for part in parts for rank in part.ranks})


def pair_name(group: str, source: int, destination: int) -> str:
    """The name under which point-to-point operations from one rank to another are matched."""
    return f"{group}:{source}>{destination}"


def _oldest_s(track: _Track, at: float) -> float:
    """How long ago the first operation was entered that has not ended; NaN if there is none."""
    return at - track.open[min(track.open)].entered_at if track.open else nan


def _shifted(record: Collective, by_s: float) -> Collective:
    return msgspec.structs.replace(record, entered_at=record.entered_at + by_s)


def _larger(known: float, value: float) -> float:
    """The larger one; NaN is none."""
    return value if isnan(known) else max(known, value)


def _or_zero(value: float) -> float:
    return 0.0 if isnan(value) else value
