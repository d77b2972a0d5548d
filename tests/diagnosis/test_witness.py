"""No healthy job is restarted: what the suspects' processes say comes before what timing says."""

import pytest
from msgspec.structs import replace

from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Kind, Scope
from ckptd.coordinator.diagnosis.witness import Doing, Verdict, WitnessLimits, in_collective, judge
from ckptd.wire import Look

COMPUTING = "train.py:10 main\ntrain.py:20 next_batch\nloader.py:5 read"
WAITING = "train.py:10 main\ntorch/distributed/distributed_c10d.py:2800 all_reduce\nwait"
FIRST = Look(at=100.0, state="S", cpu_s=5.0, io_bytes=1000, stack=COMPUTING)
LATER = replace(FIRST, at=101.5)


def finding(kind: Kind = Kind.NON_COMMUNICATION_HANG, *suspects: int) -> Finding:
    culprit = Culprit(Scope.RANK, (3,), ("n0",))
    return Finding(1, kind, culprit, 90.0, 95.0, 0.6, "", suspects=suspects or (3,))


def verdict(first: Look, last: Look, now: float = 102.0) -> tuple[Verdict, Doing]:
    judgement = judge(finding(), {3: (first, last)}, now)
    assert judgement.reason
    return judgement.verdict, judgement.doing[3]


def test_a_stopped_process_hangs() -> None:
    stopped = replace(FIRST, state="T"), replace(FIRST, state="T", at=100.5)
    assert verdict(*stopped) == (Verdict.HANGS, Doing.STOPPED)


def test_the_same_place_without_cpu_hangs() -> None:
    assert verdict(FIRST, LATER) == (Verdict.HANGS, Doing.STUCK)


@pytest.mark.parametrize(
    "progress", [{"cpu_s": 6.0}, {"io_bytes": 4096}, {"stack": COMPUTING + "\nparse"}]
)
def test_progress_of_any_sort_gets_the_long_time_out(progress: dict[str, object]) -> None:
    last = replace(LATER, **progress)  # type: ignore[arg-type]
    assert verdict(FIRST, last) == (Verdict.WAIT, Doing.BUSY)
    assert verdict(FIRST, last, now=5000.0) == (Verdict.HANGS, Doing.BUSY)


def test_the_same_place_for_too_short_a_time_is_looked_at_again() -> None:
    judgement = judge(finding(), {3: (FIRST, replace(FIRST, at=100.5))}, 102.0)
    assert judgement.verdict is Verdict.WAIT
    assert judgement.look_again_s > 0


def test_a_look_is_due_when_the_time_that_is_given_runs_out() -> None:
    limits, found, wait_s = WitnessLimits(), finding(), 4.0
    out = found.since + limits.still_s - limits.later_apart_s
    assert limits.next_look(found, 1, wait_s, out - 5.0) == out - 5.0 + wait_s
    assert limits.next_look(found, 1, wait_s, out - 3.0) == out
    assert limits.next_look(found, 1, wait_s, out) == out + wait_s
    assert limits.next_look(found, 2, wait_s, out) == out + 1.5 * wait_s
    assert limits.next_look(found, 99, wait_s, out) == out + limits.look_again_max_s


def test_a_dead_process_is_its_launcher_s() -> None:
    assert verdict(FIRST, replace(LATER, state=""))[0] is Verdict.DIED
    assert verdict(FIRST, replace(LATER, state="Z"))[0] is Verdict.DIED


def test_a_suspect_that_waits_in_a_collective_contradicts_the_timing() -> None:
    first, last = (replace(sample, stack=WAITING) for sample in (FIRST, LATER))
    spins = replace(last, cpu_s=6.5)
    assert verdict(first, spins) == (Verdict.CONTRADICTED, Doing.IN_COLLECTIVE)


def test_of_several_suspects_those_that_hang_are_named() -> None:
    waits = (replace(FIRST, stack=WAITING), replace(LATER, stack=WAITING))
    judgement = judge(
        finding(Kind.NON_COMMUNICATION_HANG, 3, 4), {4: waits, 3: (FIRST, LATER)}, 102
    )
    assert judgement.verdict is Verdict.HANGS
    assert judgement.culprits == (3,)
    assert judgement.waiting == ()


def test_that_all_suspects_wait_is_said_only_if_all_were_seen() -> None:
    waits = (replace(FIRST, stack=WAITING), replace(LATER, stack=WAITING))
    both = finding(Kind.NON_COMMUNICATION_HANG, 3, 4)
    assert judge(both, {3: waits, 4: waits}, 102.0).waiting == (3, 4)
    assert judge(both, {3: waits}, 102.0).waiting == ()
    soon = judge(both, {3: waits, 4: (FIRST, LATER)}, 98.0)
    assert (soon.verdict, soon.waiting, soon.absent) == (Verdict.WAIT, (), (4,))


def test_what_cannot_be_looked_at_proves_nothing() -> None:
    assert judge(finding(), {}, 102.0).verdict is Verdict.WAIT
    blind = Look(at=100.0, state=None)
    assert verdict(blind, replace(blind, at=102.0)) == (Verdict.WAIT, Doing.UNKNOWN)


def test_a_transfer_that_all_have_entered_is_given_its_time() -> None:
    waits = (replace(FIRST, stack=WAITING), replace(LATER, stack=WAITING))
    silent = finding(Kind.COMMUNICATION_HANG)
    assert judge(silent, {3: waits}, 95.0).verdict is Verdict.WAIT
    assert judge(silent, {3: waits}, 102.0).verdict is Verdict.HANGS


def test_collectives_in_stacks() -> None:
    assert in_collective(WAITING)
    assert not in_collective(COMPUTING)
    assert not in_collective("distributed_c10d.py all_reduce\n" + "user.py f\n" * 20)
