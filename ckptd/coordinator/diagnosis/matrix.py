"""The delay matrix: transfers between agents, by source and destination.

Agents move cells between all pairs of a group at every snapshot, and time that; so it costs
nothing (C4). A hot row is a node that sends slowly, a hot column one that receives slowly, a single
hot cell a link. It sees the agents' network, which may not be the one that training uses.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, log
from statistics import median

from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Scope

NETWORK = "the agents' network"
_AS_GOOD_AS_DEAD = 1000.0
_FASTEST_S_PER_GIB = 1e-6  # no network comes near it


@dataclass(frozen=True, slots=True)
class MatrixLimits:
    """When a transfer counts as slow."""

    ratio: float = 2.0
    """Times the usual delay: the median of the lower half of all pairs."""
    deviations: float = 5.0
    """And so many robust standard deviations of the logarithms of all delays."""
    share: float = 0.7
    """Of a row's or column's pairs that must be hot for the whole of it to be."""
    pairs_min: int = 2
    """Pairs of a row or column below which it cannot be told from a link."""
    kept: int = 9
    """Transfers that are kept of each pair; their median counts."""
    small_bytes: int = 256 << 10
    """Smaller transfers are latency, not rate, and are left out."""
    failed_s_per_gib: float = 1e6
    """A transfer that did not end counts as this slow."""
    probes_each: int = 4
    """Pairs that are probed for each suspect of a finding, both ways counted."""


@dataclass(frozen=True, slots=True)
class Hot:
    """Something through which transfers are slow."""

    culprit: Culprit
    what: str
    """"sends slowly", "receives slowly", "sends and receives slowly", or "is slow"."""
    ratio: float
    """Median delay of its pairs, in usual delays."""
    pairs: int
    """How many were measured."""

    @property
    def sentence(self) -> str:
        over = f"over {self.pairs} measured pairs of {NETWORK}"
        if self.ratio > _AS_GOOD_AS_DEAD:
            return f"{self.culprit} {self.what}: hardly anything comes through {over}"
        return f"{self.culprit} {self.what}: {self.ratio:.1f} times the usual delay {over}"


class DelayMatrix:
    """Delays of transfers between pairs of nodes, seconds a GiB. Bounded by the pairs in use."""

    def __init__(self, limits: MatrixLimits | None = None) -> None:
        self.limits = limits or MatrixLimits()
        self._delays: dict[tuple[str, str], deque[float]] = {}

    def observe(self, source: str, destination: str, size_bytes: int, seconds: float) -> None:
        """A transfer, or probe, has ended; infinite `seconds`: it failed."""
        if source == destination or not (size_bytes >= self.limits.small_bytes and seconds > 0):
            return
        delay = seconds / size_bytes * (1 << 30) if isfinite(seconds) else inf
        if delay < _FASTEST_S_PER_GIB:
            return
        kept = self._delays.setdefault((source, destination), deque(maxlen=self.limits.kept))
        kept.append(min(delay, self.limits.failed_s_per_gib))

    def forget(self, node: str) -> None:
        """A node has left."""
        self._delays = {pair: kept for pair, kept in self._delays.items() if node not in pair}

    def delays(self) -> dict[tuple[str, str], float]:
        """Median delay of each pair that was measured, seconds a GiB."""
        return {pair: median(kept) for pair, kept in self._delays.items()}

    def hot(self, among: Sequence[str] = ()) -> list[Hot]:
        """Nodes and links that are slow, the worst first; only pairs of `among`, if given."""
        chosen = set(among)
        delays = {
            pair: delay
            for pair, delay in self.delays().items()
            if not chosen or chosen.issuperset(pair)
        }
        if len(delays) < 3:
            return []
        # Nothing is faster than usual, and of few nodes one makes half of all pairs hot: so the
        # lower half tells what is usual.
        lower = sorted(delays.values())[: (len(delays) + 1) // 2]
        usual = median(lower)
        ratios = {pair: delay / usual for pair, delay in delays.items()}
        deviation = 1.4826 * median(abs(log(delay / usual)) for delay in lower)
        needed = max(log(self.limits.ratio), self.limits.deviations * deviation)
        hot_pairs = {pair for pair, ratio in ratios.items() if log(ratio) > needed}
        return sorted(self._explain(hot_pairs, ratios), key=lambda hot: -hot.ratio)

    def _explain(
        self, hot_pairs: set[tuple[str, str]], ratios: dict[tuple[str, str], float]
    ) -> Iterable[Hot]:
        """The fewest rows, columns and cells that cover all hot pairs, greedily."""
        left = set(hot_pairs)
        sides: dict[str, set[int]] = {}
        explained: dict[str, set[tuple[str, str]]] = {}
        while True:
            line = self._fullest_line(left, ratios)
            if line is None:
                break
            end, node = line
            pairs = {pair for pair in ratios if pair[end] == node}
            sides.setdefault(node, set()).add(end)
            explained.setdefault(node, set()).update(pairs)
            left -= pairs
        for node, ends in sides.items():
            verb = "sends and receives" if len(ends) == 2 else ("sends", "receives")[min(ends)]
            ratio = median(ratios[pair] for pair in explained[node])
            culprit = Culprit(Scope.NODE, (), (node,))
            yield Hot(culprit, f"{verb} slowly", ratio, len(explained[node]))
        for link in sorted({(min(pair), max(pair)) for pair in left}):
            values = [ratios[pair] for pair in (link, link[::-1]) if pair in left]
            yield Hot(Culprit(Scope.LINK, (), link), "is slow", max(values), len(values))

    def _fullest_line(
        self, left: set[tuple[str, str]], ratios: dict[tuple[str, str], float]
    ) -> tuple[int, str] | None:
        """The row (0) or column (1) with the largest share of hot pairs, if it is large enough."""
        counts: dict[tuple[int, str], int] = {}
        for pair in ratios:
            for end in (0, 1):
                counts[end, pair[end]] = counts.get((end, pair[end]), 0) + 1
        hot: dict[tuple[int, str], int] = {}
        for pair in left:
            for end in (0, 1):
                hot[end, pair[end]] = hot.get((end, pair[end]), 0) + 1
        full = [
            (count / counts[line], count, line)
            for line, count in hot.items()
            if count >= self.limits.pairs_min and count >= self.limits.share * counts[line]
        ]
        return max(full)[2] if full else None


def probes(
    suspects: Sequence[str], others: Sequence[str], limits: MatrixLimits | None = None
) -> list[tuple[str, str]]:
    """Ordered pairs to measure, so that a row or column can be told from a cell. Bounded.

    Each suspect with its neighbours in a circle, the next one and then the one after it, both
    ways: in order of names, for rings of collectives run from node to node in that order too. So
    the number grows with the suspects only. `others` make up the circle where they are few.
    """
    limits = limits or MatrixLimits()
    circle = list(dict.fromkeys(suspects))
    # With fewer than four nodes a slow one cannot be told from the rest.
    known = set(circle)
    more = [node for node in dict.fromkeys(others) if node not in known]
    circle += more[: max(0, 5 - len(circle))]
    pairs: dict[tuple[str, str], None] = {}
    for distance in range(1, len(circle)):
        for i, node in enumerate(circle):
            other = circle[(i + distance) % len(circle)]
            pairs[node, other] = pairs[other, node] = None
        if len(pairs) >= limits.probes_each * len(circle):
            break
    return list(pairs)[: limits.probes_each * len(circle)]


def narrow(finding: Finding, matrix: DelayMatrix, others: Sequence[str] = ()) -> Finding:
    """A finding about communication, with what the matrix says about its candidates.

    Where the matrix shows one of the candidates, or a link between two of them, to be slow, that is
    the culprit (or one of `others`, if with whom they communicate is not known); where it shows
    nothing, the finding stays as it is, and says so.
    """
    candidates = finding.culprit.nodes
    if finding.culprit.scope not in (Scope.NODES, Scope.NODE, Scope.LINK) or len(candidates) < 1:
        return finding
    among = (*candidates, *others)
    possible = set(among if finding.peers_unknown else candidates)
    hot = [h for h in matrix.hot(among) if possible.issuperset(h.culprit.nodes)]
    if not hot:
        note = f"{NETWORK} shows nothing unusual between them"
        return replace(finding, evidence={**finding.evidence, "matrix": note})
    worst = hot[0]
    # Ranks in order of nodes: those on the nodes that are left stay suspects.
    confidence = max(finding.confidence, 0.9 if len(hot) == 1 else 0.9 / len(hot))
    return replace(
        finding,
        culprit=replace(worst.culprit, ranks=finding.culprit.ranks),
        confidence=confidence,
        sentence=f"{finding.sentence}; {worst.sentence}",
        evidence={**finding.evidence, "matrix": worst.sentence},
        measured=True,
    )
