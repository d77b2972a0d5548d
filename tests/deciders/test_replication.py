"""The journal in many hands: what one coordinator has said, the next one knows."""

import itertools

import msgspec
import pytest

from ckptd import journal as journals
from ckptd.agent import events as ev
from ckptd.coordinator.decider import Coordinator
from ckptd.coordinator.replication import Replication
from ckptd.coordinator.view import status
from ckptd.ids import SnapshotId
from ckptd.journal import Entry, Incident, Isolated, Journal, LogSummary, Rollback
from ckptd.terms import Obeyed, Term
from ckptd.wire import AskEntries, Commit, Entries, KeepEntries, Kept, ResumeWaits, RollBack

from .fakes import JOB, Cluster
from .test_cluster_model import faults
from .test_terms import FIRST, SECOND, Place, Process
from .world import World

A_OUT, A_IN = Isolated("a", True, "it hung"), Isolated("a", False, "mended")
BACK = Rollback(JOB, SnapshotId(JOB, 2, 70))


def incident(number: int, at: float = 0.0) -> Incident:
    return Incident(number, JOB, at, "hang", "rank 3", "rank 3 did not enter")


class TestJournal:
    def test_the_order_in_which_it_is_heard_does_not_matter(self) -> None:
        entries = [
            Entry(1, 1, A_OUT),
            Entry(2, 1, A_IN),
            Entry(1, 9, BACK),
            Entry(1, 2, incident(1)),
            Entry(1, 2, incident(2)),
        ]
        found = []
        for order in itertools.permutations(entries):
            journal = Journal()
            for entry in order:
                journal.merge([entry])
            found.append((journal.entries, journal.summary))
        assert len(set(found)) == 1
        assert found[0][1].entries == 4

    def test_two_things_said_of_one_under_one_number(self) -> None:
        """By two coordinators of one term: whichever wins, it is the same for all."""
        pair = Entry(3, 1, A_OUT), Entry(3, 1, A_IN)
        one, other = Journal(), Journal()
        one.merge(pair)
        other.merge(reversed(pair))
        assert one.entries == other.entries
        assert one.summary == other.summary

    def test_summaries_differ_where_entries_do(self) -> None:
        one, other = Journal(), Journal()
        assert one.summary == other.summary == LogSummary()
        one.merge([Entry(1, 1, A_OUT)])
        other.merge([Entry(1, 1, A_IN)])
        assert one.summary != other.summary
        assert one.summary.newest == other.summary.newest == (1, 1)

    def test_what_was_said_too_low_is_said_again(self) -> None:
        """It said something before it heard of a later term."""
        journal = Journal()
        journal.begin(2)
        journal.put(A_IN)
        journal.begin(6)
        journal.merge([Entry(5, 9, A_OUT)])
        assert journal.is_isolated("a") is None
        assert journal.entries[-1].term == 6

    def test_of_each_kind_only_so_many_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(journals._KEPT, Incident, 3)
        journal = Journal(1)
        journal.put(A_OUT)
        for number in range(1, 10):
            assert journal.next_incident == number
            journal.put(incident(number))
        kept = [e.body.number for e in journal.entries if isinstance(e.body, Incident)]
        assert kept == [7, 8, 9]
        assert journal.is_isolated("a")
        assert journal.merge([Entry(1, 2, incident(1))]) == []


class TestReplication:
    def test_of_agents_that_keep_the_same_only_one_is_asked(self) -> None:
        theirs = Journal()
        theirs.merge([Entry(1, 1, A_OUT)])
        journal = Journal(2)
        replication = Replication(journal, 4.0)
        sent = [m for n in range(1000) for m in replication.hello(f"n{n}", theirs.summary, 0.0)]
        assert sent == [("n0", AskEntries())]
        assert replication.awaited == ("n0",)
        assert replication.answered("n0", theirs.entries) == []
        assert journal.entries == theirs.entries
        assert replication.awaited == ()

    def test_each_gets_what_it_lacks(self) -> None:
        journal = Journal(2)
        journal.put(BACK)
        replication = Replication(journal, 4.0)
        theirs = Journal()
        theirs.merge([Entry(1, 1, A_OUT)])
        assert replication.hello("new", LogSummary(), 0.0) == [
            ("new", KeepEntries(journal.entries))
        ]
        assert replication.hello("same", journal.summary, 0.0) == []
        assert replication.hello("old", theirs.summary, 0.0) == [("old", AskEntries())]
        assert replication.hello("old2", theirs.summary, 0.0) == []
        sent = replication.answered("old", theirs.entries)
        assert sorted(sent, key=lambda pair: pair[0]) == [
            ("new", KeepEntries(theirs.entries)),
            ("old", KeepEntries((Entry(2, 1, BACK),))),
            ("old2", KeepEntries((Entry(2, 1, BACK),))),
            ("same", KeepEntries(theirs.entries)),
        ]

    def test_if_the_one_that_was_asked_is_lost_another_is(self) -> None:
        replication = Replication(Journal(2), 4.0)
        summary = LogSummary(1, (1, 1), 7)
        for name in ("x", "y"):
            replication.hello(name, summary, 0.0)
        assert replication.lost("x", 1.0) == [("y", AskEntries())]
        assert replication.lost("y", 1.0) == []
        assert replication.awaited == ()

    def test_it_asks_again(self) -> None:
        replication = Replication(Journal(2), 4.0)
        replication.hello("x", LogSummary(1, (1, 1), 7), 0.0)
        assert replication.tick(3.9) == []
        assert replication.tick(4.0) == [("x", AskEntries())]
        assert replication.tick(4.1) == []

    def test_an_answer_that_nobody_asked_for_changes_nothing(self) -> None:
        journal = Journal(2)
        replication = Replication(journal, 4.0)
        replication.hello("x", LogSummary(), 0.0)
        assert replication.answered("x", (Entry(1, 1, A_OUT),)) == []
        assert journal.entries == ()


@pytest.fixture
def place() -> Place:
    return Place("a", "b", "c")


def summaries(place: Place) -> set[LogSummary]:
    return {node.lifecycle.journal.summary for node in place.nodes.values()} | {
        node.journal.summary for node in place.nodes.values()
    }


def with_a_wish() -> tuple[Cluster, SnapshotId]:
    """A job on two nodes, and the protected snapshot to which somebody wants to go back."""
    cluster = Cluster("a", "b")
    cluster.pass_time(cluster.settings.lease_s)
    cluster.start("a", "b")
    wanted = cluster.make_protected()
    cluster.obey(RollBack(JOB, wanted.step))
    return cluster, wanted


def say_hello(cluster: Cluster, log: LogSummary, obeyed: Obeyed = Obeyed()) -> None:  # noqa: B008 (frozen)
    """Both nodes say it, and that they keep so much of the log."""
    for name in ("a", "b"):
        hello = cluster.hello_of(name)
        cluster.say(name, msgspec.structs.replace(hello, log=log, obeyed=obeyed))


class TestWholeClusters:
    def test_what_is_said_is_stored_everywhere(self, place: Place) -> None:
        first = place.coordinator("c1", FIRST)
        entry = first.decider.say(A_OUT, place.now)
        first.send(first.decider.take_actions())
        assert entry.term == 1
        assert {node.journal.entries for node in place.nodes.values()} == {(entry,)}
        assert status(first.decider, place.now, 0.0)["coordinator"]["log_entries"] == 1

    def test_what_could_not_be_stored_is_kept_once_it_is(self, place: Place) -> None:
        first, node = place.coordinator("c1", FIRST), place.nodes["a"]
        node.full = True
        entry = first.decider.say(A_OUT, place.now)
        first.send(first.decider.take_actions())
        assert first.decider.forgetful == ("a",)
        node.feed(ev.FromCoordinator(KeepEntries((entry,)), 1, "c1"))
        assert first.decider.forgetful == ("a",), "it knows the entry, and has not stored it"
        place.move(first, "a")
        assert first.decider.forgetful == ("a",)
        node.full = False
        node.journal.merge([entry])
        node.feed(ev.EntriesKept())
        assert first.decider.forgetful == ()

    def test_the_next_coordinator_knows_it(self, place: Place) -> None:
        first = place.coordinator("c1", FIRST)
        for body in (A_OUT, BACK, incident(1)):
            first.decider.say(body, place.now)
        first.send(first.decider.take_actions())
        second = place.coordinator("c2", SECOND, take_over=True)
        assert second.decider.journal.is_isolated("a") == A_OUT
        assert second.decider.journal.rollback(JOB) == BACK
        assert second.decider.journal.next_incident == 2
        second.decider.say(A_IN, place.now)
        second.send(second.decider.take_actions())
        assert summaries(place) == {second.decider.journal.summary}
        assert all(not n.journal.is_isolated("a") for n in place.nodes.values())

    def test_a_node_that_was_away_learns_and_teaches(self, place: Place) -> None:
        """c alone heard the last word of the first coordinator, and missed that of the second."""
        first = place.coordinator("c1", FIRST, "c")
        first.decider.say(A_OUT, place.now)
        first.send(first.decider.take_actions())
        second = place.coordinator("c2", SECOND, "a", "b")
        second.decider.say(BACK, place.now)
        second.send(second.decider.take_actions())
        first.stopped = True
        place.nodes["b"].restart()
        place.pass_time(30.0)
        place.move(second, "c", "b")
        assert not second.decider.ended
        assert summaries(place) == {second.decider.journal.summary}
        assert second.decider.journal.is_isolated("a")
        assert second.decider.journal.rollback(JOB) == BACK

    def test_what_is_said_before_there_is_a_term_counts_all_the_same(self, place: Place) -> None:
        """A person asked a coordinator that had heard of no agent yet."""
        first = place.coordinator("c1", FIRST)
        first.decider.say(A_OUT, place.now)
        first.send(first.decider.take_actions())
        fresh = Process(place, "c2", FIRST)
        assert fresh.decider.say(A_IN, place.now).term == 0
        place.move(fresh)
        assert fresh.decider.journal.is_isolated("a") is None
        assert summaries(place) == {fresh.decider.journal.summary}

    def test_a_resume_waits_for_the_log(self) -> None:
        """Hello has said that there is one; the entries are on their way."""
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        theirs = Journal()
        theirs.merge([Entry(1, 1, Isolated("z", True, "why"))])
        hello = msgspec.structs.replace(cluster.hello_of("b"), log=theirs.summary)
        assert AskEntries() in cluster.say("b", hello)
        cluster.attach("r1", "a", "b")
        assert cluster.ask() is None
        (waits,) = cluster.told("a", ResumeWaits)
        assert isinstance(waits, ResumeWaits)
        assert waits.reason == "the log that b kept"
        cluster.say("b", Entries(theirs.entries))
        assert len(cluster.granted("a")) == 1
        assert cluster.coordinator.journal.entries == theirs.entries
        assert KeepEntries(theirs.entries) in cluster.inbox("a")

    def test_who_does_not_keep_yet_what_was_asked_for(self) -> None:
        """An answer waits for them: until then the wish would end with the coordinator."""
        cluster = Cluster("a", "b", "c")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.start("a", "b")
        wanted = cluster.make_protected()
        assert cluster.coordinator.forgetful == ()
        cluster.obey(RollBack(JOB, wanted.step))
        assert cluster.coordinator.forgetful == ("a", "b", "c")
        whole = cluster.coordinator.journal.summary
        cluster.say("a", Kept(LogSummary()))
        cluster.say("b", Kept(whole))
        assert cluster.coordinator.forgetful == ("a", "c")
        cluster.say("a", Kept(whole))
        cluster.destroy("c")
        assert cluster.coordinator.forgetful == ()

    def test_what_nobody_is_there_to_keep_is_not_kept(self) -> None:
        cluster, _ = with_a_wish()
        cluster.destroy("a", "b")
        assert cluster.coordinator.forgetful == ("a", "b")

    def test_nothing_is_retired_before_the_log_is_there(self) -> None:
        """What the newest would replace may be what somebody wants to go back to."""
        cluster, wanted = with_a_wish()
        theirs = cluster.coordinator.journal
        newest = max(cluster.tickets("a"))
        cluster.seal_all(newest)
        cluster.encode("a", newest)
        cluster.coordinator = Coordinator(cluster.settings, cluster.now)
        say_hello(cluster, theirs.summary)
        cluster.encode("b", newest)
        known = cluster.coordinator.jobs[JOB].snapshots
        assert {wanted, newest} <= set(known)
        cluster.say("a", Entries(theirs.entries))
        cluster.pass_time(1)
        assert {wanted, newest} <= set(known)
        commits = [m for m in cluster.told("a", Commit) if isinstance(m, Commit)]
        assert commits[-1].id == newest
        assert not any(wanted in commit.retire for commit in commits)

    def test_nothing_is_dropped_for_a_better_one_before_the_log_is_there(self) -> None:
        cluster, wanted = with_a_wish()
        theirs = cluster.coordinator.journal
        cluster.make_protected()
        held = cluster.nodes["b"].holdings[wanted]
        cluster.nodes["b"].holdings[wanted] = msgspec.structs.replace(held, extents=())
        cluster.coordinator = Coordinator(cluster.settings, cluster.now)
        for _ in range(2):  # the second time its orders are repeated, and b lacks what they need
            say_hello(cluster, theirs.summary)
        cluster.pass_time(cluster.settings.lease_s + 1)
        assert wanted in cluster.coordinator.jobs[JOB].snapshots
        cluster.say("a", Entries(theirs.entries))
        cluster.pass_time(1)
        assert wanted in cluster.coordinator.jobs[JOB].snapshots

    def test_a_wish_that_was_fulfilled_is_not_taken_back_before_later_ones_are_known(self) -> None:
        cluster, wanted = with_a_wish()
        old = cluster.coordinator.journal.entries
        cluster.stop_job()
        cluster.start("a", "b", round_="r2")
        cluster.pass_time(1)
        cluster.obey(RollBack(JOB, wanted.step))
        new = cluster.coordinator.journal
        cluster.coordinator = Coordinator(cluster.settings, cluster.now)
        cluster.coordinator.journal.merge(old)
        say_hello(cluster, new.summary, Obeyed(Term(1, "the one before"), 100.0, 100.0))
        cluster.pass_time(cluster.settings.lease_s + 1)
        cluster.say("a", Entries(new.entries))
        cluster.pass_time(1)
        job = cluster.coordinator.jobs[JOB]
        assert cluster.coordinator.rollback_of(job) == wanted

    def test_a_resume_does_not_wait_for_the_log_of_a_lost_node(self) -> None:
        cluster = Cluster("a", "b", "c")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b")
        hello = msgspec.structs.replace(cluster.hello_of("c"), log=LogSummary(1, (1, 1), 7))
        cluster.say("c", hello)
        assert cluster.ask() is None
        cluster.destroy("c")
        assert len(cluster.granted("a")) == 1


@pytest.mark.parametrize("seed", range(6))
def test_incidents_outlive_coordinators_agents_and_nodes(seed: int) -> None:
    """Through random faults: in the end all agree, on all that a live node had stored."""
    world = World(seed)
    start = world.clock.now
    chosen = ["restart_agent", "destroy_node", "cut_off", "restart_coordinator"]
    strikes = [getattr(world, name) for name in (*chosen, *["report_incident"] * 4)]
    faults(world, strikes, start + 12.0)
    world.clock.run_until(start + 12.0)
    stored = {
        entry.body
        for machine in world.machines.values()
        if machine.alive
        for entry in machine.disk.journal.entries
    }
    world.clock.run_until(start + 18.0)
    assert stored, f"seed {seed}: no incident was reported"
    assert world.coordinator is not None
    journal = world.coordinator.journal
    assert stored <= {entry.body for entry in journal.entries}
    for machine in world.machines.values():
        if machine.alive and machine.agent is not None:
            assert machine.agent.journal.summary == journal.summary, machine.name
            assert machine.disk.journal.summary == journal.summary, machine.name
            assert machine.agent.term.number == world.coordinator.term
