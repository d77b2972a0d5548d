"""What is known of all ranks in all groups, as columns: a row ("slot") is one rank in one group.

The slots of a group are next to one another, so that questions about all groups at once are
reductions over ranges (`numpy.ufunc.reduceat`), and 80,000 ranks cost milliseconds.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from math import isinf, isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptd.collectives import MEETING
from ckptd.errors import ProtocolError
from ckptd.sketches import SAMPLE_BYTES, SEQ_END, Part, Sample, Sketch, ranks_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ROWS = 24
"""Sampled operations that are kept of each slot: all of a window, where a group has few."""
RANKS_MAX = 1 << 20
_SAMPLE = np.dtype(list(zip(Sample._fields, ("<u4", "<u4", "<i8", "<f8", "<f8"), strict=True)))
"""As `ckptd.sketches.pack` has it."""
_NO_RANK = _NO_KIND = -1
_NEVER = -np.inf


class Table:
    """Columns by slot, group, rank and node, of one life. Only `flush` writes observations."""

    def __init__(self) -> None:
        self.group_names: list[str] = []
        self.group_parts: list[Part] = []
        self.nodes: list[str] = []
        self.kinds: list[tuple[str, int]] = []
        self._group_index: dict[str, int] = {}
        self._node_index: dict[str, int] = {}
        self._kind_index: dict[tuple[str, int], int] = {}
        self._placed: dict[tuple[int, int], int] = {}
        """(group, rank) to slot."""
        self._filled: list[int] = []
        """Slots of each group that have a rank."""
        self._layouts: dict[str, tuple[int, Ints, Ints]] = {}
        """Node to the number of its layout, its slots, and its ranks."""
        self._pending: dict[str, tuple[Sketch, float, float, float]] = {}
        self.used = 0
        """Slots in use."""
        self.ranks = 0
        self.version = 0
        """Grows when groups or slots are added."""
        self._starts: Ints = np.zeros(64, np.int64)
        self._allocate(1024)
        self.rank_node: Ints = np.full(64, _NO_RANK)
        self.rank_progress_at: Floats = np.full(64, _NEVER)
        """When a rank last entered or ended anything, in any group (monotonic seconds)."""
        self._still_s: Floats = np.full(64, np.nan)
        """How long a rank had been silent when it was last read; NaN: its agent does not say."""
        self._counted_from = _NEVER
        self.node_heard_at: Floats = np.full(64, _NEVER)
        self.longest_gap_s = 0.0
        """Longest silence of a rank that then went on, since this was last set to 0."""
        self.longest_node_gap_s = 0.0
        self.resolution_s = 0.0
        """How exact single times are, by the sketches of the last flush."""
        self.node_error_s: Floats = np.zeros(64)
        """How far off the times of a node may be."""
        self.unknown = 0
        self.progressed = False
        """Whether the last flush brought anything new."""

    @property
    def starts(self) -> Ints:
        """First slot of each group."""
        return self._starts[: len(self.group_names)]

    def _allocate(self, capacity: int) -> None:
        def column(old: str, kind: Any, fill: Any, *shape: int) -> Any:
            made = np.full((capacity, *shape), fill, kind, order="F")
            if hasattr(self, old):
                made[: self.used] = getattr(self, old)[: self.used]
            return made

        self.rank: Ints = column("rank", np.int64, _NO_RANK)
        self.group: Ints = column("group", np.int64, 0)
        self.is_source: Bools = column("is_source", np.bool_, False)
        self.is_destination: Bools = column("is_destination", np.bool_, False)
        self.enqueued: Bools = column("enqueued", np.bool_, False)
        """Entered means put on a stream, which runs in order."""
        self.entered: Ints = column("entered", np.int64, 0)
        self.ended: Ints = column("ended", np.int64, 0)
        self.changed_at: Floats = column("changed_at", np.float64, _NEVER)
        self.pending_at: Floats = column("pending_at", np.float64, np.nan)
        self.waited_s: Floats = column("waited_s", np.float64, np.nan)
        self.open_kind: Ints = column("open_kind", np.int64, _NO_KIND)
        """Of the first operation that has not ended."""
        self.row_seq: Ints = column("row_seq", np.int64, -1, ROWS)
        self.row_entered: Floats = column("row_entered", np.float64, np.nan, ROWS)
        self.row_duration: Floats = column("row_duration", np.float64, np.nan, ROWS)
        self.row_kind: Ints = column("row_kind", np.int64, 0, ROWS)

    def observe(self, sketch: Sketch, now: float, offset_s: float, error_s: float) -> bool:
        """Keep a sketch for the next flush. False: send it `whole`, its parts are not known."""
        if sketch.node in self._pending:
            self.flush()
        if sketch.parts is not None:
            self._lay_out(sketch.node, sketch.layout, sketch.parts)
        known = self._layouts.get(sketch.node)
        if known is None or known[0] != sketch.layout:
            return False
        if not _is_sound(sketch, len(known[1]), len(known[2])):
            return False
        self._pending[sketch.node] = (sketch, now, offset_s, error_s)
        return True

    def flush(self) -> None:
        """Take in all sketches that were kept; all columns at once."""
        if not self._pending:
            self.progressed = False
            return
        batch = list(self._pending.values())
        self._pending.clear()
        layouts = [self._layouts[sketch.node][1] for sketch, *_ in batch]
        slots = np.concatenate(layouts)
        times = np.fromiter((now for _, now, *_ in batch), np.float64, len(batch))
        counts = list(map(len, layouts))
        at = np.repeat(times, counts)
        entered = _column((s.entered for s, *_ in batch), np.int64)
        ended = np.minimum(_column((s.ended for s, *_ in batch), np.int64), entered)
        changed = (entered > self.entered[slots]) | (ended > self.ended[slots])
        self.progressed = bool(changed.any())
        self.changed_at[slots[changed]] = at[changed]
        # Where an agent does not say when that was, it was when its sketch came.
        unsaid = np.repeat([not s.still_s for s, *_ in batch], counts)
        unsaid &= changed
        self._note_gaps(self.rank[slots[unsaid]], at[unsaid])
        np.maximum.at(self.rank_progress_at, self.rank[slots[unsaid]], at[unsaid])
        self._take_signs([(s, now) for s, now, *_ in batch if s.still_s])
        self.entered[slots] = np.maximum(entered, self.entered[slots])
        self.ended[slots] = np.maximum(ended, self.ended[slots])
        self.pending_at[slots] = at - _optional((s.waiting_s, s.entered) for s, *_ in batch)
        self.waited_s[slots] = _optional((s.waited_s, s.entered) for s, *_ in batch)
        self.open_kind[slots] = self._open_kinds([s for s, *_ in batch], counts)
        nodes = np.fromiter((self._node_index[s.node] for s, *_ in batch), np.int64, len(batch))
        silent = times - self.node_heard_at[nodes]
        self.longest_node_gap_s = max(self.longest_node_gap_s, _largest_finite(silent))
        self.node_heard_at[nodes] = times
        errors = (s.resolution_s + error_s for s, _, _, error_s in batch)
        self.resolution_s = max(s.resolution_s for s, *_ in batch)
        self.node_error_s[nodes] = np.fromiter(errors, np.float64, len(batch))
        self.unknown += sum(s.unknown for s, *_ in batch)
        self._take_samples([(s, offset) for s, _, offset, _ in batch if s.samples])

    def silent_s(self, now: float) -> Floats:
        """For each rank how long it has shown no progress, as far as is known."""
        silent = np.minimum(self._still_s, now - self._counted_from)
        return np.where(np.isnan(self._still_s), now - self.rank_progress_at, silent)

    def forget_silence(self, now: float) -> None:
        """Nobody was silent until now."""
        self.rank_progress_at[:] = np.fmax(self.rank_progress_at, now)
        self._counted_from = now
        self.longest_gap_s = 0.0

    def _take_signs(self, batch: list[tuple[Sketch, float]]) -> None:
        """What agents say of when their ranks showed progress."""
        if not batch:
            return
        each = [self._layouts[sketch.node][2] for sketch, _ in batch]
        ranks = np.concatenate(each)
        still = _column((sketch.still_s for sketch, _ in batch), np.float64)
        read = _column((sketch.read_s for sketch, _ in batch), np.float64)
        heard = np.fromiter((now for _, now in batch), np.float64, len(batch))
        at = np.repeat(heard, list(map(len, each))) - still
        self._still_s[ranks] = still - read
        self.rank_progress_at[ranks] = np.fmax(self.rank_progress_at[ranks], at)
        gaps = np.fromiter((sketch.gap_s for sketch, _ in batch), np.float64, len(batch))
        self.longest_gap_s = float(np.fmax(self.longest_gap_s, np.fmax.reduce(gaps)))

    def _note_gaps(self, ranks: Ints, at: Floats) -> None:
        """A slot that moved ends its rank's silence."""
        gap = _largest_finite(at - self.rank_progress_at[ranks])
        self.longest_gap_s = max(self.longest_gap_s, gap)

    def _take_samples(self, batch: list[tuple[Sketch, float]]) -> None:
        if not batch:
            return
        samples = np.frombuffer(b"".join(s.samples for s, _ in batch), _SAMPLE)
        sketch = np.repeat(
            np.arange(len(batch)), [len(s.samples) // SAMPLE_BYTES for s, _ in batch]
        )
        layouts = [self._layouts[s.node][1] for s, _ in batch]
        slots, slots_from, slots_to = _joined(layouts)
        kinds, kinds_from, kinds_to = _joined([list(map(self._kind, s.kinds)) for s, _ in batch])
        slot, kind = samples["slot"] + slots_from[sketch], samples["kind"] + kinds_from[sketch]
        fits = (slot < slots_to[sketch]) & (kind < kinds_to[sketch])
        fits &= (samples["seq"] >= 0) & (samples["seq"] < SEQ_END)
        samples, sketch = samples[fits], sketch[fits]  # the rest is of no use to anybody
        slot, seq = slots[slot[fits]], samples["seq"]
        place = seq % ROWS
        newer = seq > self.row_seq[slot, place]
        where = slot[newer], place[newer]
        at = np.fromiter((s.at - offset for s, offset in batch), np.float64, len(batch))
        self.row_seq[where] = seq[newer]
        self.row_entered[where] = (at[sketch] - samples["entered_s"])[newer]
        self.row_duration[where] = samples["duration_s"][newer]
        self.row_kind[where] = kinds[kind[fits][newer]]

    def _open_kinds(self, sketches: list[Sketch], counts: list[int]) -> Ints:
        """The kinds of all sketches in one row, and the place of each slot's in it."""
        known: list[int] = []
        begins = []
        for sketch in sketches:
            begins.append(len(known))
            known.append(_NO_KIND)
            if sketch.open_kinds:
                known.extend(map(self._kind, sketch.kinds))
        places = _column((s.open_kinds or (0,) * len(s.entered) for s in sketches), np.int64)
        found: Ints = np.array(known)[places + np.repeat(begins, counts)]
        return found

    def _kind(self, kind: tuple[str, int]) -> int:
        number = self._kind_index.get(kind)
        if number is None:
            number = self._kind_index[kind] = len(self.kinds)
            self.kinds.append(kind)
        return number

    @property
    def error_s(self) -> float:
        """How far off times of different nodes may be."""
        return float(self.node_error_s.max())

    @property
    def meeting(self) -> Bools:
        """For each kind whether its operation makes early ranks wait for late ones."""
        return np.array([op in MEETING for op, _ in self.kinds] or [False], np.bool_)

    def _lay_out(self, node: str, layout: int, parts: tuple[Part, ...]) -> None:
        index = self._node_index.setdefault(node, len(self.nodes))
        if index == len(self.nodes):
            self.nodes.append(node)
            self.node_heard_at = _grown(self.node_heard_at, index + 1, _NEVER)
            self.node_error_s = _grown(self.node_error_s, index + 1, 0.0)
        slots = [self._slot(part, rank) for part in parts for rank in part.ranks]
        for rank in chain.from_iterable(part.ranks for part in parts):
            self.rank_node[rank] = index
        ranks = np.array(ranks_of(parts), np.int64)
        self._layouts[node] = (layout, np.array(slots, np.int64), ranks)

    def _slot(self, part: Part, rank: int) -> int:
        group = self._group_index.get(part.group)
        if group is None:
            group = self._add_group(part)
        found = self._placed.get((group, rank))
        if found is not None:
            return found
        if self._filled[group] >= self.group_parts[group].size or rank > RANKS_MAX:
            raise ProtocolError(
                f"rank {rank} cannot be in group {part.group}, which has {part.size} ranks; "
                f"ranks go to {RANKS_MAX}"
            )
        slot = int(self._starts[group]) + self._filled[group]
        self._filled[group] += 1
        self._placed[group, rank] = slot
        self.rank[slot] = rank
        self.is_source[slot] = part.pair is not None and part.pair[0] == rank
        self.is_destination[slot] = part.pair is not None and part.pair[1] == rank
        self.enqueued[slot] = part.enqueued
        if rank >= self.ranks:
            self.ranks = rank + 1
            self.rank_node = _grown(self.rank_node, self.ranks, _NO_RANK)
            self.rank_progress_at = _grown(self.rank_progress_at, self.ranks, _NEVER)
            self._still_s = _grown(self._still_s, self.ranks, np.nan)
        self.version += 1
        return slot

    def _add_group(self, part: Part) -> int:
        if part.size > RANKS_MAX:
            raise ProtocolError(f"group {part.group} of {part.size} ranks; limit {RANKS_MAX}")
        group = self._group_index[part.group] = len(self.group_names)
        self.group_names.append(part.group)
        self.group_parts.append(part)
        self._filled.append(0)
        end = self.used + part.size
        if end > len(self.rank):
            self._allocate(max(end, 2 * len(self.rank)))
        self._starts = _grown(self._starts, group + 1, 0)
        self._starts[group] = self.used
        self.group[self.used : end] = group
        self.used = end
        return group

    def slots_of(self, group: int) -> slice:
        """The slots of a group."""
        start = int(self._starts[group])
        return slice(start, start + self.group_parts[group].size)

    def ranks_of(self, group: int) -> Ints:
        """The ranks of a group that are known."""
        ranks = self.rank[self.slots_of(group)]
        known: Ints = ranks[ranks != _NO_RANK]
        return known

    def node_name(self, rank: int) -> str:
        return self.nodes[int(self.rank_node[rank])]

    def has_durations(self, rank: int) -> bool:
        """Whether a source tells how long operations of this rank took."""
        return not bool(
            np.isnan(self.row_duration[: self.used][self.rank[: self.used] == rank]).all()
        )

    def node_names(self, ranks: Ints | list[int]) -> tuple[str, ...]:
        """The nodes of `ranks`, each once, in order of names."""
        return tuple(sorted({self.node_name(int(rank)) for rank in ranks}))


def _is_sound(sketch: Sketch, slots: int, ranks: int) -> bool:
    """Whether the columns of a sketch, which came from elsewhere, fit one another."""
    return (
        len(sketch.entered) == len(sketch.ended) == slots
        and len(sketch.waiting_s) in (0, slots)
        and len(sketch.waited_s) in (0, slots)
        and len(sketch.still_s) == len(sketch.read_s)
        and len(sketch.still_s) in (0, ranks)
        and len(sketch.open_kinds) in (0, slots)
        and max(sketch.open_kinds, default=0) <= len(sketch.kinds)
        and len(sketch.samples) % SAMPLE_BYTES == 0
        and not isnan(sketch.at)
        and not isinf(sketch.gap_s)
    )


def _joined(columns: Sequence[Ints | list[int]]) -> tuple[Ints, Ints, Ints]:
    """All in one row, and where each begins and ends in it."""
    sizes = np.array(list(map(len, columns)), np.int64)
    ends = np.cumsum(sizes)
    return np.concatenate(columns).astype(np.int64), ends - sizes, ends


def _column(columns: Any, kind: Any) -> Any:
    return np.fromiter(chain.from_iterable(columns), kind)


def _optional(columns: Iterable[tuple[tuple[float, ...], tuple[int, ...]]]) -> Any:
    """Columns that may be empty, and are NaN then, for as many slots as the others."""
    return _column((c or (nan,) * len(slots) for c, slots in columns), np.float64)


def _largest_finite(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else 0.0


def _grown(column: Any, length: int, fill: Any) -> Any:
    if length <= len(column):
        return column
    made = np.full(max(length, 2 * len(column)), fill, column.dtype)
    made[: len(column)] = column
    return made
