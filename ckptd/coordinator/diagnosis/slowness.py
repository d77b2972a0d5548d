"""Which ranks, transfers or the whole job are slow, against the job's own history of windows."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from ckptd.coordinator.diagnosis.table import Bools, Floats, Ints
from ckptd.coordinator.diagnosis.thresholds import Thresholds
from ckptd.coordinator.diagnosis.windows import KINDS_MAX, Window

_MAD = 1.4826
"""Median absolute deviation to standard deviation, for normal noise."""
_RANKS_KEPT = 2048
"""Ranks of one window whose deviations are kept as history."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What is slow at the end of a window. Each with how strongly: 1 is just enough."""

    ranks: dict[int, float] = field(default_factory=dict)
    excess: Floats = field(default_factory=lambda: np.zeros(0))
    """Of each rank, in the median of the last windows; a share of time."""
    deviation: float = 0.0
    """Of healthy ranks: one robust standard deviation of a window."""
    groups: dict[int, float] = field(default_factory=dict)
    """Groups with slow communication: how many times their baseline."""
    healthy_groups: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Groups whose communication was timed and is as usual."""
    slowest: tuple[int, float, float] = (0, 0.0, 0.0)
    """Kind, seconds and baseline seconds of the transfer that is slowest against its own."""
    pace: float = 1.0
    """How many times as long as usual everything takes."""
    job: float = 0.0
    """Above 1: all are slow together."""


class History:
    """The last windows of one job, and what is usual in it."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self._windows = 0
        self._excess: deque[Floats] = deque(maxlen=thresholds.slow_long_windows)
        self._deviations: deque[Floats] = deque(maxlen=thresholds.history_windows)
        """Of ranks that were not slow, by how much they differed from their peers."""
        self._between = 0.0
        """The same of medians, once, when the job was learnt."""
        self._errors: deque[float] = deque(maxlen=thresholds.slow_windows)
        self._slow_ranks: set[int] = set()
        self._hint = 0.0
        """How strongly any rank stands out; below 1 not enough to be named."""
        self._job_is_slow = False
        self._transfers = Baselines(thresholds)
        self._paces = Baselines(thresholds)
        self._slow_paces: deque[float] = deque(maxlen=thresholds.slow_windows)
        self._usual_paces: deque[float] = deque(maxlen=thresholds.history_windows)

    @property
    def is_learning(self) -> bool:
        """Whether too few windows were seen to say what is usual."""
        limits = self._limits
        return self._windows < limits.warmup_windows + limits.learning_windows

    def add(self, window: Window) -> Verdicts:
        """What is slow, now that `window` is over."""
        self._windows += 1
        if self._windows <= self._limits.warmup_windows:
            return Verdicts()
        ranks, excess, deviation = self._judge_ranks(window)
        groups, healthy, slowest = self._judge_transfers(window)
        is_explained = bool(groups) or self._hint > self._limits.slow_over
        pace, job = self._judge_pace(window, is_explained)
        if self.is_learning:
            return Verdicts()
        return Verdicts(ranks, excess, deviation, groups, healthy, slowest, pace, job)

    def _judge_ranks(self, window: Window) -> tuple[dict[int, float], Floats, float]:
        limits = self._limits
        if self._excess and len(self._excess[-1]) != len(window.excess):
            self._excess.clear()
        self._excess.append(window.excess)
        self._errors.append(window.error)
        deviation = _deviation(self._deviations)
        recent = list(self._excess)[-limits.slow_windows :]
        latest = _median(recent)
        least = max(limits.slow_fraction, 2 * max(self._errors))
        strength = self._strength(latest, max(least, limits.slow_deviations * deviation))
        if len(self._excess) == limits.slow_long_windows:
            lasting = _median(list(self._excess))
            steady = self._steady(lasting, deviation)
            strength = np.fmax(strength, self._strength(lasting, max(least, steady)))
        if len(recent) < limits.slow_windows or self.is_learning:
            strength = np.zeros(len(latest))
            self._between = _deviation([np.abs(_median(list(self._excess)))])
        self._hint = _largest(strength)
        bars = np.ones(len(strength))
        named = [rank for rank in self._slow_ranks if rank < len(bars)]
        bars[named] = limits.slow_over
        is_slow = strength > bars
        # What is not known now is as it was.
        is_slow[named] |= np.isnan(strength[named])
        slow = np.flatnonzero(is_slow)
        self._slow_ranks = {int(rank) for rank in slow}
        self._remember(window.excess)
        known = np.nan_to_num(strength, nan=limits.slow_over)
        return {int(rank): float(known[rank]) for rank in slow}, np.nan_to_num(latest), deviation

    def _steady(self, lasting: Floats, deviation: float) -> float:
        """What healthy ranks do not have in the median of many windows, for noise averages out, and
        a cause stays.

        `deviation`, of ranks in single windows, is too much in a small job, where the slow rank and
        its peers are most of them. There it is how a rank's windows differ from one another, or how
        ranks differed when the job was learnt.
        """
        limits = self._limits
        stride = max(1, len(lasting) // _RANKS_KEPT)
        noise = np.abs(np.stack(self._excess)[:, ::stride] - lasting[::stride])
        # A median has 1.25 times the deviation of a mean.
        averaged = 1.25 / sqrt(limits.slow_long_windows)
        own = max(averaged * _deviation([noise]), self._between)
        return limits.slow_deviations * min(averaged * deviation, own)

    def _strength(self, excess: Floats, needed: float) -> Floats:
        """How many times what is needed.

        In synchronous training the slowest sets the pace: what its victims seem to lack is an error
        of measurement that grows with it, and lesser stragglers cost nothing. So these count as 0.
        """
        far_less = excess < self._limits.slow_next * _largest(excess)
        strength: Floats = np.where(far_less, 0.0, excess / needed)
        return strength

    def _remember(self, excess: Floats) -> None:
        """Deviations of ranks that are not slow tell what is usual."""
        usual = np.abs(excess)
        usual[list(self._slow_ranks)] = np.nan
        usual = usual[~np.isnan(usual)]
        stride = max(1, len(usual) // _RANKS_KEPT)
        self._deviations.append(usual[::stride])

    def _judge_transfers(
        self, window: Window
    ) -> tuple[dict[int, float], Ints, tuple[int, float, float]]:
        keys = window.transfer_key
        if not len(keys):
            return {}, np.zeros(0, np.int64), (0, 0.0, 0.0)
        group = keys // KINDS_MAX
        # What costs hardly any time is not worth a finding, and what is not resolved proves none.
        least = self._limits.transfer_share / np.maximum(window.pace[group], 1e-9)
        least = np.maximum(least, window.resolution_s)
        ratio, base, is_slow = self._transfers.compare(keys, window.transfer_s, least)
        slow = np.flatnonzero(is_slow)
        groups = {int(group[i]): float(ratio[i]) for i in slow[np.argsort(ratio[slow])]}
        timed = np.unique(group)
        healthy = timed[~np.isin(timed, list(groups))]
        if not len(slow):
            return {}, healthy, (0, 0.0, 0.0)
        worst = int(slow[np.argmax(ratio[slow])])
        kind = int(keys[worst]) % KINDS_MAX
        return groups, healthy, (kind, float(window.transfer_s[worst]), float(base[worst]))

    def _judge_pace(self, window: Window, is_explained: bool) -> tuple[float, float]:
        """Seconds an operation, over all groups: their median against the baselines."""
        limits = self._limits
        groups = np.flatnonzero(window.pace * window.seconds > limits.window_ops - 0.5)
        if not len(groups):
            return 1.0, 0.0
        ratio = self._paces.ratio(groups, 1.0 / window.pace[groups])
        now = float(np.median(ratio)) if len(ratio) else 1.0
        self._slow_paces.append(now)
        # A rank or transfer that explains it needs some windows to be found: so be slower here.
        steady = np.median(self._slow_paces) if self._job_is_slow else min(self._slow_paces)
        pace = float(steady)
        usual = np.abs(np.log(self._usual_paces)) if self._usual_paces else np.zeros(1)
        needed = max(
            np.log(limits.pace_ratio), limits.slow_deviations * _MAD * float(np.median(usual))
        )
        is_full = len(self._slow_paces) == self._slow_paces.maxlen
        strength = float(np.log(pace) / needed) if is_full else 0.0
        if np.log(now) < limits.slow_over * needed:
            self._usual_paces.append(now)
            self._paces.follow(groups, 1.0 / window.pace[groups])
        if self._job_is_slow:
            strength /= limits.slow_over
        strength = 0.0 if is_explained else strength
        self._job_is_slow = strength > 1
        return pace, strength


class Baselines:
    """What a quantity usually is, for each of many keys: the median of the first windows in which
    it was seen, and then slowly after it while it is near."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self._index: dict[int, int] = {}
        self._first: Floats = np.full((64, thresholds.learning_windows), np.nan)
        self._seen: Ints = np.zeros(64, np.int64)
        self._compared: Ints = np.zeros(64, np.int64)
        self._base: Floats = np.full(64, np.nan)
        self._recent: Floats = np.full((64, thresholds.slow_windows), np.nan)
        self._noise: deque[Floats] = deque(maxlen=thresholds.history_windows)
        self._slow: Bools = np.zeros(64, np.bool_)

    def compare(self, keys: Ints, values: Floats, least: Floats) -> tuple[Floats, Floats, Bools]:
        """Ratio to the baseline in the median of the last windows, the baseline, and is it slow:
        well above, and by at least `least`."""
        limits = self._limits
        rows = self._rows(keys)
        ratio = self._ratio(rows, values)
        place = self._compared[rows] % limits.slow_windows
        self._compared[rows] += 1
        self._recent[rows, place] = ratio
        steady = np.median(self._recent[rows], axis=1)  # NaN until there are enough
        noise = limits.slow_deviations * _deviation(self._noise)
        needed = np.full(len(rows), max(limits.transfer_ratio - 1, noise))
        needed[self._slow[rows]] *= limits.slow_over
        with np.errstate(invalid="ignore"):
            is_slow: Bools = steady - 1 > needed
            is_slow &= values - self._base[rows] > least
        self._slow[rows] = is_slow
        usual = np.abs(ratio[~is_slow & ~np.isnan(ratio)] - 1)
        self._noise.append(usual[:: max(1, len(usual) // _RANKS_KEPT)])
        self._follow(rows[~is_slow], values[~is_slow])
        return steady, self._base[rows], is_slow

    def ratio(self, keys: Ints, values: Floats) -> Floats:
        """To the baseline; only of keys that have one."""
        ratio = self._ratio(self._rows(keys), values)
        return ratio[~np.isnan(ratio)]

    def follow(self, keys: Ints, values: Floats) -> None:
        """These values are healthy."""
        self._follow(self._rows(keys), values)

    def _ratio(self, rows: Ints, values: Floats) -> Floats:
        ratio: Floats = values / np.maximum(self._base[rows], 1e-9)
        return ratio

    def _follow(self, rows: Ints, values: Floats) -> None:
        learning = self._limits.learning_windows
        is_new = self._seen[rows] < learning
        new, old = rows[is_new], rows[~is_new]
        self._first[new, self._seen[new]] = values[is_new]
        self._seen[rows] += 1
        ready = new[self._seen[new] == learning]
        self._base[ready] = np.median(self._first[ready], axis=1)
        drift = self._limits.baseline_drift
        self._base[old] += drift * (values[~is_new] - self._base[old])

    def _rows(self, keys: Ints) -> Ints:
        index = self._index
        rows = [index.setdefault(key, len(index)) for key in keys.tolist()]
        if len(index) > len(self._base):
            self._grow(2 * len(index))
        return np.array(rows, np.int64)

    def _grow(self, length: int) -> None:
        for name in ("_first", "_seen", "_compared", "_base", "_recent", "_slow"):
            old = getattr(self, name)
            made = np.zeros((length, *old.shape[1:]), old.dtype)
            if made.dtype == np.float64:
                made[:] = np.nan
            made[: len(old)] = old
            setattr(self, name, made)


def _largest(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else 0.0


def _deviation(kept: Iterable[Floats]) -> float:
    """A robust standard deviation, from absolute deviations of several windows; NaN: not known."""
    values = np.concatenate([np.zeros(0), *(each.ravel() for each in kept)])
    values = values[~np.isnan(values)]
    return _MAD * float(np.median(values)) if len(values) else 0.0


def _median(windows: list[Floats]) -> Floats:
    """Of each rank over the windows that know it; NaN where two or fewer do.

    One delay may fall into two windows, so the two largest are never it, however few are known.
    """
    ordered = np.sort(np.stack(windows), axis=0)  # NaN comes last
    known = np.count_nonzero(~np.isnan(ordered), axis=0)
    column, third = np.arange(ordered.shape[1]), np.maximum(known - 3, 0)
    low, high = (
        ordered[np.minimum(middle, third), column]
        for middle in (np.maximum(known - 1, 0) // 2, known // 2)
    )
    median: Floats = np.where(known >= 3, (low + high) / 2, np.nan)
    return median
