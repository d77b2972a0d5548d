"""Stories told to the coordinator's decider by agents that are nothing but their messages."""

from itertools import permutations
from typing import Any

import msgspec
import pytest

from ckptd.coordinator.decider import Settings
from ckptd.coordinator.pacer import Pacer
from ckptd.coordinator.state import State
from ckptd.coordinator.view import status
from ckptd.ids import SnapshotId
from ckptd.manifest import CELLS_LIMIT, Ancestor, Extent, JobRecord
from ckptd.wire import (
    Activate,
    AskResumeFor,
    Beat,
    Commit,
    Dismiss,
    Drop,
    Fetching,
    Forget,
    Grant,
    Holding,
    Holds,
    LifeResumed,
    Protect,
    RankReport,
    RankState,
    Record,
    ResumeWaits,
    Share,
    SnapshotFailed,
    TakeSnapshot,
    Undivide,
    Welcome,
    WhoAreYou,
)

from .fakes import JOB, SIZE_BYTES, Cluster, snapshot


def trained(*names: str, spares: tuple[str, ...] = ()) -> Cluster:
    """A cluster whose job, one rank a node, trains in life 1 from nothing and has a ticket."""
    cluster = Cluster(*names, *spares)
    cluster.pass_time(cluster.settings.lease_s)
    grant = cluster.start(*names)
    assert (grant.life, grant.id) == (1, None)
    return cluster


def last_wait(cluster: Cluster, name: str) -> ResumeWaits:
    waits = [message for message in cluster.inbox(name) if isinstance(message, ResumeWaits)]
    assert waits, cluster.inbox(name)
    return waits[-1]


def states(cluster: Cluster) -> dict[tuple[int, int], State]:
    job = cluster.coordinator.jobs[JOB]
    return {(id.life, id.step): snapshot.state for id, snapshot in job.snapshots.items()}


class TestMembership:
    def test_an_agent_is_welcomed_and_told_the_pace(self) -> None:
        cluster = Cluster("a")
        pace = cluster.settings
        assert cluster.inbox("a") == [Welcome(pace.beat_s, pace.cell_bytes, lease_s=pace.lease_s)]

    def test_a_stranger_is_asked_who_it_is(self) -> None:
        cluster = Cluster("a")
        assert cluster.say("a", Beat("x", "1", 0, ()), peer=b"stranger") == [WhoAreYou()]

    def test_a_second_node_of_the_same_name_is_refused(self) -> None:
        """Two machines, one --node: the first, heard again, keeps it; the second is told why."""
        cluster = Cluster("a")
        other = msgspec.structs.replace(cluster.hello_of("a"), memory_token="other")
        assert cluster.say("a", other, peer=b"impostor") == []
        cluster.pass_time(cluster.settings.beat_s)
        (answer,) = cluster.say("a", other, peer=b"impostor")
        assert isinstance(answer, Dismiss)
        assert "--node" in answer.reason
        assert cluster.say("a", Beat("a", "1", 0, ())) == []

    def test_the_name_of_a_lost_node_is_free_for_another(self) -> None:
        cluster = Cluster("a", "b")
        cluster.destroy("a")
        other = msgspec.structs.replace(cluster.hello_of("a"), memory_token="other")
        answers = cluster.say("a", other, peer=b"newcomer")
        assert isinstance(answers[0], Welcome)

    def test_a_restarted_agent_takes_over_from_the_process_before(self) -> None:
        cluster = Cluster("a")
        old = cluster.nodes["a"].peer
        cluster.restart_agent("a")
        assert cluster.say("a", Beat("a", "1", 0, ()), peer=old) == [WhoAreYou()]
        assert cluster.say("a", Beat("a", "2", 0, ())) == []

    def test_a_node_is_lost_when_its_lease_is_out_and_not_before(self) -> None:
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s - 0.1, silent=["a"])
        assert cluster.coordinator.nodes["a"].live
        assert cluster.coordinator.next_deadline(cluster.now) <= cluster.now + 0.1 + 1e-6
        cluster.pass_time(0.2, silent=["a"])
        assert not cluster.coordinator.nodes["a"].live
        assert cluster.coordinator.nodes["b"].live

    def test_a_node_that_was_given_up_must_say_again_what_it_holds(self) -> None:
        cluster = trained("a", "b")
        cluster.protect(snapshot(1, 2))
        cluster.pass_time(cluster.settings.lease_s + 1, silent=["a"])
        assert cluster.coordinator.live_holdings(snapshot(1, 2)).keys() == {"b"}
        assert cluster.say("a", Beat("a", "1", 0, ())) == [WhoAreYou()]
        cluster.hello("a")
        assert cluster.coordinator.live_holdings(snapshot(1, 2)).keys() == {"a", "b"}

    def test_hello_said_again_changes_nothing(self) -> None:
        """But for captures under way: the agent may have missed their tickets, so they end."""
        cluster = trained("a", "b", "c")
        cluster.protect(snapshot(1, 2))
        cluster.free(slots=0)
        for open_ in cluster.tickets("a")[1:]:
            cluster.say("a", SnapshotFailed(open_, "dropped", "for the story"))
        job = cluster.coordinator.jobs[JOB]

        def known() -> tuple[object, ...]:
            ranks = {key: (held.node, held.state) for key, held in job.attachments.items()}
            return states(cluster), job.life, job.round, dict(job.members), ranks, job.resumed

        before = known()
        assert states(cluster) == {(1, 2): State.PROTECTED}
        for name in ("b", "a", "c", "a"):
            cluster.hello(name)
        assert known() == before
        assert cluster.told("a", Drop) == cluster.told("b", Drop)

    def test_a_coordinator_that_was_stopped_gives_up_nobody(self) -> None:
        """It could not hear them; what they said meanwhile is taken in after the tick, perhaps."""
        cluster = trained("a", "b", spares=("s",))
        cluster.wait_for_launcher("s")
        cluster.now += 10 * cluster.settings.lease_s
        cluster.deliver(cluster.coordinator.tick(cluster.now))
        assert all(node.live for node in cluster.coordinator.nodes.values())
        assert not cluster.told("s", Activate)
        cluster.destroy("b")
        assert cluster.told("s", Activate)

    def test_a_coordinator_that_was_stopped_first_takes_in_what_was_said_meanwhile(self) -> None:
        """Of a node only its Hello may be taken in yet, and not what it has sealed since."""
        cluster = trained("a", "b")
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        cluster.now += 0.6 * cluster.settings.lease_s
        assert cluster.ask() is None
        assert (
            last_wait(cluster, "a").reason == "what agents said while the coordinator was stopped"
        )
        cluster.pass_time(2 * cluster.settings.beat_s)
        assert [grant.life for grant in cluster.granted("a")] == [1, 2]

    def test_a_coordinator_that_was_stopped_is_not_settled(self) -> None:
        """The time in which it could hear of nobody does not count as time to hear of all."""
        cluster = Cluster("s")
        cluster.attach("r1", "s")
        cluster.now += 10 * cluster.settings.lease_s
        assert cluster.ask() is None
        cluster.pass_time(cluster.settings.lease_s)
        assert cluster.granted("s")


class TestTickets:
    def test_a_ticket_waits_for_a_free_slot_on_every_rank(self) -> None:
        cluster = Cluster("a", "b", "c")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b", "c")
        grant = cluster.ask()
        assert grant is not None
        cluster.say("a", LifeResumed(JOB, 1, 0))
        for rank in (0, 1):
            cluster.update(rank, life=1, free_slots=2)
        assert cluster.tickets("a") == []
        cluster.update(2, life=1, free_slots=0)
        assert cluster.tickets("a") == []
        cluster.update(2, free_slots=1)
        assert [cluster.tickets(name) for name in "abc"] == [[snapshot(1, 2)]] * 3

    def test_a_slot_is_not_promised_twice(self) -> None:
        """Two free slots: one for the ticket on its way, one for the next, none for a third."""
        cluster = trained("a", "b")
        for step in (1, 2, 3):
            for rank in (0, 1):
                cluster.update(rank, step=step)
        assert len(cluster.tickets("a")) == 2
        cluster.take(0, cluster.tickets("a")[0])
        assert len(cluster.tickets("a")) == 2

    def test_no_step_gets_two_tickets(self) -> None:
        """Ten snapshots, each captured and protected: steps grow, whatever the ranks report."""
        cluster = trained("a", "b")
        done = 0
        while done < 10:
            id = cluster.tickets("a")[done]
            for rank in (0, 1):
                cluster.update(rank, step=id.step)
            cluster.now += 0.01
            cluster.protect(id)
            retire = [i for m in cluster.told("a", Commit) for i in m.retire]
            cluster.free(retire, slots=1)
            done += 1
        steps = [id.step for id in cluster.tickets("a")]
        assert steps == sorted(set(steps))

    def test_every_keeps_tickets_apart(self) -> None:
        cluster = Cluster("a")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.report("a", RankState(JOB, "r1", 0, 0, 1, 10, 0, 0, 0))
        cluster.round, cluster.world_size = "r1", 1
        grant = cluster.ask()
        assert grant is not None
        cluster.begin(grant)
        cluster.update(0, step=1)
        steps = [id.step for id in cluster.tickets("a")]
        assert len(steps) == 2
        assert steps[1] - steps[0] >= 10

    def test_a_failed_capture_drops_the_snapshot_on_all(self) -> None:
        cluster = trained("a", "b")
        (id,) = {cluster.tickets("a")[0]}
        for rank in (0, 1):
            cluster.take(rank, id)
        cluster.seal(0, id)
        cluster.say("b", SnapshotFailed(id, "torn", "rank 1: written meanwhile"))
        for name in ("a", "b"):
            (drop,) = cluster.told(name, Drop)
            assert isinstance(drop, Drop)
            assert drop.id == id
            assert "written meanwhile" in drop.reason
        assert cluster.coordinator.jobs[JOB].ended[-1].state is State.TORN
        assert (1, 2) not in states(cluster)

    def test_a_segment_of_a_dropped_snapshot_is_dropped_again(self) -> None:
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.say("b", SnapshotFailed(id, "skipped", "rank 1: too late"))
        cluster.seal(0, id)
        assert [m.id for m in cluster.told("a", Drop) if isinstance(m, Drop)] == [id, id]

    def test_a_dropped_ticket_takes_a_slot_until_its_rank_has_heard_of_it(self) -> None:
        """Else each drop lets tickets be issued that find no slot, and are dropped in turn."""
        cluster = trained("a", "b")
        cluster.update(0, step=1)
        first, second = cluster.tickets("a")
        for id in (first, second):
            cluster.say("a", SnapshotFailed(id, "torn", "rank 0: written meanwhile"))
        cluster.update(0, seen_step=second.step, free_slots=2)
        assert len(cluster.tickets("a")) == 2  # both are still on their way to b
        cluster.update(1, seen_step=second.step, free_slots=1)
        assert len(cluster.tickets("a")) == 3

    def test_a_restarted_agent_with_one_of_two_segments_ends_the_capture(self) -> None:
        """The other was under way when it died, and will never come."""
        cluster = trained("a", "a", "b")
        id = cluster.tickets("a")[0]
        for rank in (0, 2):
            cluster.seal(rank, id)
        cluster.restart_agent("a", ranks=True)
        assert id not in cluster.coordinator.jobs[JOB].snapshots
        assert [drop.id for drop in cluster.told("b", Drop) if isinstance(drop, Drop)] == [id]

    def test_an_agent_that_only_reconnects_goes_on_with_the_capture(self) -> None:
        cluster = trained("a", "a", "b")
        id = cluster.tickets("a")[0]
        for rank in (0, 2):
            cluster.seal(rank, id)
        cluster.say("a", msgspec.structs.replace(cluster.hello_of("a"), capturing=((id, 1),)))
        cluster.seal(1, id)
        assert cluster.told("b", Protect)

    def test_a_capture_that_failed_unheard_ends_when_the_agent_says_hello(self) -> None:
        cluster = trained("a", "a", "b")
        id = cluster.tickets("a")[0]
        for rank in (0, 2):
            cluster.seal(rank, id)
        cluster.hello("a")
        assert id not in cluster.coordinator.jobs[JOB].snapshots
        assert [drop.id for drop in cluster.told("b", Drop) if isinstance(drop, Drop)] == [id]

    def test_a_ticket_that_was_lost_is_not_waited_for(self) -> None:
        cluster = trained("a", "b")
        cluster.update(0, step=1)
        for id in cluster.tickets("a"):
            cluster.say("a", SnapshotFailed(id, "torn", "rank 0: written meanwhile"))
        cluster.pass_time(cluster.settings.lease_s)
        cluster.update(0, free_slots=2)
        assert len(cluster.tickets("a")) == 3

    def test_a_late_ticket_widens_the_margin(self) -> None:
        pacer = Pacer(every=1)
        pacer.start(0, 0.0)
        for step in range(1, 20):
            pacer.observe(step, step * 0.01)
        near = pacer.next_step(0.19, 0)
        for _ in range(5):
            pacer.missed()
        assert pacer.next_step(0.19, 0) > near + 1

    def test_reports_that_come_together_do_not_look_like_speed(self) -> None:
        """Two ranks' reports were held up and arrive within a microsecond."""
        pacer = Pacer(every=1)
        pacer.start(57, 10.0)
        pacer.observe(58, 10.000001)
        pacer.observe(59, 10.000002)
        assert pacer.next_step(10.01, 0) <= 61

    def test_a_rank_that_leaves_takes_the_unfinished_capture_along(self) -> None:
        cluster = trained("a", "b")
        first, second = cluster.tickets("a")[0], None
        cluster.take(0, first)
        cluster.take(1, first)
        cluster.seal(1, first)
        cluster.leave(0)
        assert first not in cluster.coordinator.jobs[JOB].snapshots
        assert second is None

    def test_no_tickets_once_a_rank_has_left(self) -> None:
        cluster = trained("a", "b")
        cluster.leave(1)
        count = len(cluster.tickets("a"))
        cluster.update(0, free_slots=2, step=50)
        assert len(cluster.tickets("a")) == count

    def test_tickets_come_though_the_word_of_the_resume_was_lost(self) -> None:
        """Rank 0's agent was cut off at the moment when it said that all had loaded."""
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b")
        assert cluster.ask() is not None
        for rank in (0, 1):
            cluster.update(rank, life=1, free_slots=2)
        cluster.hello("a")
        assert cluster.tickets("b")

    def test_hello_said_again_costs_no_new_ticket(self) -> None:
        """An agent that reconnects between two snapshots gets tickets that stay valid."""
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        for rank in (0, 1):
            cluster.update(rank, seen_step=max(i.step for i in cluster.tickets("a")))
        for open_ in [i for i in cluster.tickets("a") if i != id]:
            cluster.say("a", SnapshotFailed(open_, "dropped", "for the story"))
        cluster.free()
        cluster.nodes["a"].inbox.clear()
        cluster.hello("a")
        dropped = {m.id for m in cluster.told("a", Drop) if isinstance(m, Drop)}
        assert not dropped & set(cluster.tickets("a"))


class TestShares:
    """Ranks divide what they hold alike; a snapshot counts only if they cut it alike."""

    ALIKE = Share(group=1, ranks=2, tape=7)

    def cluster(self) -> Cluster:
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        cluster.say("a", LifeResumed(JOB, 1, 0))
        return cluster

    def tickets(self, cluster: Cluster) -> int:
        return sum(isinstance(message, TakeSnapshot) for message in cluster.inbox("a"))

    def test_ranks_that_agree_get_tickets(self) -> None:
        cluster = self.cluster()
        for rank in (0, 1):
            cluster.update(rank, life=1, free_slots=1, shares=(self.ALIKE,))
        assert self.tickets(cluster) == 1

    def test_ranks_that_do_not_agree_for_long_save_all(self) -> None:
        cluster = self.cluster()
        other = msgspec.structs.replace(self.ALIKE, tape=8)
        cluster.update(0, life=1, free_slots=1, shares=(self.ALIKE,))
        cluster.update(1, life=1, free_slots=1, shares=(other,))
        assert self.tickets(cluster) == 0
        assert not [m for m in cluster.inbox("a") if isinstance(m, Undivide)]
        cluster.pass_time(1.0)
        cluster.update(1, step=3)
        told = [m for name in "ab" for m in cluster.inbox(name) if isinstance(m, Undivide)]
        assert [(m.job, m.life) for m in told] == [(JOB, 1)] * 2
        assert "only 1 of 2 ranks that should hold the same tensors do" in told[0].reason
        for rank in (0, 1):
            cluster.update(rank, shares=())
        assert self.tickets(cluster) == 1

    def test_ranks_that_change_one_after_the_other_are_waited_for(self) -> None:
        cluster = self.cluster()
        new = msgspec.structs.replace(self.ALIKE, tape=8)
        for rank in (0, 1):
            cluster.update(rank, life=1, free_slots=2, shares=(self.ALIKE,))
        assert self.tickets(cluster) == 1
        cluster.update(0, shares=(new,))
        cluster.pass_time(0.5)
        cluster.update(1, shares=(new,))
        assert not [m for m in cluster.inbox("a") if isinstance(m, Undivide)]
        assert self.tickets(cluster) == 2

    def test_what_was_begun_with_the_old_layout_is_dropped(self) -> None:
        """One rank has captured its old part, another would capture its new one."""
        cluster = self.cluster()
        for rank in (0, 1):
            cluster.update(rank, life=1, free_slots=1, shares=(self.ALIKE,))
        ticket = next(m for m in cluster.inbox("a") if isinstance(m, TakeSnapshot))
        cluster.update(0, shares=(msgspec.structs.replace(self.ALIKE, tape=8),))
        dropped = [m for m in cluster.inbox("b") if isinstance(m, Drop)]
        assert [(m.id, m.reason) for m in dropped] == [(ticket.id, "rank 0 has a new layout")]


def one_protected_one_sealed() -> tuple[Cluster, SnapshotId, SnapshotId]:
    """Two nodes; the older snapshot is protected, the newer one sealed by all ranks."""
    cluster = trained("a", "b")
    cluster.update(0, step=1)
    first, second = cluster.tickets("a")
    cluster.protect(first)
    cluster.seal_all(second)
    return cluster, first, second


class TestProtectAndCommit:
    def test_what_was_protected_is_not_freed_for_what_never_was(self) -> None:
        """It has lost some of its parity: now neither surely survives the loss of a node."""
        cluster, first, second = one_protected_one_sealed()
        held = cluster.nodes["a"].holdings[first]
        cluster.say("a", Holds(msgspec.structs.replace(held, parity=False)))
        cluster.say("b", SnapshotFailed(second, "dropped", "a segment of it is damaged"))
        retired = [id for m in cluster.told("a", Commit) for id in m.retire]
        assert first not in retired
        assert states(cluster)[1, first.step] is State.PROTECTED
        assert second in [drop.id for drop in cluster.told("a", Drop) if isinstance(drop, Drop)]

    def test_what_was_protected_is_not_freed_by_a_new_coordinator_either(self) -> None:
        """Of all parity that is there it can tell, though a segment is lost."""
        cluster, first, second = one_protected_one_sealed()
        held = cluster.nodes["a"].holdings[first]
        cluster.nodes["a"].holdings[first] = msgspec.structs.replace(held, extents=())
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        cluster.say("b", SnapshotFailed(second, "dropped", "a segment of it is damaged"))
        cluster.pass_time(2 * cluster.settings.beat_s)
        assert not any(first in m.retire for m in cluster.told("a", Commit))
        assert second in [drop.id for drop in cluster.told("a", Drop) if isinstance(drop, Drop)]

    def test_what_was_protected_is_not_dropped_for_what_it_was_to_replace(self) -> None:
        """The coordinator before died as it gave permission to free that; a segment was lost."""
        cluster = trained("a", "b", "c", "d")
        cluster.update(0, step=1)
        first, second = cluster.tickets("a")
        cluster.protect(first)
        older = {name: cluster.nodes[name].holdings[first] for name in "abcd"}
        cluster.protect(second)
        for name in "abcd":
            cluster.nodes[name].holdings[first] = older[name]
        held = cluster.nodes["a"].holdings[second]
        cluster.nodes["a"].holdings[second] = msgspec.structs.replace(held, extents=())
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s + 3 * cluster.settings.beat_s)
        assert second not in [m.id for m in cluster.told("a", Drop) if isinstance(m, Drop)]
        assert first in cluster.told("a", Commit)[-1].retire  # type: ignore[attr-defined]

    @pytest.mark.parametrize("damaged", [True, False])
    def test_what_is_damaged_replaces_nothing_under_a_new_coordinator(self, damaged: bool) -> None:
        """It cannot tell that the older one was protected: a node has lost its parity."""
        cluster, first, second = one_protected_one_sealed()
        held = cluster.nodes["a"].holdings[first]
        cluster.nodes["a"].holdings[first] = msgspec.structs.replace(held, parity=False)
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        cluster.say("b", SnapshotFailed(second, "dropped", "for the story", damaged))
        cluster.pass_time(3 * cluster.settings.beat_s)
        assert any(first in m.retire for m in cluster.told("a", Commit)) is not damaged
        dropped = [drop.id for drop in cluster.told("a", Drop) if isinstance(drop, Drop)]
        assert (second in dropped) is damaged

    @pytest.mark.parametrize("damaged", [True, False])
    def test_what_is_damaged_is_not_counted_as_it_was_reported(self, damaged: bool) -> None:
        """All but one have its parity; what was protected has lost more of it than that."""
        cluster = trained("a", "b", "c", "d")
        cluster.update(0, step=1)
        first, second = cluster.tickets("a")
        cluster.protect(first)
        cluster.seal_all(second)
        for name in "abc":
            cluster.encode(name, second)
        for name in "cd":
            held = cluster.nodes[name].holdings[first]
            cluster.say(name, Holds(msgspec.structs.replace(held, parity=False)))
        reason = "cell 0 of rank 1 from b is damaged" if damaged else "no memory for parity"
        cluster.say("d", SnapshotFailed(second, "dropped", reason, damaged))
        cluster.pass_time(2 * cluster.settings.beat_s)
        retired = [id for m in cluster.told("a", Commit) for id in m.retire]
        dropped = [drop.id for drop in cluster.told("a", Drop) if isinstance(drop, Drop)]
        assert (first in retired) is not damaged
        assert (second in dropped) is damaged

    def test_sealed_by_all_is_to_be_protected_by_all(self) -> None:
        cluster = trained("a", "b", "c", "d")
        id = cluster.tickets("a")[0]
        for rank in range(4):
            cluster.take(rank, id)
            assert not cluster.told("a", Protect)
            cluster.seal(rank, id)
        for name in "abcd":
            (order,) = cluster.told(name, Protect)
            assert isinstance(order, Protect)
            (group,) = order.manifest.groups
            assert [member.node for member in group.members] == ["a", "b", "c", "d"]
            assert group.parity_shards == 2
            assert group.members[0].extents == (Extent(0, SIZE_BYTES),)
            assert order.cells.keys() == set("abcd")

    def test_commit_needs_the_parity_of_all(self) -> None:
        cluster = trained("a", "b", "c")
        id = cluster.tickets("a")[0]
        cluster.seal_all(id)
        for name in "ab":
            cluster.encode(name, id)
            assert states(cluster)[1, 2] is State.SEALED
            assert not cluster.told("a", Commit)
        cluster.encode("c", id)
        assert states(cluster)[1, 2] is State.PROTECTED
        assert cluster.told("c", Commit) == [Commit(id, ())]

    def test_commit_retires_ancestors_and_what_the_life_has_passed_over(self) -> None:
        """b was away with its part of 1.3, so life 2 began from 1.2: 1.3 is a dead branch."""
        cluster = trained("a", "b", spares=("s",))
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        branch = cluster.tickets("a")[-1]
        cluster.seal_all(branch)
        cluster.pass_time(cluster.settings.lease_s + 1, silent=["b"])
        cluster.leave(0)
        cluster.nodes["b"].ranks.clear()
        assert cluster.start("a", "s", round_="r2").id == first
        cluster.hello("b")
        third = cluster.tickets("a")[-1]
        assert third.life == 2
        for node in cluster.nodes.values():
            node.inbox.clear()
        cluster.seal_all(third)
        cluster.encode("a", third)
        assert branch in cluster.coordinator.jobs[JOB].snapshots, "no other is safe yet"
        cluster.encode("s", third)
        for name in "abs":
            assert cluster.told(name, Commit) == [Commit(third, (first, branch))]
            assert cluster.told(name, Drop) == []
        assert branch not in cluster.coordinator.jobs[JOB].snapshots

    def test_what_could_not_be_loaded_goes_when_another_is_protected(self) -> None:
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        branch = cluster.tickets("a")[-1]
        cluster.seal_all(branch)
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        grant = cluster.ask(branch)
        assert grant is not None
        assert grant.id == first
        cluster.begin(grant, free_slots=1)
        assert branch in cluster.coordinator.jobs[JOB].snapshots
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        assert branch in cluster.coordinator.jobs[JOB].snapshots
        cluster.protect(cluster.tickets("a")[-1])
        for name in "ab":
            retired = [m.retire for m in cluster.told(name, Commit) if isinstance(m, Commit)]
            assert branch in retired[-1], "also by a coordinator that does not know why"

    def test_more_cells_than_are_possible_drop_the_snapshot_and_say_why(self) -> None:
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.take(0, id)
        huge = (Extent(0, cluster.settings.cell_bytes * (CELLS_LIMIT + 1)),)
        cluster.say("a", Holds(Holding(id, 2, huge, False, None)))
        cluster.take(1, id)
        cluster.seal(1, id)
        assert id not in cluster.coordinator.jobs[JOB].snapshots
        (drop,) = (m for m in cluster.told("a", Drop) if isinstance(m, Drop) and m.id == id)
        assert "choose a larger --cell-size" in drop.reason
        cluster.say("b", Holds(cluster.nodes["b"].holdings[id]))
        assert cluster.told("b", Drop)[-1] == drop, "said again, it is dropped again"

    def test_status_counts_copies_as_what_is_kept_does(self) -> None:
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.seal_all(id)
        for name in ("a", "b"):
            cluster.bring(name, id, 0, 1)
        (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
        (shown,) = (each for each in job["snapshots"] if each["id"] == str(id))
        assert (shown["state"], shown["may_lose"]) == ("sealed", 1)

    def test_one_node_has_no_group_and_still_frees_what_is_old(self) -> None:
        cluster = trained("a")
        first = cluster.tickets("a")[0]
        cluster.seal_all(first)
        assert not cluster.told("a", Protect)
        cluster.update(0, free_slots=1, step=first.step)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        assert Commit(second, (first,)) in cluster.told("a", Commit)

    def test_protection_that_fails_drops_the_snapshot_if_there_is_a_better_one(self) -> None:
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.say("b", SnapshotFailed(second, "dropped", "no memory"))
        assert second not in cluster.coordinator.jobs[JOB].snapshots
        assert first in cluster.coordinator.jobs[JOB].snapshots

    def test_the_only_snapshot_stays_though_it_cannot_be_protected(self) -> None:
        """Memory is too small for parity: the job keeps its newest snapshot, unprotected."""
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.seal_all(first)
        cluster.say("b", SnapshotFailed(first, "dropped", "no memory for parity"))
        cluster.pass_time(1.0)
        assert states(cluster) == {(1, 2): State.SEALED} | {
            key: state for key, state in states(cluster).items() if key != (1, 2)
        }
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.say("b", SnapshotFailed(second, "dropped", "no memory for parity"))
        cluster.pass_time(1.0)
        assert Commit(second, (first,)) in cluster.told("a", Commit)
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == second

    def test_a_failure_replaces_nothing_before_all_that_it_is_on_are_heard_again(self) -> None:
        """A node that has just died may be why: another names it before its silence is noticed."""
        cluster = trained("a", "b", "c")
        safe = cluster.make_protected()
        newest = cluster.tickets("a")[-1]
        cluster.seal_all(newest)
        for name in ("b", "c"):  # so that a new coordinator finds neither safer than the other
            held = cluster.nodes[name].holdings[safe]
            cluster.nodes[name].holdings[safe] = msgspec.structs.replace(held, parity=False)
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        cluster.say("a", SnapshotFailed(newest, "dropped", "c does not hold its segments"))
        cluster.pass_time(2 * cluster.settings.beat_s, silent=["c"])
        assert not any(safe in m.retire for m in cluster.told("a", Commit))
        cluster.pass_time(2 * cluster.settings.beat_s)
        assert any(safe in m.retire for m in cluster.told("a", Commit))

    @pytest.mark.parametrize("late", [False, True])
    def test_what_lacks_a_segment_is_not_lost_before_all_have_been_heard_again(
        self, late: bool
    ) -> None:
        """The report of the parity that makes up for it is on its way."""
        cluster = trained("a", "b", "c")
        newest = cluster.tickets("a")[0]
        cluster.seal_all(newest)
        for name in ("b", "c"):
            cluster.encode(name, newest)
        held = cluster.nodes["b"].holdings[newest]
        cluster.nodes["b"].holdings[newest] = msgspec.structs.replace(held, parity=True, extents=())
        cluster.restart_agent("b", ranks=True)
        cluster.pass_time(3 * cluster.settings.beat_s if late else 0.0)
        cluster.encode("a", newest)
        cluster.pass_time(3 * cluster.settings.beat_s)
        dropped = newest in [m.id for m in cluster.told("c", Drop) if isinstance(m, Drop)]
        assert dropped is late
        assert (newest in cluster.coordinator.jobs[JOB].snapshots) is not late
        cluster.hello("a")  # who says so then has not heard of the drop
        assert newest in cluster.coordinator.jobs[JOB].snapshots

    @pytest.mark.parametrize("why", ["nobody runs", "a newer one comes"])
    def test_what_is_not_protected_replaces_nothing_as_long_as_no_room_is_needed(
        self, why: str
    ) -> None:
        """The older one may be safer than a coordinator knows: two of its nodes are not heard."""
        cluster = trained("a", "b", "c")
        safe = cluster.make_protected()
        newest = cluster.tickets("a")[-1]
        cluster.seal_all(newest)
        for name in ("b", "c"):
            held = cluster.nodes[name].holdings[safe]
            cluster.nodes[name].holdings[safe] = msgspec.structs.replace(held, parity=False)
        if why == "nobody runs":
            cluster.stop_job()
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        cluster.say("a", SnapshotFailed(newest, "dropped", "no memory for parity"))
        if why == "a newer one comes":
            cluster.free(slots=1)
        cluster.pass_time(2 * cluster.settings.lease_s)
        assert not any(safe in m.retire for m in cluster.told("a", Commit))
        (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
        shown = {found["id"]: found["reason"] for found in job["snapshots"]}
        assert shown[str(newest)] == "not protected: a: no memory for parity"
        if why == "nobody runs":
            cluster.attach("r2", "a", "b", "c")
            grant = cluster.ask()
            assert grant is not None
            cluster.begin(grant, free_slots=0)
        else:
            coming = cluster.tickets("a")[-1]
            assert coming > newest
            cluster.say("a", SnapshotFailed(coming, "torn", "for the story"))
            cluster.free(slots=0)
        cluster.pass_time(1.0)
        assert any(safe in m.retire for m in cluster.told("a", Commit))

    def test_the_newest_is_not_dropped_for_a_safer_one_as_long_as_there_are_free_slots(
        self,
    ) -> None:
        """Both nodes have lost their segments of it, and have each other's parity."""
        cluster = trained("a", "b")
        cluster.update(0, step=1)
        first, second = cluster.tickets("a")
        cluster.protect(first)
        cluster.protect(second)
        for name in "ab":
            held = cluster.nodes[name].holdings[second]
            cluster.nodes[name].holdings[second] = msgspec.structs.replace(held, extents=())
        cluster.free(slots=1)
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        cluster.hello("a")
        cluster.pass_time(1.0)
        assert {first, second} <= set(cluster.coordinator.jobs[JOB].snapshots)
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == second

    def test_what_ends_is_dropped_by_all_that_may_make_parity_of_it(self) -> None:
        """A node that has neither ranks nor anything of it yet would go on with that for ever."""
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.seal_all(id)
        cluster.destroy("b")
        cluster.add("b", token="new memory")
        cluster.pass_time(2 * cluster.settings.beat_s)
        assert id in [drop.id for drop in cluster.told("b", Drop) if isinstance(drop, Drop)]

    def test_status_says_how_far_a_segment_has_come_and_when_it_will_be_there(self) -> None:
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        on_its_way = (Fetching(id, 0, 1000, 10, 4, 2.0), Fetching(id, 1, 1000, 10, 0, 0.1))
        cluster.say("b", Beat("b", "1", 0, (), on_its_way))

        def restoring() -> list[dict[str, Any]]:
            (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
            return job["restoring"]

        (one,) = restoring()
        assert (one["node"], one["rank"], one["id"]) == ("b", 0, str(id))
        assert (one["done"], one["bytes_per_s"], one["left_s"]) == (0.4, 200.0, 3.0)
        cluster.say("b", Beat("b", "1", 0, ()))
        assert restoring() == []

    def test_status_names_who_sent_damaged_cells(self) -> None:
        cluster = trained("a", "b", "c")

        def nodes() -> dict[str, tuple[dict[str, int], list[str]]]:
            found = status(cluster.coordinator, cluster.now, 0.0)["nodes"]
            return {n["node"]: (n["sent_damaged_cells"], n["reasons"]) for n in found}

        cluster.say("a", Beat("a", "1", 0, (), damaged_from={"b": 2, "nobody": 7}))
        cluster.say("c", Beat("c", "1", 0, (), damaged_from={"b": 1}))
        said = (
            "b sent 3 damaged cells (2 to a, 1 to c): look at its memory, and at the network from "
            "it"
        )
        assert nodes() == {"a": ({}, []), "b": ({"a": 2, "c": 1}, [said]), "c": ({}, [])}

    def test_a_node_that_came_back_empty_costs_no_snapshot(self) -> None:
        """It is a member of a protected snapshot, and the first that a new coordinator hears."""
        cluster = trained(*"abcd")
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        cluster.destroy("b", wait=False)
        cluster.add("b", token="new memory")
        cluster.stop_job()
        cluster.restart_coordinator("b", "c", "a", "d")
        cluster.pass_time(cluster.settings.lease_s)
        for name in "abcd":
            assert id not in [m.id for m in cluster.told(name, Drop) if isinstance(m, Drop)]
        cluster.attach("r2", *"abcd")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == id

    def test_what_was_protected_outlives_the_failed_protection_of_a_newer_one(self) -> None:
        """b burns in the middle of an encode and is back, empty, before it was missed."""
        cluster = trained(*"abcd", spares=("s",))
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.encode("a", second)
        cluster.destroy("b")
        cluster.add("b", token="new memory")
        for name in "acd":
            assert Commit(second, (first,)) not in cluster.told(name, Commit)
        assert first in cluster.coordinator.jobs[JOB].snapshots
        cluster.destroy("c")
        cluster.stop_job()
        cluster.attach("r2", "a", "b", "d", "s")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id is not None
        assert grant.id >= first

    def test_one_node_is_never_told_to_encode(self) -> None:
        """Not when its agent says Hello again, either: there is no code without parity."""
        cluster = trained("a")
        cluster.seal_all(cluster.tickets("a")[0])
        cluster.restart_agent("a", ranks=True)
        cluster.restart_coordinator()
        assert not cluster.told("a", Protect)

    def test_groups_of_many_nodes_and_what_they_need_for_parity(self) -> None:
        names = [f"n{i:02}" for i in range(16)]
        cluster = Cluster(*names)
        cluster.pass_time(cluster.settings.lease_s)
        grant = cluster.start(*names)
        # Two groups of 6+2: a third of an image, not an eighth.
        assert grant.parity_fraction == pytest.approx(2 / 6)
        manifest = cluster.protect(cluster.tickets("n00")[0])
        assert [(g.data_shards, g.parity_shards) for g in manifest.groups] == [(6, 2)] * 2

    def test_the_flag_decides_how_much_parity(self) -> None:
        settings = Settings(cell_bytes=4, parity_shards=1)
        cluster = Cluster(*"abcd", settings=settings)
        cluster.pass_time(settings.lease_s)
        grant = cluster.start(*"abcd")
        assert grant.parity_fraction == pytest.approx(1 / 3)
        (group,) = cluster.protect(cluster.tickets("a")[0]).groups
        assert (group.data_shards, group.parity_shards) == (3, 1)

    def test_an_agent_that_comes_back_completes_the_protection(self) -> None:
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.seal_all(id)
        cluster.encode("b", id)
        cluster.nodes["b"].inbox.clear()
        cluster.restart_agent("a")
        assert [type(m) for m in cluster.inbox("a")][-1] is Protect
        assert cluster.told("b", Protect)
        cluster.encode("a", id)
        assert states(cluster)[1, 2] is State.PROTECTED

    def test_a_missed_commit_is_made_up_for(self) -> None:
        """A node was away while the snapshot it holds was retired: it is told when it is back."""
        cluster = trained("a", "b", spares=("s",))
        first = cluster.tickets("a")[0]
        cluster.say("s", Holds(Holding(first, 2, (Extent(0, SIZE_BYTES),))))
        cluster.protect(first)
        cluster.free(slots=1)
        cluster.pass_time(cluster.settings.lease_s + 1, silent=["s"])
        cluster.protect(cluster.tickets("a")[-1])
        cluster.hello("s")
        assert [m.id for m in cluster.told("s", Drop) if isinstance(m, Drop)] == [first]


class TestResume:
    def test_nothing_only_if_nobody_knows_the_job(self) -> None:
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id is None
        assert grant.record == JobRecord(
            JOB, 1, {"a": "memory of a", "b": "memory of b"}, (), term=1
        )

    def test_a_fresh_coordinator_waits_for_agents_that_may_know(self) -> None:
        cluster = Cluster("a", "b")
        cluster.attach("r1", "a", "b")
        assert cluster.ask() is None
        assert "after the coordinator's start" in last_wait(cluster, "a").reason
        cluster.pass_time(cluster.settings.lease_s)
        (grant,) = cluster.granted("a")
        assert grant.id is None

    def test_it_waits_for_all_ranks_of_the_round(self) -> None:
        cluster = trained("a", "b", "c")
        cluster.protect(cluster.tickets("a")[0])
        cluster.stop_job()
        cluster.attach("r2", "a", "b", "c")
        cluster.leave(2)
        cluster.nodes["a"].inbox.clear()
        assert cluster.ask() is None
        assert "rank 2 of 3" in last_wait(cluster, "a").reason
        cluster.report("c", RankState(JOB, "r2", 0, 2, 3, 1, 0, 0, 0))
        assert [g.id for g in cluster.granted("a")] == [snapshot(1, 2)]
        assert [g.id for g in cluster.granted("c")][-1] == snapshot(1, 2)

    def test_ranks_of_another_round_do_not_count(self) -> None:
        """A trainer of the old life still hangs around when the new ones come."""
        cluster = trained("a", "b")
        cluster.protect(cluster.tickets("a")[0])
        cluster.leave(0)
        cluster.report("a", RankState(JOB, "r2", 0, 0, 2, 1, 0, 0, 0))
        cluster.round = "r2"
        assert cluster.ask() is None
        assert "rank 1 of 2" in last_wait(cluster, "a").reason

    def test_what_was_asked_before_the_agent_knew_of_this_term_is_not_answered(self) -> None:
        """The coordinator before may have answered it since: the run would have two lives."""
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b")
        term = cluster.coordinator.term
        cluster.say("a", AskResumeFor(JOB, "r1", (), term - 1))
        cluster.pass_time(cluster.settings.lease_s)
        assert not cluster.granted("a")
        cluster.say("a", AskResumeFor(JOB, "r1", (), term))
        assert [grant.life for grant in cluster.granted("a")] == [1]

    def test_records_reach_all_nodes_before_any_rank_is_answered(self) -> None:
        cluster = Cluster("a", "b", "s")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b")
        ask = AskResumeFor(JOB, "r1", (), cluster.coordinator.term)
        sends = cluster.coordinator.handle(cluster.nodes["a"].peer, ask, cluster.now)
        kinds = [type(send.message) for send in sends]
        assert kinds == [Record, Record, Record, Grant, Grant]

    def test_a_silent_node_is_waited_for_until_its_lease_is_out(self) -> None:
        cluster = trained("a", "b", "c")
        cluster.protect(cluster.tickets("a")[0])
        cluster.free(slots=1)
        newer = cluster.tickets("a")[-1]
        cluster.seal_all(newer)
        cluster.stop_job()
        cluster.destroy("c", wait=False)
        cluster.pass_time(4 * cluster.settings.beat_s)
        cluster.attach("r2", "a", "b")
        assert cluster.ask() is None
        assert "silent nodes c" in last_wait(cluster, "a").reason
        cluster.pass_time(cluster.settings.lease_s)
        # `newer` was not protected, and c had a part of it.
        assert cluster.granted("a")[-1].id == snapshot(1, 2)

    @pytest.mark.parametrize("lost", [("a",), ("d",), ("a", "b"), ("b", "d")])
    def test_the_newest_comes_back_with_any_two_of_four_nodes_gone(
        self, lost: tuple[str, ...]
    ) -> None:
        cluster = trained(*"abcd", spares=("s", "t"))
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        cluster.destroy(*lost)
        here = [n for n in "abcd" if n not in lost] + ["s", "t"]
        cluster.stop_job()
        cluster.attach("r2", *here[:4])
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == id
        assert grant.source is not None
        assert not set(grant.source.cells) & set(lost)
        assert set(grant.source.parity) == set("abcd") - set(lost)

    def test_a_third_loss_is_waited_for_and_named(self) -> None:
        cluster = trained(*"abcd", spares=("s", "t", "u"))
        cluster.protect(cluster.tickets("a")[0])
        cluster.destroy("a", "b", "c")
        cluster.stop_job()
        cluster.attach("r2", "d", "s", "t", "u")
        assert cluster.ask() is None
        wait = last_wait(cluster, "d")
        assert not wait.final
        assert "nodes a, b, c" in wait.reason
        assert f"ckptd rm {JOB}" in wait.reason
        cluster.nodes["b"].up = True
        cluster.nodes["b"].ranks.clear()
        cluster.hello("b")
        assert cluster.granted("d")[-1].id == snapshot(1, 2)

    def test_one_that_cannot_be_restored_gives_way_to_an_older_one(self) -> None:
        cluster = trained(*"abcd", spares=("s",))
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.destroy("c")
        cluster.stop_job()
        cluster.attach("r2", "a", "b", "d", "s")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == first
        assert f"{second}" in grant.reason

    def test_memory_that_came_back_empty_is_the_final_word(self) -> None:
        """All nodes are here, but two of three were emptied: waiting cannot help."""
        cluster = trained("a", "b", "c")
        cluster.protect(cluster.tickets("a")[0])
        cluster.destroy("a", "b")
        for name in "ab":
            cluster.add(name, token="new memory")
        cluster.stop_job()
        cluster.attach("r2", "a", "b", "c")
        assert cluster.ask() is None
        wait = last_wait(cluster, "a")
        assert wait.final
        assert "nodes a, b came back with empty memory" in wait.reason

    def test_what_could_not_be_loaded_is_not_granted_again(self) -> None:
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        assert (grant.id, grant.life) == (second, 2)
        again = cluster.ask(second)
        assert again is not None
        assert (again.id, again.life) == (first, 3)
        assert cluster.ask(second, first) is None
        wait = last_wait(cluster, "a")
        assert wait.final
        assert "no snapshot could be loaded" in wait.reason

    def test_the_same_question_has_the_same_answer(self) -> None:
        """The agent asks twice because it was welcomed twice: still one life, one snapshot."""
        cluster = trained("a", "b")
        cluster.protect(cluster.tickets("a")[0])
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        first, second = cluster.ask(), cluster.ask()
        assert first is not None
        assert second is not None
        assert first == second

    def test_a_node_that_missed_its_grant_is_told_again(self) -> None:
        """b was cut off when the life was granted: its rank must not wait for ever."""
        cluster = trained("a", "b")
        cluster.protect(cluster.tickets("a")[0])
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        cluster.nodes["b"].up = False
        grant = cluster.ask()
        assert grant is not None
        cluster.nodes["b"].up = True
        cluster.nodes["b"].inbox.clear()
        cluster.hello("b")
        assert cluster.granted("b") == [grant]

    def test_a_node_that_missed_the_second_choice_is_told_again(self) -> None:
        """b heard of life 2, not of life 3, which the same round was granted after it."""
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        assert cluster.ask() is not None
        for name, rank in (("a", 0), ("b", 1)):
            node = cluster.nodes[name]
            node.ranks[rank] = msgspec.structs.replace(node.ranks[rank], life=2)
        cluster.nodes["b"].up = False
        grant = cluster.ask(second)
        assert grant is not None
        cluster.nodes["b"].up = True
        cluster.hello("b")
        assert cluster.granted("b")[-1] == grant

    def test_a_hello_with_its_segments_still_to_be_read_decides_nothing(self) -> None:
        """The answer to a waiting resume is not made from half of what a node says."""
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.stop_job()
        cluster.restart_coordinator("a")
        cluster.attach("r2", "a", "b")  # b is asked who it is, and does not answer yet
        assert cluster.ask() is None
        cluster.hello("b")
        assert cluster.granted("a")[-1].id == second

    def test_a_job_that_never_sealed_anything_starts_again(self) -> None:
        cluster = trained("a", "b")
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        assert (grant.life, grant.id) == (2, None)

    def test_a_job_that_was_resumed_never_starts_from_nothing(self) -> None:
        """Its only snapshot was found damaged when its agents came back."""
        cluster = trained("a", "b")
        only = cluster.tickets("a")[0]
        cluster.protect(only)
        cluster.stop_job()
        assert cluster.start("a", "b", round_="r2").id == only
        cluster.stop_job()
        for name in "ab":
            cluster.nodes[name].holdings.clear()
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r3", "a", "b")
        assert cluster.ask() is None
        wait = last_wait(cluster, "a")
        assert wait.final
        assert str(only) in wait.reason

    def test_a_run_that_was_stopped_before_it_had_a_life_gets_none_when_it_wakes(self) -> None:
        cluster = Cluster("a", "b")
        cluster.attach("stopped", "a", "b")
        stale = [cluster.state(rank) for rank in range(2)]
        for round_ in ("r2", "r3"):
            cluster.pass_time(cluster.settings.lease_s)
            grant = cluster.start("a", "b", round_=round_)
        for name, state in zip("ab", stale, strict=True):
            cluster.say(name, RankReport(state))
        answers = cluster.say("a", AskResumeFor(JOB, "stopped", (), cluster.coordinator.term))
        assert [a for a in answers if isinstance(a, ResumeWaits) and a.final]
        job = cluster.coordinator.jobs[JOB]
        assert (job.life, job.round, job.pending) == (grant.life, "r3", None)

    def test_no_run_takes_the_life_of_one_whose_steps_are_long_from_a_new_coordinator(self) -> None:
        """That cannot tell which is older: this one was stopped before it had a life."""
        cluster = trained("a", "b")
        cluster.protect(cluster.tickets("a")[0])
        cluster.restart_coordinator()
        stopped = {"round": "stopped", "life": 0, "step": 0, "seen_step": 0, "free_slots": 0}
        for rank, name in enumerate("ab"):
            state = msgspec.structs.replace(cluster.state(rank), **stopped)
            cluster.say(name, RankReport(state))
        cluster.say("a", AskResumeFor(JOB, "stopped", (), cluster.coordinator.term))
        job, step_s = cluster.coordinator.jobs[JOB], 2 * cluster.settings.lease_s
        for step in (10, 11, 12):
            cluster.pass_time(step_s)
            for rank in (0, 1):
                cluster.update(rank, step=step, free_slots=2)
        cluster.pass_time(1.5 * step_s)
        assert (job.life, job.round) == (1, "r1")
        assert "to end or to stand still" in last_wait(cluster, "a").reason
        cluster.pass_time(step_s)
        assert (job.life, job.round) == (2, "stopped")

    @pytest.mark.parametrize("back", [True, False])
    def test_nor_while_a_rank_may_come_back_to_its_agent_that_was_restarted(
        self, back: bool
    ) -> None:
        """A rank of the run that was stopped comes first."""
        cluster = trained("a", "b")
        cluster.protect(cluster.tickets("a")[0])
        rank = cluster.state(0)
        cluster.restart_coordinator()
        cluster.restart_agent("a")
        stopped = {"round": "stopped", "life": 0, "step": 0, "seen_step": 0, "free_slots": 0}
        for name, state in (("a", rank), ("b", cluster.state(1))):
            cluster.say(name, RankReport(msgspec.structs.replace(state, **stopped)))
        cluster.say("a", AskResumeFor(JOB, "stopped", (), cluster.coordinator.term))
        cluster.pass_time(0.9 * cluster.settings.lease_s)
        job = cluster.coordinator.jobs[JOB]
        assert (job.life, job.round) == (1, "r1")
        if back:
            cluster.report("a", msgspec.structs.replace(rank, step=9))
        cluster.pass_time(0.9 * cluster.settings.lease_s)
        assert (job.life, job.round) == ((1, "r1") if back else (2, "stopped"))

    def test_messages_of_an_old_life_are_ignored(self) -> None:
        cluster = trained("a", "b")
        cluster.protect(cluster.tickets("a")[0])
        old = cluster.state(0)
        cluster.stop_job()
        grant = cluster.start("a", "b", round_="r2")
        count = len(cluster.tickets("a"))
        job = cluster.coordinator.jobs[JOB]
        before = dict(job.attachments)
        cluster.say("a", RankReport(msgspec.structs.replace(old, free_slots=9, step=999)))
        cluster.say("a", LifeResumed(JOB, 1, 999))
        assert job.attachments == before
        assert (job.life, len(cluster.tickets("a"))) == (grant.life, count)
        assert cluster.tickets("a")[-1].step < 999

    def test_messages_of_a_life_that_was_never_granted_are_counted_and_dropped(self) -> None:
        cluster = trained("a", "b")
        job = cluster.coordinator.jobs[JOB]
        before, snapshots = dict(job.attachments), set(job.snapshots)
        cluster.say("a", RankReport(msgspec.structs.replace(cluster.state(0), life=9, step=999)))
        cluster.say("a", Holds(Holding(snapshot(9, 5), 2, (Extent(0, 1),))))
        assert (job.life, job.attachments, set(job.snapshots)) == (1, before, snapshots)
        assert cluster.coordinator.bad_messages == 2


class TestEnd:
    def test_finished_by_all_ranks_forgets_the_job(self) -> None:
        cluster = trained("a", "b", spares=("s",))
        cluster.protect(cluster.tickets("a")[0])
        cluster.leave(0, "detached", finished=True)
        assert not cluster.told("s", Forget)
        cluster.leave(1, "detached", finished=True)
        for name in "abs":
            assert cluster.told(name, Forget)
        assert JOB not in cluster.coordinator.jobs

    def test_what_was_on_its_way_does_not_bring_a_finished_job_back(self) -> None:
        """Parity was stored while the last rank said goodbye: the next run starts clean."""
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.seal_all(id)
        for rank in (0, 1):
            cluster.leave(rank, "detached", finished=True)
        cluster.encode("a", id)
        for node in cluster.nodes.values():
            node.holdings.clear()
            node.record = None
        cluster.say("a", Holds(Holding(id, 0)))
        assert JOB not in cluster.coordinator.jobs
        cluster.attach("r9", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id is None

    def test_a_node_that_was_away_cannot_bring_a_finished_job_back(self) -> None:
        cluster = trained("a", "b", spares=("s",))
        cluster.protect(cluster.tickets("a")[0])
        cluster.pass_time(cluster.settings.lease_s + 1, silent=["s"])
        for rank in (0, 1):
            cluster.leave(rank, "detached", finished=True)
        for name in "ab":
            cluster.nodes[name].holdings.clear()
            cluster.nodes[name].record = None
        grant = cluster.start("a", "b", round_="r2")
        assert grant.id is None
        life = cluster.coordinator.jobs[JOB].life
        cluster.nodes["s"].record = JobRecord(JOB, 1, {"a": "memory of a"}, (Ancestor(1, 2),))
        cluster.hello("s")
        assert cluster.told("s", Forget)
        assert cluster.coordinator.jobs[JOB].life == life
        assert cluster.coordinator.jobs[JOB].resumed

    def test_rm_refuses_a_running_job_and_removes_a_stopped_one(self) -> None:
        cluster = trained("a", "b")
        cluster.protect(cluster.tickets("a")[0])
        assert "is running on a, b" in cluster.coordinator.remove_job(JOB, cluster.now)
        assert "no job 'other'" in cluster.coordinator.remove_job("other", cluster.now)
        cluster.stop_job()
        assert cluster.coordinator.remove_job(JOB, cluster.now) == ""
        cluster.deliver(cluster.coordinator.take_actions())
        assert cluster.told("a", Forget)
        assert JOB in cluster.coordinator.remove_job(JOB, cluster.now)


class TestVacancies:
    def test_a_job_that_was_stopped_and_is_started_again_gets_spares(self) -> None:
        """A node is lost after its ranks have come, and before they were granted a life."""
        cluster = trained("a", "b", spares=("s",))
        cluster.wait_for_launcher("s")
        for rank in (0, 1):
            cluster.leave(rank, reason="detached")
        cluster.attach("r2", "a", "b")
        cluster.destroy("b")
        assert cluster.told("s", Activate)

    def test_each_lost_node_calls_one_spare(self) -> None:
        cluster = trained(*"abcd", spares=("s", "t", "u"))
        for name in "stu":
            cluster.wait_for_launcher(name)
        cluster.destroy("b", "d")
        called = [name for name in "stu" if cluster.told(name, Activate)]
        assert called == ["s", "t"]
        cluster.pass_time(10)
        cluster.hello("u")
        assert [len(cluster.told(name, Activate)) for name in "stu"] == [1, 1, 0]

    def test_a_spare_that_comes_late_is_called_at_once(self) -> None:
        cluster = trained("a", "b", spares=("s",))
        cluster.destroy("b")
        cluster.wait_for_launcher("s")
        assert cluster.told("s", Activate) == [Activate(JOB)]

    def test_a_called_spare_that_dies_is_replaced(self) -> None:
        cluster = trained("a", "b", spares=("s", "t"))
        for name in "st":
            cluster.wait_for_launcher(name)
        cluster.destroy("b")
        cluster.destroy("s")
        assert cluster.told("t", Activate) == [Activate(JOB)]

    def test_a_call_that_was_not_heard_is_repeated(self) -> None:
        """The spare's agent was cut off when it was called, and says that a launcher waits."""
        cluster = trained("a", "b", spares=("s",))
        cluster.wait_for_launcher("s")
        cluster.nodes["s"].inbox.clear()
        cluster.destroy("b")
        assert cluster.told("s", Activate) == [Activate(JOB)]
        cluster.hello("s")
        assert cluster.told("s", Activate) == [Activate(JOB)] * 2

    def test_a_node_that_comes_back_empty_as_a_spare_is_called(self) -> None:
        cluster = trained("a", "b")
        cluster.destroy("b")
        cluster.add("b", token="new memory", launchers=(JOB,))
        assert cluster.told("b", Activate) == [Activate(JOB)]

    def test_no_spare_for_a_node_that_has_left_on_purpose(self) -> None:
        cluster = trained("a", "b", spares=("s",))
        cluster.wait_for_launcher("s")
        for rank in (0, 1):
            cluster.leave(rank, "detached")
        cluster.destroy("b")
        assert not cluster.told("s", Activate)

    def test_a_node_that_died_with_the_coordinator_is_missed_too(self) -> None:
        cluster = trained("a", "b", spares=("s",))
        cluster.wait_for_launcher("s")
        cluster.destroy("b", wait=False)
        cluster.restart_coordinator("a", "s")
        assert not cluster.told("s", Activate)
        cluster.pass_time(cluster.settings.lease_s + 1)
        assert cluster.told("s", Activate) == [Activate(JOB)]


class TestARestartedCoordinator:
    def test_who_holds_what_a_life_begins_from_is_waited_for_where_it_has_no_ranks(self) -> None:
        """A job on one node moves to another, and the coordinator ends before it has loaded."""
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.start("a")
        first = cluster.tickets("a")[0]
        cluster.seal_all(first)
        cluster.stop_job()
        cluster.attach("r2", "b")
        grant = cluster.ask()
        assert grant is not None
        assert (grant.id, grant.record.holders) == (first, ("a",))
        cluster.restart_coordinator("b")
        cluster.pass_time(2 * cluster.settings.lease_s, silent=["a"])
        assert cluster.ask() is None
        said = last_wait(cluster, "b")
        assert "nodes a, which may hold a snapshot" in said.reason
        assert not said.final
        cluster.hello("a")
        assert cluster.granted("b")[-1].id == first

    @pytest.mark.parametrize("order", ["abc", "cba"])
    def test_a_life_that_was_granted_twice_began_where_the_later_term_says(
        self, order: str
    ) -> None:
        """Only c has heard of the first grant, and the coordinator died before rank 0 could."""
        cluster = trained(*"abc")
        cluster.make_protected()
        cluster.stop_job()
        cluster.attach("r2", *"abc")
        grant = cluster.ask()
        assert grant is not None
        in_vain = msgspec.structs.replace(grant.record, ancestors=(), term=grant.record.term - 1)
        cluster.nodes["c"].record = in_vain
        cluster.restart_coordinator(*order)
        assert cluster.coordinator.jobs[JOB].record == grant.record
        assert cluster.coordinator.jobs[JOB].resumed_from == grant.id

    def test_a_run_that_may_be_older_gets_no_life_while_another_trains(self) -> None:
        """Its processes were stopped when the job was started again; then they wake up and ask."""
        cluster = trained("a", "b")
        running = [cluster.state(rank) for rank in (0, 1)]
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        before = len(cluster.granted("a"))
        for step in range(1, 12):
            for name, state in zip("ab", running, strict=True):
                cluster.say(name, RankReport(msgspec.structs.replace(state, step=step)))
            cluster.pass_time(cluster.settings.lease_s / 2)
            if step == 1:
                for rank, name in enumerate("ab"):
                    cluster.say(name, RankReport(RankState(JOB, "r0", 0, rank, 2, 1, 0, 0, 0)))
                cluster.say("a", AskResumeFor(JOB, "r0", (), cluster.coordinator.term))
        assert len(cluster.granted("a")) == before
        assert "life 1, whose ranks are all there" in last_wait(cluster, "a").reason
        cluster.pass_time(cluster.settings.lease_s)
        assert cluster.granted("a")[-1].round == "r0", "the other has come to a standstill"

    def test_a_life_whose_captures_go_on_has_not_come_to_a_standstill(self) -> None:
        """The gate may hold a step up for longer than two of them take."""
        cluster = trained("a", "b")
        id, lease_s = cluster.tickets("a")[0], cluster.settings.lease_s
        cluster.restart_coordinator()
        cluster.pass_time(lease_s)
        for rank, name in enumerate("ab"):
            cluster.say(name, RankReport(RankState(JOB, "r0", 0, rank, 2, 1, 0, 0, 0)))
        cluster.say("a", AskResumeFor(JOB, "r0", (), cluster.coordinator.term))
        for step in (1, 2, 3):
            cluster.update(0, step=step)
            cluster.pass_time(0.5)
        for rank in (0, 1):
            cluster.take(rank, id)
            cluster.pass_time(0.8 * lease_s)
        for rank in (0, 1):
            cluster.seal(rank, id)
            cluster.pass_time(0.8 * lease_s)
        assert all(grant.round == "r1" for grant in cluster.granted("a"))
        cluster.pass_time(lease_s)
        assert cluster.granted("a")[-1].round == "r0"

    @pytest.mark.parametrize("order", list(permutations("abc")))
    def test_it_goes_on_in_whatever_order_it_hears(self, order: tuple[str, ...]) -> None:
        """Life 1 trains, one snapshot is protected and one sealed: nothing is forgotten."""
        cluster = trained("a", "b", "c")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        second = cluster.tickets("a")[-1]
        cluster.seal_all(second)
        cluster.encode("b", second)
        for name in "abc":
            cluster.nodes[name].inbox.clear()
        cluster.restart_coordinator(*order)
        assert states(cluster)[1, first.step] is State.PROTECTED
        assert states(cluster)[1, second.step] is State.SEALED
        for name in "abc":
            assert cluster.told(name, Protect)
            assert not cluster.told(name, Drop)
        for name in "ac":
            cluster.encode(name, second)
        assert Commit(second, (first,)) in cluster.told("a", Commit)
        cluster.free([first], slots=1)
        assert cluster.tickets("c")[-1].step > second.step

    def test_it_forgets_nothing_that_can_be_restored_with_two_nodes_gone(self) -> None:
        cluster = trained(*"abcd", spares=("s", "t"))
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        cluster.destroy("a", "b", wait=False)
        cluster.restart_coordinator("c", "d", "s", "t")
        cluster.stop_job()
        cluster.attach("r2", "c", "d", "s", "t")
        assert cluster.ask() is None
        assert "nodes a, b" in last_wait(cluster, "c").reason
        cluster.pass_time(cluster.settings.lease_s)
        grant = cluster.granted("c")[-1]
        assert grant.id == id
        assert not cluster.told("c", Drop)
        assert not cluster.told("d", Drop)

    def test_it_does_not_answer_before_the_nodes_of_the_manifest(self) -> None:
        cluster = trained("a", "b", "c")
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        cluster.stop_job()
        cluster.restart_coordinator("a")
        cluster.attach("r2", "a")
        assert cluster.ask() is None
        assert "nodes b, c" in last_wait(cluster, "a").reason
        cluster.hello("b")
        assert not [g for g in cluster.granted("a") if g.round == "r2"]
        cluster.hello("c")
        assert [g.id for g in cluster.granted("a") if g.round == "r2"] == [id]

    @pytest.mark.parametrize("order", ["ab", "ba"])
    def test_a_ticket_that_only_one_rank_had_does_not_block_the_others(self, order: str) -> None:
        """The coordinator died between two sends: a has sealed, b never heard of it."""
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        half = cluster.tickets("a")[-1]
        cluster.take(0, half)
        cluster.seal(0, half)
        for name in "ab":
            cluster.nodes[name].inbox.clear()
        cluster.restart_coordinator(*order)
        assert half in [m.id for m in cluster.told("a", Drop) if isinstance(m, Drop)]
        cluster.free([half], slots=1)
        assert cluster.tickets("b")[-1].step > half.step

    def test_a_capture_that_failed_unheard_is_given_up_in_time(self) -> None:
        """b's capture failed while there was no coordinator to tell."""
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        half = cluster.tickets("a")[-1]
        cluster.take(0, half)
        cluster.take(1, half)
        cluster.seal(0, half)
        cluster.nodes["b"].ranks[1] = msgspec.structs.replace(cluster.state(1), free_slots=1)
        cluster.restart_coordinator("b", "a")
        for step in range(20):
            cluster.pass_time(0.5)
            for rank in (0, 1):
                cluster.update(rank, step=half.step + step)
        cluster.free([half], slots=1)
        assert cluster.tickets("b")[-1].step > half.step

    def test_half_a_capture_on_every_rank_does_not_stop_the_tickets(self) -> None:
        """a has half of one, b half of another, and no rank has a slot left."""
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        cluster.free(slots=1)
        for rank, step in ((0, 8), (1, 9)):
            cluster.update(rank, step=9, seen_step=step, free_slots=0)
            cluster.seal(rank, snapshot(1, step))
        cluster.restart_coordinator()
        for step in range(10, 30):
            cluster.pass_time(0.5)
            for rank in (0, 1):
                cluster.update(rank, step=step)
        dropped = {m.id for name in "ab" for m in cluster.told(name, Drop) if isinstance(m, Drop)}
        assert {snapshot(1, 8), snapshot(1, 9)} <= dropped

    def test_tickets_do_not_repeat_what_the_one_before_had_issued(self) -> None:
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        for rank in (0, 1):
            cluster.update(rank, seen_step=first.step + 40, step=first.step, free_slots=0)
        before = set(cluster.tickets("a"))
        cluster.restart_coordinator()
        for rank in (0, 1):
            cluster.update(rank, step=first.step + 1, free_slots=1)
        new = [id for id in cluster.tickets("a") if id not in before]
        assert new
        assert min(id.step for id in new) > first.step + 40

    def test_tickets_do_not_repeat_a_snapshot_that_is_held(self) -> None:
        """Agents and coordinator came back together: no trainer knows what it has seen."""
        cluster = trained("a", "b")
        first = cluster.tickets("a")[0]
        cluster.protect(first)
        for name in "ab":
            cluster.nodes[name].incarnation += 1
        for rank in (0, 1):
            node = cluster.nodes[cluster.where(rank)]
            node.ranks[rank] = msgspec.structs.replace(
                node.ranks[rank], free_slots=1, step=0, seen_step=0
            )
        before = len(cluster.tickets("a"))
        cluster.restart_coordinator()
        new = cluster.tickets("a")[before:]
        assert all(id.step > first.step for id in new)
        assert states(cluster)[1, first.step] is State.PROTECTED

    def test_an_unknown_step_does_not_look_like_a_fast_one(self) -> None:
        """At step 0 when it is first heard of, at 100,000 a moment later."""
        cluster = trained("a")
        first = cluster.tickets("a")[0]
        cluster.seal_all(first)
        cluster.nodes["a"].ranks[0] = msgspec.structs.replace(
            cluster.state(0), step=0, seen_step=0, free_slots=0
        )
        cluster.restart_coordinator()
        cluster.now += 0.1
        cluster.update(0, step=100_000)
        cluster.now += 0.1
        cluster.update(0, step=100_001, free_slots=1)
        assert 100_001 < cluster.tickets("a")[-1].step < 100_010

    def test_a_life_that_hides_behind_an_older_one_goes_on(self) -> None:
        """A node that was cut off since life 1 is the first to speak."""
        cluster = trained("a", "b", spares=("z",))
        cluster.protect(cluster.tickets("a")[0])
        stale = cluster.hello_of("b")
        cluster.stop_job()
        grant = cluster.start("a", "z", round_="r2")
        cluster.nodes["b"].ranks = {state.rank: state for state in stale.ranks}
        cluster.nodes["b"].record = stale.records[0]
        before = len(cluster.tickets("a"))
        cluster.restart_coordinator("b", "a", "z")
        job = cluster.coordinator.jobs[JOB]
        assert (job.life, job.round) == (grant.life, "r2")
        for rank in (0, 1):
            cluster.update(rank, free_slots=1, step=5, seen_step=4)
        assert len(cluster.tickets("a")) > before

    @pytest.mark.parametrize("order", ["ab", "ba"])
    def test_a_grant_that_only_rank_0_had_is_said_to_the_others(self, order: str) -> None:
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        cluster.nodes["b"].up = False
        grant = cluster.ask()
        assert grant is not None
        cluster.nodes["a"].ranks[0] = msgspec.structs.replace(cluster.state(0), life=grant.life)
        cluster.nodes["b"].up = True
        cluster.nodes["b"].inbox.clear()
        cluster.restart_coordinator(*order)
        told = cluster.granted("b")[-1]
        assert (told.life, told.id, told.round) == (grant.life, id, "r2")
        assert told.source is not None

    def test_a_question_that_was_answered_before_is_not_answered_anew(self) -> None:
        """b knows of the life that a, which asks again, has not heard of."""
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        cluster.stop_job()
        cluster.attach("r2", "a", "b")
        cluster.nodes["a"].up = False
        assert cluster.ask() is None
        life = cluster.coordinator.jobs[JOB].life
        cluster.nodes["a"].up = True
        cluster.nodes["b"].ranks[1] = msgspec.structs.replace(cluster.state(1), life=life)
        cluster.restart_coordinator("a")
        assert cluster.ask() is None
        cluster.hello("b")
        assert {(g.life, g.id) for g in cluster.granted("a") if g.round == "r2"} == {(life, id)}
        assert cluster.coordinator.jobs[JOB].life == life

    def test_a_first_capture_that_was_under_way_is_no_lost_snapshot(self) -> None:
        """Coordinator and trainers die before anything was ever complete."""
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.take(0, id)
        cluster.seal(0, id)
        for name in "ab":
            cluster.nodes[name].ranks.clear()
        cluster.restart_coordinator()
        cluster.attach("r2", "a", "b")
        grant = cluster.ask()
        assert grant is not None
        assert (grant.life, grant.id) == (2, None)
        assert id in [m.id for m in cluster.told("a", Drop) if isinstance(m, Drop)]

    def test_the_snapshot_that_a_life_resumed_from_is_still_protected(self) -> None:
        """It was only sealed; the coordinator died before it ordered its protection."""
        cluster = trained("a", "b")
        id = cluster.tickets("a")[0]
        cluster.seal_all(id)
        for node in cluster.nodes.values():
            node.holdings = {
                i: msgspec.structs.replace(h, manifest=None) for i, h in node.holdings.items()
            }
        cluster.stop_job()
        cluster.restart_coordinator()
        cluster.start("a", "b", round_="r2")
        for node in cluster.nodes.values():
            node.inbox.clear()
            node.holdings = {
                i: msgspec.structs.replace(h, manifest=None) for i, h in node.holdings.items()
            }
        cluster.restart_coordinator()
        assert {m.manifest.id for m in cluster.told("a", Protect) if isinstance(m, Protect)} == {id}

    def test_nothing_is_ticketed_before_all_ranks_have_spoken(self) -> None:
        cluster = trained("a", "b", "c")
        cluster.protect(cluster.tickets("a")[0])
        cluster.free(slots=1)
        before = len(cluster.told("a", TakeSnapshot))
        cluster.restart_coordinator("a", "b")
        for step in range(5, 10):
            cluster.update(0, step=step)
        assert len(cluster.told("a", TakeSnapshot)) == before
