"""Spare memory: segments whose node is lost are rebuilt on others if nobody takes its place."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from ckptd.agent import events as ev
from ckptd.agent.state import Use
from ckptd.coordinator import spare
from ckptd.coordinator.decider import Settings
from ckptd.coordinator.view import status
from ckptd.manifest import Extent, Group, JobManifest, Member
from ckptd.wire import (
    Beat,
    Commit,
    Drop,
    Forget,
    Grant,
    Holds,
    OpenLayout,
    Protect,
    Rebuild,
    RebuildFailed,
    Rejected,
    Restore,
)

from .fakes import JOB, SIZE_BYTES, Cluster, snapshot
from .test_again import happened, orders
from .test_coordinator import trained
from .test_lifecycle import (
    Node,
    manifest_of,
    only,
    reports,
    sidecar_of,
    source_of,
    tells_kind,
)

SETTINGS = Settings(cell_bytes=4, rebuild_after_s=10.0)


def manifest_with(*members: tuple[str, dict[int, int]]) -> JobManifest:
    """One group; each member with its ranks and their sizes."""
    found = tuple(
        Member(node, tuple(Extent(rank, size) for rank, size in sizes.items()))
        for node, sizes in members
    )
    return JobManifest(snapshot(1, 4), 9, (Group(found, 2),), "zfec", 4, ())


class TestPlacement:
    MANIFEST = manifest_with(("a", {0: 10}), ("b", {1: 10}), ("c", {2: 10, 3: 10}), ("d", {4: 10}))

    def place(self, rooms: dict[str, int], *lost: int, failed: Any = ()) -> spare.Placement:
        return spare.place(self.MANIFEST, {}, lost or (2, 3), rooms, failed)

    def test_they_are_spread_over_the_group_the_most_room_first(self) -> None:
        assert self.place({"a": 30, "b": 40, "d": 5}).nodes == {2: "b", 3: "a"}

    def test_never_more_than_fits(self) -> None:
        found = self.place({"a": 19, "b": 9, "d": 9})
        assert (found.nodes, found.left) == ({2: "a"}, (Extent(3, 10),))

    def test_the_largest_has_the_first_choice(self) -> None:
        manifest = manifest_with(("a", {0: 1}), ("b", {1: 1}), ("c", {2: 5, 3: 9}))
        found = spare.place(manifest, {}, (2, 3), {"a": 9, "b": 5})
        assert found == spare.Placement({3: "a", 2: "b"}, ())

    def test_another_group_s_node_is_the_second_choice(self) -> None:
        other = Group((Member("x", (Extent(8, 10),)),), 0)
        manifest = msgspec.structs.replace(self.MANIFEST, groups=(*self.MANIFEST.groups, other))
        found = spare.place(manifest, {}, (2, 3), {"a": 10, "x": 100})
        assert found.nodes == {2: "a", 3: "x"}

    def test_one_outside_all_groups_that_has_room_for_all_is_the_first(self) -> None:
        assert self.place({"a": 50, "z": 20}).nodes == {2: "z", 3: "z"}
        assert self.place({"a": 50, "z": 19}).nodes[2] == "a"

    def test_who_has_failed_is_not_asked_again(self) -> None:
        found = self.place({"a": 50, "b": 20}, 2, failed={(2, "a")})
        assert found.nodes == {2: "b"}
        assert self.place({"a": 50}, 2, failed={(2, "a")}).left == (Extent(2, 10),)


def bereft(*spares: str, settings: Settings = SETTINGS, room: int = SIZE_BYTES) -> Any:
    """2+2 nodes with a protected snapshot, of which c is lost; nobody takes its place."""
    cluster = Cluster(*"abcd", *spares, settings=settings)
    cluster.pass_time(settings.lease_s)
    cluster.start(*"abcd")
    id = cluster.tickets("a")[0]
    cluster.protect(id)
    cluster.stop_job()
    have_room(cluster, **dict.fromkeys("abd", room))
    cluster.destroy("c")
    return cluster, id


def have_room(cluster: Cluster, **rooms: int) -> None:
    """Beats go on saying how much is spare."""
    for name, room in rooms.items():
        cluster.nodes[name].spare_bytes = room
        cluster.say(name, Beat(name, "1", 0, (), spare_bytes=room))


def rebuilds(cluster: Cluster) -> dict[int, str]:
    return {
        order.rank: name
        for name in cluster.nodes
        for order in cluster.inbox(name)
        if isinstance(order, Rebuild)
    }


def no_room(cluster: Cluster) -> list[str]:
    (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
    return job["no_room"]


class TestTheCoordinator:
    def test_after_a_while_the_survivor_with_the_most_room_is_told(self) -> None:
        cluster, id = bereft()
        have_room(cluster, b=2 * SIZE_BYTES)
        cluster.pass_time(9.0 - SETTINGS.beat_s)
        assert not rebuilds(cluster)
        cluster.pass_time(2.0)
        assert rebuilds(cluster) == {2: "b"}
        (order,) = cluster.told("b", Rebuild)
        assert isinstance(order, Rebuild)
        assert order.id == id
        assert order.source.ranks == {0: ("a",), 1: ("b",), 3: ("d",)}
        assert order.source.parity == ("a", "b", "d")
        assert order.source.cells.keys() == {"a", "b", "d"}
        cluster.pass_time(20.0)
        assert len(cluster.told("b", Rebuild)) == 1
        cluster.bring("b", id, 2)
        cluster.pass_time(0.5)
        (event,) = happened(cluster, "rebuilt")
        assert (event["node"], event["rank"]) == ("b", 2)
        cluster.attach("r2", "a", "b", "d")
        cluster.pass_time(20.0)
        assert len(cluster.told("b", Rebuild)) == 1

    def test_a_later_resume_finds_it_there(self) -> None:
        cluster, id = bereft()
        cluster.pass_time(12.0)
        (name,) = rebuilds(cluster).values()
        cluster.bring(name, id, 2)
        cluster.add("g")
        cluster.attach("r2", "a", "b", "g", "d")
        grant = cluster.ask()
        assert grant is not None
        assert grant.source is not None
        assert (grant.id, grant.source.ranks[2]) == (id, (name,))

    def test_zero_means_never(self) -> None:
        cluster, _ = bereft(settings=Settings(cell_bytes=4, rebuild_after_s=0.0))
        cluster.pass_time(200.0)
        assert not rebuilds(cluster)
        assert not no_room(cluster)

    def test_a_node_that_is_back_in_time_is_all_that_is_needed(self) -> None:
        cluster, _ = bereft()
        cluster.pass_time(5.0)
        cluster.nodes["c"].up = True
        cluster.restart_agent("c")
        cluster.pass_time(30.0)
        assert not rebuilds(cluster)

    def test_who_comes_to_resume_fetches_what_is_lost(self) -> None:
        cluster, _ = bereft("g")
        cluster.pass_time(5.0)
        cluster.attach("r2", "a", "b", "g", "d")
        cluster.pass_time(30.0)
        assert cluster.ask() is not None
        cluster.pass_time(30.0)
        assert not rebuilds(cluster)

    def test_no_room_is_said_with_its_numbers_and_the_way_out(self) -> None:
        cluster, id = bereft(room=SIZE_BYTES - 4)
        have_room(cluster, b=SIZE_BYTES - 3)
        cluster.pass_time(12.0)
        assert not rebuilds(cluster)
        (text,) = no_room(cluster)
        assert f"rank 2 of {id} is lost and cannot be rebuilt: it needs 10 bytes" in text
        assert "spare are a 6, b 7, d 6" in text
        assert f"the agent on b with --memory-limit {(1 << 30) + 3} or more" in text
        assert "or bring a node" in text
        assert [e["text"] for e in happened(cluster, "no_room_to_rebuild")] == [text]
        cluster.pass_time(30.0)
        assert len(happened(cluster, "no_room_to_rebuild")) == 1
        cluster.add("g")
        have_room(cluster, g=SIZE_BYTES)
        cluster.pass_time(1.0)
        assert rebuilds(cluster) == {2: "g"}
        cluster.bring("g", id, 2)
        cluster.pass_time(1.0)
        assert not no_room(cluster)

    def test_a_spare_node_takes_the_place_too(self) -> None:
        cluster, id = bereft("g")
        have_room(cluster, g=5 * SIZE_BYTES, a=50 * SIZE_BYTES)
        cluster.pass_time(12.0)
        assert rebuilds(cluster) == {2: "g"}
        cluster.bring("g", id, 2)
        cluster.pass_time(0.5)
        assert orders(cluster, "g")[-1].manifest.edition == 1

    def test_one_that_cannot_is_replaced_by_another(self) -> None:
        cluster, id = bereft()
        have_room(cluster, b=2 * SIZE_BYTES)
        cluster.pass_time(12.0)
        cluster.say("b", RebuildFailed(id, 2, "a cell is damaged"))
        cluster.pass_time(1.0)
        assert cluster.told("a", Rebuild)
        assert not cluster.told("d", Rebuild)
        cluster.say("a", RebuildFailed(id, 2, "here, too"))
        cluster.pass_time(1.0)
        assert cluster.told("d", Rebuild)
        cluster.say("d", RebuildFailed(id, 2, "and here"))
        cluster.pass_time(1.0)
        (text,) = no_room(cluster)
        assert "(here, too; a cell is damaged; and here)" in text

    @pytest.mark.parametrize("how", ["lost", "restarted"])
    def test_one_that_is_gone_in_the_middle_is_not_waited_for(self, how: str) -> None:
        cluster, _ = bereft()
        have_room(cluster, b=2 * SIZE_BYTES)
        cluster.pass_time(12.0)
        before = len(cluster.told("b", Rebuild))
        if how == "lost":
            cluster.destroy("b")
            cluster.pass_time(12.0)
            assert set(rebuilds(cluster)) == {1, 2}
            assert rebuilds(cluster)[2] in "abd"
            assert any(cluster.told(name, Rebuild) for name in "ad")
        else:
            cluster.restart_agent("b")
            have_room(cluster, b=2 * SIZE_BYTES)
            cluster.pass_time(1.0)
            assert len(cluster.told("b", Rebuild)) == before + 1

    def test_what_is_being_trained_with_all_its_nodes_is_left_alone(self) -> None:
        cluster = trained(*"abcd")
        cluster.protect(cluster.tickets("a")[0])
        cluster.pass_time(100.0)
        assert not rebuilds(cluster)


def replace_parity(grant: Grant) -> Grant:
    """Without parity: one slot's worth of memory is what counts here."""
    return msgspec.structs.replace(grant, parity_fraction=0.0)


class TestTheAgent:
    def rebuild(self, node: Node, rank: int = 1) -> list[ev.Action]:
        id = snapshot(1, 4)
        return node.order(Rebuild(id, rank, source_of(id, {0: ("b",)})))

    def test_it_fetches_the_segment_and_holds_it(self) -> None:
        node = Node()
        (fetch,) = only(ev.Fetch, self.rebuild(node))
        assert (fetch.rank, fetch.size_bytes, fetch.present) == (1, SIZE_BYTES, False)
        assert node.lifecycle.spare_bytes == (1 << 20) - SIZE_BYTES
        (held,) = reports(node.do(ev.Fetched(fetch.name, 1, 2)), Holds)
        assert held.holding.extents == (Extent(1, SIZE_BYTES),)
        assert held.holding.manifest is not None
        again = self.rebuild(node)
        assert not only(ev.Fetch, again)
        assert reports(again, Holds), "the order was repeated, so it is said again"

    def test_the_order_repeated_while_it_comes_changes_nothing(self) -> None:
        node = Node()
        self.rebuild(node)
        assert self.rebuild(node) == []

    @pytest.mark.parametrize("order", ["commit", "drop", "forget"])
    def test_it_is_given_back_when_nobody_needs_it(self, order: str) -> None:
        node = Node()
        id = snapshot(1, 4)
        (fetch,) = only(ev.Fetch, self.rebuild(node))
        node.do(ev.Fetched(fetch.name, 3, 0))
        message = {
            "commit": Commit(snapshot(2, 9), (id,)),
            "drop": Drop(id, "gone"),
            "forget": Forget(JOB, "finished"),
        }[order]
        node.order(message)
        assert node.lifecycle.slots == {}
        assert node.lifecycle.spare_bytes == 1 << 20

    def test_a_drop_in_the_middle_waits_for_the_fetch(self) -> None:
        node = Node()
        (fetch,) = only(ev.Fetch, self.rebuild(node))
        node.order(Drop(snapshot(1, 4), "gone"))
        assert node.use(fetch.name) is Use.FETCHING
        node.do(ev.Fetched(fetch.name, 3, 0))
        assert node.lifecycle.slots == {}

    def test_a_failure_is_said_and_leaves_no_file(self) -> None:
        node = Node()
        (fetch,) = only(ev.Fetch, self.rebuild(node))
        done = node.do(ev.FetchFailed(fetch.name, "Unrecoverable", "too few cells"))
        assert reports(done, RebuildFailed) == [RebuildFailed(snapshot(1, 4), 1, "too few cells")]
        assert node.lifecycle.slots == {}

    def test_no_more_than_the_spare_memory(self) -> None:
        node = Node(limit_bytes=100)
        node.lifecycle.identity = replace(
            node.lifecycle.identity, spare_memory_bytes=SIZE_BYTES + 5
        )
        assert node.lifecycle.spare_bytes == SIZE_BYTES + 5
        assert only(ev.Fetch, self.rebuild(node, rank=1))
        assert node.lifecycle.spare_bytes == 5
        (failed,) = reports(self.rebuild(node, rank=0), RebuildFailed)
        assert failed.reason == "a has 5 spare bytes and rank 0 needs 10"

    def test_no_more_than_the_limit(self) -> None:
        node = Node(limit_bytes=SIZE_BYTES - 1)
        assert reports(self.rebuild(node), RebuildFailed)

    @pytest.mark.parametrize("for_what", ["a layout", "parity", "a restore"])
    def test_it_gives_way_to_what_the_node_itself_needs(self, for_what: str) -> None:
        """What was rebuilt can be rebuilt once more; a trainer without memory cannot go on."""
        id = snapshot(1, 4)
        own = (f"{JOB}/segment-0.safetensors", sidecar_of(id))
        node = Node(ev.Adopted(segments=(own,)), limit_bytes=4 * SIZE_BYTES)
        (fetch,) = only(ev.Fetch, self.rebuild(node))
        node.do(ev.Fetched(fetch.name, 3, 0))
        if for_what == "a layout":
            node.attach(1)
            node.grant()
            node.lifecycle.grants[JOB] = replace_parity(node.lifecycle.grants[JOB])
            done = node.say(1, OpenLayout(1, SIZE_BYTES + SIZE_BYTES // 2))
            assert not tells_kind(done, 1, Rejected)
        elif for_what == "parity":
            node.lifecycle.identity = replace(node.lifecycle.identity, memory_limit_bytes=25)
            done = node.order(Protect(manifest_of(id), {}))
            assert only(ev.Encode, done)
        else:
            node.lifecycle.identity = replace(node.lifecycle.identity, memory_limit_bytes=25)
            other = snapshot(1, 5)
            node.attach(1)
            node.grant(2, other)
            done = node.say(1, Restore(2, other, 1))
            assert only(ev.Fetch, done)
        assert ev.Release(fetch.name) in done
        assert reports(done, Holds)[0].holding.extents == (Extent(0, SIZE_BYTES),)
        assert all(slot.rank != 1 or slot.id != id for slot in node.lifecycle.slots.values())

    def test_the_heartbeat_says_how_much_is_spare(self) -> None:
        node = Node(limit_bytes=3 * SIZE_BYTES)
        self.rebuild(node)
        (said,) = reports(node.lifecycle.tick(node.now + 1.0), Beat)
        assert said.spare_bytes == 2 * SIZE_BYTES
