"""What counts as right, and what is worse than nothing."""

import pytest

from ckptd.coordinator.diagnosis.score import NOTHING, Confusion, Expected, Said, Who, spread

RANK_2 = Expected(("hang",), ("rank 2 on node b",), (2,), ("b",))


def said(culprit: str, ranks: tuple[int, ...] = (), nodes: tuple[str, ...] = (), sure: float = 0.5):
    return Said("hang", culprit, ranks, nodes, sure, 1.5, 3.0)


@pytest.mark.parametrize(
    ("what", "who"),
    [
        (said("rank 2 on node b", (2,), ("b",)), Who.RIGHT),
        (said("ranks 2, 3", (2, 3), ("b", "c")), Who.AMONG),
        (said("nodes a, b, or what joins them", (0, 2), ("a", "b")), Who.AMONG),
        (said("rank 1 on node a", (1,), ("a",)), Who.WRONG),
        (said("the job as a whole"), Who.NOBODY),
    ],
)
def test_whether_the_culprit_is_right(what: Said, who: Who) -> None:
    assert RANK_2.who(what) is who
    assert RANK_2.is_right(what) == (who is Who.RIGHT)


def test_another_class_is_not_right() -> None:
    assert not Expected(("slow",), ("rank 2 on node b",), (2,), ("b",)).is_right(
        said("rank 2 on node b", (2,), ("b",))
    )


def test_a_table_of_right_wrong_and_nothing() -> None:
    counted = Confusion()
    assert counted.add("stop", RANK_2, [said("rank 2 on node b", (2,), ("b",))])
    assert not counted.add("stop", RANK_2, [said("rank 1 on node a", (1,), ("a",), sure=0.9)])
    assert not counted.add("stop", RANK_2, [])
    assert counted.add("healthy", Expected(), [])
    assert not counted.add("healthy", Expected(), [said("rank 0 on node a", (0,), ("a",))])
    stop, healthy = counted.rows["stop"], counted.rows["healthy"]
    assert (stop.runs, stop.right, stop.found) == (3, 1, {"hang": 2, NOTHING: 1})
    assert stop.who == {Who.RIGHT: 1, Who.WRONG: 1, Who.NOBODY: 1}
    assert (stop.after_s, stop.after_steps) == ([1.5], [3.0])
    assert (healthy.runs, healthy.right) == (2, 1)
    assert (counted.faults, counted.right, counted.said, counted.bold) == (3, 1, 3, 1)
    assert counted.recall == pytest.approx(1 / 3)


def test_a_spread_is_a_median_and_its_ends() -> None:
    assert spread([]) == ""
    assert spread([2.0]) == "2.0"
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0–3.0)"
