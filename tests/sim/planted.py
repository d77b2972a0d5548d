"""Bugs that the simulator must find: each makes one decision of a real decider wrong.

A planted bug is a pair of decider classes, and patches that last while a seed is lived through.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import msgspec

from ckptd.agent import events as ev
from ckptd.agent.lifecycle import Lifecycle, Slot, Use
from ckptd.coordinator import choice, decider, recovery
from ckptd.coordinator.decider import Coordinator
from ckptd.coordinator.state import Job, Node, PendingResume, Snapshot, State
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest, JobRecord
from ckptd.wire import Attach, Commit, Holds, Protect, SnapshotFailed, WhoAreYou

from .plan import Plan, draw

Patch = tuple[Any, str, Any]

_OFTEN_S = 2.0


@dataclass(frozen=True)
class Bug:
    """What is wrong, and where."""

    says: str
    coordinator: type[Coordinator] = Coordinator
    lifecycle: type[Lifecycle] = Lifecycle
    patches: Callable[[], list[Patch]] = list
    faults: tuple[str, ...] = ()
    """Where these have to come together, often, for the bug to do harm: only they strike."""
    nodes: int = 0
    """Size of the job, with spares to move to, where that is needed, too."""

    def plan(self, seed: int) -> Plan:
        plan = draw(seed)
        often = dict.fromkeys(self.faults, _OFTEN_S)
        if self.nodes:
            plan = replace(plan, jobs=(self.nodes,), spares=2, stable_ranks=False)
        return replace(plan, interval_s=often) if often else plan

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with ExitStack() as stack:
            for where, name, wrong in self.patches():
                stack.enter_context(patch.object(where, name, wrong))
            yield


# The coordinator.


def _commit_early() -> list[Patch]:
    def some_parity(manifest: JobManifest, holdings: recovery.Holdings) -> bool:
        return any(holding.parity for holding in holdings.values())

    return [(recovery, "is_protected", some_parity)]


def _retire_anything_older() -> list[Patch]:
    return [(decider, "is_ancestor", lambda id, of, ancestors: id < of)]


def _nothing_when_unsure() -> list[Patch]:
    def start(*_: object) -> choice.Start:
        return choice.Start(None, "nothing was found")

    return [(choice, "_without_a_snapshot", start)]


def _trust_a_flag() -> list[Patch]:
    right = choice.choose

    def choose(
        job: Job, pending: PendingResume, nodes: dict[str, Node], *rest: float
    ) -> choice.Start | choice.Wait:
        known = [s.id for s in job.snapshots.values() if s.state is State.PROTECTED]
        good = [id for id in known if id not in pending.rejected]
        return choice.Start(max(good), "it is protected") if good else right(
            job, pending, nodes, *rest
        )  # fmt: skip

    return [(choice, "choose", choose)]


def _expect_nobody() -> list[Patch]:
    right = choice.choose

    def choose(
        job: Job, pending: PendingResume, nodes: dict[str, Node], _: float, *rest: float
    ) -> choice.Start | choice.Wait:
        if job.record is not None:
            known = {n: t for n, t in job.record.nodes.items() if n in nodes and nodes[n].live}
            job = replace(job, record=msgspec.structs.replace(job.record, nodes=known))
        return right(job, pending, nodes, 0.0, *rest)

    return [(choice, "choose", choose)]


class GrantsALifeTwice(Coordinator):
    """A new round gets the number of the life before."""

    def _grant(self, job: Job, *rest: Any) -> None:
        before = job.life, job.record
        job.life, job.record = max(0, job.life - 1), None
        for held in job.attachments.values():
            held.state = msgspec.structs.replace(held.state, life=0)
        super()._grant(job, *rest)
        if job.record is None:
            job.life, job.record = before


class TakesOneSealForAll(Coordinator):
    """What one rank has sealed counts as sealed by every rank."""

    def _advance(self, job: Job, snapshot: Snapshot, now: float) -> None:
        if snapshot.state in (State.TICKETED, State.CAPTURING):
            snapshot.move(State.SEALED, now)
        super()._advance(job, snapshot, now)


class ForgetsWhatWasTorn(Coordinator):
    """A capture that failed on one rank is not dropped on the others."""

    def _snapshot_failed(self, node: str, message: SnapshotFailed, now: float) -> None:
        if message.outcome != "torn":
            super()._snapshot_failed(node, message, now)


class BelievesTheDead(Coordinator):
    """What a lost node held still counts."""

    def _node_lost(self, name: str, now: float) -> None:
        held = self.nodes[name].holdings
        super()._node_lost(name, now)
        self.nodes[name].holdings, self.nodes[name].live = held, True
        self.nodes[name].last_seen = now


class CallsNoSpare(Coordinator):
    """A place that is empty stays so."""

    def _fill_vacancies(self, job: Job, now: float) -> None:
        pass


class FreesOnSeal(Coordinator):
    """A sealed snapshot is committed before anything protects it."""

    def _order_protect(self, job: Job, snapshot: Snapshot, now: float) -> None:
        super()._order_protect(job, snapshot, now)
        if snapshot.state is State.SEALED:
            self._commit(job, snapshot, now)


class AsksNobodyAgain(Coordinator):
    """A node that was given up is not asked what it holds when it is heard again."""

    def handle(self, peer: bytes, message: Any, now: float) -> list[decider.Send]:
        sends = super().handle(peer, message, now)
        return [send for send in sends if not isinstance(send.message, WhoAreYou)]


# The agent.


class IgnoresTheLife(Lifecycle):
    """Tickets are given to processes of any life."""

    def _take(self, id: SnapshotId) -> None:
        lives = {conn: trainer.life for conn, trainer in self.trainers.items()}
        for trainer in self.trainers.values():
            trainer.life = id.life if trainer.job == id.job else trainer.life
        super()._take(id)
        for conn, life in lives.items():
            self.trainers[conn].life = life


class TakesSlotsFromTheLiving(Lifecycle):
    """A closed connection counts as a dead process."""

    def _local_gone(self, event: ev.LocalGone, now: float) -> None:
        super()._local_gone(ev.LocalGone(event.conn, event.reason, dead=True), now)
        for slot in list(self.slots.values()):
            self._take_over(slot)

    def _leave(self, trainer: Any, reason: str, finished: bool) -> None:
        super()._leave(trainer, reason, finished)
        self._disown(trainer.conn)

    def _attach(self, conn: int, message: Attach) -> None:
        for slot in self.slots.values():
            if slot.job == message.job:
                self._take_over(slot)
        super()._attach(conn, message)

    def _take_over(self, slot: Slot) -> None:
        if slot.use is Use.CAPTURING:
            self._check(slot)
        slot.owner = None


class ReportsBeforeStoring(Lifecycle):
    """Parity counts as kept as soon as it is ordered."""

    def _protect(self, message: Protect) -> None:
        super()._protect(message)
        holding = self._holding(message.manifest.id)
        if any(s.id == message.manifest.id and s.parity for s in self.slots.values()):
            self._report(Holds(msgspec.structs.replace(holding, parity=True)))


class KeepsNoRecord(Lifecycle):
    """The record of a life is known, and not stored."""

    def _keep(self, record: JobRecord) -> None:
        super()._keep(record)
        self._out = [action for action in self._out if not isinstance(action, ev.KeepRecord)]


class FreesWhatIsBeingChecked(Lifecycle):
    """Every slot of a snapshot is released at once, whoever writes to it."""

    def _free_snapshot(self, id: SnapshotId) -> None:
        for slot in self.slots.values():
            if slot.id == id and slot.use is Use.CAPTURING:
                slot.use = Use.SEALED
        super()._free_snapshot(id)


class ForgetsManifests(Lifecycle):
    """A commit frees the manifests of what was committed, too."""

    def _from_coordinator(self, event: ev.FromCoordinator, now: float) -> None:
        super()._from_coordinator(event, now)
        if isinstance(event.message, Commit):
            self._do(ev.ForgetManifests(event.message.id))


class HoardsParity(Lifecycle):
    """Parity of what was retired is kept."""

    def _release(self, slot: Slot) -> None:
        if not slot.parity:
            super()._release(slot)


BUGS = {
    "commit_early": Bug("commits before all have encoded", patches=_commit_early),
    "retire_older": Bug("retires what is no ancestor", patches=_retire_anything_older),
    "nothing_when_unsure": Bug("starts from nothing when unsure", patches=_nothing_when_unsure),
    "trust_a_flag": Bug("decides from a state, not from holdings", patches=_trust_a_flag),
    "unheard": Bug(
        "resumes while nodes are unheard",
        patches=_expect_nobody,
        faults=("restart_coordinator", "kill_trainer", "cut_off"),
        nodes=1,
    ),
    "life_twice": Bug("grants two rounds one life", coordinator=GrantsALifeTwice),
    "one_seal": Bug("takes one rank's seal for all", coordinator=TakesOneSealForAll),
    "torn": Bug("does not drop what was torn", coordinator=ForgetsWhatWasTorn),
    "dead": Bug("counts what lost nodes held", coordinator=BelievesTheDead),
    "no_spare": Bug("calls no spare", coordinator=CallsNoSpare),
    "free_on_seal": Bug("frees as soon as all have sealed", coordinator=FreesOnSeal),
    "not_asked": Bug("does not ask again", coordinator=AsksNobodyAgain),
    "any_life": Bug("gives tickets to any life", lifecycle=IgnoresTheLife),
    "owned": Bug("gives away the slot of a living process", lifecycle=TakesSlotsFromTheLiving),
    "report_early": Bug("reports parity before it is stored", lifecycle=ReportsBeforeStoring),
    "no_record": Bug(
        "stores no record",
        lifecycle=KeepsNoRecord,
        faults=("restart_coordinator", "restart_agent", "kill_trainer"),
    ),
    "free_capturing": Bug("releases what is written to", lifecycle=FreesWhatIsBeingChecked),
    "no_manifest": Bug("forgets manifests at a commit", lifecycle=ForgetsManifests),
    "hoard": Bug("keeps all parity", lifecycle=HoardsParity),
}
