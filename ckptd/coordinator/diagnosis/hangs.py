"""Who hangs: the ranks for which others wait, and which themselves wait for nobody.

C4 compares, group by group, who has entered an operation and who has not. With tensor, pipeline,
data and expert parallelism most of those who have not entered are victims: they wait in another
group. All chains of waiting end at a rank that waits in no group (it hangs outside communication),
in a group that all its ranks have entered (its communication hangs), or in a circle (its ranks call
their operations in different orders). So these ends are looked for, all at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckptd.coordinator.diagnosis.table import Bools, Ints, Table

_TOGETHER_S = 0.5
"""Ranks that stopped within such a time stopped together."""
_NONE_WAITS = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Stall:
    """Ranks wait, and none that is concerned makes progress."""

    roots: Ints
    """Ranks that others wait for and that wait for nobody."""
    silent_groups: Ints
    """Groups that all ranks have entered, and none leaves; if there are no roots."""
    circle: Ints
    """Ranks that wait for one another; if there are neither."""
    waiting: Ints
    """Ranks that wait, directly or not."""
    group: int
    """One of the groups, for the evidence: the one that was first without progress."""
    seq: int
    """The operation that it is at."""
    absent: int
    """How many of its ranks have not entered that."""
    since: float
    """When the culprits last made progress (monotonic seconds)."""


def find_stall(
    table: Table, timeout_s: float, stale_s: float, now: float, paused: Sequence[int] = ()
) -> Stall | None:
    """Where all chains of waiting end, if some ranks have waited for `timeout_s` without progress.

    Nodes that were not heard of for `stale_s` are unknown: nothing follows from what they lack.
    `paused` ranks do something else on purpose, and whoever waits for them does well to.
    """
    if not table.used:
        return None
    view = _View(table, timeout_s, stale_s, now)
    if not view.waits.any():
        return None
    roots = np.unique(view.rank[view.absent & view.heard & view.silent & ~view.waits_anywhere])
    at_fault = np.setdiff1d(roots, paused).astype(np.int64)
    if len(at_fault):
        return view.stall(roots=at_fault, group=view.oldest(view.groups_lacking(at_fault)))
    if len(roots):
        return None
    silent_groups = view.silent_groups()
    if len(silent_groups):
        return view.stall(silent_groups=silent_groups, group=view.oldest(silent_groups))
    unheard = view.is_stuck[view.group] & ~view.heard
    if unheard.any():
        return None  # the chains end at ranks of which nothing is known
    circle = np.unique(view.rank[view.absent & view.silent & view.waits_anywhere])
    if not len(circle):
        return None  # those who are waited for are on their way
    return view.stall(
        circle=_stopped_first(table, circle), group=view.oldest(view.groups_lacking(circle))
    )


class _View:
    """The columns of the table, and what follows from them, at one moment."""

    def __init__(self, table: Table, timeout_s: float, stale_s: float, now: float) -> None:
        used = slice(0, table.used)
        self.table = table
        self.rank, self.group = table.rank[used], table.group[used]
        self.entered, self.ended = table.entered[used], table.ended[used]
        self.known: Bools = self.rank >= 0
        node = table.rank_node[self.rank]
        self.heard: Bools = self.known & (now - table.node_heard_at[node] < stale_s)
        silent_ranks = table.silent_s(now) >= timeout_s
        self.silent: Bools = silent_ranks[self.rank]
        pending = self.known & (self.entered > self.ended)
        self.waits: Bools = pending & self.heard & self.silent
        waiting_ranks = np.zeros(len(table.rank_node), np.bool_)
        waiting_ranks[self.rank[pending]] = True
        self.waits_anywhere: Bools = waiting_ranks[self.rank] & self.known
        first = np.where(self.waits, self.ended + 1, _NONE_WAITS)
        self.first_seq: Ints = np.minimum.reduceat(first, table.starts)
        """The operation at which each group is, as far as ranks wait in it."""
        self.is_stuck: Bools = self.first_seq < _NONE_WAITS
        self.absent: Bools = self.known & (self.entered < self.first_seq[self.group])
        self.absent &= self.is_stuck[self.group]

    def groups_lacking(self, ranks: Ints) -> Ints:
        """Stuck groups that one of `ranks` has not entered."""
        return np.unique(self.group[self.absent & np.isin(self.rank, ranks)])

    def silent_groups(self) -> Ints:
        """Groups that all have entered, and in which their ranks really wait."""
        starts = self.table.starts
        stays = self.heard & self.silent & ~self.absent
        complete: Bools = np.logical_and.reduceat(stays, starts) & self.is_stuck
        if not complete.any():
            return np.zeros(0, np.int64)
        # On a GPU the processor runs ahead: a rank is entered in several groups, and what was
        # put on the stream first is what it waits for.
        used = slice(0, self.table.used)
        on_stream = self.waits & self.table.enqueued[used]
        pending_at = np.where(on_stream, self.table.pending_at[used], np.nan)
        earliest = np.full(len(self.table.rank_node), np.inf)
        np.fmin.at(earliest, self.rank[on_stream], pending_at[on_stream])
        # What was received is over, though the sender may never look whether it was sent.
        is_past = self.table.is_destination[used] & ~self.waits
        is_past |= on_stream & (pending_at > earliest[self.rank])
        return np.flatnonzero(complete & ~np.logical_or.reduceat(is_past, starts))

    def oldest(self, groups: Ints) -> int:
        """The one of `groups` that has been without progress for longest."""
        changed = np.maximum.reduceat(self.table.changed_at[: self.table.used], self.table.starts)
        return int(groups[np.argmin(changed[groups])])

    def stall(
        self,
        group: int,
        roots: Ints | None = None,
        silent_groups: Ints | None = None,
        circle: Ints | None = None,
    ) -> Stall:
        """What was found, with evidence from `group`."""
        none = np.zeros(0, np.int64)
        slots = self.table.slots_of(group)
        seq = int(self.first_seq[group])
        concerned = next(
            (ranks for ranks in (roots, circle) if ranks is not None), self.table.ranks_of(group)
        )
        return Stall(
            roots=none if roots is None else roots,
            silent_groups=none if silent_groups is None else silent_groups,
            circle=none if circle is None else circle,
            waiting=np.unique(self.rank[self.waits]),
            group=group,
            seq=seq,
            absent=int(np.count_nonzero(self.absent[slots])),
            since=float(self.table.rank_progress_at[concerned].max()),
        )


def _stopped_first(table: Table, circle: Ints) -> Ints:
    """Of ranks that wait for one another those that stopped before the others did."""
    at = table.rank_progress_at[circle]
    first: Ints = circle[at - at.min() <= _TOGETHER_S]
    return first


def not_seen_to_wait(table: Table) -> Ints:
    """Ranks that are in no operation, as far as is known: one of them may be what others wait for,
    in operations that are not seen."""
    used = slice(0, table.used)
    rank = table.rank[used]
    known = rank >= 0
    waits = known & (table.entered[used] > table.ended[used])
    return np.setdiff1d(rank[known], rank[waits]).astype(np.int64)


def all_idle(table: Table, idle_s: float, stale_s: float, now: float) -> bool:
    """Whether all ranks stopped long ago, all are heard of, and none waits for another."""
    used = slice(0, table.used)
    known = table.rank[used] >= 0
    ranks = table.rank[used][known]
    if not len(ranks) or bool((table.entered[used] > table.ended[used])[known].any()):
        return False
    heard = now - table.node_heard_at[table.rank_node[ranks]] < stale_s
    silent_s = now - table.rank_progress_at[ranks]
    return bool(heard.all() and np.isfinite(silent_s).all() and (silent_s > idle_s).all())
