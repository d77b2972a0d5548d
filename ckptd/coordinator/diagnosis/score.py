"""How good the diagnosis is: what was said against what was wrong. For drill and campaign."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from statistics import median

NOTHING = "nothing"
BOLD = 0.8
"""A wrong culprit that is named with more confidence than this is worse than none."""


class Who(Enum):
    """What is to be said of a culprit that was named."""

    RIGHT = "right"
    AMONG = "one of several"
    """The right one, and others beside it."""
    WRONG = "wrong"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Said:
    """One thing that was said, or that should have been."""

    kind: str
    culprit: str
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    confidence: float = 0.0
    after_s: float = inf
    """Since the fault."""
    after_steps: float = inf
    text: str = ""
    """The sentence that a person can check."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What is right to say. Without `kinds`: nothing."""

    kinds: tuple[str, ...] = ()
    culprits: tuple[str, ...] = ()
    """Any of these is right."""
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()

    def who(self, said: Said) -> Who:
        """Whether the culprit is the right one."""
        if said.culprit in self.culprits:
            return Who.RIGHT
        if not said.ranks and not said.nodes:
            return Who.NOBODY
        has_rank = bool(self.ranks) and set(self.ranks) <= set(said.ranks)
        has_node = bool(self.nodes) and set(self.nodes) <= set(said.nodes)
        return Who.AMONG if has_rank or has_node else Who.WRONG

    def is_bold(self, said: Said) -> bool:
        """Whether a wrong culprit was named with much confidence."""
        return said.confidence > BOLD and self.who(said) is Who.WRONG

    def is_right(self, said: Said) -> bool:
        """Whether class and culprit are right."""
        return said.kind in self.kinds and self.who(said) is Who.RIGHT


@dataclass
class Row:
    """All runs of one sort of fault."""

    runs: int = 0
    right: int = 0
    """Runs in which class and culprit were right; of healthy ones, in which nothing was said."""
    found: Counter[str] = field(default_factory=Counter)
    """By kind: how often it was said."""
    who: Counter[Who] = field(default_factory=Counter)
    confidences: list[float] = field(default_factory=list)
    """Of what was right, or had the right one among several."""
    after_s: list[float] = field(default_factory=list)
    after_steps: list[float] = field(default_factory=list)


@dataclass
class Confusion:
    """Rows by what was wrong."""

    rows: dict[str, Row] = field(default_factory=dict)
    said: int = 0
    faults: int = 0
    right: int = 0
    """Faults, healthy runs not counted, of which class and culprit were said."""
    bold: int = 0
    """Wrong culprits that were named with much confidence."""

    @property
    def precision(self) -> float:
        return self.right / self.said if self.said else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.faults if self.faults else 1.0

    def add(self, injected: str, expected: Expected, said: Sequence[Said]) -> bool:
        """Count one more run; returns whether what was said in the end is right."""
        row = self.rows.setdefault(injected, Row())
        row.runs += 1
        self.said += len(said)
        for each in said:
            who = expected.who(each)
            row.found[each.kind] += 1
            row.who[who] += 1
            self.bold += expected.is_bold(each)
        right = next((each for each in said if expected.is_right(each)), None)
        if not said:
            row.found[NOTHING] += 1
            row.who[Who.NOBODY] += 1
        among = (each for each in said if expected.who(each) is Who.AMONG)
        named = next(among, None) if right is None else right
        if named is not None:
            row.confidences.append(named.confidence)
            row.after_s.append(named.after_s)
            row.after_steps.append(named.after_steps)
        is_right = right is not None if expected.kinds else not said
        row.right += is_right
        if expected.kinds:
            self.faults += 1
            self.right += is_right
        return is_right


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (least–most)`; "" for none."""
    if not values:
        return ""
    low, high = min(values), max(values)
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({low:.{digits}f}–{high:.{digits}f})"
