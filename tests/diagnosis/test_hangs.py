"""Who hangs, on pictures small enough to draw."""

from collections.abc import Iterable
from math import inf, nan
from typing import Any

import numpy as np
import pytest

from ckptd.coordinator.diagnosis import Detector, explain, hangs
from ckptd.coordinator.diagnosis.finding import Finding, Kind, Scope
from ckptd.coordinator.diagnosis.hangs import all_idle, find_stall
from ckptd.coordinator.diagnosis.table import Table
from ckptd.coordinator.diagnosis.thresholds import Thresholds
from ckptd.errors import ProtocolError
from ckptd.sketches import SEQ_END, Part, Sample, Sketch, pack

STOPPED_AT, NOW = 10.0, 20.0
Group = tuple[str, dict[int, tuple[int, int]]]
"""Name, and for each rank what it has entered and ended."""


class Picture:
    """Groups of ranks, one rank a node unless `per_node` says otherwise."""

    def __init__(self, per_node: int = 1, enqueued: bool = False) -> None:
        self.per_node, self.enqueued = per_node, enqueued
        self.table = Table()

    def draw(
        self,
        groups: Iterable[Group],
        at: float = STOPPED_AT,
        silent: tuple[int, ...] = (),
        waiting_s: dict[tuple[str, int], float] | None = None,
    ) -> "Picture":
        """Every node tells this at `at`, and again now, but for the nodes that are silent."""
        groups = list(groups)
        ranks = sorted({rank for _, members in groups for rank in members})
        for node in sorted({rank // self.per_node for rank in ranks}):
            for moment in (at, NOW):
                if moment == at or node not in silent:
                    sketch = self._sketch(node, groups, moment, waiting_s or {})
                    assert self.table.observe(sketch, moment, 0.0, 0.0)
                    self.table.flush()
        return self

    def _sketch(
        self, node: int, groups: list[Group], at: float, waiting_s: dict[tuple[str, int], float]
    ) -> Sketch:
        """A group that is named like "0>2" is what rank 0 sends to rank 2."""
        parts, entered, ended, waiting = [], [], [], []
        for name, members in groups:
            mine = tuple(rank for rank in members if rank // self.per_node == node)
            if mine:
                pair = tuple(map(int, name.split(">"))) if ">" in name else None
                parts.append(Part(name, len(members), mine, "", self.enqueued, pair))
            entered += [members[rank][0] for rank in mine]
            ended += [members[rank][1] for rank in mine]
            waiting += [waiting_s.get((name, rank), nan) for rank in mine]
        return Sketch(
            "job", 1, f"n{node}", 1, at, tuple(entered), tuple(ended), tuple(waiting),
            parts=tuple(parts),
        )  # fmt: skip

    def finding(self, paused: tuple[int, ...] = ()) -> Finding | None:
        stall = find_stall(self.table, 2.0, 5.0, NOW, paused)
        return stall and explain.stall(self.table, stall, 2.0, Thresholds(), NOW)


def waits(at: int) -> tuple[int, int]:
    """Has entered operation `at`, and not left it."""
    return (at, at - 1)


def past(at: int) -> tuple[int, int]:
    """Has left operation `at`, and entered none since."""
    return (at, at)


def test_the_rank_that_has_not_entered() -> None:
    finding = (
        Picture().draw([("dp", {0: waits(7), 1: waits(7), 2: past(6), 3: waits(7)})]).finding()
    )
    assert finding is not None
    assert finding.kind is Kind.NON_COMMUNICATION_HANG
    assert finding.culprit.ranks == (2,)
    assert finding.victims == 3
    assert "rank 2 on node n2 has not entered operation 7 of group dp" in finding.sentence


CHAIN: list[Group] = [
    ("a", {0: waits(3), 1: waits(3), 2: past(2)}),
    ("b", {2: waits(9), 4: past(8)}),
    ("c", {4: waits(5), 5: past(4)}),
]
"""0 and 1 wait for 2 in a; 2 waits for 4 in b; 4 waits for 5 in c; 5 waits for nobody."""


def test_who_is_late_because_it_waits_elsewhere_is_a_victim() -> None:
    finding = Picture().draw(CHAIN).finding()
    assert finding is not None
    assert finding.culprit.ranks == (5,)
    assert finding.victims == 4


def test_who_has_paused_hangs_for_nobody_and_hides_nobody() -> None:
    assert Picture().draw(CHAIN).finding(paused=(5,)) is None
    assert Picture().draw(CHAIN).finding(paused=(4,)).culprit.ranks == (5,)
    absent = Picture().draw([("dp", {0: waits(7), 1: past(6), 2: past(6)})])
    assert absent.finding(paused=(1,)).culprit.ranks == (2,)


def test_what_is_sent_on_the_side_hides_nothing() -> None:
    """The processor goes on after `isend`, so it does not wait in what it entered first."""
    sent: list[Group] = [
        ("1>3", {1: waits(51), 3: waits(51)}),
        ("3>1", {3: waits(48), 1: waits(48)}),
    ]
    since = {("1>3", 1): 9.9, ("3>1", 1): 9.5, ("3>1", 3): 9.7, ("1>3", 3): 9.4}
    finding = Picture().draw(sent, waiting_s=since).finding()
    assert finding is not None
    assert finding.kind is Kind.COMMUNICATION_HANG
    assert finding.culprit.nodes == ("n1", "n3")


def test_what_was_received_is_over_though_its_sender_does_not_look() -> None:
    groups: list[Group] = [
        ("0>1", {0: waits(5), 1: past(5)}),
        ("dp", {1: waits(7), 2: waits(7)}),
    ]
    finding = Picture().draw(groups).finding()
    assert finding is not None
    assert finding.culprit.nodes == ("n1", "n2")
    assert Picture().draw(groups[:1]).finding() is None


STAGES: list[Group] = [
    ("dp0", {0: past(6), 1: waits(7)}),
    ("dp1", {2: past(6), 3: waits(7)}),
]
"""0 and 2 wait for each other, in sends and receives, which are not recorded."""


def test_whose_suspects_all_wait_in_what_is_not_seen_is_stuck_there() -> None:
    detector = Detector()
    picture = Picture().draw(STAGES)
    detector.table, first = picture.table, picture.finding()
    assert first is not None
    assert (first.kind, first.suspects) == (Kind.NON_COMMUNICATION_HANG, (0, 2))
    finding = detector.reconsidered(first, (0, 2))
    assert finding is not None
    assert finding.kind is Kind.COMMUNICATION_HANG
    assert (finding.culprit.scope, finding.culprit.nodes) == (Scope.NODES, ("n0", "n2"))
    assert finding.confidence < first.confidence
    assert "the processes of ranks 0, 2 wait in communication that is not rec" in finding.sentence


def test_before_that_whoever_is_not_seen_to_wait_is_looked_at() -> None:
    detector = Detector()
    picture = Picture().draw([*STAGES, ("dp2", {4: past(7), 5: past(7)})])
    detector.table, first = picture.table, picture.finding()
    assert first is not None
    second = detector.reconsidered(first, (0, 2))
    assert second is not None
    assert (second.kind, second.culprit) == (first.kind, first.culprit)
    assert second.suspects == (0, 2, 4, 5)
    third = detector.reconsidered(second, second.suspects)
    assert third is not None
    assert third.culprit.nodes == ("n0", "n2", "n4", "n5")


def test_without_wait_chains_victims_are_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation: whoever has not entered is blamed, though it waits elsewhere."""

    class Shortsighted(hangs._View):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.waits_anywhere = np.zeros_like(self.waits_anywhere)

    monkeypatch.setattr(hangs, "_View", Shortsighted)
    finding = Picture().draw(CHAIN).finding()
    assert finding is not None
    assert finding.culprit.ranks == (2, 4, 5)


def test_two_that_hang_on_one_node_of_two_are_the_node() -> None:
    finding = Picture(per_node=2).draw(
        [("dp", {0: waits(2), 1: waits(2), 2: past(1), 3: past(1)})]
    ).finding()  # fmt: skip
    assert finding is not None
    assert finding.culprit.scope is Scope.NODE
    assert finding.culprit.nodes == ("n1",)


def test_all_have_entered_and_none_leaves() -> None:
    groups = [("x", {0: waits(4), 1: waits(4)}), ("y", {0: past(1), 1: past(1), 2: waits(2)})]
    finding = Picture().draw(groups).finding()
    assert finding is not None
    assert finding.kind is Kind.COMMUNICATION_HANG
    assert finding.culprit.nodes == ("n0", "n1")
    assert finding.suspects == (0, 1)


def test_all_ranks_of_a_stuck_group_are_looked_at_for_one_may_be_stopped_in_it() -> None:
    members = {rank: waits(4) for rank in range(4)}
    finding = Picture(per_node=2).draw([("x", members)]).finding()
    assert finding is not None
    assert finding.suspects == (0, 1, 2, 3)


def test_some_have_left_and_others_cannot() -> None:
    finding = Picture().draw([("x", {0: waits(4), 1: waits(4), 2: waits(5)})]).finding()
    assert finding is not None
    assert finding.kind is Kind.COMMUNICATION_HANG


def test_what_two_stuck_groups_have_in_common_is_named() -> None:
    finding = Picture().draw(
        [("x", {0: waits(4), 1: waits(4)}), ("y", {1: waits(2), 2: waits(2)})],
    ).finding()  # fmt: skip
    assert finding is not None
    assert (finding.culprit.scope, finding.culprit.nodes) == (Scope.NODE, ("n1",))


def test_on_a_gpu_the_first_on_the_stream_is_what_hangs() -> None:
    """All are enqueued in both groups; in y only after x."""
    picture = Picture(enqueued=True).draw(
        [("x", {0: waits(4), 1: waits(4)}), ("y", {1: waits(2), 2: waits(2)})],
        waiting_s={("x", 0): 9.0, ("x", 1): 9.0, ("y", 1): 8.0, ("y", 2): 9.0},
    )
    finding = picture.finding()
    assert finding is not None
    assert finding.culprit.nodes == ("n0", "n1")
    assert "stuck kernel" in finding.sentence


def test_a_circle_is_the_program_s() -> None:
    finding = Picture().draw(
        [("x", {0: waits(4), 1: past(3)}), ("y", {0: past(1), 1: waits(2)})]
    ).finding()  # fmt: skip
    assert finding is not None
    assert finding.kind is Kind.NON_COMMUNICATION_HANG
    assert "in a circle" in finding.sentence
    assert finding.confidence <= 0.5


def called(ops: dict[int, str], at: int = 7) -> Finding | None:
    """What is found where all ranks wait as operation `at` of one group, each in its own."""
    picture = Picture()
    for moment in (STOPPED_AT, NOW):
        for rank, op in ops.items():
            sketch = Sketch(
                "job", 1, f"n{rank}", 1, moment, (at,), (at - 1,), kinds=((op, 4),),
                parts=(Part("dp", len(ops), (rank,)),), open_kinds=(1,),
            )  # fmt: skip
            assert picture.table.observe(sketch, moment, 0.0, 0.0)
        picture.table.flush()
    return picture.finding()


def test_who_has_called_another_operation_is_named() -> None:
    ops = {rank: "all_gather" if rank == 2 else "all_reduce" for rank in range(4)}
    finding = called(ops)
    assert finding is not None
    assert finding.kind is Kind.COMMUNICATION_HANG
    assert finding.culprit.ranks == (2,)
    assert "rank 2 on node n2 has called all_gather, others all_reduce" in finding.sentence
    assert finding.confidence > 0.9


def test_of_two_that_differ_either_may_be_wrong() -> None:
    finding = called({0: "all_gather", 1: "all_reduce"})
    assert finding is not None
    assert finding.culprit.ranks == (0, 1)


def test_ranks_that_call_the_same_are_not_told_apart_by_it() -> None:
    finding = called(dict.fromkeys(range(4), "all_reduce"))
    assert finding is not None
    assert finding.culprit.scope is Scope.NODES


class Read:
    """Two ranks in one group on a node whose agent says when it has read them."""

    def __init__(self) -> None:
        self.table = Table()

    def say(self, at: float, still_s: tuple[float, float], read_s: float, gap_s: float = nan):
        """Rank 0 waits in operation 7, and rank 1 has not entered it."""
        sketch = Sketch(
            "job", 1, "n0", 1, at, (7, 6), (6, 6), parts=(Part("dp", 2, (0, 1)),),
            still_s=still_s, read_s=(read_s, read_s), gap_s=gap_s,
        )  # fmt: skip
        assert self.table.observe(sketch, at, 0.0, 0.0)
        self.table.flush()
        return self

    def finds(self, now: float, timeout_s: float = 1.0) -> bool:
        return find_stall(self.table, timeout_s, 5.0, now) is not None


def test_who_is_silent_only_because_nobody_has_read_it_is_not_suspicious() -> None:
    assert not Read().say(10.0, still_s=(1.4, 1.4), read_s=1.3).finds(now=12.0)


def test_silence_counts_from_the_last_sign_and_not_from_the_last_sketch() -> None:
    read = Read().say(10.0, still_s=(1.2, 1.6), read_s=0.1)
    assert read.finds(now=10.0)
    assert read.table.rank_progress_at[1] == 8.4


def test_what_a_pause_hides_is_not_silence() -> None:
    read = Read().say(10.0, still_s=(5.0, 5.0), read_s=0.0)
    read.table.forget_silence(10.0)
    assert not read.finds(now=10.5)
    assert read.finds(now=11.5)


def test_what_is_usual_is_what_agents_have_seen() -> None:
    read = Read().say(10.0, still_s=(0.2, 0.2), read_s=0.1, gap_s=0.4)
    read.say(15.0, still_s=(0.2, 0.2), read_s=0.1, gap_s=0.3)
    assert read.table.longest_gap_s == 0.4


def test_from_a_silent_node_nothing_follows() -> None:
    members = {0: waits(7), 1: waits(7), 2: past(6)}
    assert Picture().draw([("dp", members)], silent=(2,)).finding() is None


def test_ranks_that_were_never_heard_of_are_unknown() -> None:
    picture = Picture()
    sketch = Sketch(
        "job", 1, "n0", 1, STOPPED_AT, (7,), (6,), parts=(Part("dp", 2, (0,)),)
    )  # fmt: skip
    for at in (STOPPED_AT, NOW):
        picture.table.observe(sketch, at, 0.0, 0.0)
        picture.table.flush()
    assert picture.finding() is None


def test_a_rank_that_goes_on_in_another_group_is_not_hung() -> None:
    picture = Picture().draw([("dp", {0: waits(7), 1: past(6)}), ("own", {1: past(100)})])
    picture.draw([("dp", {0: waits(7), 1: past(6)}), ("own", {1: past(101)})], at=NOW - 0.5)
    assert picture.finding() is None


def test_all_that_stopped_and_wait_for_nobody_are_idle() -> None:
    picture = Picture().draw([("dp", {0: past(7), 1: past(7)})])
    assert picture.finding() is None
    assert all_idle(picture.table, 5.0, 5.0, NOW)
    assert not all_idle(picture.table, 15.0, 5.0, NOW)


def test_a_sketch_that_does_not_fit_is_asked_for_again() -> None:
    table = Table()
    assert not table.observe(Sketch("job", 1, "n0", 1, 0.0, (1,), (1,)), 0.0, 0.0, 0.0)
    parts = (Part("dp", 2, (0, 1)),)
    assert not table.observe(Sketch("job", 1, "n0", 1, 0.0, (1,), (1,), parts=parts), 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"still_s": (1.0, 1.0), "read_s": (1.0, 1.0)},
        {"still_s": (1.0,)},
        {"gap_s": inf},
        {"open_kinds": (1, 1)},
        {"open_kinds": (2,), "kinds": (("all_reduce", 4),)},
        {"samples": b"not whole"},
    ],
)
def test_columns_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    parts = (Part("dp", 2, (0,)),)
    sketch = Sketch("job", 1, "n0", 1, 0.0, (1,), (1,), parts=parts, **wrong)
    assert not Table().observe(sketch, 0.0, 0.0, 0.0)


def test_samples_that_do_not_fit_are_left_out() -> None:
    parts, kinds = (Part("dp", 2, (0,)),), (("all_reduce", 4),)
    good = Sample(0, 0, 3, 0.5, 0.25)
    wrong = good._replace(seq=2)
    samples = [wrong._replace(slot=1), wrong._replace(kind=1), wrong._replace(seq=-2), good]
    samples.append(wrong._replace(seq=SEQ_END))
    sketch = Sketch(
        "job", 1, "n0", 1, 10.0, (3,), (3,), samples=pack(samples), kinds=kinds, parts=parts
    )
    table = Table()
    assert table.observe(sketch, 0.0, 0.0, 0.0)
    table.flush()
    assert sorted(table.row_seq[: table.used].ravel())[-2:] == [-1, 3]
    assert table.row_entered[0, 3] == 9.5
    assert table.row_duration[0, 3] == 0.25


def test_a_group_with_too_many_ranks_is_refused() -> None:
    sketch = Sketch("job", 1, "n0", 1, 0.0, (1, 1), (1, 1), parts=(Part("dp", 1, (0, 1)),))
    with pytest.raises(ProtocolError, match="rank 1 cannot be in group dp"):
        Table().observe(sketch, 0.0, 0.0, 0.0)
