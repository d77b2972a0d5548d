"""What is done about a finding, and when it is no longer done."""

from dataclasses import replace

from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Kind, Scope
from ckptd.coordinator.diagnosis.policy import Decision, Do, Policy, PolicyLimits
from ckptd.coordinator.diagnosis.witness import Judgement, Verdict

HANGS = Judgement(Verdict.HANGS, "rank 3: stopped", {})
RANK = Culprit(Scope.RANK, (3,), ("n0",))
HANG = Finding(1, Kind.NON_COMMUNICATION_HANG, RANK, 0.0, 5.0, 0.9, "rank 3 hangs")


def decide(policy: Policy, now: float, step: int = 0, finding: Finding = HANG) -> Decision:
    decision = policy.decide(finding, HANGS, step or int(now), now)
    assert decision.reason
    return decision


def test_a_confirmed_hang_is_restarted() -> None:
    decision = decide(Policy(), 10.0)
    assert decision.do is Do.RESTART
    assert decision.reason == "rank 3 hangs; second witness: rank 3: stopped"


def test_never_on_timing_alone() -> None:
    assert Policy().decide(HANG, None, 7, 10.0).do is Do.OBSERVE
    for verdict in set(Verdict) - {Verdict.HANGS}:
        judgement = Judgement(verdict, "it computes", {})
        assert Policy().decide(HANG, judgement, 7, 10.0).do is Do.OBSERVE


def test_slowness_is_watched() -> None:
    slow = replace(HANG, kind=Kind.NON_COMMUNICATION_SLOW)
    assert decide(Policy(), 10.0, finding=slow).do is Do.OBSERVE
    assert decide(Policy(), 10.0, finding=replace(HANG, over=True)).do is Do.OBSERVE


def test_the_second_fault_of_a_node_isolates_it() -> None:
    policy = Policy()
    decide(policy, 10.0)
    other = replace(HANG, culprit=Culprit(Scope.RANK, (4,), ("n0",)))
    decision = decide(policy, 5000.0, finding=other)
    assert decision.do is Do.ISOLATE
    assert decision.isolate == ("n0",)


def test_after_the_window_it_is_a_first_fault_again() -> None:
    policy = Policy(PolicyLimits(window_s=1000.0))
    decide(policy, 10.0)
    assert decide(policy, 2000.0).do is Do.RESTART


def test_one_of_several_nodes_is_not_isolated() -> None:
    policy = Policy()
    several = replace(HANG, culprit=Culprit(Scope.NODES, (0, 1), ("n0", "n1")))
    for now in (10.0, 5000.0):
        assert decide(policy, now, finding=several).do is Do.RESTART


def test_the_same_fault_at_the_same_step_three_times_stops() -> None:
    policy = Policy(PolicyLimits(isolate=False))
    assert [decide(policy, at, step=700).do for at in (10.0, 4000.0)] == [Do.RESTART] * 2
    decision = decide(policy, 8000.0, step=700)
    assert decision.do is Do.OBSERVE
    assert decision.tripped
    assert "at step 700" in decision.reason
    assert decide(policy, 90000.0, step=800).tripped, "until a person has seen to it"


def test_it_is_the_same_fault_though_told_differently_or_a_step_was_not_reported_yet() -> None:
    policy = Policy(PolicyLimits(isolate=False))
    stuck = replace(HANG, kind=Kind.COMMUNICATION_HANG)
    other = replace(HANG, culprit=Culprit(Scope.RANK, (4,), ("n0",)))
    told = [(HANG, 699), (other, 700), (HANG, 400), (stuck, 700)]
    at = [3600.0 * (number + 1) for number in range(len(told))]
    done = [decide(policy, now, step, what).do for now, (what, step) in zip(at, told, strict=True)]
    assert done == [Do.RESTART] * 4
    assert "the same fault at step 700 for the 3. time" in decide(policy, 90000.0, 700).reason


def test_too_many_restarts_an_hour_stop() -> None:
    policy = Policy(PolicyLimits(restarts_per_hour=3))
    faults = [replace(HANG, culprit=Culprit(Scope.RANK, (r,), (f"n{r}",))) for r in range(4)]
    done = [decide(policy, 100.0 * (r + 1), finding=fault) for r, fault in enumerate(faults)]
    assert [d.do for d in done] == [Do.RESTART] * 3 + [Do.OBSERVE]
    assert "3 in the last hour, limit 3" in done[3].reason


def test_a_new_coordinator_knows_what_was() -> None:
    policy = Policy()
    decide(policy, 10.0)
    assert decide(Policy(past=tuple(policy.past)), 20.0).do is Do.ISOLATE


def test_only_words_where_restarts_are_not_wanted() -> None:
    decision = decide(Policy(PolicyLimits(automatic=False)), 10.0)
    assert decision.do is Do.OBSERVE
    assert "it would be" in decision.reason
