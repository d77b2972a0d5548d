"""Agents that decide one thing wrong."""

from typing import Any

import msgspec

from ckptd.agent import events as ev
from ckptd.agent.lifecycle import Lifecycle
from ckptd.agent.state import Slot, Use
from ckptd.ids import SnapshotId
from ckptd.manifest import JobRecord
from ckptd.terms import Term
from ckptd.wire import Attach, Commit, Holds, Kept, Protect, Welcome


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


class IgnoresTheTerm(Lifecycle):
    """Whoever gives orders is obeyed."""

    def _obeys(self, event: ev.FromCoordinator, now: float) -> bool:
        return super()._obeys(event, now) or event.term > 0


class ObeysAnOldOne(Lifecycle):
    """Whoever says Welcome is obeyed from then on, whatever its term."""

    def _obeys(self, event: ev.FromCoordinator, now: float) -> bool:
        if isinstance(event.message, Welcome) and 0 < event.term < self.term.number:
            self.term = Term(event.term, event.coordinator, event.message.address)
        return super()._obeys(event, now)


class StoresNoTerm(Lifecycle):
    """The term that is obeyed is known, and not stored."""

    def _obeys(self, event: ev.FromCoordinator, now: float) -> bool:
        obeys = super()._obeys(event, now)
        self._out = [action for action in self._out if not isinstance(action, ev.KeepTerm)]
        return obeys


class StoresNoEntries(Lifecycle):
    """The log is known, and not stored."""

    def _from_coordinator(self, event: ev.FromCoordinator, now: float) -> None:
        super()._from_coordinator(event, now)
        others = [action for action in self._out if not isinstance(action, ev.KeepEntries)]
        if others != self._out:
            self._out = others
            self._stored = self.journal.summary
            self._report(Kept(self._stored))
