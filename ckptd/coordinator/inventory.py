"""Which live nodes hold what of each snapshot, counted as it is reported. No IO, no clock.

What can be computed from all reports at any time is kept here only so that a report of one of ten
thousand nodes need not look at those of all others.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptd.coordinator import recovery
from ckptd.errors import InternalError
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest
from ckptd.wire import Holding


@dataclass
class Held:
    """Of one snapshot."""

    holdings: dict[str, Holding] = field(default_factory=dict)
    """By node."""
    ranks: Counter[int] = field(default_factory=Counter)
    """On how many nodes the segment of each rank is; only of those that are on one."""
    parities: int = 0
    """On how many nodes there is parity."""
    protected: tuple[JobManifest, bool] | None = None
    """What was found last, if nothing has changed since: whether it is protected."""

    _places: tuple[JobManifest, int] | None = None
    """How many nodes of a manifest are to have parity."""

    def put(self, node: str, holding: Holding) -> None:
        self.remove(node)
        self.holdings[node] = holding
        self.parities += holding.parity
        self.ranks.update(extent.rank for extent in holding.extents)

    def remove(self, node: str) -> None:
        self.protected = None
        old = self.holdings.pop(node, None)
        if old is None:
            return
        self.parities -= old.parity
        for extent in old.extents:
            self.ranks[extent.rank] -= 1
            if not self.ranks[extent.rank]:
                del self.ranks[extent.rank]

    def is_protected(self, manifest: JobManifest) -> bool:
        """As `recovery.is_protected`; at once if too little is there, or if it was asked before."""
        if self._places is None or self._places[0] is not manifest:
            coded = (group for group in manifest.groups if group.parity_shards)
            self._places = manifest, sum(len(group.members) for group in coded)
        if self.parities < self._places[1]:
            return False
        if self.protected is None or self.protected[0] is not manifest:
            self.protected = manifest, recovery.is_protected(manifest, self.holdings)
        return self.protected[1]


class Inventory:
    """Of all snapshots."""

    def __init__(self) -> None:
        self._held: dict[SnapshotId, Held] = {}

    def put(self, node: str, holding: Holding) -> None:
        """A live node holds this now."""
        self._held.setdefault(holding.id, Held()).put(node, holding)

    def remove(self, node: str, id: SnapshotId) -> None:
        """It holds nothing of it any more."""
        held = self._held.get(id)
        if held is not None:
            held.remove(node)
            if not held.holdings:
                del self._held[id]

    def lose(self, node: str, ids: Iterable[SnapshotId]) -> None:
        """All of these are gone from it."""
        for id in ids:
            self.remove(node, id)

    def check(self, id: SnapshotId, holdings: Mapping[str, Holding]) -> None:
        """Raise InternalError if the counts are not what `holdings` say. Called by tests."""
        held = self.of(id)
        ranks = Counter(e.rank for holding in holdings.values() for e in holding.extents)
        parities = sum(holding.parity for holding in holdings.values())
        if (held.holdings, held.ranks, held.parities) != (holdings, ranks, parities):
            raise InternalError(f"what is counted of {id} is not what live nodes hold")

    def of(self, id: SnapshotId) -> Held:
        """What there is of a snapshot."""
        return self._held.get(id) or Held()
