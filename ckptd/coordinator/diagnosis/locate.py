"""From process groups that are bad to the node or link that they have in common."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypeVar

from ckptd.coordinator.diagnosis.finding import Culprit, Scope

Group = tuple[str, ...]
Link = tuple[str, str]
Element = TypeVar("Element", str, Link)

_ALL_PAIRS_MAX = 24
"""In a group over more nodes only neighbours are taken to be joined by a link."""
_GROUPS_MAX = 4096
"""Different sets of nodes that are looked at; more say the same again."""


@dataclass(frozen=True, slots=True)
class Location:
    """Who it may be, and how sure that is."""

    culprit: Culprit
    certainty: float
    """Near 1 for one candidate, less for several that groups cannot tell apart."""


def locate(
    bad: Iterable[Sequence[str]],
    good: Iterable[Sequence[str]],
    coverage: float,
    ranks: tuple[int, ...] = (),
) -> Location:
    """The smallest thing that all bad groups have in common, and hardly any good one.

    Each group is given as the nodes of its ranks, in order; `good` are those that are known to
    work. A bad group on one node blames what joins that node's ranks. Else a node is to blame if
    all bad groups have it, and at least `coverage` of its groups between nodes are bad; else a
    link, by the same rule; else it is one of the nodes that all bad groups have, or what joins
    them.
    """
    bad_sets, good_sets = _distinct(bad), _distinct(good)
    inside = sorted({group[0] for group in bad_sets if len(group) == 1})
    between = [group for group in bad_sets if len(group) > 1]
    if len(inside) == 1 and all(inside[0] in group for group in between):
        return Location(Culprit(Scope.DEVICE, ranks, (inside[0],)), 0.9)
    if not between:
        return Location(Culprit(Scope.NODES, ranks, tuple(inside)), 0.9 / max(1, len(inside)))
    fine = [group for group in good_sets if len(group) > 1]
    nodes = _to_blame(between, fine, coverage, lambda group: group)
    links = _to_blame(between, fine, coverage, _links)
    if len(nodes) == 1:
        return Location(Culprit(Scope.NODE, ranks, (nodes[0],)), 0.6 if links else 0.9)
    if len(links) == 1 and not nodes:
        return Location(Culprit(Scope.LINK, ranks, links[0]), 0.9)
    several = set(nodes) | {end for link in links for end in link}
    if not several:
        several = set(between[0]).intersection(*between[1:]) or {n for g in between for n in g}
    names = tuple(sorted(several))
    if len(names) == 1:
        # Some of its groups work: of small messages, perhaps, or of others' that are not timed.
        return Location(Culprit(Scope.NODE, ranks, names), 0.7)
    return Location(Culprit(Scope.NODES, ranks, names), 0.9 / len(names))


def _to_blame(
    bad: list[Group],
    good: list[Group],
    coverage: float,
    elements: Callable[[Group], Iterable[Element]],
) -> list[Element]:
    common = set(elements(bad[0]))
    for group in bad[1:]:
        common.intersection_update(elements(group))
    working = Counter(e for group in good for e in elements(group) if e in common)
    return sorted(e for e in common if len(bad) >= coverage * (len(bad) + working[e]))


def _links(group: Group) -> Iterable[Link]:
    """Pairs of nodes between which a group's data may go, each in order of names."""
    ends = combinations(group, 2) if len(group) <= _ALL_PAIRS_MAX else pairwise(group)
    return {(min(pair), max(pair)) for pair in ends}


def _distinct(groups: Iterable[Sequence[str]]) -> list[Group]:
    """Each as its nodes, each once; sets of nodes that several groups have, once."""
    seen = dict.fromkeys(tuple(dict.fromkeys(group)) for group in groups if group)
    return list(seen)[:_GROUPS_MAX]
