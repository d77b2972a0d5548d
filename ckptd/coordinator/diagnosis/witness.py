"""The second witness: timing says who is suspected, their processes say whether they hang.

A rank that evaluates while the others wait looks exactly like a hang from the outside. So before
anything is done, the suspects' processes are looked at twice. Pure functions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from ckptd.coordinator.diagnosis.finding import Finding, Kind, listed
from ckptd.wire import Counted, Look


class Doing(Enum):
    """What a process was found to be doing."""

    GONE = "gone"
    STOPPED = "stopped"
    STUCK = "at the same place, using no CPU"
    IN_COLLECTIVE = "waiting in a collective"
    BUSY = "making progress"
    UNKNOWN = "not known"


class Verdict(Enum):
    """What follows."""

    HANGS = "hangs"
    WAIT = "wait"
    """It may be healthy: look again later."""
    DIED = "died"
    """Its launcher will see to it."""
    CONTRADICTED = "contradicted"
    """The processes do not do what the timing says: nothing is to be done on it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict, why, and what each suspect was doing."""

    verdict: Verdict
    reason: str
    doing: dict[int, Doing]
    culprits: tuple[int, ...] = ()
    """Suspects that were seen to hang, where the verdict is that. Give them to
    `Detector.confirmed`: others may only have waited in what is not timed."""
    waiting: tuple[int, ...] = ()
    """All suspects, where each was seen to wait in a collective, though none is recorded. Give them
    to `Detector.reconsidered`."""
    absent: tuple[int, ...] = ()
    """Suspects that were seen elsewhere, where all others were seen to wait in a collective."""
    look_again_s: float = 0.0
    """In how many seconds to look again, where the verdict is to wait."""


@dataclass(frozen=True, slots=True)
class WitnessLimits:
    """How sure the witness must be."""

    apart_s: float = 0.4
    """Two samples closer together than this say nothing."""
    first_apart_s: float = 0.5
    """So far apart are the first two: enough to see who is stopped, and who only waits."""
    later_apart_s: float = 1.1
    """And all others: enough for `stuck_s`."""
    busy_share: float = 0.02
    """CPU seconds a second above which a process does something; a sleeping one's helper threads
    use less."""
    stuck_s: float = 1.0
    """A process must be at the same place for so long, from first sample to last."""
    still_s: float = 10.0
    """A process that is not stopped may wait for storage: it is given so long before it hangs."""
    transfer_s: float = 10.0
    """A transfer that all have entered is given so long; large ones take their time."""
    long_s: float = 1800.0
    """A suspect that makes progress is given so long before it counts as hung all the same."""
    look_again_s: float = 2.0
    """Seconds to the next look where this one was not enough."""
    look_again_max_s: float = 15.0
    """And at most, after many of them."""

    def next_look(self, finding: Finding, tries: int, wait_s: float, now: float) -> float:
        """When to look again, after so many looks: less and less often, and when the time that a
        process or transfer is given runs out."""
        at = now + min(wait_s * 1.5 ** min(tries - 1, 10), self.look_again_max_s)
        given_s = self.transfer_s if finding.kind is Kind.COMMUNICATION_HANG else self.still_s
        out = finding.since + given_s - self.later_apart_s
        return out if now < out < at else at


_COLLECTIVE = re.compile(
    r"distributed_c10d|ProcessGroup|c10d::|\b(all_?reduce|all_?gather|reduce_scatter|all_to_all"
    r"|broadcast|barrier|ncclGroupEnd|_functional_collectives|batch_isend_irecv|isend|irecv)\b",
    re.IGNORECASE,
)
_INNERMOST_LINES = 12


def in_collective(stack: str) -> bool:
    """Whether a stack ends in a collective operation, or in waiting for one."""
    ending = "\n".join(stack.strip().splitlines()[-_INNERMOST_LINES:])
    return bool(_COLLECTIVE.search(ending))


def judge(
    finding: Finding,
    samples: Mapping[int, tuple[Look, Look]],
    now: float,
    limits: WitnessLimits | None = None,
) -> Judgement:
    """Whether the suspects of a hang really hang. `samples`: first and last of each rank."""
    limits = limits or WitnessLimits()
    doing = {rank: look(first, last, limits) for rank, (first, last) in samples.items()}
    seen = [rank for rank in finding.suspects if doing.get(rank, Doing.UNKNOWN) != Doing.UNKNOWN]
    if not seen:
        return _wait("none of the suspects could be looked at", doing, limits)
    ranks = {what: [rank for rank in seen if doing[rank] is what] for what in Doing}
    absent = tuple(rank for rank in seen if doing[rank] is not Doing.IN_COLLECTIVE)
    judgement = _judge_seen(finding, ranks, doing, samples, now, limits)
    if finding.kind is Kind.COMMUNICATION_HANG or len(seen) < len(finding.suspects):
        return judgement
    return replace(judgement, absent=absent, waiting=() if absent else finding.suspects)


def _judge_seen(
    finding: Finding,
    ranks: Mapping[Doing, list[int]],
    doing: dict[int, Doing],
    samples: Mapping[int, tuple[Look, Look]],
    now: float,
    limits: WitnessLimits,
) -> Judgement:
    lasted_s = now - finding.since
    if ranks[Doing.GONE]:
        return Judgement(Verdict.DIED, _says(ranks, Doing.GONE), doing)
    if ranks[Doing.STOPPED]:
        return _hangs(_says(ranks, Doing.STOPPED), doing, ranks[Doing.STOPPED])
    if ranks[Doing.BUSY]:
        if lasted_s < limits.long_s:
            return _wait(
                f"{_says(ranks, Doing.BUSY)}, so there is time until {limits.long_s:.0f} s",
                doing,
                limits,
            )
        reason = f"{_says(ranks, Doing.BUSY)}, but others have waited for {lasted_s:.0f} s"
        return _hangs(reason, doing, ranks[Doing.BUSY])
    if finding.kind is Kind.COMMUNICATION_HANG:
        return _judge_transfer(ranks, doing, lasted_s, limits)
    return _judge_absent(ranks, doing, samples, lasted_s, limits)


def weigh(finding: Finding, counted: Counted) -> str:
    """Whether NCCL's own counts bear the finding out, in words. Nothing is decided on them."""
    lagging = sorted({*counted.behind, *counted.silent})
    named = set(finding.culprit.ranks or finding.suspects)
    has_absent = finding.kind is Kind.NON_COMMUNICATION_HANG
    if bool(named.intersection(lagging)) if has_absent else not counted.behind:
        return f"NCCL's own counts agree: {counted.text}"
    whom = f"by them {listed(lagging)} lag" if lagging else "by them nobody lags"
    return f"NCCL's own counts disagree, {whom}: {counted.text}"


def look(first: Look, last: Look, limits: WitnessLimits) -> Doing:
    """What a process did between two samples."""
    if last.state in ("", "Z", "X"):
        return Doing.GONE
    if first.state in ("T", "t") and last.state in ("T", "t"):
        return Doing.STOPPED
    if last.state is None or first.state is None or last.at - first.at < limits.apart_s:
        return Doing.UNKNOWN
    same_stack = first.stack == last.stack if first.stack and last.stack else None
    waits = same_stack is True and last.stack is not None and in_collective(last.stack)
    if waits:
        return Doing.IN_COLLECTIVE  # it may use CPU: libraries spin while they wait
    if same_stack is False or _used_cpu(first, last, limits) or _did_io(first, last):
        return Doing.BUSY
    if same_stack is None and (first.cpu_s is None or last.cpu_s is None):
        return Doing.UNKNOWN
    return Doing.STUCK


def _judge_transfer(
    ranks: Mapping[Doing, list[int]],
    doing: dict[int, Doing],
    lasted_s: float,
    limits: WitnessLimits,
) -> Judgement:
    """All have entered: they wait, and that is all that can be seen of them."""
    if lasted_s < limits.transfer_s:
        return _wait(f"a transfer is given {limits.transfer_s:.0f} s", doing, limits)
    what = Doing.IN_COLLECTIVE if ranks[Doing.IN_COLLECTIVE] else Doing.STUCK
    return _hangs(f"{_says(ranks, what)} for {lasted_s:.0f} s", doing, [])


def _judge_absent(
    ranks: Mapping[Doing, list[int]],
    doing: dict[int, Doing],
    samples: Mapping[int, tuple[Look, Look]],
    lasted_s: float,
    limits: WitnessLimits,
) -> Judgement:
    """They have not entered: they must be somewhere else, and stay there."""
    if not ranks[Doing.STUCK]:
        reason = (
            f"{_says(ranks, Doing.IN_COLLECTIVE)}, though by the timing they wait in none: a "
            "collective that is not timed, or reports that are late"
        )
        return Judgement(Verdict.CONTRADICTED, reason, doing)
    apart_s = min(samples[rank][1].at - samples[rank][0].at for rank in ranks[Doing.STUCK])
    if apart_s < limits.stuck_s:
        return _wait(f"{_says(ranks, Doing.STUCK)}, but only for {apart_s:.1f} s", doing, limits)
    if lasted_s < limits.still_s:
        said = f"{_says(ranks, Doing.STUCK)}, and is given {limits.still_s:.0f} s"
        return _wait(said, doing, limits)
    reason = f"{_says(ranks, Doing.STUCK)}, in no collective, for {apart_s:.1f} s"
    return _hangs(reason, doing, ranks[Doing.STUCK])


def _hangs(reason: str, doing: dict[int, Doing], culprits: list[int]) -> Judgement:
    return Judgement(Verdict.HANGS, reason, doing, tuple(sorted(culprits)))


def _wait(reason: str, doing: dict[int, Doing], limits: WitnessLimits) -> Judgement:
    return Judgement(Verdict.WAIT, reason, doing, look_again_s=limits.look_again_s)


def _says(ranks: Mapping[Doing, list[int]], what: Doing) -> str:
    several = len(ranks[what]) > 1
    return f"rank{'s' if several else ''} {listed(ranks[what])}: {what.value}"


def _used_cpu(first: Look, last: Look, limits: WitnessLimits) -> bool:
    if first.cpu_s is None or last.cpu_s is None:
        return False
    return last.cpu_s - first.cpu_s > limits.busy_share * (last.at - first.at)


def _did_io(first: Look, last: Look) -> bool:
    return (
        first.io_bytes is not None and last.io_bytes is not None and last.io_bytes != first.io_bytes
    )
