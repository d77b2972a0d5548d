"""Which bytes of the live state go where in this rank's segment. Computed without a collective."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckptd.digest import digest
from ckptd.errors import UnsavableState
from ckptd.segment import Layout, TensorSpec, plan_layout
from ckptd.trainer import shares as dividing
from ckptd.trainer.state import Item
from ckptd.wire import Share


@dataclass(frozen=True, slots=True)
class Piece:
    """A live tensor, or rows of one, and its place in the segment: bytes `begin` to `end`."""

    name: str
    source: torch.Tensor
    begin: int
    end: int
    volatile: bool

    @property
    def lies_as_saved(self) -> bool:
        """Whether its memory is, byte for byte, what goes into the segment."""
        source = self.source
        return source.is_contiguous() and not source.is_conj() and not source.is_neg()


@dataclass(frozen=True, slots=True)
class Plan:
    """The layout of one rank's segments, and how to find the sources anew at each capture."""

    layout: Layout
    specs: tuple[TensorSpec, ...]
    """What the rank has, before it is divided."""
    shares: tuple[Share, ...]
    """What it divides with other ranks, for them to compare."""
    _rows: tuple[dividing.Rows | None, ...]
    """Beside `specs`: the rows that this rank saves; None: all."""

    def fits(self, items: Sequence[Item]) -> bool:
        """Whether `items` can be captured with this plan."""
        return tuple(item.spec for item in items) == self.specs

    def pieces(self, items: Sequence[Item]) -> list[Piece]:
        """What to copy, and where to. `items` must fit."""
        places = {placed.spec.key: placed for placed in self.layout.tensors}
        found = []
        for item, rows in zip(items, self._rows, strict=True):
            spec, local = item.spec, item.local
            if rows is not None and rows.empty:
                continue
            if rows is not None and rows.dim is not None and not dividing.is_whole(spec, rows):
                spec = dividing.chunk(spec, rows)
                local = local.narrow(rows.dim, rows.first, rows.stop - rows.first)
            placed = places[spec.key]
            found.append(Piece(spec.name, local, placed.begin, placed.end, item.volatile))
        return found


def make_plan(
    items: Sequence[Item], rank: int, objects_capacity: int, structure: str, once: bool
) -> Plan:
    """Lay out what `rank` saves of `items`; with `once`, state that ranks share is divided.

    Raises UnsavableState if two tensors have one name.
    """
    # Of those that are divided, this rank's segment may have neither.
    names = Counter(item.spec.name for item in items)
    if twice := sorted(name for name, times in names.items() if times > 1):
        raise UnsavableState(f"two tensors have the same name: {', '.join(twice[:3])}")
    tapes: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        if once and len(item.ranks) > 1 and rank in item.ranks:
            tapes.setdefault(item.ranks, []).append(item)
    rows_of: dict[str, dividing.Rows] = {}
    share_of: dict[str, int] = {}
    named: list[Share] = []
    for number, (ranks, tape) in enumerate(sorted(tapes.items())):
        specs = sorted((item.spec for item in tape), key=lambda spec: spec.name)
        mine = dividing.cut(specs, len(ranks))[ranks.index(rank)]
        for spec, rows in zip(specs, mine, strict=True):
            rows_of[spec.key], share_of[spec.key] = rows, number
        named.append(Share(digest(repr(ranks).encode()), len(ranks), dividing.fingerprint(specs)))
    stored: list[TensorSpec] = []
    elsewhere: list[tuple[TensorSpec, int]] = []
    for item in items:
        found = rows_of.get(item.spec.key)
        if found is None or dividing.is_whole(item.spec, found):
            stored.append(item.spec)
            continue
        elsewhere.append((item.spec, share_of[item.spec.key]))
        if not found.empty:
            stored.append(dividing.chunk(item.spec, found))
    try:
        layout = plan_layout(
            stored,
            objects_capacity,
            elsewhere=elsewhere,
            shares=sorted(tapes),
            structure=structure,
        )
    except ValueError as error:
        raise UnsavableState(str(error)) from error
    return Plan(
        layout=layout,
        specs=tuple(item.spec for item in items),
        shares=tuple(named),
        _rows=tuple(rows_of.get(item.spec.key) for item in items),
    )


def what_changed(old: Sequence[TensorSpec], new: Sequence[TensorSpec]) -> str:
    """The first differences between two states, as a sentence."""
    before = {spec.key: spec for spec in old}
    after = {spec.key: spec for spec in new}
    changed = [
        *(f"{key} is new" for key in after.keys() - before.keys()),
        *(f"{key} is gone" for key in before.keys() - after.keys()),
        *(
            f"{key} has changed"
            for key in after.keys() & before.keys()
            if after[key] != before[key]
        ),
    ]
    return "the state has changed: " + "; ".join(sorted(changed)[:3])
