"""Coordinators that decide one thing wrong."""

from dataclasses import replace
from typing import Any

import msgspec

from ckptd.coordinator import choice, decider, keeping
from ckptd.coordinator.claim import Claim, Raise, Stop, judge
from ckptd.coordinator.decider import Coordinator
from ckptd.coordinator.inventory import Held
from ckptd.coordinator.state import Job, Node, PendingResume, Snapshot, State
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest
from ckptd.terms import Obeyed
from ckptd.wire import SnapshotFailed, WhoAreYou

Patch = tuple[Any, str, Any]


def commit_early() -> list[Patch]:
    def some_parity(held: Held, manifest: JobManifest) -> bool:
        return held.parities > 0

    return [(Held, "is_protected", some_parity)]


def retire_anything_else() -> list[Patch]:
    return [(decider, "is_ancestor", lambda id, of, ancestors: id != of and id.life <= of.life)]


def nothing_when_unsure() -> list[Patch]:
    def start(*_: object) -> choice.Start:
        return choice.Start(None, "nothing was found")

    return [(choice, "_without_a_snapshot", start)]


def trust_a_flag() -> list[Patch]:
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


def expect_nobody() -> list[Patch]:
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
        for holding in held.values():
            self._inventory.put(name, holding)
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


def never_give_way() -> list[Patch]:
    def wrong(claim: Claim, term: int, obeyed: Obeyed, *rest: Any) -> Raise | Stop | None:
        verdict = judge(claim, term, obeyed, *rest)
        if isinstance(verdict, Stop):
            return Raise(obeyed.term.number + 1) if obeyed.term.number >= term else None
        return verdict

    return [(decider, "judge", wrong)]


def go_on_with_the_old_term() -> list[Patch]:
    def wrong(*args: Any) -> Raise | None:
        verdict = judge(*args)
        return None if isinstance(verdict, Stop) else verdict

    return [(decider, "judge", wrong)]


def keep_only_the_newest() -> list[Patch]:
    def kept(job: Job, newest: Snapshot, wanted: SnapshotId | None, *_: object) -> set[SnapshotId]:
        return {newest.id} if wanted is None else {newest.id, wanted}

    return [(keeping, "kept", kept)]


class ForgetsARollback(Coordinator):
    """Nobody's wish counts when a life is granted."""

    def rollback_of(self, job: Job) -> SnapshotId | None:
        return None


class FreesWhatIsWanted(Coordinator):
    """What somebody wants to go back to may be retired all the same."""

    def _commit(self, job: Job, snapshot: Snapshot, now: float) -> None:
        wanted, self.rollback_of = self.rollback_of, lambda _: None  # type: ignore[method-assign]
        super()._commit(job, snapshot, now)
        self.rollback_of = wanted  # type: ignore[method-assign]


class FallsBack(Coordinator):
    """What a rollback gave up is not remembered with the life."""

    def _grant(self, job: Job, *rest: Any) -> None:
        if job.record is not None:
            job.record = msgspec.structs.replace(job.record, given_up=())
        super()._grant(job, *rest)
        assert job.record is not None
        job.record = msgspec.structs.replace(job.record, given_up=())


class StartsAnywhere(Coordinator):
    """An isolated node may have ranks of a new life."""

    def _unfit_ranks(self, job: Job, pending: PendingResume) -> choice.Wait | None:
        return None


class AwaitsNoEntries(Coordinator):
    """Lives are granted before the log is there that agents kept."""

    def _missing_entries(self) -> choice.Wait | None:
        return None
