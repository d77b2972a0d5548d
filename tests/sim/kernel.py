"""The simulation's clock, its story, and how it says that something is wrong."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest, JobRecord
from ckptd.wire import Holding, RankState, Source

START_S = 1000.0


class Violation(AssertionError):
    """What must always hold does not."""


class Clock:
    """What happens when. Times in seconds; those at the same time happen in the order given."""

    def __init__(self, seed: str) -> None:
        self.now = START_S
        self.random = random.Random(seed)
        self.events = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (when, next(self._numbers), what, args))

    def later(self, range_s: tuple[float, float], what: Callable[..., None], *args: Any) -> None:
        self.at(self.now + self.random.uniform(*range_s), what, *args)

    def run_until(self, end: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Let things happen until `end`, or until there is `enough`."""
        while self._queue and self._queue[0][0] <= end:
            self.now, _, what, args = heapq.heappop(self._queue)
            self.events += 1
            what(*args)
            if enough():
                return
        self.now = end

    @property
    def waiting(self) -> int:
        """How many things are still to happen."""
        return len(self._queue)


class Story:
    """The last things that happened, put in words only when somebody wants to read them."""

    def __init__(self, clock: Clock, kept: int | None) -> None:
        self._clock = clock
        self._lines: deque[tuple[float, str, tuple[Any, ...]]] = deque(maxlen=kept)

    def tell(self, who: str, *what: Any) -> None:
        self._lines.append((self._clock.now - START_S, who, what))

    def lines(self, last: int | None = None, about: str = "") -> list[str]:
        """The last lines, oldest first; only those in which `about` occurs."""
        told = [
            f"{at:9.4f}  {who:<12} {' '.join(map(brief, what))}" for at, who, what in self._lines
        ]
        told = [line for line in told if about in line]
        return told if last is None else told[-last:]


def brief(what: Any) -> str:
    """In few words, what a person needs to follow a story."""
    match what:
        case str() | SnapshotId():
            return str(what)
        case Holding():
            ranks = ",".join(str(extent.rank) for extent in what.extents)
            known = " with its manifest" if what.manifest is not None else ""
            return f"{what.id}: ranks {ranks or 'none'}{', parity' * what.parity}{known}"
        case RankState():
            return (
                f"{what.job} {what.round} rank {what.rank} life {what.life} step {what.step} "
                f"seen {what.seen_step} free {what.free_slots}"
            )
        case JobManifest():
            groups = [[member.node for member in group.members] for group in what.groups]
            return f"manifest of {what.id} on {groups}"
        case JobRecord():
            return f"life {what.life} of {what.job} on {sorted(what.nodes)} from {what.ancestors}"
        case Source():
            return f"ranks {what.ranks} parity {what.parity}"
        case tuple() | list():
            return "[" + ", ".join(map(brief, what)) + "]"
        case msgspec.Struct():
            names = what.__struct_fields__
        case _ if hasattr(what, "__dataclass_fields__"):
            names = tuple(what.__dataclass_fields__)
        case _:
            return repr(what)
    skipped = ("incarnation", "cells", "address", "codec", "engine", "memory_limit_bytes")
    fields = [(name, getattr(what, name)) for name in names if name not in skipped]
    told = [f"{name}={brief(v)}" for name, v in fields if v not in (None, "", (), 0, False)]
    return f"{type(what).__name__}({' '.join(told)})"
