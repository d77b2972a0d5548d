"""Stories told to the agent's decider: what it does with slots, trainers and snapshots."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from msgspec import structs

from ckptd.agent import events as ev
from ckptd.agent.lifecycle import Lifecycle
from ckptd.agent.state import USES, Identity, Use
from ckptd.ids import SnapshotId
from ckptd.manifest import Ancestor, Extent, Group, JobManifest, JobRecord, Member
from ckptd.segment import ParitySidecar, Sidecar
from ckptd.wire import (
    Activate,
    AgentMessage,
    AskResume,
    AskResumeFor,
    Attach,
    Attached,
    Beat,
    CaptureFailed,
    Commit,
    CoordinatorMessage,
    Detach,
    Detached,
    Dismiss,
    Drop,
    Fetching,
    Forget,
    Grant,
    Granted,
    Hello,
    Holding,
    Holds,
    LauncherWaiting,
    LayoutOpened,
    LifeResumed,
    OpenLayout,
    Progress,
    Protect,
    RankLeft,
    RankReport,
    Record,
    Rejected,
    Restore,
    Restored,
    Resumed,
    ResumeWaits,
    Revoked,
    Sealed,
    SegmentReady,
    SnapshotFailed,
    Source,
    TakeSnapshot,
    Ticket,
    TrainerMessage,
    WaitForWork,
    Waiting,
    Welcome,
    WhoAreYou,
    Work,
)

JOB = "job"
CELL_BYTES = 4
SIZE_BYTES = 10  # three cells
WORLD = 2

T = TypeVar("T")


def snapshot(life: int, step: int) -> SnapshotId:
    return SnapshotId(JOB, life, step)


def manifest_of(id: SnapshotId) -> JobManifest:
    """Two nodes, a mirror; this node is `a` and holds rank 0."""
    members = tuple(
        Member(node, (Extent(rank, SIZE_BYTES),)) for rank, node in enumerate(("a", "b"))
    )
    return JobManifest(id, WORLD, (Group(members, 1),), "zfec", CELL_BYTES, ())


def source_of(id: SnapshotId, ranks: dict[int, tuple[str, ...]]) -> Source:
    sizes = dict.fromkeys(range(WORLD), SIZE_BYTES)
    return Source(manifest_of(id), ranks, sizes, ("a", "b"), {"a": "a:1", "b": "b:1"})


def record_of(life: int) -> JobRecord:
    return JobRecord(JOB, life, {"a": "ta", "b": "tb"}, (Ancestor(1, 1),) if life > 1 else ())


def sidecar_of(id: SnapshotId, rank: int = 0, size_bytes: int = SIZE_BYTES) -> Sidecar:
    return Sidecar(id, rank, WORLD, size_bytes, CELL_BYTES, bytes(24))


class Node:
    """One lifecycle, whose Allocate, Release and Delete are carried out at once."""

    def __init__(self, adopted: ev.Adopted = ev.Adopted(), limit_bytes: int = 1 << 20) -> None:  # noqa: B008 (frozen)
        identity = Identity(
            "a",
            "i1",
            "ta",
            "host-a",
            "a:1",
            "",
            False,
            "zfec",
            "zfec 1.6",
            "",
            "/mem",
            limit_bytes,
            "tcp://c:1",
        )
        self.now = 10.0
        self.lifecycle = Lifecycle(identity, adopted, self.now)
        self.actions: list[ev.Action] = []
        self.files: set[str] = set(self.lifecycle.slots)
        self.held_back: list[str] = []
        """Names of Release actions that are answered only by `let_go`."""
        self.holding_back = False
        self.do(ev.Connected())
        self.order(Welcome(0.5, CELL_BYTES))

    def do(self, event: ev.Event) -> list[ev.Action]:
        """One event, and what follows at once; returns all actions."""
        done: list[ev.Action] = []
        events = [event]
        while events:
            actions = self.lifecycle.handle(events.pop(0), self.now)
            self.lifecycle.check_invariants()
            done += actions
            for action in actions:
                match action:
                    case ev.Allocate():
                        self.files.add(action.name)
                        events.append(ev.Allocated(action.name))
                    case ev.Release() if self.holding_back:
                        self.held_back.append(action.name)
                    case ev.Release():
                        events.append(ev.Released(action.name))
                    case ev.Fetch() | ev.Encode():
                        self.files.add(action.name)
                    case ev.Delete():
                        self.files.remove(action.name)
                    case _:
                        pass
        self.actions += done
        return done

    def let_go(self) -> list[ev.Action]:
        names, self.held_back = self.held_back, []
        return [action for name in names for action in self.do(ev.Released(name))]

    def order(self, message: CoordinatorMessage) -> list[ev.Action]:
        return self.do(ev.FromCoordinator(message))

    def say(self, conn: int, message: TrainerMessage) -> list[ev.Action]:
        return self.do(ev.FromLocal(conn, message))

    # A job's way.

    def attach(
        self, conn: int, rank: int = 0, life: int = 0, round_: str = "r1", keep: int = 1
    ) -> None:
        self.say(conn, Attach(JOB, round_, rank, WORLD, 1, keep + 1, life, keep))

    def grant(
        self,
        life: int = 1,
        id: SnapshotId | None = None,
        round_: str = "r1",
        b_has: bool = True,
        quota_bytes: int | None = None,
    ) -> list[ev.Action]:
        ranks = {0: ("a",), 1: ("b",)} if b_has else {0: ("a",)}
        source = source_of(id, ranks) if id else None
        record = record_of(life)
        return self.order(Grant(JOB, round_, life, id, "why", record, source, 1.0, quota_bytes))

    def train(
        self, conn: int = 1, rank: int = 0, life: int = 1, round_: str = "r1"
    ) -> list[ev.Action]:
        """A trainer that comes, is granted a life from nothing, and opens its layout."""
        self.attach(conn, rank, round_=round_)
        self.grant(life, round_=round_)
        return self.say(conn, OpenLayout(life, SIZE_BYTES))

    def ticket(self, id: SnapshotId, conn: int = 1) -> str:
        """The slot that the ticket names."""
        done = self.order(TakeSnapshot(id))
        (ticket,) = [m for m in tells(done, conn) if isinstance(m, Ticket)]
        assert ticket.id == id
        return ticket.path.removeprefix("/mem/")

    def seal(self, id: SnapshotId, conn: int = 1) -> str:
        """Captured, sealed and looked at; returns the slot."""
        name = self.ticket(id, conn)
        rank = self.lifecycle.trainers[conn].rank
        assert ev.CheckSegment(name, id, rank) in self.say(conn, Sealed(id))
        self.do(ev.SegmentChecked(name, sidecar_of(id, rank)))
        assert self.use(name) is Use.SEALED
        return name

    def protect(self, id: SnapshotId) -> str:
        """Encoded; returns the parity slot."""
        (encode,) = only(ev.Encode, self.order(Protect(manifest_of(id), {"b": "b:1"})))
        self.do(ev.Encoded(id))
        return encode.name

    def use(self, name: str) -> Use:
        return self.lifecycle.slots[name].use

    def slots(self, parity: bool = False) -> dict[str, Use]:
        slots = self.lifecycle.slots.values()
        return {slot.name: slot.use for slot in slots if slot.parity is parity}


def only(kind: type[T], actions: list[ev.Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def tells(actions: list[ev.Action], conn: int) -> list[object]:
    return [tell.message for tell in only(ev.Tell, actions) if tell.conn == conn]


def reports(actions: list[ev.Action], kind: type[AgentMessage] | type[T]) -> list[T]:
    said = [report.message for report in only(ev.Report, actions)]
    return [message for message in said if isinstance(message, kind)]


def before(actions: list[ev.Action], *tests: Callable[[ev.Action], bool]) -> bool:
    """Whether the first actions that pass each test come in this order."""
    places = [next(i for i, action in enumerate(actions) if test(action)) for test in tests]
    return places == sorted(places)


class TestSlots:
    def test_the_way_of_a_slot_through_one_snapshot(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 5)
        name = node.ticket(id)
        assert node.use(name) is Use.CAPTURING
        node.say(1, Sealed(id))
        assert node.use(name) is Use.CHECKING
        done = node.do(ev.SegmentChecked(name, sidecar_of(id)))
        assert node.use(name) is Use.SEALED
        (held,) = reports(done, Holds)
        assert held.holding == Holding(id, WORLD, (Extent(0, SIZE_BYTES),))
        node.holding_back = True
        node.order(Drop(id, "for the story"))
        assert node.use(name) is Use.RELEASING
        done = node.let_go()
        assert node.use(name) is Use.FREE
        assert reports(done, RankReport)[-1].state.free_slots == 2

    def test_the_table_has_no_dead_ends(self) -> None:
        """From every use a slot comes back to be free."""
        for use in Use:
            reached, border = set(), {use}
            while border:
                reached |= border
                border = {after for at in border for after in USES[at]} - reached
            assert Use.FREE in reached

    def test_two_slots_serve_for_ever(self) -> None:
        """A hundred snapshots, each protected and then replaced: no file is made or deleted."""
        node = Node()
        node.train()
        node.seal(snapshot(1, 1))
        node.protect(snapshot(1, 1))
        node.seal(snapshot(1, 2))
        node.protect(snapshot(1, 2))
        node.order(Commit(snapshot(1, 2), (snapshot(1, 1),)))
        files, used = set(node.files), node.lifecycle.used_bytes
        assert len(files) == 4
        node.actions.clear()
        for step in range(3, 100):
            id = snapshot(1, step)
            node.seal(id)
            node.protect(id)
            node.order(Commit(id, (snapshot(1, step - 1),)))
            assert node.lifecycle.used_bytes == used
        assert node.files == files
        assert not only(ev.Allocate, node.actions) + only(ev.Delete, node.actions)
        assert len(node.lifecycle.manifests) == 1
        # Nor does what is only remembered grow.
        assert len(node.lifecycle._world_sizes) == 1

    def test_without_a_free_slot_a_ticket_fails(self) -> None:
        node = Node()
        node.train()
        for step in (1, 2):
            node.ticket(snapshot(1, step))
        done = node.order(TakeSnapshot(snapshot(1, 3)))
        (failed,) = reports(done, SnapshotFailed)
        assert (failed.id, failed.outcome) == (snapshot(1, 3), "dropped")
        assert "no free slot" in failed.reason

    def test_a_ticket_is_taken_once(self) -> None:
        node = Node()
        node.train()
        node.ticket(snapshot(1, 4))
        for step in (4, 3):
            assert node.order(TakeSnapshot(snapshot(1, step))) == []

    def test_a_ticket_of_another_life_is_nobody_s(self) -> None:
        node = Node()
        node.train(life=2)
        assert node.order(TakeSnapshot(snapshot(1, 9))) == []

    def test_a_grant_said_again_changes_nothing(self) -> None:
        node = Node()
        node.train()
        node.ticket(snapshot(1, 4))
        assert tells(node.grant(1), 1) == []
        assert node.order(TakeSnapshot(snapshot(1, 4))) == []
        assert node.lifecycle.trainers[1].seen_step == 4

    def test_a_capture_that_fails_is_reported_and_its_slot_freed(self) -> None:
        node = Node()
        node.train()
        name = node.ticket(snapshot(1, 4))
        done = node.say(1, CaptureFailed(snapshot(1, 4), "skipped", "it was at step 5 already"))
        (failed,) = reports(done, SnapshotFailed)
        assert failed.outcome == "skipped"
        assert "rank 0: it was at step 5 already" in failed.reason
        assert node.use(name) is Use.FREE

    def test_an_unsealed_segment_is_torn(self) -> None:
        node = Node()
        node.train()
        name = node.ticket(snapshot(1, 4))
        node.say(1, Sealed(snapshot(1, 4)))
        done = node.do(ev.SegmentChecked(name, None, "it was not sealed"))
        (failed,) = reports(done, SnapshotFailed)
        assert (failed.outcome, failed.reason) == ("torn", "rank 0: it was not sealed")
        assert node.use(name) is Use.FREE


class TestRevoked:
    def test_a_slot_waits_for_its_trainer_to_answer(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.ticket(id)
        done = node.order(Drop(id, "b failed"))
        assert tells(done, 1) == [Revoked(id)]
        assert not only(ev.Release, done)
        assert node.use(name) is Use.REVOKED
        other = node.ticket(snapshot(1, 5))
        assert other != name
        done = node.say(1, CaptureFailed(id, "dropped", "revoked"))
        assert only(ev.Release, done)
        assert not reports(done, SnapshotFailed)
        assert node.use(name) is Use.FREE

    def test_what_was_sealed_all_the_same_is_freed(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.ticket(id)
        node.order(Drop(id, "b failed"))
        done = node.say(1, Sealed(id))
        assert only(ev.Release, done)
        assert not only(ev.CheckSegment, done)
        assert node.use(name) is Use.FREE

    def test_a_drop_while_the_segment_is_looked_at(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.ticket(id)
        node.say(1, Sealed(id))
        assert not only(ev.Release, node.order(Drop(id, "b failed")))
        done = node.do(ev.SegmentChecked(name, sidecar_of(id)))
        assert only(ev.Release, done)
        assert not any(held.holding.extents for held in reports(done, Holds))
        assert node.use(name) is Use.FREE


class TestTrainersThatEnd:
    def test_the_next_life_reuses_what_a_dead_trainer_left(self) -> None:
        node = Node()
        node.train()
        kept = node.seal(snapshot(1, 4))
        files, used = set(node.files), node.lifecycle.used_bytes
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        assert node.files == files
        node.actions.clear()
        done = node.train(conn=2, life=2, round_="r2")
        assert LayoutOpened(SIZE_BYTES, ("/mem/job/segment-2.safetensors",)) in tells(done, 2)
        assert not only(ev.Allocate, node.actions)
        assert node.lifecycle.used_bytes == used
        name = node.seal(snapshot(2, 7), conn=2)
        assert name != kept
        # The snapshot it resumed from is retired: its slot is the second one.
        node.order(Commit(snapshot(2, 7), (snapshot(1, 4),)))
        assert node.ticket(snapshot(2, 8), conn=2) == kept
        assert node.files == files

    def test_a_process_of_an_old_life_leaves_its_slots_to_nobody(self) -> None:
        """It was stopped, and dies when the next life has long had slots of its own."""
        node = Node()
        node.train()
        old = set(node.files)
        node.train(conn=2, life=2, round_="r2")
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        assert not old & node.files
        assert len(node.slots()) == 2

    def test_a_stopped_process_of_an_old_life_keeps_no_slots_from_being_given_back(self) -> None:
        """It never came to open a layout, and so never will."""
        node = Node()
        node.train()
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        node.attach(2, round_="r2")
        node.grant(2, round_="r2")
        node.attach(3, round_="r3")
        node.grant(3, round_="r3")
        node.say(3, OpenLayout(3, 2 * SIZE_BYTES))
        assert len(node.slots()) == 2

    def test_all_ranks_of_a_node_die_one_after_another(self) -> None:
        """Slots of the first are still there when the last is dead."""
        node = Node()
        for conn, rank in ((1, 0), (2, 1)):
            node.attach(conn, rank)
        node.grant(1)
        for conn in (1, 2):
            node.say(conn, OpenLayout(1, SIZE_BYTES))
        files = set(node.files)
        assert len(files) == 4
        second = node.ticket(snapshot(1, 3), conn=2)
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        node.order(Drop(snapshot(1, 3), "rank 0 left"))
        node.say(2, CaptureFailed(snapshot(1, 3), "dropped", "revoked"))
        node.do(ev.LocalGone(2, "its process ended", dead=True))
        for name in [n for n in node.slots() if node.use(n) is Use.CHECKING]:
            node.do(ev.SegmentChecked(name, None, "not sealed"))
        assert node.files == files
        assert node.use(second) is Use.FREE
        for conn, rank in ((3, 0), (4, 1)):
            node.attach(conn, rank, round_="r2")
        node.grant(2, round_="r2")
        for conn in (3, 4):
            node.say(conn, OpenLayout(2, SIZE_BYTES))
        assert node.files == files

    def test_a_slot_of_a_process_that_may_still_write_is_nobody_else_s(self) -> None:
        """The trainer was stopped and lost its connection: its slots wait for its death."""
        node = Node()
        node.train()
        old = set(node.slots())
        writing = node.ticket(snapshot(1, 4))
        done = node.do(ev.LocalGone(1, "it stopped reading", dead=False))
        assert reports(done, RankLeft)
        assert not only(ev.Release, done) + only(ev.CheckSegment, done)
        node.order(Drop(snapshot(1, 4), "rank 0 left"))
        assert node.use(writing) is Use.REVOKED
        node.train(conn=2, life=2, round_="r2")
        new = {n for n, s in node.lifecycle.slots.items() if s.owner == 2}
        assert len(new) == 2
        assert not new & old
        done = node.do(ev.ProcessEnded(1))
        assert node.use(next(iter(new))) is Use.FREE
        assert not old & node.slots().keys(), "what nobody needs is given back"

    def test_a_sealed_slot_of_a_stopped_process_stays_its_own(self) -> None:
        node = Node()
        node.train()
        name = node.seal(snapshot(1, 4))
        node.do(ev.LocalGone(1, "it stopped reading", dead=False))
        node.train(conn=2, life=2, round_="r2")
        node.order(Commit(snapshot(2, 5), (snapshot(1, 4),)))
        assert node.use(name) is Use.FREE
        assert node.lifecycle.slots[name].owner == 1
        for step in (6, 7):
            assert node.ticket(snapshot(2, step), conn=2) != name

    def test_a_trainer_that_is_gone_while_its_segment_is_looked_at(self) -> None:
        """The socket is closed a moment before the process ends."""
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.ticket(id)
        node.say(1, Sealed(id))
        node.do(ev.LocalGone(1, "it closed the connection", dead=False))
        done = node.do(ev.SegmentChecked(name, sidecar_of(id)))
        assert reports(done, Holds)[0].holding.extents == (Extent(0, SIZE_BYTES),)
        node.do(ev.ProcessEnded(1))
        assert node.use(name) is Use.SEALED

    @pytest.mark.parametrize("sealed", [True, False])
    def test_what_a_dead_trainer_was_writing_is_looked_at(self, sealed: bool) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.ticket(id)
        done = node.do(ev.LocalGone(1, "its process ended", dead=True))
        assert ev.CheckSegment(name, id, 0) in done
        done = node.do(ev.SegmentChecked(name, sidecar_of(id) if sealed else None, "no"))
        assert bool(reports(done, SnapshotFailed)) is not sealed
        assert node.use(name) is (Use.SEALED if sealed else Use.FREE)

    def test_a_goodbye_keeps_the_snapshot(self) -> None:
        node = Node()
        node.train()
        name = node.seal(snapshot(1, 4))
        done = node.say(1, Detach(False))
        assert tells(done, 1) == [Detached()]
        (left,) = reports(done, RankLeft)
        assert (left.reason, left.finished) == ("detached", False)
        assert node.use(name) is Use.SEALED


class TestEncoding:
    def test_a_snapshot_is_protected_and_says_so(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        node.seal(id)
        done = node.order(Protect(manifest_of(id), {"b": "b:1"}))
        (encode,) = only(ev.Encode, done)
        assert node.use(encode.name) is Use.ENCODING
        assert encode.size_bytes == 3 * CELL_BYTES
        done = node.do(ev.Encoded(id))
        assert node.use(encode.name) is Use.PARITY
        (held,) = reports(done, Holds)
        assert held.holding.parity
        assert held.holding.place == (0, 0), "even if another node has it in a later edition"
        assert held.holding.manifest == manifest_of(id)

    def test_the_order_repeated_only_brings_new_addresses(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        node.seal(id)
        (first,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:1"})))
        (again,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:2"})))
        assert (again.name, again.cells, again.serve_only) == (first.name, {"b": "b:2"}, False)
        node.do(ev.Encoded(id))
        done = node.order(Protect(manifest_of(id), {"b": "b:3"}))
        assert only(ev.Encode, done)[0].serve_only
        assert reports(done, Holds)[0].holding.parity

    def test_a_node_that_fetched_more_than_its_part_still_protects_it(self) -> None:
        """Ranks were numbered anew, so another rank's segment was brought here as well."""
        id = snapshot(1, 4)
        adopted = ev.Adopted(
            segments=tuple((f"{JOB}/segment-{r}.safetensors", sidecar_of(id, r)) for r in (0, 1)),
            records=(record_of(1),),
        )
        done = Node(adopted).order(Protect(manifest_of(id), {"b": "b:1"}))
        assert only(ev.Encode, done)
        assert not reports(done, SnapshotFailed)

    def test_a_group_without_parity_has_nothing_to_encode(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        node.seal(id)
        alone = Group((Member("a", (Extent(0, SIZE_BYTES),)),), 0)
        manifest = JobManifest(id, 1, (alone,), "zfec", CELL_BYTES, ())
        assert node.order(Protect(manifest, {})) == []

    def test_a_node_without_its_part_says_so(self) -> None:
        node = Node()
        node.train()
        (failed,) = reports(node.order(Protect(manifest_of(snapshot(1, 4)), {})), SnapshotFailed)
        assert "no longer holds its segments" in failed.reason

    def test_a_drop_stops_the_encoding_and_frees_what_it_used_afterwards(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.seal(id)
        (encode,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:1"})))
        done = node.order(Drop(id, "b is lost"))
        assert ev.StopEncode(id) in done
        assert ev.Release(encode.name) not in done
        assert ev.Release(name) in done
        assert ev.ForgetManifests(id) in done
        assert node.use(encode.name) is Use.ENCODING
        node.do(ev.EncodeFailed(id, ""))
        assert node.use(encode.name) is Use.FREE
        assert node.lifecycle.problems == []

    def test_a_manifest_that_cannot_be_stored_ends_it_and_it_may_be_tried_again(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.seal(id)
        (encode,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:1"})))
        done = node.do(ev.ManifestNotKept(id, "no space left"))
        assert ev.StopEncode(id) in done
        assert node.use(encode.name) is Use.FREE
        (failed,) = reports(done, SnapshotFailed)
        assert failed.reason == "no space left"
        assert node.use(name) is Use.SEALED
        done = node.order(Protect(manifest_of(id), {"b": "b:1"}))
        assert only(ev.KeepManifest, done)
        assert only(ev.Encode, done)

    def test_encoding_that_was_faster_than_its_drop(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        node.seal(id)
        (encode,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:1"})))
        node.order(Drop(id, "b is lost"))
        done = node.do(ev.Encoded(id))
        assert ev.Release(encode.name) in done
        assert not any(held.holding.parity for held in reports(done, Holds))

    def test_another_try_does_not_use_a_file_that_is_being_let_go(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        node.seal(id)
        (first,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:1"})))
        node.holding_back = True
        done = node.do(ev.EncodeFailed(id, "a cell is damaged", damaged=True))
        (failed,) = reports(done, SnapshotFailed)
        assert failed.damaged
        assert ev.StopEncode(id) in done
        (second,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:1"})))
        assert second.name != first.name
        node.let_go()
        node.do(ev.Encoded(id))
        assert node.use(second.name) is Use.PARITY

    def test_too_little_memory_for_parity_is_said_with_its_numbers(self) -> None:
        node = Node(limit_bytes=2 * SIZE_BYTES + 2 * 12)
        node.train()
        id = snapshot(1, 4)
        node.seal(id)
        node.lifecycle.identity = replace(node.lifecycle.identity, memory_limit_bytes=25)
        (failed,) = reports(node.order(Protect(manifest_of(id), {})), SnapshotFailed)
        for text in ("12 more bytes", "20 bytes are in use", "limit is 25", "--memory-limit 32"):
            assert text in failed.reason


class TestLayouts:
    def test_too_little_memory_is_an_error_with_its_numbers_and_its_flag(self) -> None:
        """Two slots and two generations of parity: 20 + 24 bytes, rounded to cells."""
        node = Node(limit_bytes=43)
        done = node.train()
        (rejected,) = [m for m in tells(done, 1) if isinstance(m, Rejected)]
        assert rejected.kind == "MemoryTooSmall"
        for text in ("needs 44 more bytes", "0 bytes are in use", "limit is 43", "node a"):
            assert text in rejected.reason
        assert "--memory-limit 44 or more" in rejected.reason
        assert not only(ev.Allocate, done)
        assert LayoutOpened(
            SIZE_BYTES, ("/mem/job/segment-1.safetensors", "/mem/job/segment-2.safetensors")
        ) in tells(Node(limit_bytes=44).train(), 1)

    @pytest.mark.parametrize("newest_is_protected", [True, False])
    def test_what_was_enough_for_the_first_life_is_enough_for_the_next(
        self, newest_is_protected: bool
    ) -> None:
        node = Node(limit_bytes=44)
        node.train()
        node.seal(snapshot(1, 1))
        node.protect(snapshot(1, 1))
        if not newest_is_protected:
            node.seal(snapshot(1, 2))
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        done = node.train(conn=2, life=2, round_="r2")
        paths = ("/mem/job/segment-2.safetensors",) if newest_is_protected else ()
        assert LayoutOpened(SIZE_BYTES, paths) in tells(done, 2)
        assert node.lifecycle.used_bytes <= 44
        free = reports(done, RankReport)[-1].state.free_slots
        assert free == (1 if newest_is_protected else 0)
        if not newest_is_protected:
            node.protect(snapshot(1, 2))
            done = node.order(Commit(snapshot(1, 2), (snapshot(1, 1),)))
            assert reports(done, RankReport)[-1].state.free_slots == 1
        node.seal(snapshot(2, 5), conn=2)

    def test_another_layout_takes_the_place_of_the_first(self) -> None:
        node = Node()
        node.train()
        kept = node.seal(snapshot(1, 4))
        done = node.say(1, OpenLayout(1, 30))
        assert tells(done, 1) == [
            LayoutOpened(30, ("/mem/job/segment-3.safetensors", "/mem/job/segment-4.safetensors"))
        ]
        sizes = sorted(s.size_bytes for s in node.lifecycle.slots.values())
        assert sizes == [SIZE_BYTES, 30, 30]
        node.seal(snapshot(1, 5))
        node.order(Commit(snapshot(1, 5), (snapshot(1, 4),)))
        assert kept not in node.lifecycle.slots
        assert kept not in node.files

    def test_a_layout_opened_again_adds_nothing(self) -> None:
        """The trainer says it again after its agent was away for a moment."""
        node = Node()
        node.train()
        assert not only(ev.Allocate, node.say(1, OpenLayout(1, SIZE_BYTES)))
        assert len(node.slots()) == 2

    def test_memory_that_the_system_refuses(self) -> None:
        node = Node()
        node.attach(1)
        node.grant()
        actions = node.lifecycle.handle(ev.FromLocal(1, OpenLayout(1, SIZE_BYTES)), 0)
        names = [a.name for a in only(ev.Allocate, actions)]
        done = node.do(ev.AllocationFailed(names[0], "no space left"))
        assert tells(done, 1) == [Rejected("MemoryTooSmall", "no space left")]
        assert node.lifecycle.problems


class TestComingBack:
    def adopted(self, id: SnapshotId) -> ev.Adopted:
        parity = ParitySidecar(id, 0, 0, CELL_BYTES, (4, 4, 2), bytes(24))
        return ev.Adopted(
            segments=((f"{JOB}/segment-2.safetensors", sidecar_of(id)),),
            parities=((f"{JOB}/parity-3.cells", 12, parity),),
            manifests=(manifest_of(id),),
            records=(record_of(1),),
            problems=("one file was set aside",),
        )

    def test_hello_tells_all_that_was_found(self) -> None:
        id = snapshot(1, 4)
        (hello, *_) = reports(Node(self.adopted(id)).actions, Hello)
        assert hello.holdings == (
            Holding(id, WORLD, (Extent(0, SIZE_BYTES),), True, manifest_of(id), place=(0, 0)),
        )
        assert hello.records == (record_of(1),)
        assert hello.problems == ("one file was set aside",)
        assert hello.memory_used_bytes == SIZE_BYTES + 12

    def test_the_trainer_that_lived_on_captures_again(self) -> None:
        """It says its life and its layout; the adopted slot comes to it when it is retired."""
        old = snapshot(1, 4)
        node = Node(self.adopted(old), limit_bytes=44)
        node.attach(1, life=1)
        assert tells(node.actions, 1) == [Attached("a", CELL_BYTES)]
        done = node.say(1, OpenLayout(1, SIZE_BYTES))
        assert LayoutOpened(SIZE_BYTES, ("/mem/job/segment-1.safetensors",)) in tells(done, 1)
        node.grant(1)
        new = node.seal(snapshot(1, 9))
        assert new not in (f"{JOB}/segment-2.safetensors", f"{JOB}/parity-3.cells")
        node.protect(snapshot(1, 9))
        node.order(Commit(snapshot(1, 9), (old,)))
        node.seal(snapshot(1, 10))
        assert len(node.slots()) == 2
        assert node.lifecycle.used_bytes <= 44

    def test_a_trainer_of_a_life_that_is_over_is_refused(self) -> None:
        node = Node(ev.Adopted(records=(record_of(3),)))
        node.attach(1, life=2)
        ((rejected,),) = (tells(node.actions, 1),)
        assert isinstance(rejected, Rejected)
        assert rejected.kind == "Refused"
        assert "life 2" in rejected.reason

    def test_a_restore_waits_for_the_grant_that_the_agent_before_had(self) -> None:
        id = snapshot(1, 4)
        node = Node(self.adopted(id))
        node.attach(1, life=2)
        assert tells(node.say(1, Restore(2, id, 0)), 1) == []
        done = node.grant(2, id)
        assert only(ev.Fetch, done)

    def test_who_are_you_is_answered_with_everything(self) -> None:
        node = Node()
        node.train()
        node.seal(snapshot(1, 4))
        (hello,) = reports(node.order(WhoAreYou()), Hello)
        assert [h.id for h in hello.holdings] == [snapshot(1, 4)]
        assert [(r.rank, r.life, r.free_slots, r.seen_step) for r in hello.ranks] == [(0, 1, 1, 4)]

    def test_hello_says_which_captures_are_under_way(self) -> None:
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.ticket(id)
        assert reports(node.order(WhoAreYou()), Hello)[0].capturing == ((id, 0),)
        node.say(1, Sealed(id))
        assert reports(node.order(WhoAreYou()), Hello)[0].capturing == ((id, 0),), "being checked"
        node.do(ev.SegmentChecked(name, sidecar_of(id)))
        assert reports(node.order(WhoAreYou()), Hello)[0].capturing == ()
        torn = snapshot(1, 5)
        node.ticket(torn)
        node.say(1, CaptureFailed(torn, "torn", "something wrote to it"))
        assert reports(node.order(WhoAreYou()), Hello)[0].capturing == ()

    def test_a_welcome_after_a_silence_repeats_what_was_asked(self) -> None:
        node = Node()
        node.attach(1)
        node.say(1, AskResume())
        done = node.order(Welcome(0.5, CELL_BYTES))
        assert reports(done, AskResumeFor) == [AskResumeFor(JOB, "r1", (), 0)]
        node.grant()
        assert not reports(node.order(Welcome(0.5, CELL_BYTES)), AskResumeFor)


class TestForget:
    def test_everything_of_the_job_goes(self) -> None:
        node = Node()
        node.train()
        node.seal(snapshot(1, 1))
        node.protect(snapshot(1, 1))
        node.seal(snapshot(1, 2))
        (encode,) = only(ev.Encode, node.order(Protect(manifest_of(snapshot(1, 2)), {})))
        node.say(1, Detach(True))
        done = node.order(Forget(JOB, "finished"))
        assert ev.ForgetJob(JOB) in done
        assert list(node.lifecycle.slots) == [encode.name]
        node.do(ev.EncodeFailed(snapshot(1, 2), ""))
        assert node.lifecycle.slots == {}
        assert node.files == set()
        assert node.lifecycle.used_bytes == 0
        assert (node.lifecycle.records, node.lifecycle.manifests) == ({}, {})
        assert node.lifecycle._world_sizes == {}

    def test_a_trainer_that_still_runs_keeps_its_files_until_it_ends(self) -> None:
        node = Node()
        node.train()
        name = node.ticket(snapshot(1, 1))
        node.order(Forget(JOB, "removed by hand"))
        assert node.use(name) is Use.REVOKED
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        assert node.files == set()


class TestRestore:
    def held(self, rank: int = 0) -> Node:
        """Rank 0's segment of 1.4 is here."""
        segments = ((f"{JOB}/segment-1.safetensors", sidecar_of(snapshot(1, 4), rank)),)
        return Node(ev.Adopted(segments=segments, records=(record_of(1),)))

    def resume(self, node: Node, rank: int = 0, conn: int = 1, life: int = 2) -> list[ev.Action]:
        node.attach(conn, rank, round_=f"r{life}")
        done = node.grant(life, snapshot(1, 4), round_=f"r{life}")
        return done + node.say(conn, Restore(life, snapshot(1, 4), rank))

    def test_a_segment_that_is_here_is_verified_in_place(self) -> None:
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node))
        assert fetch.present
        done = node.do(ev.Fetched(fetch.name, 0, 0))
        assert tells(done, 1) == [Restored(snapshot(1, 4), 0, f"/mem/{fetch.name}")]
        assert reports(done, SegmentReady) == [SegmentReady(JOB, 2, 0, snapshot(1, 4), 0, 0)]

    def test_one_that_is_elsewhere_is_fetched_and_then_held(self) -> None:
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node, rank=1))
        assert not fetch.present
        assert fetch.source.ranks[1] == ("b",)
        assert node.use(fetch.name) is Use.FETCHING
        done = node.do(ev.Fetched(fetch.name, 3, 0))
        assert tells(done, 1) == [Restored(snapshot(1, 4), 1, f"/mem/{fetch.name}")]
        (held,) = reports(done, Holds)
        assert held.holding.extents == (Extent(0, SIZE_BYTES), Extent(1, SIZE_BYTES))
        assert node.use(fetch.name) is Use.SEALED

    def test_how_far_it_has_come_is_in_the_heartbeat_until_it_is_here(self) -> None:
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node, rank=1))

        def beat() -> Beat:
            node.now = node.lifecycle.next_deadline() + 3
            (found,) = reports(node.lifecycle.tick(node.now), Beat)
            return found

        assert beat().fetching == ()
        node.do(ev.FetchMoved(fetch.name, 2, 8, 0.5))
        assert beat().fetching == (Fetching(snapshot(1, 4), 1, SIZE_BYTES, 8, 2, 0.5),)
        node.do(ev.Fetched(fetch.name, 3, 0))
        node.do(ev.FetchMoved(fetch.name, 8, 8, 0.9))  # it was on its way
        assert beat().fetching == ()

    def test_damaged_cells_are_counted_in_the_heartbeat(self) -> None:
        """Its own, found by scrubbing or when they were wanted, and those of each other node."""
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node))
        assert fetch.present
        node.do(ev.Scrubbed(3, 2, "a cell could not be mended"))
        node.do(ev.Fetched(fetch.name, 1, 1))
        for sender, cells in (("b", 1), ("c", 1), ("b", 3), ("b", 2)):  # in any order
            node.do(ev.Damaged(sender, cells))
        node.now = node.lifecycle.next_deadline()
        (beat,) = reports(node.lifecycle.tick(node.now), Beat)
        assert (beat.damaged_cells, beat.mended_cells) == (5, 4)
        assert beat.damaged_from == {"b": 3, "c": 1}

    def test_a_restore_that_comes_before_the_grant_waits(self) -> None:
        node = self.held()
        node.attach(1, round_="r2")
        assert node.say(1, Restore(2, snapshot(1, 4), 0)) == []
        assert only(ev.Fetch, node.grant(2, snapshot(1, 4), round_="r2"))

    def test_only_what_was_granted_is_restored(self) -> None:
        node = self.held()
        self.resume(node)
        (answer,) = tells(node.say(1, Restore(2, snapshot(1, 3), 0)), 1)
        assert isinstance(answer, Rejected)
        (answer,) = tells(node.say(1, Restore(1, snapshot(1, 4), 0)), 1)
        assert isinstance(answer, Rejected)
        assert "life 1 is over" in answer.reason

    def test_a_fetch_under_way_for_a_dead_life_serves_the_next(self) -> None:
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node, rank=1))
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        assert not only(ev.Fetch, self.resume(node, rank=1, conn=2, life=3))
        done = node.do(ev.Fetched(fetch.name, 3, 0))
        assert tells(done, 2) == [Restored(snapshot(1, 4), 1, f"/mem/{fetch.name}")]
        assert reports(done, SegmentReady)[0].life == 3

    def test_the_failure_of_a_dead_life_s_fetch_is_not_the_next_one_s(self) -> None:
        """It asked nodes that are gone; the new grant knows of others."""
        node = self.held()
        (old,) = only(ev.Fetch, self.resume(node, rank=1))
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        self.resume(node, rank=1, conn=2, life=3)
        done = node.do(ev.FetchFailed(old.name, "Unrecoverable", "b is gone"))
        assert tells(done, 2) == []
        (new,) = only(ev.Fetch, done)
        done = node.do(ev.Fetched(new.name, 0, 3))
        assert tells(done, 2) == [Restored(snapshot(1, 4), 1, f"/mem/{new.name}")]

    def test_a_fetch_that_fails_is_said_and_leaves_no_file(self) -> None:
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node, rank=1))
        done = node.do(ev.FetchFailed(fetch.name, "Unrecoverable", "too few cells"))
        assert tells(done, 1) == [Rejected("Unrecoverable", "too few cells")]
        assert fetch.name not in node.lifecycle.slots
        assert fetch.name not in node.files

    def test_a_damaged_segment_stays_for_another_try(self) -> None:
        """What could not be repaired now may be later, from nodes that are away."""
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node))
        done = node.do(ev.FetchFailed(fetch.name, "Unrecoverable", "no parity"))
        assert not only(ev.Release, done)
        assert node.use(fetch.name) is Use.SEALED
        assert tells(done, 1) == [Rejected("Unrecoverable", "no parity")]

    @pytest.mark.parametrize("present", [True, False])
    @pytest.mark.parametrize("success", [True, False])
    def test_a_drop_waits_for_the_fetch_that_writes(self, present: bool, success: bool) -> None:
        node = self.held()
        (fetch,) = only(ev.Fetch, self.resume(node, rank=0 if present else 1))
        assert fetch.present is present
        done = node.order(Drop(snapshot(1, 4), "for the story"))
        assert ev.Release(fetch.name) not in done
        assert not any(h.extents for h in reports(node.order(WhoAreYou()), Hello)[0].holdings)
        failed = ev.FetchFailed(fetch.name, "Gone", "dropped")
        done = node.do(ev.Fetched(fetch.name, 1, 1) if success else failed)
        assert ev.Release(fetch.name) in done
        assert [m.kind for m in tells(done, 1) if isinstance(m, Rejected)] == ["Gone"]
        assert node.lifecycle.problems == []

    def test_a_segment_that_is_still_looked_at_is_waited_for(self) -> None:
        """The old trainer died with its last segment sealed but not yet told."""
        node = Node()
        node.train()
        id = snapshot(1, 4)
        name = node.ticket(id)
        node.do(ev.LocalGone(1, "its process ended", dead=True))
        assert node.use(name) is Use.CHECKING
        assert not only(ev.Fetch, self.resume(node, conn=2))
        (fetch,) = only(ev.Fetch, node.do(ev.SegmentChecked(name, sidecar_of(id))))
        assert (fetch.name, fetch.present) == (name, True)

    def test_a_slot_that_is_being_let_go_is_not_waited_for(self) -> None:
        node = self.held()
        node.holding_back = True
        node.order(Drop(snapshot(1, 4), "for the story"))
        (fetch,) = only(ev.Fetch, self.resume(node))
        assert not fetch.present
        assert fetch.name not in node.held_back

    def test_no_memory_to_fetch_into(self) -> None:
        segments = ((f"{JOB}/segment-1.safetensors", sidecar_of(snapshot(1, 4))),)
        node = Node(ev.Adopted(segments=segments, records=(record_of(1),)), limit_bytes=15)
        (answer,) = tells_kind(self.resume(node, rank=1), 1, Rejected)
        assert answer.kind == "MemoryTooSmall"
        assert "--memory-limit 20" in answer.reason


def tells_kind(actions: list[ev.Action], conn: int, kind: type[T]) -> list[T]:
    return [message for message in tells(actions, conn) if isinstance(message, kind)]


class TestTheOrderContract:
    def test_the_record_is_kept_before_anybody_is_granted_a_life(self) -> None:
        node = Node()
        node.attach(1)
        node.say(1, AskResume())
        done = node.grant(2, snapshot(1, 4))
        assert tells(done, 1) == [Granted(2, snapshot(1, 4), "why")]
        assert before(
            done,
            lambda a: isinstance(a, ev.KeepRecord),
            lambda a: isinstance(a, ev.Tell),
        )
        assert before(
            done,
            lambda a: isinstance(a, ev.KeepManifest),
            lambda a: isinstance(a, ev.Tell),
        )

    def test_the_manifest_is_kept_before_anything_is_encoded(self) -> None:
        node = Node()
        node.train()
        node.seal(snapshot(1, 4))
        done = node.order(Protect(manifest_of(snapshot(1, 4)), {}))
        assert before(
            done,
            lambda a: isinstance(a, ev.KeepManifest),
            lambda a: isinstance(a, ev.Encode),
        )

    def test_an_older_record_does_not_replace_a_newer_one(self) -> None:
        node = Node(ev.Adopted(records=(record_of(3),)))
        assert not only(ev.KeepRecord, node.order(Record(record_of(2))))
        assert only(ev.KeepRecord, node.order(Record(record_of(4))))

    def test_of_two_records_of_a_life_that_of_the_later_term_counts(self) -> None:
        """The coordinator before granted it too, and died before rank 0 could hear of it."""
        first, second = (structs.replace(record_of(3), term=term) for term in (4, 5))
        node = Node(ev.Adopted(records=(first,)))
        assert only(ev.KeepRecord, node.order(Record(second)))
        assert not only(ev.KeepRecord, node.order(Record(first)))


class TestTalk:
    def test_the_first_word_must_be_attach(self) -> None:
        (answer,) = tells(Node().say(7, Progress(3)), 7)
        assert isinstance(answer, Rejected)

    def test_progress_is_passed_on_at_a_bounded_rate(self) -> None:
        node = Node()
        node.train()
        assert not reports(node.say(1, Progress(1)), RankReport)
        node.now += 1
        (report,) = reports(node.say(1, Progress(2)), RankReport)
        assert report.state.step == 2

    def test_those_who_wait_are_told_for_what(self) -> None:
        node = Node()
        node.attach(1)
        node.say(1, AskResume())
        done = node.order(ResumeWaits(JOB, "r1", "node b"))
        assert tells(done, 1) == [Waiting("node b")]
        done = node.order(ResumeWaits(JOB, "r1", "all is lost", final=True))
        assert tells(done, 1) == [Rejected("ResumeImpossible", "all is lost")]
        assert not reports(node.order(Welcome(0.5, CELL_BYTES)), AskResumeFor)

    def test_without_a_coordinator_the_trainer_is_told_so(self) -> None:
        node = Node()
        node.attach(1)
        node.say(1, AskResume())
        node.do(ev.Disconnected())
        node.now = node.lifecycle.next_deadline() + 3
        done = node.lifecycle.tick(node.now)
        (waiting,) = tells_kind(done, 1, Waiting)
        assert "tcp://c:1" in waiting.reason
        assert not reports(done, Beat)

    def test_the_resume_of_rank_0_is_passed_on(self) -> None:
        node = Node()
        node.attach(1)
        node.grant()
        assert reports(node.say(1, Resumed(1, 0)), LifeResumed) == [LifeResumed(JOB, 1, 0)]

    def test_an_old_answer_said_again_is_not_taken_for_the_new_one(self) -> None:
        """A new coordinator repeats the grant of a life whose snapshot could not be loaded."""
        node = Node()
        node.attach(1)
        node.say(1, AskResume((snapshot(1, 8),)))
        assert not tells_kind(node.grant(2, snapshot(1, 8)), 1, Granted)
        assert tells_kind(node.grant(3, snapshot(1, 4)), 1, Granted)

    def test_a_waiting_launcher_is_called_and_forgotten(self) -> None:
        node = Node()
        done = node.do(ev.FromLocal(5, WaitForWork(JOB)))
        assert reports(done, LauncherWaiting) == [LauncherWaiting(JOB, True)]
        assert tells(node.order(Activate(JOB)), 5) == [Work(JOB)]
        assert tells(node.order(Activate(JOB)), 5) == []

    def test_a_launcher_that_gives_up_waits_no_more(self) -> None:
        node = Node()
        node.do(ev.FromLocal(5, WaitForWork(JOB)))
        done = node.do(ev.LocalGone(5, "its process ended", dead=True))
        assert reports(done, LauncherWaiting) == [LauncherWaiting(JOB, False)]

    def test_an_agent_that_is_not_wanted_says_why(self) -> None:
        node = Node()
        node.order(Dismiss("node id 'a' is in use"))
        assert node.lifecycle.dismissed == "node id 'a' is in use"


class TestHowMuchMemory:
    """Two mirrored nodes: a slot has 10 bytes here, and its parity takes three cells, 12 bytes."""

    def open(
        self, keep: int, limit_bytes: int = 1 << 20, quota_bytes: int | None = None
    ) -> tuple[Node, list[object]]:
        """A trainer that opens its layout, and what it is told."""
        node = Node(limit_bytes=limit_bytes)
        node.attach(1, keep=keep)
        node.grant(quota_bytes=quota_bytes)
        return node, tells(node.say(1, OpenLayout(1, SIZE_BYTES)), 1)

    @pytest.mark.parametrize("keep", [1, 2, 4])
    def test_a_slot_and_a_generation_of_parity_for_each_that_is_kept_and_one_more(
        self, keep: int
    ) -> None:
        needed = (keep + 1) * (SIZE_BYTES + 12)
        node, (answer,) = self.open(keep, limit_bytes=needed)
        assert isinstance(answer, LayoutOpened)
        assert len(node.slots()) == keep + 1
        _, (refusal,) = self.open(keep, limit_bytes=needed - 1)
        assert isinstance(refusal, Rejected)
        assert refusal.kind == "MemoryTooSmall"
        assert f"{keep + 1} slots of {SIZE_BYTES} bytes" in refusal.reason
        assert f"{keep + 1} generations of parity" in refusal.reason
        assert f"--memory-limit {needed}" in refusal.reason
        assert (f"Checkpointer(keep={keep})" in refusal.reason) == (keep > 1)

    def test_the_coordinator_hears_how_many_are_kept(self) -> None:
        node = Node()
        node.attach(1, keep=3)
        (report,) = reports(node.actions, RankReport)
        assert report.state.keep == 3

    def test_a_job_over_its_quota_is_refused_with_the_numbers_and_the_ways_out(self) -> None:
        needed = 3 * (SIZE_BYTES + 12)
        _, (answer,) = self.open(2, quota_bytes=needed)
        assert isinstance(answer, LayoutOpened)
        node, (refusal,) = self.open(2, quota_bytes=needed - 1)
        assert isinstance(refusal, Rejected)
        assert refusal.kind == "MemoryTooSmall"
        for part in (
            f"needs {needed} bytes on node a",
            "30 in 3 slots and 3 generations of parity of 12 bytes",
            f"its quota is {needed - 1}",
            "Checkpointer(keep=...)",
            f"ckptd quota {JOB} {needed}",
            "--job-quota",
        ):
            assert part in refusal.reason
        assert node.slots() == {}

    def test_the_quota_counts_all_ranks_of_the_node(self) -> None:
        node = Node()
        node.attach(1)
        node.attach(2, rank=1)
        node.grant(quota_bytes=2 * 2 * (SIZE_BYTES + 10))
        assert isinstance(tells(node.say(1, OpenLayout(1, SIZE_BYTES)), 1)[0], LayoutOpened)
        assert isinstance(tells(node.say(2, OpenLayout(1, SIZE_BYTES)), 2)[0], LayoutOpened)
        node.attach(3, rank=2)
        node.grant(quota_bytes=2 * 2 * (SIZE_BYTES + 10))
        assert isinstance(tells(node.say(3, OpenLayout(1, SIZE_BYTES)), 3)[0], Rejected)

    def test_segments_of_ranks_that_moved_are_not_in_the_way_of_what_is_kept(self) -> None:
        """The node has a segment of its own and one of another rank, both of a snapshot that stays.

        The one rank that runs here still gets room for two more that are kept, and for the next.
        """
        id = snapshot(1, 5)
        found = tuple((f"{JOB}/old-{r}.safetensors", sidecar_of(id, r)) for r in (0, 1))
        node = Node(ev.Adopted(found, (), (manifest_of(id),), (record_of(1),)))
        node.attach(1, keep=3, round_="r2")
        node.grant(2, id, round_="r2")
        node.say(1, OpenLayout(2, SIZE_BYTES))
        own = [slot for slot in node.lifecycle.slots.values() if slot.owner == 1]
        assert len(own) == 3

    def test_ranks_of_a_node_count_the_same_of_what_a_snapshot_will_leave(self) -> None:
        """Else one of them would have no slot for a second snapshot that is kept beside it."""
        id = snapshot(1, 5)
        found = tuple((f"{JOB}/old-{r}.safetensors", sidecar_of(id, r)) for r in (0, 1))
        node = Node(ev.Adopted(found, (), (manifest_of(id),), (record_of(1),)))
        for rank in (0, 1):
            node.attach(1 + rank, rank, keep=2, round_="r2")
        node.grant(2, id, round_="r2")
        for conn in (1, 2):
            node.say(conn, OpenLayout(2, SIZE_BYTES))
        assert Counter(node.slots().values()) == {Use.SEALED: 2, Use.FREE: 4}
        for conn in (1, 2):
            assert sum(slot.owner == conn for slot in node.lifecycle.slots.values()) == 2

    def test_a_node_that_the_job_has_left_gives_back_what_no_snapshot_needs(self) -> None:
        node = Node()
        node.train()
        name = node.seal(snapshot(1, 5))
        node.do(ev.LocalGone(1, "it died", dead=True))
        assert len(node.slots()) == 2
        node.order(Record(JobRecord(JOB, 2, {"b": "tb", "c": "tc"}, ())))
        assert node.slots() == {name: Use.SEALED}
        node.order(Drop(snapshot(1, 5), "it is over"))
        assert node.slots() == {}
