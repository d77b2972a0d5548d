"""Stories of two coordinators: whom agents obey, who stops, and with what words."""

from collections.abc import Callable

import msgspec
import pytest

from ckptd.agent import events as ev
from ckptd.agent.lifecycle import Lifecycle
from ckptd.agent.state import Identity
from ckptd.coordinator.claim import Claim, Raise, Stop, judge
from ckptd.coordinator.decider import Coordinator, Send, Settings
from ckptd.coordinator.view import status
from ckptd.ids import SnapshotId
from ckptd.journal import Isolated, Journal
from ckptd.manifest import JobRecord
from ckptd.terms import KeptTerm, Obeyed, Term
from ckptd.wire import (
    AgentMessage,
    Beat,
    Dismiss,
    Drop,
    Hello,
    Outdated,
    Present,
    Record,
    Welcome,
    WhoAreYou,
)

SETTINGS = Settings(cell_bytes=4)
FIRST, SECOND = "tcp://first:7070", "tcp://second:7070"
ORDERS = Record, Drop, Welcome, Dismiss


class Node:
    """An agent's decider with the memory that outlives it, connected to one coordinator or none."""

    def __init__(self, place: "Place", name: str) -> None:
        self.place, self.name = place, name
        self.term: KeptTerm | None = None
        self.stored: list[object] = []
        """What was stored and reported, in order."""
        self.journal = Journal()
        self.coordinator: Process | None = None
        self.full = False
        self.restart()

    def restart(self) -> None:
        adopted = ev.Adopted(term=self.term, entries=self.journal.entries)
        identity = Identity(
            self.name, f"{self.name}{self.place.now}", "t", self.name, f"{self.name}:1", "", False,
            "zfec", "zfec", "", "/mem", 1 << 20, "tcp://service:1",
        )  # fmt: skip
        self.lifecycle = Lifecycle(identity, adopted, self.place.now)

    def feed(self, event: ev.Event) -> None:
        self.carry_out(self.lifecycle.handle(event, self.place.now))

    def tick(self) -> None:
        self.carry_out(self.lifecycle.tick(self.place.now))

    def carry_out(self, actions: list[ev.Action]) -> None:
        for action in actions:
            match action:
                case ev.KeepTerm(kept):
                    if self.full:
                        self.feed(ev.TermNotKept("no space left"))
                        return
                    self.stored.append(kept.term)
                    self.term = kept
                case ev.KeepEntries() if self.full:
                    return
                case ev.KeepEntries(entries):
                    self.journal.merge(entries)
                    self.feed(ev.EntriesKept())
                case ev.Report(message):
                    self.stored.append(message)
                    if self.coordinator is not None:
                        self.coordinator.hear(self.name.encode(), message)
                case _:
                    self.stored.append(action)

    def connect(self, coordinator: "Process") -> None:
        self.feed(ev.Disconnected())
        self.coordinator = coordinator
        self.feed(ev.Connected())


class Process:
    """A coordinator that can be stopped as a process can: it hears all of it when it goes on."""

    def __init__(self, place: "Place", name: str, address: str, **claim: bool | int) -> None:
        self.place, self.name = place, name
        self.decider = Coordinator(SETTINGS, place.now, Claim(name, address, **claim))  # type: ignore[arg-type]
        self.stopped = False
        self.inbox: list[tuple[bytes, AgentMessage]] = []

    def hear(self, peer: bytes, message: AgentMessage) -> None:
        self.inbox.append((peer, message))
        if not self.stopped:
            self.go_on()

    def go_on(self) -> None:
        self.stopped = False
        while self.inbox:
            peer, message = self.inbox.pop(0)
            self.send(self.decider.handle(peer, message, self.place.now))

    def tick(self) -> None:
        if not self.stopped:
            self.send(self.decider.tick(self.place.now))

    def send(self, sends: list[Send]) -> None:
        for send in sends:
            node = self.place.nodes[send.peer.decode()]
            if node.coordinator is self:
                event = ev.FromCoordinator(send.message, self.decider.term, self.name)
                node.feed(event)


class Place:
    """Nodes and coordinators, and time that passes for all."""

    def __init__(self, *names: str) -> None:
        self.now = 1000.0
        self.nodes: dict[str, Node] = {}
        self.coordinators: list[Process] = []
        for name in names:
            self.nodes[name] = Node(self, name)

    def coordinator(self, name: str, address: str, *nodes: str, **claim: bool | int) -> Process:
        """A new one, which these nodes (by default all) now reach."""
        self.coordinators.append(Process(self, name, address, **claim))
        self.move(self.coordinators[-1], *nodes)
        return self.coordinators[-1]

    def move(self, to: Process, *nodes: str) -> None:
        for name in nodes or self.nodes:
            self.nodes[name].connect(to)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + SETTINGS.beat_s)
            for node in self.nodes.values():
                node.tick()
            for coordinator in self.coordinators:
                coordinator.tick()

    def obeyed(self) -> set[tuple[int, str]]:
        terms = [node.lifecycle.term for node in self.nodes.values()]
        return {(term.number, term.coordinator) for term in terms}


@pytest.fixture
def place() -> Place:
    return Place("a", "b", "c")


class TestOneAfterAnother:
    def test_the_first_begins_term_1(self, place: Place) -> None:
        first = place.coordinator("c1", FIRST)
        assert first.decider.term == 1
        assert place.obeyed() == {(1, "c1")}
        shown = status(first.decider, place.now, 0.0)["coordinator"]
        assert (shown["term"], shown["id"], shown["address"]) == (1, "c1", FIRST)
        assert shown["log_entries"] == 0

    def test_no_order_before_a_term(self, place: Place) -> None:
        """Who speaks before it has said Hello is asked who it is, and that is no order."""
        first = Process(place, "c1", FIRST)
        (send,) = first.decider.handle(b"a", Beat("a", "i", 0, ()), place.now)
        assert send.message == WhoAreYou()
        assert first.decider.term == 0
        assert status(first.decider, place.now, 0.0)["coordinator"]["term"] == 0

    def test_a_term_is_stored_before_anything_of_it_is_obeyed(self, place: Place) -> None:
        place.coordinator("c1", FIRST)
        node = place.nodes["a"]
        node.stored.clear()
        place.coordinator("c2", FIRST)
        hello, term = node.stored[:2]
        assert isinstance(hello, Hello)
        assert isinstance(term, Term)
        assert term.number == 2

    def test_a_restarted_one_goes_on_at_the_same_address_with_the_next_term(
        self, place: Place
    ) -> None:
        place.coordinator("c1", FIRST)
        place.pass_time(0.1)
        second = place.coordinator("c2", FIRST)
        assert not second.decider.ended
        assert place.obeyed() == {(2, "c2")}

    def test_elsewhere_it_goes_on_when_the_one_before_is_silent_for_its_lease(
        self, place: Place
    ) -> None:
        first = place.coordinator("c1", FIRST)
        first.stopped = True
        place.pass_time(SETTINGS.lease_s + 1)
        second = place.coordinator("c2", SECOND)
        assert not second.decider.ended
        assert place.obeyed() == {(2, "c2")}

    def test_an_idle_coordinator_still_counts_as_alive(self, place: Place) -> None:
        """There is no job, so there are no orders: it says that it is there."""
        first = place.coordinator("c1", FIRST)
        place.pass_time(10 * SETTINGS.lease_s)
        for node in place.nodes.values():
            silent_s = node.lifecycle._obeyed(place.now).silent_s
            assert silent_s is not None
            assert silent_s < SETTINGS.lease_s
        assert not first.decider.ended
        assert "tcp://first:7070" in place.coordinator("c2", SECOND).decider.ended

    def test_all_agents_are_told_when_the_term_rises(self, place: Place) -> None:
        """Agents differ in what they have heard; the new coordinator hears the lowest first."""
        low = Process(place, "c1", FIRST)
        place.move(low, "a")
        place.coordinators.append(low)
        for number in (2, 3, 4):
            place.coordinator(f"c{number}", FIRST, "b")
        place.nodes["a"].feed(ev.Disconnected())
        fresh = place.coordinator("c5", FIRST, "a")
        assert fresh.decider.term == 2
        place.move(fresh, "b", "c")
        assert fresh.decider.term == 4
        assert place.obeyed() == {(4, "c5")}

    def test_two_of_one_term_cannot_both_be_obeyed(self, place: Place) -> None:
        first = place.coordinator("c1", FIRST, "a")
        second = place.coordinator("c2", FIRST, "b")
        assert first.decider.term == second.decider.term == 1
        place.move(second, "a")
        assert second.decider.term == 2
        assert {node.lifecycle.term.coordinator for node in place.nodes.values()} == {"c2", ""}

    def test_a_lease_has_seen_a_term_that_no_agent_has(self, place: Place) -> None:
        fresh = place.coordinator("c1", FIRST, take_over=True, seen_term=7)
        assert fresh.decider.term == 8
        assert place.obeyed() == {(8, "c1")}


class TestTwoAtOnce:
    def test_the_second_refuses_and_names_the_first_and_the_flag(self, place: Place) -> None:
        place.coordinator("c1", FIRST)
        place.pass_time(1.0)
        second = place.coordinator("c2", SECOND)
        assert "another coordinator is alive" in second.decider.ended
        assert FIRST in second.decider.ended
        assert "--take-over" in second.decider.ended
        assert place.obeyed() == {(1, "c1")}

    def test_it_refuses_also_if_the_first_agent_it_hears_knows_of_nobody(
        self, place: Place
    ) -> None:
        """An agent with empty memory; the next one tells."""
        place.coordinator("c1", FIRST, "a", "b")
        place.pass_time(1.0)
        second = place.coordinator("c2", SECOND, "c")
        assert not second.decider.ended
        place.move(second, "a")
        assert "--take-over" in second.decider.ended

    def test_once_it_has_ended_it_says_nothing_more(self, place: Place) -> None:
        place.coordinator("c1", FIRST)
        second = place.coordinator("c2", SECOND)
        assert second.decider.ended
        hello = place.nodes["a"].lifecycle.handle(ev.Connected(), place.now)
        (report,) = [action for action in hello if isinstance(action, ev.Report)]
        assert second.decider.handle(b"a", report.message, place.now) == []
        assert second.decider.tick(place.now + 100) == []
        second.decider.say(Isolated("a", True, "why"), place.now)
        assert second.decider.take_actions() == []

    def test_with_take_over_it_goes_on(self, place: Place) -> None:
        place.coordinator("c1", FIRST)
        second = place.coordinator("c2", SECOND, take_over=True)
        assert not second.decider.ended
        assert place.obeyed() == {(2, "c2")}

    @pytest.mark.parametrize("first_heard", ["a", "b", "c"])
    def test_a_stopped_one_that_goes_on_is_refused_and_ends(
        self, place: Place, first_heard: str
    ) -> None:
        first = place.coordinator("c1", FIRST)
        record = JobRecord("job", 9, {"a": "t"}, ())
        place.pass_time(1.0)
        first.stopped = True
        place.pass_time(2.0)
        second = place.coordinator("c2", SECOND, take_over=True)
        place.pass_time(2.0)
        before = {name: dict(node.lifecycle.records) for name, node in place.nodes.items()}
        # What it had decided and not sent arrives now, over a connection that is still there.
        node = place.nodes[first_heard]
        node.coordinator = first
        old = ev.FromCoordinator(Record(record), first.decider.term, first.name)
        node.feed(old)
        assert isinstance(node.stored[-1], Outdated)
        first.go_on()
        assert first.decider.ended.startswith("superseded: the coordinator at tcp://second:7070")
        assert "term 2" in first.decider.ended
        assert {n: node.lifecycle.records for n, node in place.nodes.items()} == before
        assert place.obeyed() == {(2, "c2")}
        assert any("refused" in problem for problem in node.lifecycle.problems)
        node.connect(second)
        assert not second.decider.ended

    def test_one_that_was_taken_over_ends_at_the_first_hello(self, place: Place) -> None:
        first = place.coordinator("c1", FIRST)
        place.pass_time(1.0)
        place.coordinator("c2", SECOND, take_over=True)
        place.pass_time(1.0)
        place.move(first, "b")
        assert "superseded" in first.decider.ended
        assert place.obeyed() == {(2, "c2")}

    def test_also_one_that_was_stopped_for_longer_than_it_had_run(self, place: Place) -> None:
        """What it does not count as silence of its nodes, it must count as time for others."""
        first = place.coordinator("c1", FIRST)
        first.stopped = True
        place.pass_time(60.0)
        place.coordinator("c2", SECOND, take_over=True)
        place.pass_time(30.0)
        place.move(first, "b")
        first.go_on()
        assert "superseded" in first.decider.ended
        assert place.obeyed() == {(2, "c2")}

    def test_even_one_that_had_taken_over_itself(self, place: Place) -> None:
        first = place.coordinator("c1", FIRST, take_over=True)
        place.pass_time(1.0)
        place.coordinator("c2", SECOND, take_over=True)
        place.move(first, "c")
        assert "superseded" in first.decider.ended

    def test_the_word_of_a_restarted_agent_still_ends_the_old_one(self, place: Place) -> None:
        first = place.coordinator("c1", FIRST)
        place.pass_time(1.0)
        place.coordinator("c2", SECOND, take_over=True)
        place.nodes["a"].restart()
        assert place.nodes["a"].lifecycle.term.number == 2
        place.move(first, "a")
        assert "superseded" in first.decider.ended


class TestAgents:
    @pytest.mark.parametrize(
        "message",
        [
            Record(JobRecord("job", 9, {}, ())),
            Drop(SnapshotId("job", 1, 1), "why"),
            Dismiss("why"),
            Welcome(9.0, 8),
            Present(),
        ],
    )
    @pytest.mark.parametrize(("term", "who"), [(0, ""), (1, "c1"), (2, "c1")])
    def test_an_order_of_another_coordinator_is_refused(
        self, place: Place, message: object, term: int, who: str
    ) -> None:
        place.coordinator("c1", FIRST)
        place.coordinator("c2", FIRST)
        node = place.nodes["a"]
        node.coordinator = None
        node.stored.clear()
        node.feed(ev.FromCoordinator(message, term, who))  # type: ignore[arg-type]
        (answer,) = node.stored
        assert isinstance(answer, Outdated)
        assert answer.obeyed.term == Term(2, "c2", FIRST, SETTINGS.lease_s)
        assert not node.lifecycle.dismissed
        assert node.lifecycle.beat_s == SETTINGS.beat_s

    def test_only_a_welcome_begins_a_term(self, place: Place) -> None:
        """It was lost: the next heartbeat is a Hello, which is answered by another Welcome."""
        first = place.coordinator("c1", FIRST)
        node = place.nodes["a"]
        node.feed(ev.FromCoordinator(Record(JobRecord("job", 9, {}, ())), 5, "c5"))
        assert not node.lifecycle.records
        assert node.lifecycle.term.number == 1
        node.stored.clear()
        node.coordinator = None
        place.pass_time(SETTINGS.beat_s)
        assert [type(said) for said in node.stored] == [Hello]
        assert first.decider.term == 1

    def test_a_dismissed_agent_obeys_without_a_welcome(self, place: Place) -> None:
        """Its node's id is in use, so it is never welcomed."""
        node = place.nodes["a"]
        node.feed(ev.FromCoordinator(Dismiss("the id is in use"), 1, "c1"))
        assert node.lifecycle.dismissed == "the id is in use"
        assert node.term is None

    def test_a_term_that_cannot_be_stored_is_not_obeyed(self, place: Place) -> None:
        place.coordinator("c1", FIRST)
        node = place.nodes["a"]
        node.full = True
        second = place.coordinator("c2", FIRST)
        assert node.lifecycle.term.number == 1
        assert any("cannot be stored" in problem for problem in node.lifecycle.problems)
        sends = [Send(b"a", Record(JobRecord("job", 9, {}, ())))]
        second.send(sends)
        assert not node.lifecycle.records
        node.full = False
        place.pass_time(2 * SETTINGS.beat_s)
        assert node.lifecycle.term.number == 2
        second.send(sends)
        assert node.lifecycle.records

    def test_after_a_reboot_a_stored_term_is_older_than_anything(self) -> None:
        """Monotonic time began anew, and is lower than what was stored."""
        kept = KeptTerm(Term(4, "c4", FIRST, 4.0), since=1e6)
        place = Place()
        place.nodes["a"] = Node(place, "a")
        place.nodes["a"].term = kept
        place.nodes["a"].restart()
        fresh = Process(place, "c5", SECOND)
        place.now += 100
        place.move(fresh, "a")
        assert not fresh.decider.ended
        assert fresh.decider.term == 5


OTHER = Term(5, "other", FIRST, 4.0)


class TestTheRule:
    @pytest.mark.parametrize(
        ("term", "obeyed", "take_over", "settled", "expected"),
        [
            (0, Obeyed(), False, False, Raise(1)),
            (3, Obeyed(), False, False, None),
            (0, Obeyed(OTHER, 100, 50), False, False, Raise(6)),
            (0, Obeyed(OTHER, 100, None), False, False, Raise(6)),
            (0, Obeyed(OTHER, 100, 1), False, False, Stop),
            (0, Obeyed(OTHER, 1, 1), False, True, Stop),
            (0, Obeyed(OTHER, 100, 1), True, False, Raise(6)),
            (0, Obeyed(OTHER, 1, 1), True, False, Raise(6)),
            (4, Obeyed(OTHER, 1, 1), True, True, Stop),
            (4, Obeyed(OTHER, 100, 50), False, True, Raise(6)),
            (4, Obeyed(OTHER, 100, 1), False, True, Stop),
            (5, Obeyed(OTHER, 1, 50), False, True, Raise(6)),
            (6, Obeyed(OTHER, 1, 1), False, False, Stop),
            (6, Obeyed(OTHER, 1, 1), False, True, None),
            (6, Obeyed(OTHER, 1, 1), True, False, None),
            (6, Obeyed(OTHER, 100, 50), False, False, None),
        ],
    )
    def test_case_by_case(
        self, term: int, obeyed: Obeyed, take_over: bool, settled: bool, expected: object
    ) -> None:
        """Up for 10 s; the other one began before or after that, and was heard lately or not."""
        verdict = judge(Claim("me", SECOND, take_over), term, obeyed, 10.0, settled)
        if isinstance(expected, Callable):  # type: ignore[arg-type]
            assert isinstance(verdict, Stop)
            assert FIRST in verdict.reason
        else:
            assert verdict == expected

    def test_whoever_listened_here_before_is_dead(self) -> None:
        """What is said of its term may have been on the way for long."""
        here = msgspec.structs.replace(OTHER, address=SECOND)
        assert judge(Claim("me", SECOND), 4, Obeyed(here, 1.0, 1.0), 10.0, True) == Raise(6)

    def test_the_term_that_its_lease_has_seen_may_be_higher(self) -> None:
        claim = Claim("me", SECOND, take_over=True, seen_term=9)
        assert judge(claim, 0, Obeyed(OTHER, 100.0, 1.0), 10.0, True) == Raise(10)

    def test_who_goes_on_has_a_higher_term_than_all_it_has_heard(self) -> None:
        for term in range(8):
            for heard in range(8):
                for silent_s in (None, 1.0, 50.0):
                    for for_s in (1.0, 100.0):
                        obeyed = Obeyed(
                            msgspec.structs.replace(OTHER, number=heard), for_s, silent_s
                        )
                        for take_over in (False, True):
                            claim = Claim("me", SECOND, take_over)
                            verdict = judge(claim, term, obeyed, 10.0, True)
                            if not isinstance(verdict, Stop):
                                mine = verdict.term if verdict is not None else term
                                assert mine > heard
