"""What ranks have said that they do instead of training, as their agents tell it over and over."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ckptd.wire import Pause


@dataclass(slots=True)
class _Paused:
    node: str
    told: Pause
    heard_at: float
    overran: bool = False

    def for_s(self, now: float) -> float:
        return self.told.for_s + now - self.heard_at


class Pauses:
    """Those of one life of a job."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Paused] = {}

    def hear(
        self, node: str, told: Mapping[int, Pause], members: Mapping[int, str], now: float
    ) -> None:
        """All pauses on a node, as its agent says; `members`: rank to node.

        What makes no sense, or is of a rank that is not known to be there, does not count.
        """
        told = {r: p for r, p in told.items() if members.get(r) == node and _is_sound(p)}
        for rank in [rank for rank, paused in self._ranks.items() if paused.node == node]:
            if rank not in told:
                del self._ranks[rank]
        for rank, pause in told.items():
            old = self._ranks.get(rank)
            overran = old is not None and old.overran and pause.for_s >= old.told.for_s
            self._ranks[rank] = _Paused(node, pause, now, overran)

    def overrun(self, now: float) -> dict[int, str]:
        """By rank, once each, what lasts too long: it was forgotten, or the rank hangs in it."""
        found = {}
        for rank, paused in self._ranks.items():
            if not paused.overran and paused.for_s(now) > paused.told.at_most_s:
                paused.overran = True
                found[rank] = (
                    f"rank {rank} is paused for longer than the {paused.told.at_most_s:g} s that "
                    f"it said ({paused.told.what}): its silence counts again"
                )
        return found

    @property
    def counting(self) -> dict[int, str]:
        """By rank, what it does, of those that do not last too long."""
        return {rank: p.told.what for rank, p in self._ranks.items() if not p.overran}

    def as_json(self, now: float) -> list[dict[str, Any]]:
        """`over`: for longer than was said."""
        return [
            {
                "rank": rank,
                "what": paused.told.what,
                "for_s": paused.for_s(now),
                "at_most_s": paused.told.at_most_s,
                "over": paused.overran,
            }
            for rank, paused in sorted(self._ranks.items())
        ]


def _is_sound(pause: Pause) -> bool:
    return all(isfinite(seconds) and seconds >= 0 for seconds in (pause.for_s, pause.at_most_s))
