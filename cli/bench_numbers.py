"""The arithmetic of `ckptd bench`: who measures when, and what the samples say. No IO."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptd.trainer.bench_messages import Step


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of one sample or more; quartiles lie within the samples (numpy's `linear`)."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Snapshot:
    """One snapshot's cost to the training: inside the save, and at the gate of the next step."""

    blocked_s: float
    audited: bool


def order_of_turn(names: Sequence[str], turn: int) -> list[str]:
    """The order in which methods measure: every other turn backwards, rotated after each two.

    So none is always first, or always after the same one; two take turns as A B, B A, B A, A B.
    """
    first = turn // 2 % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


def snapshots(steps: Sequence[Step]) -> list[Snapshot]:
    """Those of successive steps; the last step's is left out, for its gate is not among them."""
    return [
        Snapshot(step.save_s + after.gate_s, audited=after.audits > step.audits)
        for step, after in pairwise(steps)
        if step.captured
    ]


def paired(samples: Mapping[int, float], base: Mapping[int, float]) -> Spread | None:
    """Spread of the ratios of samples to those of the same turn in `base`; None without any."""
    ratios = [value / base[turn] for turn, value in samples.items() if base.get(turn)]
    return Spread.of(ratios) if ratios else None
