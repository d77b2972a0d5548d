"""What happened between two moments: how much each rank waited, how long transfers took.

A rank that is slow arrives last, and so waits least: its operations are the shortest (C4). A rank
that is late only because it waited for a slow one in another group has that waiting in its own sum.
So *all* waiting of a rank, over all its groups, is added up, as a share of the time that passed;
who waits less than those that do the same work is slow, and its victims are not.
"""

import re
from dataclasses import dataclass

import numpy as np

from ckptd.coordinator.diagnosis.table import Bools, Floats, Ints, Table

_DATA_PARALLEL = re.compile(
    r"(?<![a-z])(h?dp|ddp|data|data_parallel|fsdp|shard|replicate)(?![a-z])"
)
_DIGITS = re.compile(r"\d+")
KINDS_MAX = 1 << 20
"""Of operations; a group's number times this, and the kind's, make a key."""
_EXPERT = re.compile(r"(?<![a-z])(e[dp]?p|expert)")


@dataclass(frozen=True, slots=True)
class Window:
    """What a window says. Shares are of wall-clock time."""

    seconds: float
    excess: Floats
    """Of each rank: how much less it waited than its peers, as a share; NaN: not known."""
    error: float
    """Share of time that the resolution of the clocks may have added to that."""
    pace: Floats
    """Operations a second of each group."""
    transfer_key: Ints
    """Group and kind of operation, in one number."""
    resolution_s: float
    """How exact durations are."""
    transfer_s: Floats
    """Shortest duration over the ranks, in the median of the operations of that key."""


class Meter:
    """Marks where a window begins, and reads it off when it is over."""

    def __init__(self, ops_min: int, rows_min: int) -> None:
        self._ops_min, self._rows_min = ops_min, rows_min
        self._version = -1
        self.position: Ints = np.zeros(0, np.int64)
        """Of each rank: the group of those in its place of pipeline and tensor; -1 for none."""
        self._sort: Ints = np.zeros(0, np.int64)
        """Of each group: one number for all that are used alike."""
        self.began_at = 0.0
        self._ended: Ints = np.zeros(0, np.int64)
        self._waited_s: Floats = np.zeros(0)
        self._row_seq_used: Ints = np.zeros(0, np.int64)

    def begin(self, table: Table, now: float) -> None:
        """A window begins."""
        self.began_at = now
        self._ended = table.ended[: table.used].copy()
        self._waited_s = table.waited_s[: table.used].copy()
        if self._version != table.version:
            self._version = table.version
            self.position = positions(table)
            self._sort = _sorts(table)
        newest = np.maximum.reduceat(table.row_seq[: table.used].max(axis=1), table.starts)
        self._row_seq_used = newest

    def is_full(self, table: Table) -> bool:
        """Whether the groups that are compared have had enough operations."""
        if self._version != table.version:
            return True  # what there is cannot be compared: read it off and begin anew
        advanced = np.minimum.reduceat(table.ended[: table.used] - self._ended, table.starts)
        compared = np.unique(self.position[self.position >= 0])
        if not len(compared):
            compared = np.flatnonzero(advanced > 0)
        return bool(len(compared) and np.quantile(advanced[compared], 0.1) >= self._ops_min)

    def read(self, table: Table, now: float) -> Window | None:
        """The window that ends now; None if it says nothing. The next one is to be begun."""
        seconds = now - self.began_at
        if self._version != table.version or seconds <= 0 or not table.used:
            return None
        starts, group = table.starts, table.group[: table.used]
        advanced = table.ended[: table.used] - self._ended
        count = np.minimum.reduceat(advanced, starts)
        pace = count / seconds
        complete = self._complete_rows(table)
        waited_s, transfer_s = _waits_and_transfers(table, complete)
        rows = complete.sum(axis=1)
        sampled = waited_s / np.maximum(rows, 1)[group]
        usual = self._usual(count)
        # More or less than others that are used as often only tells where the window ended.
        total = np.minimum.reduceat(table.ended[: table.used], starts)
        is_alike = np.abs(total - self._usual(total)) <= self._ops_min
        often = np.where(is_alike, usual, count)
        share = sampled * (often / seconds)[group]
        is_known = (rows >= self._rows_min)[group] & ~np.isnan(share)
        share, is_known = self._prefer_sums(table, share, is_known, rows, pace, seconds)
        compared = np.unique(self.position[self.position >= 0])
        is_compared = np.isin(np.arange(len(count)), compared)
        # A group that is hardly used tells nothing and costs nothing, unless it is compared. So
        # that ranks can be, groups of a sort are all left out, or none is.
        is_few = np.where(is_compared, count, 2 * usual) < self._ops_min
        is_idle = (is_few & ~is_compared)[group]
        is_known &= ~is_few[group]
        is_double = _seen_twice(table)
        share, is_known = np.where(is_double, 0.0, share), is_known | is_double
        excess = self._compare(table, np.where(is_known, share, 0.0), is_known | is_idle)
        is_timed = not (complete & np.isnan(transfer_s))[compared].any()  # no clocks are compared
        exact_s = table.resolution_s if is_timed else table.error_s
        error = exact_s * float(pace[compared].max(initial=0.0))
        keys, values = self._transfers(table, complete, transfer_s)
        return Window(seconds, excess, error, pace, keys, table.resolution_s, values)

    def _usual(self, number: Ints) -> Floats:
        """For each group the median of what groups of its sort have."""
        _, medians = _medians(self._sort, number.astype(np.float64))
        return medians[self._sort]

    def _complete_rows(self, table: Table) -> Bools:
        """For each group and place: whether all its ranks have told of the same new operation."""
        seqs = table.row_seq[: table.used]
        lowest = np.minimum.reduceat(seqs, table.starts, axis=0)
        highest = np.maximum.reduceat(seqs, table.starts, axis=0)
        complete: Bools = (lowest == highest) & (highest > self._row_seq_used[:, None])
        return complete

    def _prefer_sums(
        self,
        table: Table,
        share: Floats,
        is_known: Bools,
        rows: Ints,
        pace: Floats,
        seconds: float,
    ) -> tuple[Floats, Bools]:
        """Where an agent has added up all waiting, and samples are few of many, take its sum."""
        group = table.group[: table.used]
        summed = (table.waited_s[: table.used] - self._waited_s) / seconds
        is_summed = ~np.isnan(np.minimum.reduceat(summed, table.starts))
        preferred = (is_summed & (rows < 0.5 * pace * seconds))[group]
        return np.where(preferred, summed, share), is_known | preferred

    def _compare(self, table: Table, share: Floats, is_known: Bools) -> Floats:
        """How much less each rank waited than the median of those in its position; of two, than the
        other: their median is half way to it."""
        count = table.ranks
        rank = table.rank[: table.used]
        placed = rank >= 0
        waited = np.bincount(rank[placed], weights=share[placed], minlength=count)
        unknown = np.bincount(rank[placed & ~is_known], minlength=count) > 0
        waited[unknown] = np.nan
        excess = np.full(count, np.nan)
        usable = np.flatnonzero((self.position[:count] >= 0) & ~np.isnan(waited))
        if not len(usable):
            return excess
        order = usable[np.lexsort((waited[usable], self.position[usable]))]
        place = self.position[order]
        first = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
        sizes = np.diff(np.r_[first, len(place)])
        low, high = waited[order][first + (sizes - 1) // 2], waited[order][first + sizes // 2]
        excess[order] = np.repeat((low + high) / 2, sizes) - waited[order]
        excess[order[np.repeat(sizes == 2, sizes)]] *= 2
        excess[order[np.repeat(sizes < 2, sizes)]] = np.nan
        return excess

    def _transfers(self, table: Table, complete: Bools, transfer_s: Floats) -> tuple[Ints, Floats]:
        kinds = table.row_kind[: table.used][table.starts]
        counts = complete & ~np.isnan(transfer_s) & table.meeting[kinds]
        groups, places = np.nonzero(counts)
        key = groups * KINDS_MAX + kinds[groups, places]
        return _medians(key, transfer_s[groups, places])


def _waits_and_transfers(table: Table, complete: Bools) -> tuple[Floats, Floats]:
    """How long each slot waited in all `complete` operations of its group, and how long these took.

    The latter is the shortest duration over the ranks, by group and place; NaN: not known. Waiting
    is told by durations where all ranks of the group have them: no clocks are compared, and time
    that slow transfers take is not taken for the rank's own. Else by how much later than this rank
    the last one entered, unless that only tells when an operation was enqueued.
    """
    starts, group = table.starts, table.group[: table.used]
    sizes = np.diff(np.r_[starts, table.used])
    enqueued = np.array([part.enqueued for part in table.group_parts], np.bool_)
    meeting = table.meeting
    waited, took = np.zeros(table.used), np.full(complete.shape, np.nan)
    for place in np.flatnonzero(complete.any(axis=0)):  # one at a time: these stay in the cache
        groups = np.flatnonzero(complete[:, place])
        slots = np.flatnonzero(complete[group, place])
        counts = sizes[groups]
        first = np.cumsum(counts) - counts
        duration, entered = table.row_duration[slots, place], table.row_entered[slots, place]
        shortest = np.minimum.reduceat(duration, first)  # NaN if any is
        late = np.repeat(np.maximum.reduceat(entered, first), counts) - entered
        late[np.repeat(enqueued[groups], counts)] = np.nan
        late[table.is_source[slots]] = 0.0  # a sender need not wait for its receiver
        wait = np.where(np.repeat(np.isnan(shortest), counts), late, duration)
        waits_for_all = meeting[table.row_kind[slots, place]]
        waited[slots] += np.where(waits_for_all, wait, 0.0)
        took[groups, place] = shortest
    return waited, took


def _seen_twice(table: Table) -> Bools:
    """For each slot whether another source tells how long the same operations of its rank took."""
    used = slice(0, table.used)
    rank, is_known = table.rank[used], table.rank[used] >= 0
    is_timed = np.array([part.times_only for part in table.group_parts], np.bool_)[
        table.group[used]
    ]
    is_timed_rank = np.zeros(max(1, table.ranks), np.bool_)
    is_timed_rank[rank[is_known & is_timed]] = True
    double: Bools = is_known & table.enqueued[used] & ~is_timed & is_timed_rank[rank]
    return double


def _sorts(table: Table) -> Ints:
    """For each group a number from 0 on: the same for those of one size and one description."""
    numbers: dict[tuple[int, bool, str], int] = {}
    return np.array(
        [
            numbers.setdefault(
                (part.size, part.pair is not None, _DIGITS.sub("", part.description)), len(numbers)
            )
            for part in table.group_parts
        ],
        np.int64,
    )


def positions(table: Table) -> Ints:
    """For each rank the group of those that do the same work: its data-parallel group.

    By what the program calls it. Where it calls none so: the group with the largest stride of rank
    numbers, for replicas are laid out outermost, and not that of all ranks if there is another.
    """
    best = np.full(max(1, table.ranks), -1, np.int64)
    found = np.full((len(best), 3), -1.0)
    for group, part in enumerate(table.group_parts):
        ranks = table.ranks_of(group)
        if part.pair is not None or part.times_only or part.size < 2 or len(ranks) < 2:
            continue
        text = f"{part.description} {part.group}".lower()
        named = bool(_DATA_PARALLEL.search(text)) and not _EXPERT.search(text)
        stride = float(np.diff(np.sort(ranks)).min())
        score = np.array([float(named), float(part.size < table.ranks), stride])
        old = found[ranks]
        better = np.zeros(len(ranks), np.bool_)
        undecided = np.ones(len(ranks), np.bool_)
        for column in range(3):
            better |= undecided & (score[column] > old[:, column])
            undecided &= score[column] == old[:, column]
        best[ranks[better]] = group
        found[ranks[better]] = score
    return best


def _medians(key: Ints, value: Floats) -> tuple[Ints, Floats]:
    """Each key once, in order, and the median of its values."""
    if not len(key):
        return key, value
    order = np.lexsort((value, key))
    key, value = key[order], value[order]
    first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    sizes = np.diff(np.r_[first, len(key)])
    return key[first], (value[first + (sizes - 1) // 2] + value[first + sizes // 2]) / 2
