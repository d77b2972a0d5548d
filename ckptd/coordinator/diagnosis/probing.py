"""Before a network is blamed: pairs of nodes that a finding leaves open are measured, at once.

The delay matrix lives on transfers that happen anyway, and they are old, or of other pairs. So each
suspect moves a few MiB to and from its neighbours, and the finding is narrowed by what that took.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ckptd.coordinator.diagnosis.finding import Finding, Kind, Scope
from ckptd.coordinator.diagnosis.matrix import NETWORK, DelayMatrix, MatrixLimits, narrow, probes
from ckptd.wire import Probe, Transfer

PATIENCE_S = 8.0
_PAIRS_MIN = 3
_LIMITS = MatrixLimits(ratio=5.0)
"""A few transfers only, on machines that may be busy. Of five nodes on two busy cores, with
nothing wrong, a link was named in 14 of 60 measurements with a ratio of 2, in 2 of 200 with 5."""
_SUSPECTS_MAX = 256
"""Of more, the rest is not measured: who is to blame for so many is seldom one node."""
_COMMUNICATION = (Kind.COMMUNICATION_HANG, Kind.COMMUNICATION_SLOW)
_NETWORK_SCOPES = (Scope.NODE, Scope.NODES, Scope.LINK)


class Probing:
    """The measurements for one finding, from the orders to what they say."""

    def __init__(
        self, finding: Finding, nodes: Sequence[str], cells_of: Callable[[str], str], now: float
    ) -> None:
        """`nodes`: of the job. `cells_of` a node: the address of its cell server, "" if none."""
        self.finding = finding
        self.until = now + PATIENCE_S
        self._matrix = DelayMatrix(_LIMITS)
        self._sources: dict[str, dict[str, str]] = {}
        """By destination, what it is to get bytes from, and where."""
        concerned = finding.kind in _COMMUNICATION and finding.culprit.scope in _NETWORK_SCOPES
        suspects = finding.culprit.nodes[:_SUSPECTS_MAX] if concerned else ()
        for source, destination in probes(suspects, nodes) if suspects else ():
            address = cells_of(source)
            if address and cells_of(destination):
                self._sources.setdefault(destination, {})[source] = address
        self.awaited = set(self._sources)

    def orders(self, job: str, life: int) -> list[tuple[str, Probe]]:
        """What to tell which node."""
        number = self.finding.number
        return [(n, Probe(job, life, number, cells)) for n, cells in sorted(self._sources.items())]

    def heard(self, node: str, transfers: Iterable[Transfer]) -> None:
        """What one of them has measured; only what it was asked for counts."""
        self.awaited.discard(node)
        for each in transfers:
            if each.source in self._sources.get(node, {}):
                self._matrix.observe(each.source, node, each.size_bytes, each.seconds)

    def narrowed(self) -> Finding:
        """The finding, with what was measured."""
        if len(self._matrix.delays()) < _PAIRS_MIN:
            note = f"too few pairs of {NETWORK} could be measured"
            return replace(self.finding, evidence={**self.finding.evidence, "matrix": note})
        others = {*self._sources, *(s for each in self._sources.values() for s in each)}
        return narrow(self.finding, self._matrix, sorted(others - {*self.finding.culprit.nodes}))
