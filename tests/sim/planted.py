"""Bugs that the simulator must find: each makes one decision of a real decider wrong.

A planted bug is a pair of decider classes, and patches that last while a seed is lived through.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from ckptd.agent.lifecycle import Lifecycle
from ckptd.coordinator.decider import Coordinator

from . import planted_agent as bad
from . import planted_coordinator as wrong
from .plan import Plan, draw

_OFTEN_S = 2.0


@dataclass(frozen=True)
class Bug:
    """What is wrong, and where."""

    says: str
    coordinator: type[Coordinator] = Coordinator
    lifecycle: type[Lifecycle] = Lifecycle
    patches: Callable[[], list[wrong.Patch]] = list
    faults: tuple[str, ...] = ()
    """Where these have to come together, often, for the bug to do harm: only they strike."""
    nodes: int = 0
    """Size of the job, with spares to move to, where that is needed, too."""
    keep: int = 0
    """How many snapshots are kept, where that counts."""

    def plan(self, seed: int) -> Plan:
        plan = draw(seed)
        often = dict.fromkeys(self.faults, _OFTEN_S)
        if self.nodes:
            plan = replace(plan, jobs=(self.nodes,), spares=2, stable_ranks=False)
        if self.keep:
            plan = replace(plan, keep=self.keep, slots=self.keep + 1)
        return replace(plan, interval_s=often) if often else plan

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with ExitStack() as stack:
            for where, name, what in self.patches():
                stack.enter_context(patch.object(where, name, what))
            yield


BUGS = {
    "commit_early": Bug("commits before all have encoded", patches=wrong.commit_early),
    "retire_all": Bug("retires what is no ancestor", patches=wrong.retire_anything_else),
    "nothing_when_unsure": Bug(
        "starts from nothing when unsure",
        patches=wrong.nothing_when_unsure,
        faults=("cut_off", "kill_trainer", "restart_job"),
        nodes=1,
    ),
    "trust_a_flag": Bug("decides from a state, not from holdings", patches=wrong.trust_a_flag),
    "unheard": Bug(
        "resumes while nodes are unheard",
        patches=wrong.expect_nobody,
        faults=("restart_coordinator", "kill_trainer", "cut_off"),
        nodes=1,
    ),
    "life_twice": Bug("grants two rounds one life", coordinator=wrong.GrantsALifeTwice),
    "one_seal": Bug("takes one rank's seal for all", coordinator=wrong.TakesOneSealForAll),
    "torn": Bug("does not drop what was torn", coordinator=wrong.ForgetsWhatWasTorn),
    "dead": Bug(
        "counts what lost nodes held",
        coordinator=wrong.BelievesTheDead,
        faults=("destroy_node", "kill_trainer"),
    ),
    "no_spare": Bug("calls no spare", coordinator=wrong.CallsNoSpare),
    "free_on_seal": Bug("frees as soon as all have sealed", coordinator=wrong.FreesOnSeal),
    "not_asked": Bug("does not ask again", coordinator=wrong.AsksNobodyAgain),
    "any_life": Bug("gives tickets to any life", lifecycle=bad.IgnoresTheLife),
    "owned": Bug("gives away the slot of a living process", lifecycle=bad.TakesSlotsFromTheLiving),
    "report_early": Bug("reports parity before it is stored", lifecycle=bad.ReportsBeforeStoring),
    "no_record": Bug(
        "stores no record",
        lifecycle=bad.KeepsNoRecord,
        faults=("restart_coordinator", "restart_agent", "kill_trainer"),
    ),
    "free_capturing": Bug("releases what is written to", lifecycle=bad.FreesWhatIsBeingChecked),
    "no_manifest": Bug("forgets manifests at a commit", lifecycle=bad.ForgetsManifests),
    "hoard": Bug("keeps all parity", lifecycle=bad.HoardsParity),
    "not_stopped": Bug(
        "gives orders though another is alive",
        patches=wrong.never_give_way,
        faults=("rival_coordinator",),
    ),
    "keep_one": Bug(
        "retires a snapshot that is to be kept",
        patches=wrong.keep_only_the_newest,
        keep=2,
    ),
    "no_rollback": Bug(
        "forgets a rollback", coordinator=wrong.ForgetsARollback, faults=("roll_back",)
    ),
    "wanted": Bug(
        "frees what somebody wants to go back to",
        coordinator=wrong.FreesWhatIsWanted,
        faults=("roll_back", "restart_coordinator"),
    ),
    "falls_back": Bug(
        "falls back to what was given up",
        coordinator=wrong.FallsBack,
        faults=("roll_back", "kill_trainer"),
    ),
    "isolated": Bug(
        "starts ranks on isolated nodes",
        coordinator=wrong.StartsAnywhere,
        faults=("isolate", "restart_job"),
    ),
    "no_entries": Bug(
        "grants before the log is there",
        coordinator=wrong.AwaitsNoEntries,
        faults=("isolate", "roll_back", "restart_coordinator", "kill_trainer"),
    ),
    "any_term": Bug(
        "ignores the term",
        lifecycle=bad.IgnoresTheTerm,
        patches=wrong.go_on_with_the_old_term,
        faults=("replace_coordinator",),
    ),
    "old_term": Bug(
        "obeys an old coordinator",
        lifecycle=bad.ObeysAnOldOne,
        patches=wrong.go_on_with_the_old_term,
        faults=("replace_coordinator",),
    ),
    "no_term": Bug(
        "stores no term",
        lifecycle=bad.StoresNoTerm,
        faults=("replace_coordinator", "restart_agent"),
    ),
    "no_log": Bug(
        "stores no entries",
        lifecycle=bad.StoresNoEntries,
        faults=("isolate", "restart_agent", "restart_coordinator", "kill_trainer"),
    ),
}
