"""Protected again: what the deciders do about parity that is lost while the data is there."""

from typing import Any

import msgspec
import pytest

from ckptd.agent import events as ev
from ckptd.agent.state import Use
from ckptd.coordinator import again
from ckptd.coordinator.state import State
from ckptd.coordinator.view import status
from ckptd.ids import SnapshotId
from ckptd.manifest import Extent, Group, JobManifest, Member
from ckptd.wire import (
    Beat,
    Commit,
    Drop,
    Holding,
    Holds,
    Protect,
    Rebuild,
    Recoding,
    ResumeWaits,
    SnapshotFailed,
)

from .fakes import JOB, SIZE_BYTES, Cluster, snapshot
from .test_coordinator import states, trained
from .test_lifecycle import Node, manifest_of, only, reports, sidecar_of
from .world import World


def group_of(*members: Member, parity_shards: int = 1) -> JobManifest:
    return JobManifest(snapshot(1, 4), 9, (Group(members, parity_shards),), "zfec", 4, ())


def member(node: str, *ranks: int, captured_on: str | None = None) -> Member:
    return Member(node, tuple(Extent(rank, SIZE_BYTES) for rank in ranks), captured_on)


def holds(*ranks: int, parity: bool = False, place: tuple[int, int] | None = None) -> Holding:
    """`place`: for which it has parity, where that matters."""
    extents = tuple(Extent(rank, SIZE_BYTES) for rank in ranks)
    return Holding(snapshot(1, 4), 9, extents, parity or place is not None, place=place)


THREE = group_of(member("a", 0), member("b", 1), member("c", 2, 3))
WHOLE = {"a": holds(0, parity=True), "b": holds(1, parity=True)}


class TestThePlan:
    def test_nothing_lacks_nothing_happens(self) -> None:
        found = again.plan(THREE, {**WHOLE, "c": holds(2, 3, parity=True)})
        assert found == again.Plan({}, (), ())

    def test_a_node_that_has_its_data_back_makes_its_parity(self) -> None:
        assert again.plan(THREE, {**WHOLE, "c": holds(2, 3)}) == again.Plan({}, (0,), ())

    def test_a_newcomer_with_all_its_data_takes_a_lost_node_s_place(self) -> None:
        found = again.plan(THREE, {**WHOLE, "z": holds(2, 3, 7)})
        assert found == again.Plan({(0, 2): "z"}, (0,), ())

    def test_a_part_of_the_data_is_waited_for(self) -> None:
        found = again.plan(THREE, {**WHOLE, "z": holds(2)})
        assert (found.taken, found.groups) == ({}, ())
        assert found.hindrances == ("rank 3 of c must be brought back first",)

    @pytest.mark.parametrize(
        "there",
        [
            {"a": holds(0, 2, 3, parity=True), "b": holds(1, parity=True)},
            {**WHOLE, "y": holds(2), "z": holds(3)},
        ],
        ids=["on a survivor", "on two newcomers"],
    )
    def test_data_that_is_on_no_one_newcomer_is_said_to_be_so(self, there: Any) -> None:
        (why,) = again.plan(THREE, there).hindrances
        assert "ranks 2, 3 of c, which is lost, are now on" in why
        assert again.plan(THREE, there).homeless == (member("c", 2, 3),)
        assert again.plan(THREE, there).groups == ()

    def test_two_lost_two_newcomers_each_with_one_s_data(self) -> None:
        wide = group_of(*(member(n, i) for i, n in enumerate("abcd")), parity_shards=2)
        left = {n: holds(i, parity=True) for i, n in enumerate("ab")}
        found = again.plan(wide, {**left, "y": holds(2, 3), "z": holds(3)})
        assert found.taken == {(0, 2): "y", (0, 3): "z"}

    def test_one_of_two_is_enough_to_begin(self) -> None:
        """The data of the other place is on a survivor: that one's parity cannot be made."""
        wide = group_of(*(member(n, i) for i, n in enumerate("abcd")), parity_shards=2)
        found = again.plan(
            wide, {"a": holds(0, 3, parity=True), "b": holds(1, parity=True), "z": holds(2)}
        )
        assert (found.taken, found.groups) == ({(0, 2): "z"}, (0,))
        assert len(found.hindrances) == 1

    def test_who_holds_the_parity_of_another_place_takes_none(self) -> None:
        found = again.plan(THREE, {**WHOLE, "z": holds(2, 3, place=(0, 1))})
        assert not found.taken

    @pytest.mark.parametrize("name", ["c", "y"], ids=["the first", "an heir before"])
    def test_who_had_it_takes_its_place_back_while_the_heir_has_no_parity(self, name: str) -> None:
        heir = group_of(member("a", 0), member("b", 1), member("z", 2, captured_on="c"))
        back = {name: holds(2, place=(0, 2))}
        assert again.plan(heir, {**WHOLE, "z": holds(2), **back}).taken == {(0, 2): name}
        done = {**WHOLE, "z": holds(2, place=(0, 2)), **back}
        assert again.plan(heir, done) == again.Plan({}, (), ())

    @pytest.mark.parametrize("left", [(2,), ()], ids=["segments elsewhere", "segments lost"])
    def test_who_has_its_parity_takes_it_back_wherever_the_segments_are(
        self, left: tuple[int, ...]
    ) -> None:
        """The ranks were numbered anew while it had the place."""
        heir = group_of(member("a", 0), member("b", 1), member("z", 2, captured_on="c"))
        found = again.plan(heir, {**WHOLE, "z": holds(*left), "c": holds(0, place=(0, 2))})
        assert found.taken == {(0, 2): "c"}
        assert found.groups == ((0,) if left else ()), "others are to hear of it"

    def test_who_had_it_first_and_has_the_parity_of_another_since_does_not(self) -> None:
        lost = group_of(member("a", 0), member("b", 1), member("z", 2, captured_on="c"))
        assert not again.plan(lost, {**WHOLE, "c": holds(2, place=(0, 1))}).taken

    def test_the_next_edition_changes_only_names(self) -> None:
        once = THREE.with_nodes({(0, 2): "z"})
        twice = once.with_nodes({(0, 2): "y"})
        assert (once.edition, twice.edition) == (1, 2)
        assert twice.groups[0].members[2] == member("y", 2, 3, captured_on="c")
        assert twice.groups[0].members[2].origin == "c"
        assert twice.stripe_map(0).stripes == THREE.stripe_map(0).stripes
        assert (twice.place_of("c"), twice.place_of("y")) == (None, (0, 2))


def protected(*spares: str) -> tuple[Cluster, SnapshotId]:
    """Four nodes, 2+2, with a protected snapshot; the trainers are stopped."""
    cluster = trained(*"abcd", spares=spares)
    id = cluster.tickets("a")[0]
    cluster.protect(id)
    cluster.stop_job()
    return cluster, id


def manifest_now(cluster: Cluster, id: SnapshotId) -> JobManifest:
    manifest = cluster.coordinator.jobs[JOB].snapshots[id].manifest
    assert manifest is not None
    return manifest


def orders(cluster: Cluster, name: str) -> list[Protect]:
    return [message for message in cluster.inbox(name) if isinstance(message, Protect)]


def shown(cluster: Cluster) -> dict[str, Any]:
    (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
    return job["snapshots"][0]


def happened(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    events = status(cluster.coordinator, cluster.now, 0.0)["events"]
    return [event for event in events if event["kind"] == kind]


class TestTheCoordinator:
    def test_a_newcomer_with_the_image_gets_the_place_and_makes_the_parity(self) -> None:
        cluster, id = protected("g")
        cluster.destroy("c")
        assert shown(cluster)["may_lose"] == 1
        cluster.attach("r2", "a", "b", "g", "d")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == id
        assert not manifest_now(cluster, id).edition, "its data is not there yet"
        before = len(orders(cluster, "a"))
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        manifest = manifest_now(cluster, id)
        assert manifest.edition == 1
        assert [m.node for m in manifest.groups[0].members] == ["a", "b", "g", "d"]
        (order,) = orders(cluster, "g")
        assert order.manifest == manifest
        assert order.ranks == {0: ("a",), 1: ("b",), 2: ("g",), 3: ("d",)}
        assert order.cells.keys() == {"a", "b", "d", "g"}
        assert orders(cluster, "a")[before:] == [order], "all learn of the edition"
        cluster.pass_time(3.0)
        assert len(orders(cluster, "g")) == 1
        cluster.encode("g", id)
        cluster.pass_time(0.5)
        assert shown(cluster)["may_lose"] == 2
        assert shown(cluster)["protected_again"] is None
        assert Commit(id, ()) in cluster.told("g", Commit)
        (event,) = happened(cluster, "protected_again")
        assert event["seconds"] == pytest.approx(3.5 + 0.5, abs=0.6)
        assert [e["lost"] for e in happened(cluster, "place_taken")] == ["c"]

    def test_a_new_coordinator_has_a_newcomer_s_parity_made_with_the_others_help(self) -> None:
        """It waits as long as data is damaged: a failure would end it, and the place was taken."""
        cluster, id = protected("g")
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "g", "d")
        assert cluster.ask() is not None
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        assert states(cluster)[id.life, id.step] is State.SEALED, "all parity was never seen here"
        (order,) = orders(cluster, "g")
        assert order.ranks == {0: ("a",), 1: ("b",), 2: ("g",), 3: ("d",)}

    def test_a_new_coordinator_hears_again_that_what_was_sealed_cannot_be_protected(self) -> None:
        """The first report was lost, and whoever makes lost parity waits for damaged cells."""
        cluster = trained(*"abcd")
        cluster.make_protected()
        id = cluster.tickets("a")[-1]
        cluster.seal_all(id)
        for name in "abc":
            cluster.encode(name, id)
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        assert not orders(cluster, "d")[-1].ranks
        cluster.say("d", SnapshotFailed(id, "dropped", "cell 0 of rank 1 from b is damaged"))
        assert (id.life, id.step) not in states(cluster)

    @pytest.mark.parametrize("room", [SIZE_BYTES, SIZE_BYTES - 1])
    def test_what_renumbered_ranks_have_brought_to_survivors_is_copied_to_the_newcomer(
        self, room: int
    ) -> None:
        cluster, id = protected("g")
        cluster.nodes["g"].spare_bytes = room
        cluster.destroy("c")
        cluster.attach("r2", "g", "a", "b", "d")
        grant = cluster.ask()
        assert grant is not None
        for name, rank in (("g", 0), ("a", 1), ("b", 2)):
            cluster.bring(name, id, rank)
        cluster.pass_time(1.0)
        assert not cluster.told("g", Rebuild), "ranks that load need the memory first"
        cluster.begin(grant, free_slots=0)
        cluster.pass_time(1.0)
        if room < SIZE_BYTES:
            assert not cluster.told("g", Rebuild)
            assert "on no one node" in shown(cluster)["reason"]
            return
        (order,) = cluster.told("g", Rebuild)
        assert isinstance(order, Rebuild)
        assert (order.id, order.rank, order.source.ranks[2]) == (id, 2, ("b",))
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        assert [m.node for m in manifest_now(cluster, id).groups[0].members] == [*"abgd"]
        cluster.encode("g", id)
        cluster.pass_time(0.5)
        assert shown(cluster)["may_lose"] == 2
        assert len(happened(cluster, "protected_again")) == 1

    def test_status_says_how_far_it_is(self) -> None:
        cluster, id = protected("g")
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.ask()
        assert "rank 2 of c must be brought back first" in shown(cluster)["reason"]
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        assert shown(cluster)["protected_again"]["making"] == [
            {"node": "g", "done": 0.0, "left_s": None}
        ]
        cluster.say("g", Beat("g", "1", 0, (), recoding=(Recoding(id, 100, 100, 40, 8.0),)))
        found = shown(cluster)["protected_again"]
        assert found["making"] == [{"node": "g", "done": 0.4, "left_s": 12.0}]
        assert (found["nodes"], found["without"]) == (4, ["g"])
        cluster.say("g", SnapshotFailed(id, "dropped", "no memory for parity"))
        assert "g cannot make it: no memory for parity" in shown(cluster)["reason"]
        assert states(cluster)[1, 2] is State.PROTECTED

    def test_the_same_node_with_empty_memory_needs_no_edition(self) -> None:
        cluster, id = protected()
        cluster.destroy("c")
        cluster.add("c", token="new memory")
        cluster.attach("r2", *"abcd")
        cluster.ask()
        cluster.bring("c", id, 2)
        cluster.pass_time(0.5)
        assert manifest_now(cluster, id).edition == 0
        assert orders(cluster, "c")[-1].ranks
        cluster.encode("c", id)
        cluster.pass_time(0.5)
        assert len(happened(cluster, "protected_again")) == 1

    def test_two_at_once(self) -> None:
        cluster, id = protected("g", "h")
        cluster.destroy("b", "c")
        cluster.attach("r2", "a", "g", "h", "d")
        cluster.ask()
        cluster.bring("h", id, 2)
        cluster.bring("g", id, 1)
        cluster.pass_time(0.5)
        manifest = manifest_now(cluster, id)
        assert [m.node for m in manifest.groups[0].members] == ["a", "g", "h", "d"]
        for name in "gh":
            assert orders(cluster, name)[-1].manifest == manifest
            cluster.encode(name, id)
        cluster.pass_time(0.5)
        assert len(happened(cluster, "protected_again")) == 1
        assert shown(cluster)["may_lose"] == 2

    def test_a_newcomer_that_is_lost_in_the_middle_is_replaced(self) -> None:
        cluster, id = protected("g", "h")
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.ask()
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        cluster.destroy("g")
        cluster.stop_job()
        cluster.attach("r3", "a", "b", "h", "d")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == id
        cluster.bring("h", id, 2)
        cluster.pass_time(0.5)
        manifest = manifest_now(cluster, id)
        assert manifest.edition == 2
        assert manifest.groups[0].members[2] == member("h", 2, captured_on="c")
        cluster.encode("h", id)
        cluster.pass_time(0.5)
        assert len(happened(cluster, "protected_again")) == 1

    @pytest.mark.parametrize("order", ["gabd", "abdg"])
    @pytest.mark.parametrize("heard", [True, False])
    def test_a_new_coordinator_learns_of_the_edition_and_goes_on(
        self, order: str, heard: bool
    ) -> None:
        """Whether the survivors had heard of it or not."""
        cluster, id = protected("g")
        before = manifest_now(cluster, id)
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.ask()
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        edition = manifest_now(cluster, id)
        for name in "abd":
            held = cluster.nodes[name].holdings[id]
            assert held.manifest == edition
            if not heard:
                first = Holding(id, 4, held.extents, held.parity, before, held.place)
                cluster.nodes[name].holdings[id] = first
        cluster.nodes["g"].inbox.clear()
        cluster.restart_coordinator(*order)
        cluster.pass_time(cluster.settings.lease_s + 0.5)
        assert manifest_now(cluster, id) == edition
        assert orders(cluster, "g")
        cluster.encode("g", id)
        cluster.pass_time(0.5)
        assert states(cluster)[1, 2] is State.PROTECTED
        assert len(happened(cluster, "protected_again")) == 1

    def test_an_heir_that_was_lost_and_comes_back_takes_its_place_back(self) -> None:
        """What it made is of use, though it did not have the place first."""
        cluster, id = protected("g", "h")
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.ask()
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        cluster.encode("g", id)
        cluster.destroy("g")
        old = dict(cluster.nodes["g"].holdings)
        cluster.attach("r3", "a", "b", "h", "d")
        cluster.ask()
        cluster.bring("h", id, 2)
        cluster.pass_time(0.5)
        assert manifest_now(cluster, id).place_of("h") is not None
        cluster.nodes["g"].up = True
        cluster.nodes["g"].holdings = old
        cluster.restart_agent("g")
        cluster.pass_time(0.5)
        assert manifest_now(cluster, id).place_of("g") is not None
        assert shown(cluster)["may_lose"] == 2

    def test_the_lost_node_that_comes_back_with_its_memory_takes_its_place_back(self) -> None:
        cluster, id = protected("g")
        cluster.destroy("c")
        old = dict(cluster.nodes["c"].holdings)
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.ask()
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        cluster.nodes["c"].up = True
        cluster.nodes["c"].holdings = old
        cluster.restart_agent("c")
        cluster.pass_time(0.5)
        assert manifest_now(cluster, id).place_of("c") is not None
        assert shown(cluster)["may_lose"] == 2
        assert id not in [drop.id for drop in cluster.told("c", Drop) if isinstance(drop, Drop)]

    @pytest.mark.parametrize("resumed", [True, False])
    def test_nothing_is_lost_as_long_as_a_node_is_away_whose_place_was_taken(
        self, resumed: bool
    ) -> None:
        """A new coordinator has never heard of it, and two of four have come back empty."""
        cluster, id = protected("g")
        cluster.destroy("d")
        if resumed:
            cluster.attach("r2", *"abcg")
            cluster.ask()
        cluster.bring("g", id, 3)
        for name in "bc":
            cluster.nodes[name].holdings, cluster.nodes[name].token = {}, "emptied"
        cluster.restart_coordinator(*"abcg")
        cluster.pass_time(cluster.settings.lease_s + 1)
        assert manifest_now(cluster, id).place_of("g") == (0, 3)
        cluster.nodes["d"].up = True
        cluster.restart_agent("d")
        cluster.pass_time(1)
        cluster.stop_job()
        cluster.attach("r3", *"abcd")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == id

    def test_a_new_coordinator_refuses_nobody_before_an_heir_may_have_been_heard(self) -> None:
        """The node that knew of it has come back empty, and the other had lost its place before."""
        cluster = trained("a", "b", spares=("s",))
        id = cluster.tickets("a")[0]
        cluster.protect(id)
        cluster.stop_job()
        cluster.destroy("b")
        cluster.bring("s", id, 1)
        cluster.pass_time(0.5)
        assert manifest_now(cluster, id).place_of("s") == (0, 1)
        cluster.encode("s", id)
        lost = cluster.nodes["a"]
        lost.holdings, lost.record, lost.token = {}, None, "emptied"
        back = cluster.nodes["b"]
        back.up = True
        back.holdings[id] = msgspec.structs.replace(back.holdings[id], parity=False)
        cluster.restart_coordinator("a", "b")
        cluster.attach("r2", "a", "b")
        assert cluster.ask() is None
        (said,) = cluster.told("a", ResumeWaits)
        assert not said.final  # type: ignore[attr-defined]
        cluster.hello("s")
        assert [grant.id for grant in cluster.granted("a")][-1] == id

    def test_the_lost_node_that_comes_back_too_late_does_no_harm(self) -> None:
        cluster, id = protected("g")
        cluster.destroy("c")
        old = dict(cluster.nodes["c"].holdings)
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.ask()
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        cluster.encode("g", id)
        cluster.pass_time(0.5)
        cluster.nodes["c"].up = True
        cluster.nodes["c"].holdings = old
        cluster.restart_agent("c")
        cluster.pass_time(0.5)
        assert manifest_now(cluster, id).place_of("g") == (0, 2)
        cluster.destroy("a", "g")
        cluster.stop_job()
        cluster.attach("r3", *"bcd")
        grant = cluster.ask()
        assert grant is not None
        assert grant.id == id

    def test_orders_are_repeated_to_one_that_says_hello_again(self) -> None:
        cluster, id = protected("g")
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.ask()
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        cluster.nodes["g"].inbox.clear()
        cluster.restart_agent("g", ranks=True)
        cluster.pass_time(0.5)
        assert orders(cluster, "g")
        assert not cluster.told("g", Commit), "that would stop what it is about"
        cluster.nodes["g"].inbox.clear()
        cluster.restart_agent("a", ranks=True)
        cluster.pass_time(0.5)
        assert orders(cluster, "g"), "a helper may have another address"

    def test_data_on_a_survivor_is_said_and_nothing_is_ordered(self) -> None:
        """Ranks were numbered anew: the lost one went to a node that has a place of its own."""
        cluster, id = protected("g")
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "d", "g")
        cluster.ask()
        cluster.bring("d", id, 2)
        cluster.bring("g", id, 3)
        before = len(orders(cluster, "a"))
        cluster.pass_time(2.0)
        assert len(orders(cluster, "a")) == before
        assert "rank 2 of c, which is lost, is now on d" in shown(cluster)["reason"]

    def test_what_a_newer_one_has_replaced_is_left_alone(self) -> None:
        cluster, id = protected("g")
        cluster.destroy("c")
        cluster.attach("r2", "a", "b", "g", "d")
        grant = cluster.ask()
        assert grant is not None
        cluster.bring("g", id, 2)
        cluster.begin(grant)
        newer = cluster.tickets("a")[-1]
        cluster.protect(newer)
        cluster.pass_time(0.5)
        assert states(cluster)[2, newer.step] is State.PROTECTED
        assert (id.life, id.step) not in states(cluster)
        assert not happened(cluster, "protected_again")

    def test_damaged_parity_that_was_deleted_is_made_anew(self) -> None:
        cluster, id = protected()
        held = cluster.nodes["b"].holdings[id]
        cluster.nodes["b"].holdings[id] = Holding(id, 4, held.extents, False, held.manifest)
        cluster.restart_agent("b")
        cluster.pass_time(0.5)
        assert orders(cluster, "b")[-1].ranks


class TestTheAgent:
    RANKS = {0: ("a",), 1: ("b",)}  # noqa: RUF012 (never changed)

    def holder(self, limit_bytes: int = 1 << 20) -> tuple[Node, SnapshotId]:
        """A node with its segment and no parity."""
        id = snapshot(1, 4)
        adopted = ev.Adopted(segments=((f"{JOB}/segment-0.safetensors", sidecar_of(id)),))
        return Node(adopted, limit_bytes), id

    def test_it_has_its_rows_made_by_others_and_holds_them_then(self) -> None:
        node, id = self.holder()
        (run,) = only(ev.Encode, node.order(Protect(manifest_of(id), {"b": "b:1"}, self.RANKS)))
        assert run.ranks == self.RANKS
        assert node.use(run.name) is Use.ENCODING
        (held,) = reports(node.do(ev.Encoded(id)), Holds)
        assert held.holding.parity

    def test_how_far_it_has_come_is_in_the_heartbeat_until_it_is_done(self) -> None:
        node, id = self.holder()
        node.order(Protect(manifest_of(id), {}, self.RANKS))
        node.do(ev.RecodeMoved(id, 1, 3, 0.5))

        def beat() -> tuple[Recoding, ...]:
            node.now += 1.0
            (said,) = reports(node.lifecycle.tick(node.now), Beat)
            return said.recoding

        assert beat() == (Recoding(id, 12, 3, 1, 0.5),)
        node.do(ev.Encoded(id))
        assert beat() == ()
        node.do(ev.RecodeMoved(id, 3, 3, 0.6))
        assert beat() == (), "news that came late"

    def test_the_order_repeated_begins_nothing_new(self) -> None:
        node, id = self.holder()
        (first,) = only(ev.Encode, node.order(Protect(manifest_of(id), {}, self.RANKS)))
        (second,) = only(ev.Encode, node.order(Protect(manifest_of(id), {}, self.RANKS)))
        assert second.name == first.name
        node.do(ev.Encoded(id))
        done = node.order(Protect(manifest_of(id), {}, self.RANKS))
        assert reports(done, Holds)[0].holding.parity
        assert only(ev.Encode, done)[0].serve_only

    def test_a_drop_in_the_middle_stops_it_quietly(self) -> None:
        node, id = self.holder()
        (run,) = only(ev.Encode, node.order(Protect(manifest_of(id), {}, self.RANKS)))
        assert ev.StopEncode(id) in node.order(Drop(id, "a newer one is protected"))
        done = node.do(ev.EncodeFailed(id, ""))
        assert ev.Release(run.name) in done
        assert not reports(done, SnapshotFailed)
        assert node.lifecycle.problems == []

    def test_the_higher_edition_wins(self) -> None:
        node, id = self.holder()
        old = manifest_of(id)
        new = old.with_nodes({(0, 1): "z"})
        assert ev.KeepManifest(new) in node.order(Protect(new, {}, self.RANKS))
        done = node.order(Protect(old, {}, self.RANKS))
        assert not only(ev.KeepManifest, done)
        assert not only(ev.Encode, done)
        assert reports(done, Holds)[0].holding.manifest == new, "so that its sender learns of it"

    def test_an_edition_that_cannot_be_stored_leaves_the_one_before(self) -> None:
        node, id = self.holder()
        old = manifest_of(id)
        new = old.with_nodes({(0, 1): "z"})
        node.order(Protect(old, {}, self.RANKS))
        node.order(Protect(new, {}, self.RANKS))
        node.do(ev.ManifestNotKept(id, "no space left"))
        assert node.lifecycle.manifests[id] == old
        assert ev.KeepManifest(new) in node.order(Protect(new, {}, self.RANKS)), "another try"

    def test_no_memory_for_it_is_said(self) -> None:
        node, id = self.holder(limit_bytes=15)
        (failed,) = reports(node.order(Protect(manifest_of(id), {}, self.RANKS)), SnapshotFailed)
        assert "--memory-limit" in failed.reason


def test_in_whole_clusters_places_are_taken_and_parity_comes_back() -> None:
    """The deciders together, through losses: it is not only the stories above that do it."""
    kinds = set()
    for seed in range(12):
        world = World(seed)
        world.clock.run_until(world.clock.now + 3)
        world.destroy_node()
        world.clock.run_until(world.clock.now + 6)
        assert world.coordinator is not None
        kinds |= {event.kind for event in world.coordinator.events}
    assert "place_taken" in kinds
