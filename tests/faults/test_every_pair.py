"""Every pair of nodes of a 4+2 group is lost, in turn, at moments drawn from a seed."""

import random
from collections import Counter
from itertools import combinations
from time import monotonic, sleep

import pytest

from ckptd.ids import SnapshotId
from ckptd.segment import ParitySidecar, read_checked_record

from .fleet import CELL_BYTES, Fleet

NODES = 6
MOMENTS = ("before the encode", "encoding", "encoding", "committed", "rebuilding")


class Losses:
    """Loses nodes of a fleet; each method returns the snapshot that must survive."""

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self.fleet, self.rng = fleet, rng
        self.in_the_middle = 0
        """How often an encode was under way, by what survivors hold."""

    def lose(self, places: tuple[int, int], moment: str) -> SnapshotId:
        match moment:
            case "before the encode":
                return self._before(places)
            case "encoding":
                return self._encoding(places)
            case "committed":
                return self._committed(places)
        return self._rebuilding(places)

    def _before(self, places: tuple[int, int]) -> SnapshotId:
        self.fleet.hold.touch()
        self.fleet.wait_for("held")
        return self._burn(places)

    def _encoding(self, places: tuple[int, int]) -> SnapshotId:
        """As soon as some node has been told to encode, or a little later."""
        witness = self.rng.choice(self.fleet.places)
        known = set(self.fleet.files(witness, "[0-9]*.manifest"))
        deadline = monotonic() + 30
        while not (new := set(self.fleet.files(witness, "[0-9]*.manifest")) - known):
            assert monotonic() < deadline
        began = SnapshotId("fleet", *map(int, new.pop().name.split(".")[:2]))
        sleep(self.rng.uniform(0, 0.03))  # a moment, not a wait for anything
        survivors = [n for place, n in enumerate(self.fleet.places) if place not in places]
        survives = self._burn(places)
        self.in_the_middle += not all(self._has_parity(node, began) for node in survivors)
        return survives

    def _committed(self, places: tuple[int, int]) -> SnapshotId:
        self.fleet.wait_for_protected(self.fleet.protected())
        return self._burn(places)

    def _rebuilding(self, places: tuple[int, int]) -> SnapshotId:
        """The second is lost, with the newcomer perhaps, while the first is being rebuilt."""
        fleet, (first, second) = self.fleet, places
        survives = self._burn((first,))
        fleet.train()
        newcomer = fleet.places[first]
        fleet.wait(
            "the newcomer to have a part of it", lambda: fleet.files(newcomer, "segment-*"), 60
        )
        sleep(self.rng.uniform(0, 0.02))  # as above
        victims = (second, first) if self.rng.random() < 0.5 else (second,)
        return max(survives, self._burn(victims))

    def _burn(self, places: tuple[int, ...]) -> SnapshotId:
        """Lose the nodes at these places with all they hold, and all ranks; newcomers come."""
        fleet = self.fleet
        survives = fleet.protected()
        assert survives is not None
        for place in places:
            fleet.destroy_node(fleet.places[place])
        fleet.stop_training()
        for place in places:
            fleet.places[place] = fleet.newcomer()
        return survives

    def _has_parity(self, node: str, id: SnapshotId) -> bool:
        return any(
            read_checked_record(path, ParitySidecar).id == id
            for path in self.fleet.files(node, "parity-*.digests")
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_pair_of_nodes_of_a_group_may_be_lost_at_any_moment() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pairs = list(combinations(range(NODES), 2))
    moments = [*MOMENTS, *MOMENTS, *MOMENTS]
    rng.shuffle(pairs)
    rng.shuffle(moments)
    began: Counter[str] = Counter()
    with Fleet(NODES, seed=seed, size_bytes=40 * CELL_BYTES).open() as fleet:
        fleet.train()
        assert fleet.wait_for_start() is None
        losses = Losses(fleet, rng)
        start: SnapshotId | None = None
        for pair, moment in zip(pairs, moments, strict=True):
            # In the life that runs, so that all six nodes have a part in it.
            fleet.wait_for_protected(start)
            lost = [fleet.places[place] for place in pair]
            survives = losses.lose(pair, moment)
            if rng.random() < 0.3:
                rng.shuffle(fleet.places)  # the launcher numbers the ranks anew
            fleet.train()
            start = fleet.wait_for_start()
            print(f"{' and '.join(lost)} lost, {moment}: {survives} was protected, {start} is back")
            assert start is not None
            assert start >= survives
            assert not fleet.said("rejected")
            began[moment] += 1
        print(f"in the middle of an encode: {losses.in_the_middle}")
        assert began == Counter(moments)
