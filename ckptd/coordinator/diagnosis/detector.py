"""Who is slow, who hangs: the decider that is fed with sketches. No IO, clock or randomness."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckptd.coordinator.diagnosis import explain
from ckptd.coordinator.diagnosis.finding import SUSPECTS_MAX, Finding, Kind, Scope, listed
from ckptd.coordinator.diagnosis.hangs import all_idle, find_stall, not_seen_to_wait
from ckptd.coordinator.diagnosis.slowness import History
from ckptd.coordinator.diagnosis.table import Table
from ckptd.coordinator.diagnosis.thresholds import Thresholds
from ckptd.coordinator.diagnosis.windows import Meter
from ckptd.sketches import Sketch

_HANG = "hang"


@dataclass(frozen=True, slots=True)
class Offset:
    """A node's clock against the coordinator's, from heartbeat round trips."""

    ahead_s: float = 0.0
    error_s: float = 0.0


class Detector:
    """Watches one life of a job.

    `observe` each sketch as it arrives, and ask for `findings` now and then: more often than the
    steps are long, if hangs are to be found within a few of them. `now` is monotonic seconds.
    A new life gets a new detector; so does a job whose program is changed in mid-run, or it is
    told by `replan`.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.table = Table()
        self.open: dict[str, Finding] = {}
        """Findings that are not over."""
        self._numbers = 0
        self._gaps: deque[float] = deque(maxlen=self.thresholds.gap_windows)
        self._node_gaps: deque[float] = deque(maxlen=self.thresholds.gap_windows)
        self._meter = Meter(self.thresholds.window_ops, self.thresholds.rows_min)
        self._history = History(self.thresholds)
        self._paused: dict[int, str] = {}
        self._began = False
        self._windows = 0

    def observe(self, sketch: Sketch, now: float, offset: Offset | None = None) -> bool:
        """Take in what an agent says. False: its layout is unknown, ask for a whole sketch.

        Raises ProtocolError for a sketch that cannot be of this life.
        """
        offset = offset or Offset()
        return self.table.observe(sketch, now, offset.ahead_s, offset.error_s)

    def pause(self, ranks: Mapping[int, str], now: float) -> None:
        """What ranks have said that they do instead of training, such as "evaluation".

        They hang for nobody, and slowness is not looked for. When one of them is back, the silence
        meanwhile counts for nothing.
        """
        if self._paused.keys() - ranks.keys():
            self._forget_silence(now)
        self._paused = dict(ranks)

    def replan(self, now: float) -> None:
        """The program changes: what was usual is so no more (also after compilation)."""
        self._history = History(self.thresholds)
        self._gaps.clear()
        self._windows = 0
        self._forget_silence(now)

    @property
    def quiet_because(self) -> str:
        """Why there are no findings of slowness now, and hangs only after long; "" if there are."""
        if self._paused:
            what = ", ".join(sorted(set(self._paused.values())))
            several = "s" if len(self._paused) > 1 else ""
            return f"paused: {what} (rank{several} {listed(sorted(self._paused))})"
        if self._history.is_learning:
            return "learning what is usual in this job"
        return ""

    @property
    def hang_timeout_s(self) -> float:
        """How long a silent rank is not suspicious."""
        limits = self.thresholds
        if len(self._gaps) < limits.warmup_windows:
            return limits.startup_hang_s
        usual = float(np.quantile(self._gaps, limits.gap_quantile))
        return limits.hang_floor_s + limits.hang_gaps * usual

    @property
    def stale_s(self) -> float:
        """How long a silent node is not unknown."""
        usual = max(self._node_gaps, default=0.0)
        return max(self.thresholds.stale_s, 2 * usual)

    def findings(self, now: float) -> list[Finding]:
        """What is new, changed, or over, since this was last asked."""
        self.table.flush()
        if not self.table.used:
            return self._update({}, now, lambda finding: True)
        if self._paused:
            self._began = False
        elif not self._began:
            self._began = True
            self._meter.begin(self.table, now)
        news = self._update(self._hangs(now), now, lambda finding: finding.kind.is_hang)
        if self._began and not any(finding.kind.is_hang for finding in self.open.values()):
            news += self._end_window(now)
        return news

    def narrowed(self, finding: Finding, ranks: Sequence[int]) -> Finding:
        """A hang of `ranks`, when the second witness has seen the other suspects wait."""
        return explain.narrowed(self.table, finding, ranks, self.thresholds)

    def confirmed(self, finding: Finding, ranks: Sequence[int]) -> Finding:
        """A hang, when the second witness has seen it, of `ranks` if it could tell of whom."""
        return replace(self.narrowed(finding, ranks), confidence=explain.SURE) if ranks else finding

    def reconsidered(self, finding: Finding, waiting: Sequence[int]) -> Finding | None:
        """A hang of which all suspects were seen to wait, `waiting`, though in nothing recorded.

        The one that they wait for may be any rank that is not seen to wait: those are suspected
        now. If they were already, it is what they communicate with one another that is stuck. None
        if they are too many to look at.
        """
        others = tuple(map(int, not_seen_to_wait(self.table)))
        if len(others) > SUSPECTS_MAX:
            return None
        if set(others) - set(finding.suspects):
            return replace(finding, suspects=others)
        return explain.unseen(self.table, finding, waiting)

    def _hangs(self, now: float) -> dict[str, Finding]:
        timeout_s = self.hang_timeout_s
        stall = find_stall(self.table, timeout_s, self.stale_s, now, tuple(self._paused))
        if stall is not None:
            return {_HANG: explain.stall(self.table, stall, timeout_s, self.thresholds, now)}
        if not self._paused and all_idle(self.table, self.thresholds.idle_s, self.stale_s, now):
            return {_HANG: explain.idle(self.table, self.thresholds.idle_s, now)}
        return {}

    def _end_window(self, now: float) -> list[Finding]:
        limits, meter = self.thresholds, self._meter
        elapsed_s = now - meter.began_at
        if elapsed_s < limits.window_min_s:
            return []
        if not meter.is_full(self.table) and elapsed_s < limits.window_max_s:
            return []
        window = meter.read(self.table, now)
        since = meter.began_at
        meter.begin(self.table, now)
        if window is None:
            return []
        self._windows += 1
        self._remember_gaps(counts=self._windows > limits.warmup_windows)
        verdicts = self._history.add(window)
        blamed = {
            finding.culprit.nodes[0]
            for finding in self.open.values()
            if finding.culprit.scope is Scope.NODE and finding.kind is Kind.NON_COMMUNICATION_SLOW
        }
        found = explain.slow(self.table, verdicts, limits, now, since, blamed)
        return self._update(found, now, lambda finding: not finding.kind.is_hang)

    def _remember_gaps(self, counts: bool = True) -> None:
        if counts:
            self._gaps.append(self.table.longest_gap_s)
            self._node_gaps.append(self.table.longest_node_gap_s)
        self.table.longest_gap_s = self.table.longest_node_gap_s = 0.0

    def _update(
        self, found: dict[str, Finding], now: float, concerns: Callable[[Finding], bool]
    ) -> list[Finding]:
        """Bring open findings up to date with all that `concerns` says are of the same sort."""
        news = []
        for key, finding in found.items():
            old = self.open.get(key)
            if old is None:
                self._numbers += 1
                self.open[key] = replace(finding, number=self._numbers)
                news.append(self.open[key])
            elif _names(old) != _names(finding):
                self.open[key] = replace(finding, number=old.number, since=old.since)
                news.append(self.open[key])
            else:
                since = min(old.since, finding.since)
                self.open[key] = replace(finding, number=old.number, since=since)
        for key, finding in list(self.open.items()):
            if concerns(finding) and key not in found:
                del self.open[key]
                news.append(replace(finding, over=True, found_at=now))
                if finding.kind.is_hang:
                    self._remember_gaps()
                    self._began = False
        return news

    def _forget_silence(self, now: float) -> None:
        """Nobody was silent, and no window is under way."""
        self.table.forget_silence(now)
        self._began = False


def _names(finding: Finding) -> tuple[object, ...]:
    """What makes a finding another one for whoever reads it."""
    culprit = finding.culprit
    is_node = culprit.scope is Scope.NODE
    return finding.kind, culprit.scope, culprit.nodes, () if is_node else culprit.ranks
