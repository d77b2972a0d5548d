"""What people ask of the coordinator: to go back, and to leave a node out; and that it is done."""

from typing import TYPE_CHECKING

from ckptd.coordinator import keeping
from ckptd.coordinator.decider import Coordinator
from ckptd.ids import SnapshotId
from ckptd.journal import Rollback
from ckptd.wire import Grant, IsolateNode, RollBack

from .kernel import Violation

if TYPE_CHECKING:
    from .agents import Machine
    from .control import CoordinatorProcess
    from .runs import TrainingJob
    from .world import World

_AGAIN_S = (0.5, 1.5)
_LOOK_AGAIN_S = (0.02, 0.05)


class People:
    """They give orders, and look whether they were heard."""

    def __init__(self, world: "World") -> None:
        self._world, self._random = world, world.fault_random
        self._asked: dict[str, Rollback] = {}
        """Where a job is to go back to, as long as it has not."""
        self._confirmed: set[str] = set()
        """Jobs whose people were told that it will be so, whatever becomes of the coordinator."""
        self._readmitted: set[str] = set()
        self.left_out: set[str] = set()
        """Nodes on which no launcher starts ranks."""
        self._fulfilled: dict[tuple[str, int], SnapshotId] = {}
        """(job, life) to the snapshot that somebody chose for it."""
        self._granted_by: dict[tuple[str, int], Coordinator] = {}
        """(job, life) to the coordinator that granted it last."""

    # Going back.

    def roll_back(self, job: "TrainingJob") -> bool:
        """To one of the snapshots that there are; most often, the job is started again at once."""
        office = self._world.coordinator
        decider = office.decider if office.at_work else None
        if decider is None or job.name not in decider.jobs or job.run is None:
            return False
        able = keeping.choices(decider.jobs[job.name], decider.nodes)
        able = [id for id in able if self._world.truth.restorable(id)]
        if not able:
            return False
        id = self._random.choice(able)
        if office.obey(RollBack(job.name, id.step, id.life)):
            return False
        entry = decider.journal.rollback(job.name)
        assert entry is not None
        self._asked[job.name] = entry
        self._confirmed.discard(job.name)
        self._confirm(job.name, entry, decider)
        if self._random.random() < 0.7:
            job.restart()
        return True

    def _confirm(self, job: str, entry: Rollback, decider: Coordinator) -> None:
        """Somebody waits for the answer; if the coordinator ends first, nothing was promised."""
        office = self._world.coordinator
        if office.decider is not decider or self._asked.get(job) is not entry:
            return
        if office.at_work and not decider.forgetful:
            self._confirmed.add(job)
        else:
            self._world.clock.later(_LOOK_AGAIN_S, self._confirm, job, entry, decider)

    def wanted(self, job: str) -> tuple[SnapshotId, ...]:
        """Where somebody wants to go back to, whether or not that was confirmed."""
        asked = self._asked.get(job)
        return (asked.id,) if asked is not None and asked.id is not None else ()

    def promised(self, job: str) -> tuple[SnapshotId, ...]:
        """What must not be freed, as somebody was told that the job will go back to it."""
        return self.wanted(job) if job in self._confirmed else ()

    def wish(self, office: "CoordinatorProcess", grant: Grant) -> SnapshotId | None:
        """Where this coordinator must know that the life is to begin."""
        assert office.decider is not None
        known = office.hearsay.log(office.decider).rollback(grant.job)
        if known is None or known.after >= grant.life:
            return None
        return None if self._world.truth.trained.get(grant.job, 0) > known.after else known.id

    def have_chosen(self, grant: Grant) -> bool:
        """Whether the life was granted from where somebody chose, whatever was asked for since."""
        return grant.id is not None and self._fulfilled.get((grant.job, grant.life)) == grant.id

    def fulfils(self, grant: Grant) -> SnapshotId | None:
        """The wish with which the life was granted, once an agent has heard of it."""
        asked = self._asked.get(grant.job)
        if asked is not None and asked.id == grant.id and grant.life > asked.after:
            return asked.id  # of a coordinator that is no longer in office, perhaps
        return self._fulfilled.get((grant.job, grant.life))

    def trains(self, job: str, life: int) -> None:
        """The ranks of a life have loaded."""
        asked = self._asked.get(job)
        if asked is not None and life > asked.after:
            del self._asked[job]

    # Leaving nodes out.

    def isolate(self, machine: "Machine") -> bool:
        """Its launchers hear of it at once, or later; it is readmitted after a while."""
        office, name = self._world.coordinator, machine.name
        if not office.at_work or office.obey(IsolateNode(name, True, "it failed twice")):
            return False
        clock = self._world.clock
        self._readmitted.discard(name)
        if self._random.random() < 0.6:
            self._leave_out(name)
        else:
            clock.at(clock.now + self._random.uniform(1.0, 5.0), self._leave_out, name)
        clock.at(clock.now + self._random.uniform(4.0, 15.0), self.readmit, name)
        return True

    def _leave_out(self, name: str) -> None:
        if name not in self._readmitted:
            self.left_out.add(name)

    def readmit(self, name: str) -> None:
        """Ask for it until it is done."""
        self.left_out.discard(name)
        self._readmitted.add(name)
        self._ask_again(name)

    def _ask_again(self, name: str) -> None:
        if name not in self._readmitted:
            return
        office = self._world.coordinator
        decider = office.decider if office.at_work else None
        if decider is not None and decider.journal.is_isolated(name) is not None:
            office.obey(IsolateNode(name, False, ""))
        self._world.clock.later(_AGAIN_S, self._ask_again, name)

    def make_peace(self) -> None:
        """Every node may take part again, and whoever is to go back does so now."""
        for name in sorted(self._world.machines):
            if name not in self._readmitted:
                self.readmit(name)
        for name in sorted(self._asked):
            self._world.jobs[name].restart()
        self._look_after_wishes()

    def _look_after_wishes(self) -> None:
        """What was not promised may be gone: then the way out that the job's status says is taken.

        A coordinator may have died with the wish, and the one after it heard of it too late.
        """
        office = self._world.coordinator
        for name, asked in sorted(self._asked.items()):
            gone = asked.id is not None and not self._world.truth.restorable(asked.id)
            in_vain = gone and name not in self._confirmed
            if in_vain and office.at_work and not office.obey(RollBack(name, None)):
                del self._asked[name]
        if self._asked:
            self._world.clock.later(_AGAIN_S, self._look_after_wishes)

    # What must hold.

    def check(self, office: "CoordinatorProcess", grant: Grant) -> None:
        """A coordinator in office grants a life. What it says again was decided before."""
        truth, decider = self._world.truth, office.decider
        assert decider is not None
        life = grant.job, grant.life
        if truth.is_granted(grant) or self._granted_by.get(life) is decider:
            return
        self._granted_by[life] = decider
        wish = self.wish(office, grant)
        if wish is not None:
            if grant.id != wish:
                raise Violation(f"{grant.job} starts from {grant.id}, though {wish} was asked for")
            self._fulfilled[life] = wish
        elif grant.id is not None and truth.given_up(grant.id):
            raise Violation(f"{grant.job} falls back to {grant.id}, which was given up")
        log = office.hearsay.log(decider)
        for name in grant.record.nodes:
            if log.is_isolated(name) is not None:
                raise Violation(f"life {grant.life} of {grant.job} has ranks on isolated {name}")
