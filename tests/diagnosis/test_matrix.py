"""Rows, columns and cells of the delay matrix."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Kind, Scope
from ckptd.coordinator.diagnosis.locate import locate
from ckptd.coordinator.diagnosis.matrix import DelayMatrix, MatrixLimits, narrow, probes

NODES = [f"n{i}" for i in range(6)]
CELL = 4 << 20


def measured(slow: dict[tuple[str, str], float], nodes: list[str] = NODES) -> DelayMatrix:
    """All pairs; those in `slow` so many times slower, where "*" stands for every node."""
    matrix = DelayMatrix()
    for number, (a, b) in enumerate(permutations(nodes, 2)):
        factor = next((slow[k] for k in ((a, b), (a, "*"), ("*", b)) if k in slow), 1.0)
        for turn in range(5):
            matrix.observe(a, b, CELL, 0.01 * factor * (1 + 0.02 * ((number + turn) % 5)))
    return matrix


def test_all_alike_is_nothing() -> None:
    assert measured({}).hot() == []


@pytest.mark.parametrize(
    ("slow", "what", "who"),
    [
        ({("n2", "*"): 4.0}, "sends slowly", ("n2",)),
        ({("*", "n2"): 4.0}, "receives slowly", ("n2",)),
        ({("*", "n2"): 4.0, ("n2", "*"): 4.0}, "sends and receives slowly", ("n2",)),
        ({("n1", "n4"): 4.0}, "is slow", ("n1", "n4")),
    ],
)
def test_rows_columns_and_cells(
    slow: dict[tuple[str, str], float], what: str, who: tuple[str, ...]
) -> None:
    (hot,) = measured(slow).hot()
    assert (hot.what, hot.culprit.nodes) == (what, who)
    assert hot.ratio == pytest.approx(4, rel=0.2)
    assert "the agents' network" in hot.sentence


def test_of_four_nodes_one_makes_half_of_all_pairs_hot() -> None:
    (hot,) = measured({("n1", "*"): 3.0, ("*", "n1"): 3.0}, NODES[:4]).hot()
    assert hot.culprit.nodes == ("n1",)


def test_a_transfer_that_failed_is_the_slowest_of_all() -> None:
    matrix = measured({})
    for _ in range(9):
        matrix.observe("n0", "n1", CELL, float("inf"))
    (hot,) = matrix.hot()
    assert hot.culprit.nodes == ("n0", "n1")


def test_small_transfers_and_odd_numbers_are_left_out() -> None:
    matrix = DelayMatrix()
    for size, seconds in ((10, 5.0), (CELL, 0.0), (CELL, float("nan")), (0, 1.0)):
        matrix.observe("a", "b", size, seconds)
    assert matrix.delays() == {}


def test_a_delay_that_cannot_be_is_no_measure_of_the_usual_one() -> None:
    matrix = measured({})
    before = matrix.delays()
    for pair in before:
        matrix.observe(*pair, 1 << 40, 1e-310)
        matrix.observe(*pair, CELL, 5e-324)
    assert matrix.delays() == before
    odd = DelayMatrix()
    for number, source in enumerate("abc"):
        odd.observe(source, "d", CELL if number else 1 << 40, 1.0 if number else 1e-310)
        odd.observe(source, "e", 1 << 40, 1e-310)
    assert odd.hot() == []


@given(st.integers(1, 40), st.integers(0, 10))
def test_probes_are_bounded_and_reach_every_suspect(count: int, others: int) -> None:
    suspects = [f"s{i}" for i in range(count)]
    pairs = probes(suspects, [f"o{i}" for i in range(others)])
    assert len(pairs) == len(set(pairs))
    assert len(pairs) <= MatrixLimits().probes_each * max(count, 5)
    assert all(a != b for a, b in pairs)
    if count + others > 1:
        assert {node for pair in pairs for node in pair} >= set(suspects)


def test_a_finding_is_narrowed_to_what_is_hot() -> None:
    several = Culprit(Scope.NODES, (0, 8), ("n1", "n2", "n3"))
    finding = Finding(1, Kind.COMMUNICATION_HANG, several, 0.0, 1.0, 0.3, "stuck")
    narrowed = narrow(finding, measured({("n2", "n3"): 5.0}))
    assert (narrowed.culprit.scope, narrowed.culprit.nodes) == (Scope.LINK, ("n2", "n3"))
    assert narrowed.confidence > finding.confidence
    unmoved = narrow(finding, measured({("n4", "n5"): 5.0}))
    assert unmoved.culprit == several
    assert "nothing unusual" in str(unmoved.evidence["matrix"])


def test_groups_in_common() -> None:
    def culprit(bad: list[str], good: list[str]) -> tuple[Scope, str]:
        found = locate([tuple(b) for b in bad], [tuple(g) for g in good], 0.9).culprit
        return found.scope, "".join(found.nodes)

    assert culprit(["ab", "bc", "bd"], ["cd", "ad"]) == (Scope.NODE, "b")
    assert culprit(["ab"], ["ac", "bc"]) == (Scope.LINK, "ab")
    assert culprit(["abc"], ["aa", "bb"]) == (Scope.NODES, "abc")
    assert culprit(["abc", "abd"], ["ac", "bd", "ad", "bc"]) == (Scope.LINK, "ab")
    assert culprit(["ab", "bc"], ["bd", "abcd"]) == (Scope.NODE, "b")
    assert culprit(["aa"], ["ab"]) == (Scope.DEVICE, "a")
    assert culprit(["aa", "ab"], []) == (Scope.DEVICE, "a")
