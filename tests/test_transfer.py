"""Cells between nodes: several stores, servers and encoders in one process, over loopback."""

import errno
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, combinations
from pathlib import Path

import pytest

from ckptd.agent import cells
from ckptd.agent.again import RecodeRun
from ckptd.agent.cells import Peers
from ckptd.agent.decode import CellDecoder
from ckptd.agent.fetch import SegmentFetch
from ckptd.agent.protect import EncodeRun
from ckptd.agent.reader import CellReader
from ckptd.agent.scrub import Scrubber, ScrubStats
from ckptd.agent.store import Store, read_segment_sidecar, verify_cells
from ckptd.agent.turns import Pace
from ckptd.cli.local_cluster import wait_until
from ckptd.digest import cell_count, digest
from ckptd.errors import CorruptData, Gone, ProtocolError, Unrecoverable
from ckptd.ids import SnapshotId
from ckptd.keys import ClusterKey
from ckptd.manifest import NodeManifest, SegmentDigests
from ckptd.segment import ParitySidecar, sidecar_path
from ckptd.wire import (
    GetCell,
    GetDecoded,
    GetEncoded,
    GetManifest,
    GetParity,
    GetRecoded,
    Payload,
    PeerRequest,
    Source,
)

from .nodes import (
    CELL_BYTES,
    DEADLINE_S,
    ID,
    KEY,
    Build,
    Cluster,
    FakeServer,
    Node,
    clusters,
    connect,
    flip,
    flip_parity,
    forge_parity,
    framed,
    places_of,
    shake_hands,
    wait_for,
)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    with clusters(tmp_path) as make:
        yield make


class TestLosses:
    @pytest.mark.parametrize(
        ("ranks", "parity_shards"),
        [([1, 2], 1), ([2, 1, 1], 1), ([1, 0, 2], 2), ([1, 2, 1, 1], 2), ([1, 1, 0, 2, 1, 1], 2)],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else str(value),
    )
    def test_every_loss_that_parity_can_bear(
        self, ranks: list[int], parity_shards: int, build: Build
    ) -> None:
        """Whichever nodes are gone, each of their segments comes back byte for byte."""
        cluster = build(ranks, parity_shards, seed=len(ranks))
        cluster.protect()
        newcomer = cluster.newcomer()
        sets = chain(*(combinations(cluster.nodes, count) for count in range(1, parity_shards + 1)))
        for number, lost in enumerate(sets):
            survivor = next(node for node in cluster.nodes if node not in lost)
            # A survivor has a part of what is needed itself, a newcomer nothing.
            where = survivor if number % 2 else newcomer
            for node in lost:
                for rank in cluster.ranks[node.name]:
                    outcome = cluster.fetch(where, rank, cluster.source(lost))
                    assert (outcome.fetched_cells, outcome.rebuilt_cells) == (
                        0,
                        cell_count(len(cluster.segments[rank]), CELL_BYTES),
                    )

    @pytest.mark.parametrize("seed", range(3))
    def test_random_clusters(self, seed: int, build: Build) -> None:
        rng = random.Random(seed)
        count = rng.randint(3, 6)
        ranks = [rng.randint(0, 2) for _ in range(count - 1)] + [1]
        parity_shards = rng.randint(1, count - 1)
        cluster = build(ranks, parity_shards, seed)
        cluster.protect()
        lost = tuple(rng.sample(cluster.nodes, parity_shards))
        where = cluster.newcomer()
        for rank in cluster.segments:
            cluster.fetch(where, rank, cluster.source(lost))

    def test_one_loss_too_many_is_named(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        lost = tuple(cluster.nodes[:2])
        for node in lost:
            (rank,) = cluster.ranks[node.name]
            with pytest.raises(
                Unrecoverable, match=rf"^cell \d+ of rank {rank} of job/2.40 .* of the 2 cells that"
            ):
                cluster.fetch(cluster.nodes[2], rank, cluster.source(lost))

    def test_nodes_that_died_unnoticed(self, build: Build) -> None:
        """They are still listed; nobody answers at their addresses."""
        cluster = build([1, 1, 1, 1], 2)
        cluster.protect()
        lost = tuple(cluster.nodes[1:3])
        for node in lost:
            node.close()
        for node in lost:
            (rank,) = cluster.ranks[node.name]
            outcome = cluster.fetch(cluster.newcomer(), rank, cluster.source(lost, listed=True))
            assert outcome.rebuilt_cells == cell_count(len(cluster.segments[rank]), CELL_BYTES)

    def test_a_parity_node_whose_address_is_unknown(self, build: Build) -> None:
        """What this node keeps itself must not be taken for that node's."""
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        lost = cluster.nodes[0]
        (rank,) = cluster.ranks[lost.name]
        source = cluster.source((lost,))
        del source.cells[cluster.nodes[1].name]
        with pytest.raises(Unrecoverable, match="b is not there"):
            cluster.fetch(cluster.nodes[2], rank, source)

    def test_one_of_two_segments_is_gone_from_its_own_node(self, build: Build) -> None:
        """What the node itself knows is no longer all: its group has the digests of both."""
        cluster = build([2, 2, 2], 1)
        cluster.protect()
        node = cluster.nodes[0]
        lost, _ = cluster.ranks[node.name]
        name = f"job/segment-{lost}.safetensors"
        node.store.release(name)
        node.store.delete(name)
        source = cluster.source()
        del source.ranks[lost]
        for asked in cluster.nodes:
            outcome = cluster.fetch(asked, lost, source)
            assert outcome.rebuilt_cells == cell_count(len(cluster.segments[lost]), CELL_BYTES)

    def test_a_segment_that_its_holder_did_not_have_when_it_was_protected(
        self, build: Build
    ) -> None:
        """Manifests kept since then know less than the holder, which is asked all the same."""
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        owner, holder, other = cluster.nodes
        (rank,) = cluster.ranks[owner.name]
        holder.seal(rank, cluster.segments[rank], 3)
        source = cluster.source((owner,))
        source.ranks[rank] = (holder.name,)
        for keeper in (holder, other):
            keeper.store.path(f"job/{ID.life}.{ID.step}.of.{owner.name}").unlink()
        assert cluster.fetch(other, rank, source).rebuilt_cells == 0

    def test_only_sealed_segments_come_from_their_node(self, build: Build) -> None:
        cluster = build([1, 1], 1)
        whole = cluster.source()
        source = Source(None, whole.ranks, whole.sizes, (), whole.cells)
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        outcome = cluster.fetch(cluster.nodes[1], rank, source)
        assert outcome.rebuilt_cells == 0
        flip(node.segment(rank), CELL_BYTES)
        with pytest.raises(Unrecoverable, match=r"is damaged\), and there is no parity yet"):
            cluster.fetch(cluster.nodes[1], rank, source)

    def test_a_cell_that_is_gone_from_a_short_segment(self, build: Build) -> None:
        """Its digests are known only to nodes that are gone, too."""
        cluster = build([1, 1], 1)
        (rank,) = cluster.ranks["a"]
        source = cluster.source((cluster.nodes[0],))
        with pytest.raises(Unrecoverable, match=f"the digests of rank {rank} of .* are lost"):
            cluster.fetch(cluster.nodes[1], rank, source)


class TestTheWorkIsShared:
    """A node that lost its memory gets its cells, and not k times as much to decode them from."""

    def lose_one(self, build: Build) -> tuple[Cluster, Node, int]:
        cluster = build([1, 1, 1, 1, 1, 1], 2, seed=5)
        cluster.protect()
        lost = cluster.nodes[2]
        (rank,) = cluster.ranks[lost.name]
        lost.close()
        return cluster, lost, rank

    def test_by_all_survivors(self, build: Build) -> None:
        cluster, lost, _ = self.lose_one(build)
        newcomer = cluster.newcomer()
        came = count_received(newcomer.peers)
        (rank,) = cluster.ranks[lost.name]
        cluster.fetch(newcomer, rank, cluster.source((lost,)))
        assert sum(came) == len(cluster.segments[rank])
        asked = {node.name: len(node.decoded) for node in cluster.nodes if node is not lost}
        cells_ = cell_count(len(cluster.segments[rank]), CELL_BYTES)
        assert sum(asked.values()) == cells_
        assert max(asked.values()) <= -(-cells_ // len(asked)) + 1

    def test_whatever_the_helpers_do_the_right_bytes_come_out(
        self, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cluster, lost, rank = self.lose_one(build)

        def lie(request: GetDecoded) -> memoryview:
            return memoryview(bytearray(CELL_BYTES))

        def refuse(request: GetDecoded) -> memoryview:
            raise Gone("I would rather not")

        for node, answer in zip(cluster.nodes[3:], (lie, refuse, lie), strict=True):
            monkeypatch.setattr(node.server, "_decoded", answer)
        cluster.fetch(cluster.newcomer(), rank, cluster.source((lost,)))

    def test_a_helper_that_lacks_what_it_needs_says_so(self, build: Build) -> None:
        cluster, _, rank = self.lose_one(build)
        helper = cluster.nodes[0]
        into = memoryview(bytearray(CELL_BYTES))
        for request, match in (
            (GetDecoded(ID, rank, 0, {}, (), {}), "cannot be rebuilt"),
            (GetDecoded(ID, rank, 10_000, {}, (), {}), "has no cell 10000"),
            (GetDecoded(ID, 99, 0, {}, (), {}), "has no rank 99"),
            (GetDecoded(SnapshotId("job", 9, 9), rank, 0, {}, (), {}), "no manifest of"),
        ):
            with pytest.raises(Gone, match=match):
                cluster.nodes[1].peers.fetch(helper.address, request, into)


class TestProtectedAgain:
    """A node that has taken a lost one's place gets its parity from the others' data."""

    def lose(self, cluster: Cluster, *lost: Node) -> None:
        for node in lost:
            node.close()

    def take_place(self, cluster: Cluster, lost: Node, name: str) -> Node:
        """A node of this name gets the image of a lost one; the next edition says so."""
        place = cluster.nodes.index(lost)
        newcomer = cluster.newcomer(name)
        gone = tuple(n for n in cluster.nodes if n.name not in cluster.addresses)
        source = cluster.source((*gone, lost))
        for rank in cluster.ranks[lost.name]:
            file = f"job/segment-{rank}.safetensors"
            newcomer.store.allocate(file, len(cluster.segments[rank]))
            path = newcomer.store.path(file)
            outcome = SegmentFetch(newcomer.reader, ID, rank, source).run(path, present=False)
            newcomer.store.publish_segment(path, outcome.sidecar)
        cluster.ranks[name] = cluster.ranks[lost.name]
        cluster.nodes[place] = newcomer
        if name != lost.name:
            cluster.manifest = cluster.manifest.with_nodes({(0, place): name})
            (cluster.group,) = cluster.manifest.groups
        cluster.addresses = {node.name: node.address for node in cluster.nodes if node not in gone}
        return newcomer

    def recode(
        self, cluster: Cluster, node: Node, addresses: dict[str, str] | None = None
    ) -> EncodeRun:
        return cluster.encode(node, addresses, partial(RecodeRun, cluster.source().ranks))

    def parity_of(self, node: Node) -> tuple[bytes, ParitySidecar]:
        with node.store.parity(ID) as parity:
            return parity.path.read_bytes(), parity.sidecar

    @pytest.mark.parametrize(
        ("ranks", "parity_shards"),
        [([1, 1], 1), ([2, 1, 1], 1), ([1, 2, 1, 1], 2), ([1, 1, 2, 1, 1, 1], 2)],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else str(value),
    )
    def test_the_same_parity_byte_for_byte_and_one_cell_for_each(
        self, ranks: list[int], parity_shards: int, build: Build
    ) -> None:
        cluster = build(ranks, parity_shards, seed=len(ranks))
        cluster.protect()
        lost = cluster.nodes[1]
        before = self.parity_of(lost)
        self.lose(cluster, lost)
        newcomer = self.take_place(cluster, lost, "z")
        came = count_received(newcomer.peers)
        self.recode(cluster, newcomer)
        cluster.wait_encoded(1)
        assert self.parity_of(newcomer) == before
        assert sum(came) == sum(before[1].lengths)

    def test_by_all_survivors_in_turn(self, build: Build) -> None:
        cluster = build([4, 4, 4, 4, 4], 2, seed=3)
        cluster.protect()
        lost = cluster.nodes[0]
        self.lose(cluster, lost)
        newcomer = self.take_place(cluster, lost, "z")
        for node in cluster.nodes:
            node.decoded.clear()
        self.recode(cluster, newcomer)
        cluster.wait_encoded(1)
        asked = [sum(isinstance(r, GetRecoded) for r in n.decoded) for n in cluster.nodes[1:]]
        assert sum(asked) == len(cluster.manifest.stripe_map(0).parity_of(0))
        assert min(asked) >= 1

    def test_two_at_once_and_then_two_others_are_lost(self, build: Build) -> None:
        """What the newcomers made is as good as what was lost, and so are their digests."""
        cluster = build([1, 2, 1, 1], 2, seed=7)
        cluster.protect()
        old = list(cluster.nodes)
        self.lose(cluster, *old[:2])
        for node in old[:2]:
            del cluster.addresses[node.name]
        newcomers = [
            self.take_place(cluster, node, name)
            for node, name in zip(old[:2], ("y", "z"), strict=True)
        ]
        for node in newcomers:
            self.recode(cluster, node)
        cluster.wait_encoded(2)
        self.lose(cluster, *old[2:])
        where = cluster.newcomer("w")
        for rank in [*cluster.ranks["c"], *cluster.ranks["d"]]:
            outcome = cluster.fetch(where, rank, cluster.source(tuple(old[2:])))
            assert outcome.fetched_cells == 0
        # The digests of what the first newcomer holds are known to the second, too.
        (rank, *_) = cluster.ranks["y"]
        own = CellDecoder(newcomers[1].reader, ID, cluster.source((newcomers[0],)))
        assert own.segment(rank)[0].size_bytes == len(cluster.segments[rank])

    def test_the_same_node_that_has_lost_all_it_had(self, build: Build) -> None:
        """Under its old name it holds one rank's segment already when it asks for the other's."""
        cluster = build([1, 2, 1], 1, seed=4)
        cluster.protect()
        lost = cluster.nodes[1]
        before = self.parity_of(lost)
        self.lose(cluster, lost)
        newcomer = self.take_place(cluster, lost, "b")
        self.recode(cluster, newcomer)
        cluster.wait_encoded(1)
        assert cluster.manifest.edition == 0
        assert self.parity_of(newcomer) == before

    def test_whatever_the_helpers_do_the_right_bytes_come_out(
        self, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cluster = build([2, 2, 2, 2], 1, seed=6)
        cluster.protect()
        lost = cluster.nodes[0]
        before = self.parity_of(lost)
        self.lose(cluster, lost)
        newcomer = self.take_place(cluster, lost, "z")

        def too_short(request: GetRecoded) -> memoryview:
            return memoryview(bytearray(1))

        def refuse(request: GetRecoded) -> memoryview:
            raise Gone("I would rather not")

        for node, answer in zip(cluster.nodes[1:], (too_short, refuse, refuse), strict=True):
            monkeypatch.setattr(node.server, "_decoded", answer)
        self.recode(cluster, newcomer)
        cluster.wait_encoded(1)
        assert self.parity_of(newcomer) == before

    def test_damaged_data_makes_no_parity(self, build: Build) -> None:
        """It waits until the cell is as it was; a wrong byte is never coded."""
        cluster = build([1, 1, 1], 1, seed=8)
        cluster.protect()
        lost, other = cluster.nodes[0], cluster.nodes[1]
        before = self.parity_of(lost)
        self.lose(cluster, lost)
        newcomer = self.take_place(cluster, lost, "z")
        (rank,) = cluster.ranks[other.name]
        flip(other.segment(rank), CELL_BYTES // 2)
        run = self.recode(cluster, newcomer)
        wait_for(lambda: any(isinstance(r, GetRecoded) for r in cluster.nodes[2].decoded))
        assert cluster.outcomes.empty()
        flip(other.segment(rank), CELL_BYTES // 2)
        run.update(cluster.manifest, cluster.addresses, {})
        cluster.wait_encoded(1)
        assert self.parity_of(newcomer) == before

    def test_one_that_is_stopped_ends_without_parity(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1, seed=9)
        cluster.protect()
        lost = cluster.nodes[0]
        self.lose(cluster, lost)
        newcomer = self.take_place(cluster, lost, "z")
        helper = cluster.nodes[1]
        run = self.recode(cluster, newcomer, {newcomer.name: newcomer.address})
        run.stop()
        assert cluster.outcomes.get(timeout=DEADLINE_S) == (newcomer.name, "")
        with pytest.raises(Gone, match="no parity"), newcomer.store.parity(ID):
            pass
        assert not any(isinstance(request, GetRecoded) for request in helper.decoded)

    def test_a_row_that_is_none_is_refused(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        a, b, _ = cluster.nodes
        into = memoryview(bytearray(CELL_BYTES))
        for group, stripe, row in ((1, 0, 0), (0, 999, 0), (0, 0, 1)):
            with pytest.raises(Gone, match="has no row"):
                b.peers.fetch(a.address, GetRecoded(ID, group, stripe, row, {}, {}), into)

    def test_names_of_the_next_edition_reach_a_run_that_is_under_way(self, build: Build) -> None:
        """Its encoder has died; the node that takes its place computes the rows for it."""
        cluster = build([1, 1, 1, 1], 2, seed=11)
        for node in cluster.nodes[:3]:
            cluster.encode(node, {n.name: n.address for n in cluster.nodes[:3]})
        lost = cluster.nodes[3]
        (rank,) = cluster.ranks[lost.name]
        raw = cluster.segments[rank]
        self.lose(cluster, lost)
        newcomer = cluster.newcomer("z")
        newcomer.seal(rank, raw, len(cluster.segments))
        cluster.nodes[3], cluster.ranks["z"] = newcomer, [rank]
        cluster.manifest = cluster.manifest.with_nodes({(0, 3): "z"})
        cluster.addresses = {node.name: node.address for node in cluster.nodes}
        for node in cluster.nodes[:3]:
            assert node.run is not None
            node.run.update(cluster.manifest, cluster.addresses, {})
        self.recode(cluster, newcomer)
        cluster.wait_encoded(4)
        assert cluster.source().parity == ("a", "b", "c", "z")


def count_received(peers: Peers) -> list[int]:
    """The bytes of every payload that comes through `peers` from now on."""
    came: list[int] = []
    fetch = peers.fetch

    def counting(*args, **kwargs) -> tuple[int, int]:
        length, value = fetch(*args, **kwargs)
        came.append(length)
        return length, value

    peers.fetch = counting  # type: ignore[method-assign]
    return came


class TestFlippedBits:
    def test_in_a_data_cell(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        flip(node.segment(rank), CELL_BYTES + 9)
        outcome = cluster.fetch(cluster.newcomer(), rank, cluster.source())
        assert outcome.rebuilt_cells == 1
        assert outcome.fetched_cells == cell_count(len(cluster.segments[rank]), CELL_BYTES) - 1

    def test_in_the_nodes_own_cells_they_are_mended_in_place(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        path = node.segment(rank)
        fetch = SegmentFetch(node.reader, ID, rank, cluster.source())
        assert fetch.run(path, present=True).rebuilt_cells == 0
        for place in (3, len(cluster.segments[rank]) - 1):
            flip(path, place)
        assert fetch.run(path, present=True).rebuilt_cells == 2
        assert path.read_bytes() == cluster.segments[rank]
        verify_cells(path, read_segment_sidecar(path))

    def test_in_the_nodes_own_digests_they_are_written_anew(self, build: Build) -> None:
        """A process of an old life, whose slot had the same name, has written its own there."""
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        path = node.segment(rank)
        good = sidecar_path(path).read_bytes()
        for bad in (b"of another", None):
            sidecar_path(path).unlink() if bad is None else sidecar_path(path).write_bytes(bad)
            SegmentFetch(node.reader, ID, rank, cluster.source()).run(path, present=True)
            assert sidecar_path(path).read_bytes() == good

    def test_a_mending_that_fails_makes_nothing_worse(self, build: Build) -> None:
        """The other cells, the first among them, can still be had from here."""
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        path = node.segment(rank)
        flip(path, CELL_BYTES)
        before = path.read_bytes()
        alone = cluster.source(tuple(cluster.nodes[1:]))
        with pytest.raises(Unrecoverable):
            SegmentFetch(node.reader, ID, rank, alone).run(path, present=True)
        assert path.read_bytes() == before
        again = SegmentFetch(node.reader, ID, rank, cluster.source())
        assert again.run(path, present=True).rebuilt_cells == 1
        assert path.read_bytes() == cluster.segments[rank]

    def test_in_a_parity_cell_another_row_serves(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2)
        cluster.protect()
        lost = cluster.nodes[0]
        (rank,) = cluster.ranks[lost.name]
        flip_parity(cluster, places_of(cluster, lost, rank, 0)[0], row=0)
        cluster.fetch(cluster.nodes[1], rank, cluster.source((lost,)))

    def test_in_a_data_cell_and_its_only_parity(self, build: Build) -> None:
        """Never a wrong byte: it says what is damaged."""
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        stripe, _ = places_of(cluster, node, rank, 1)
        flip(node.segment(rank), CELL_BYTES)
        flip_parity(cluster, stripe, row=0)
        with pytest.raises(Unrecoverable, match=r"is damaged.*parity row 0 .* is damaged"):
            cluster.fetch(cluster.newcomer(), rank, cluster.source())

    def test_parity_of_other_data(self, build: Build) -> None:
        """At rest with the right digest, but made of other bytes: the cell's own digest tells."""
        cluster = build([1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        forge_parity(cluster.nodes[1])
        with pytest.raises(CorruptData, match="does not have its digest"):
            cluster.fetch(cluster.newcomer(), rank, cluster.source((node,)))

    def test_parity_of_other_data_while_there_is_better(self, build: Build) -> None:
        """One row was computed wrongly, and has its digest: the other rows give the right bytes."""
        cluster = build([1, 1, 1, 1, 1], 3, seed=8)
        cluster.protect()
        lost = cluster.nodes[4]
        (rank,) = cluster.ranks[lost.name]
        for keeper in cluster.nodes[1:3]:
            forge_parity(keeper)
        for where in (cluster.newcomer(), cluster.nodes[0], cluster.nodes[1]):
            cluster.fetch(where, rank, cluster.source((lost,)))


class TestScrubbing:
    """Cells at rest are looked at, and mended through their stripe."""

    def scrubber(self, cluster: Cluster, node: Node, parity: bool = True) -> Scrubber:
        self.said: list[str] = []

        def decoder_of(id: SnapshotId) -> CellDecoder | None:
            return CellDecoder(node.reader, ID, cluster.source()) if parity else None

        found = Scrubber(node.reader, 0, decoder_of, lambda _, text: self.said.append(text), 10.0)
        found.round(0.0)  # it sees the snapshot for the first time, and leaves it alone
        assert found.stats.checked_bytes == 0
        return found

    def test_all_cells_are_looked_at_once_they_have_been_at_rest(self, build: Build) -> None:
        cluster = build([2, 1, 1, 1], 2)
        cluster.protect()
        node = cluster.nodes[0]
        scrubber = self.scrubber(cluster, node)
        scrubber.round(9.0)
        assert scrubber.stats.checked_bytes == 0
        scrubber.round(11.0)
        own = sum(len(cluster.segments[rank]) for rank in cluster.ranks[node.name])
        with node.store.parity(ID) as parity:
            kept = sum(parity.sidecar.lengths)
        assert scrubber.stats == ScrubStats(own + kept, 0, 0)
        assert self.said == []

    def test_flipped_bits_are_mended_in_data_and_in_parity(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        for place in (3, CELL_BYTES, len(cluster.segments[rank]) - 1):
            flip(node.segment(rank), place)
        before = node.parity.read_bytes()
        flip(node.parity, 1)
        scrubber = self.scrubber(cluster, node)
        scrubber.round(11.0)
        assert node.segment(rank).read_bytes() == cluster.segments[rank]
        assert node.parity.read_bytes() == before
        assert (scrubber.stats.damaged_cells, scrubber.stats.mended_cells) == (4, 4)
        assert len([text for text in self.said if "has been mended" in text]) == 4
        scrubber.round(12.0)
        assert scrubber.stats.damaged_cells == 4

    def test_what_cannot_be_mended_is_said_once(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        flip(node.segment(rank), CELL_BYTES)
        damaged = node.segment(rank).read_bytes()
        scrubber = self.scrubber(cluster, node, parity=False)
        for now in (11.0, 12.0):
            scrubber.round(now)
        assert self.said == [
            f"cell 1 of rank {rank} of {ID} is damaged and could not be mended: there is no "
            "parity of it"
        ]
        assert node.segment(rank).read_bytes() == damaged

    def test_parity_of_other_data_is_found_though_its_digest_is_right(
        self, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckptd.agent.scrub._ENCODED_ANEW_EVERY", 1)
        cluster = build([1, 1], 1)
        cluster.protect()
        keeper = cluster.nodes[1]
        forge_parity(keeper)
        scrubber = self.scrubber(cluster, keeper)
        scrubber.round(11.0)
        assert "is not what its data gives" in self.said[0]
        assert scrubber.stats.mended_cells == 0

    def test_a_segment_that_is_being_mended_already_is_left_alone(self, build: Build) -> None:
        cluster = build([1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        (rank,) = cluster.ranks[node.name]
        with node.segment(rank).open("r+b") as file:
            file.write(bytes(8))
        scrubber = self.scrubber(cluster, node)
        scrubber.round(11.0)
        assert node.segment(rank).read_bytes()[:8] == bytes(8)
        assert scrubber.stats.damaged_cells == 0

    def test_a_snapshot_that_goes_meanwhile_is_let_go(self, build: Build) -> None:
        cluster = build([1, 1], 1)
        cluster.protect()
        node = cluster.nodes[0]
        scrubber = self.scrubber(cluster, node)
        published = node.store.published
        (rank,) = cluster.ranks[node.name]
        node.store.published = lambda: {ID: (rank, 77)}  # type: ignore[method-assign]
        scrubber.round(11.0)
        node.store.published = published  # type: ignore[method-assign]
        node.store.release(f"job/segment-{rank}.safetensors")
        scrubber.round(12.0)
        assert self.said == []


class TestProtecting:
    def test_a_peer_that_comes_late(self, build: Build) -> None:
        """The others wait for it, and go on with the address that it has then."""
        cluster = build([1, 1, 1], 1)
        late = cluster.nodes[2]
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = "{}:{}".format(*closed.getsockname())
            addresses = {**cluster.addresses, late.name: nobody}
            runs = [cluster.encode(node, addresses) for node in cluster.nodes[:2]]
            closed.settimeout(DEADLINE_S)
            closed.accept()[0].close()  # somebody has tried
        assert cluster.outcomes.empty()
        cluster.encode(late)
        for run in runs:
            run.update(cluster.manifest, cluster.addresses, {})
        cluster.wait_encoded(3)

    def test_stop_ends_the_threads(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1)
        before = set(threading.enumerate())
        without_c = {node.name: node.address for node in cluster.nodes[:2]}
        runs = [cluster.encode(node, without_c) for node in cluster.nodes[:2]]
        started = [
            thread
            for thread in set(threading.enumerate()) - before
            if thread.name == "ckptd-encode"
        ]
        assert len(started) == 2
        for run in runs:
            run.stop()
        assert {cluster.outcomes.get(timeout=DEADLINE_S) for _ in runs} == {("a", ""), ("b", "")}
        for thread in started:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def test_a_damaged_segment_is_never_protected(self, build: Build) -> None:
        cluster = build([1, 1, 1], 1)
        node = cluster.nodes[1]
        flip(node.segment(cluster.ranks[node.name][0]), CELL_BYTES)
        for each in cluster.nodes:
            cluster.encode(each)
        reasons = {}
        while not reasons:
            name, reason = cluster.outcomes.get(timeout=DEADLINE_S)
            reasons |= {name: reason} if reason else {}
        ((name, reason),) = reasons.items()
        assert "is damaged" in reason
        (run,) = (each.run for each in cluster.nodes if each.name == name)
        assert run is not None
        assert run.damaged

    def test_a_row_is_handed_out_again_when_it_was_lost_on_the_way(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2)
        cluster.protect()
        keeper = cluster.nodes[1]
        with keeper.store.parity(ID) as parity:
            for number, (stripe, row) in enumerate(parity.index):
                if row == 0:
                    continue
                encoder = cluster.nodes[cluster.manifest.stripe_map(0).stripes[stripe].encoder]
                into = memoryview(bytearray(CELL_BYTES))
                length, _ = keeper.peers.fetch(
                    encoder.address, GetEncoded(ID, 0, stripe, row), into
                )
                kept = parity.path.read_bytes()[number * CELL_BYTES :][:length]
                assert bytes(into[:length]) == kept

    def test_rows_that_a_node_does_not_encode(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2)
        cluster.protect()
        run = cluster.nodes[0].run
        assert run is not None
        for stripe, row in ((1, 1), (0, 0), (0, 2), (-1, 1), (10_000, 1)):
            with pytest.raises(Gone):
                run.row(GetEncoded(ID, 0, stripe, row))


def test_what_is_in_danger_goes_at_full_speed_and_before_the_rest(build: Build) -> None:
    cluster = build([1, 1], 1)
    a, b = cluster.nodes
    a.server._pace = Pace(1.0)  # a cell would take an hour
    into = memoryview(bytearray(CELL_BYTES))
    assert not a.server._is_hastened(ID)
    a.server.hasten(ID)
    length, _ = b.peers.fetch(a.address, GetCell(ID, cluster.ranks["a"][0], 0), into)
    assert 0 < length <= CELL_BYTES
    a.server.hasten(SnapshotId("job", 2, 41))
    assert not a.server._is_hastened(ID), "the newest counts"


def test_a_peer_that_was_silent_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "PEER_TIMEOUT_S", 0.1)
    monkeypatch.setattr(cells, "_SILENCE_S", 1000.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address, peers = "{}:{}".format(*listener.getsockname()), Peers(KEY)
        request, into = GetCell(ID, 0, 0), memoryview(bytearray(1))
        with pytest.raises(TimeoutError):
            peers.fetch(address, request, into)
        with pytest.raises(ConnectionError, match="did not answer a moment ago"):
            peers.fetch(address, request, into)
        peers._silent_until.clear()
        with pytest.raises(TimeoutError):
            peers.fetch(address, request, into)


class TestPeersThatMisbehave:
    @pytest.fixture
    def node(self, build: Build) -> Node:
        return build([1, 1], 1).nodes[0]

    @pytest.fixture
    def ask(self, node: Node) -> Iterator[Callable[[], None]]:
        """An honest client, connected before anything happens; asks for a cell."""
        peers = Peers(KEY)

        def fetch() -> None:
            manifest = peers.fetch_manifest(node.address, GetManifest(ID, node.name))
            rank = manifest.segments[0].rank
            into = memoryview(bytearray(CELL_BYTES))
            peers.fetch(node.address, GetCell(ID, rank, 0), into)
            assert into == memoryview(node.segment(rank).read_bytes()[:CELL_BYTES])

        fetch()
        yield fetch
        peers.close()

    def test_another_cluster_key(self, node: Node, ask: Callable[[], None]) -> None:
        for key in (ClusterKey(bytes(32)), ClusterKey()):
            stranger = Peers(key)
            with pytest.raises(ProtocolError, match="does not have this cluster's key"):
                stranger.fetch(node.address, GetCell(ID, 0, 0), memoryview(bytearray(10)))
        ask()

    def test_garbage_instead_of_a_challenge(self, node: Node, ask: Callable[[], None]) -> None:
        before = node.server.bad.count
        with connect(node.address) as conn:
            conn.sendall(b"GET / HTTP/1.1\r\n" * 10)
            wait_for(lambda: node.server.bad.count == before + 1)
        ask()

    @pytest.mark.parametrize(
        "garbage",
        [
            struct.pack("!I", 1 << 31),
            struct.pack("!I", 5) + b"hello",
            struct.pack("!I", 0),
            struct.pack("!I", 6) + b"ck\x07abc",
            framed(Payload(1, 1)),
            framed(GetCell(ID, 0, 0)).replace(b"\xa3job", b"\xa3\xff\xfe\xfd"),
        ],
        ids=["too long", "no message", "empty", "other version", "other union", "not utf-8"],
    )
    def test_garbage_instead_of_a_request(
        self, node: Node, ask: Callable[[], None], garbage: bytes
    ) -> None:
        before = node.server.bad.count
        with connect(node.address) as conn:
            shake_hands(conn, KEY, b"client")
            conn.sendall(garbage)
            assert conn.recv(1) == b""
        wait_for(lambda: node.server.bad.count == before + 1)
        ask()

    def test_half_a_request(
        self, node: Node, ask: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is not waited for without end: its connection would be taken from others."""
        with connect(node.address) as conn:
            shake_hands(conn, KEY, b"client")
            monkeypatch.setattr(cells, "PEER_TIMEOUT_S", 0.05)
            conn.sendall(framed(GetCell(ID, 0, 0))[:9])
            assert conn.recv(1) == b""
        monkeypatch.undo()
        ask()

    def test_a_moment_without_file_descriptors(
        self, node: Node, ask: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server takes new connections again afterwards."""
        listener, failed = node.server._listener, threading.Event()

        class Exhausted:
            def accept(self) -> tuple[socket.socket, object]:
                if not failed.is_set():
                    failed.set()
                    raise OSError(errno.EMFILE, "Too many open files")
                return listener.accept()

        monkeypatch.setattr(node.server, "_listener", Exhausted())
        with connect(node.address) as conn:
            shake_hands(conn, KEY, b"client")
        assert failed.wait(DEADLINE_S)
        with connect(node.address) as conn:
            shake_hands(conn, KEY, b"client")
        ask()
        monkeypatch.undo()

    @pytest.mark.parametrize(
        "request_",
        [
            GetCell(SnapshotId("job", 9, 9), 0, 0),
            GetCell(ID, 77, 0),
            GetParity(ID, 0, 0, 0),
            GetEncoded(ID, 0, 0, 1),
            GetManifest(ID, "nobody"),
            GetManifest(SnapshotId("other", 1, 1), "a"),
        ],
        ids=lambda request: str(request)[:60],
    )
    def test_what_is_not_here(
        self, node: Node, ask: Callable[[], None], request_: PeerRequest
    ) -> None:
        peers = Peers(KEY)
        with pytest.raises(Gone):
            peers.fetch(node.address, request_, memoryview(bytearray(CELL_BYTES)))
        peers.close()
        ask()

    def test_cells_that_a_segment_does_not_have(self, node: Node) -> None:
        rank = node.store.node_manifest(ID, node.name).segments[0].rank
        for cell in (1000, 2**60):
            with pytest.raises(Gone, match=r"has \d+ cells"):
                node.peers.fetch(node.address, GetCell(ID, rank, cell), memoryview(bytearray(1)))

    def test_digests_of_a_place_that_the_node_had_before(self, node: Node) -> None:
        """It was emptied, holds others' segments now, and was told by its group what it had."""
        had = SegmentDigests(77, 8, b"digest77")
        node.store.keep_node_manifest(NodeManifest(ID, node.name, CELL_BYTES, (had,)))
        own = node.store.node_manifest(ID, node.name)
        known = node.peers.fetch_manifest(node.address, GetManifest(ID, node.name))
        assert known.segments == (*own.segments, had)

    def test_a_manifest_that_is_damaged_at_rest(self, node: Node) -> None:
        node.store.keep_node_manifest(NodeManifest(ID, "b", CELL_BYTES, ()))
        flip(node.store.root / "job" / "2.40.of.b", 3)
        with pytest.raises(Gone, match="its checksum does not match"):
            node.peers.fetch_manifest(node.address, GetManifest(ID, "b"))

    @pytest.mark.parametrize(
        "request_",
        [
            GetManifest(SnapshotId("../job", 2, 40), "b"),
            GetManifest(ID, "../../b"),
            GetManifest(ID, "b\0"),
            GetCell(ID, 0, -1),
        ],
        ids=["job", "node", "nul", "negative"],
    )
    def test_names_and_numbers_that_cannot_be_end_the_connection(
        self, node: Node, request_: PeerRequest
    ) -> None:
        before = node.server.bad.count
        with pytest.raises(ConnectionResetError):
            node.peers.fetch(node.address, request_, memoryview(bytearray(CELL_BYTES)))
        wait_until("it to be counted", lambda: node.server.bad.count == before + 1)

    def test_a_negative_length(self) -> None:
        server = FakeServer(framed(Payload(-1, 0)))
        with pytest.raises(ProtocolError, match="Expected `int` >= 0"):
            Peers(KEY).fetch(server.address, GetCell(ID, 0, 0), memoryview(bytearray(1)))
        server.close()

    @pytest.mark.parametrize("length", [CELL_BYTES + 1, 1 << 60])
    def test_more_bytes_than_were_asked_for(self, length: int) -> None:
        server, peers = FakeServer(framed(Payload(length, 0))), Peers(KEY)
        with pytest.raises(ProtocolError, match=rf"to send {length} bytes where at most 4096 fit"):
            peers.fetch(server.address, GetCell(ID, 0, 0), memoryview(bytearray(CELL_BYTES)))
        server.close()

    def test_a_manifest_of_impossible_size(self) -> None:
        length = 1 << 40
        server, peers = FakeServer(framed(Payload(length, 0))), Peers(KEY)
        with pytest.raises(ProtocolError, match=rf"to send {length} bytes"):
            peers.fetch_manifest(server.address, GetManifest(ID, "a"))
        server.close()

    @pytest.mark.parametrize(
        "body", [b"", b"\xc1", b"\x84\xa2id\x93\xa1\xff\x01\x01" + b"\x91" * 9]
    )
    def test_a_manifest_that_makes_no_sense(self, body: bytes) -> None:
        server = FakeServer(framed(Payload(len(body), digest(body))) + body)
        with pytest.raises(ProtocolError, match="is malformed"):
            Peers(KEY).fetch_manifest(server.address, GetManifest(ID, "a"))
        server.close()

    def test_wrong_bytes_with_their_right_digest(self, node: Node) -> None:
        """The peer's word does not count: the digest is the one of the capture."""
        rank = node.store.node_manifest(ID, node.name).segments[0].rank
        segment = node.store.node_manifest(ID, node.name).segment(rank)
        body = bytes(CELL_BYTES)
        server = FakeServer(framed(Payload(len(body), digest(body))) + body)
        elsewhere = CellReader("z", Store(node.store.root.parent / "z"), Peers(KEY))
        with pytest.raises(CorruptData, match=f"from {server.address} is damaged"):
            elsewhere.cell(
                ID, segment, 0, CELL_BYTES, [server.address], memoryview(bytearray(CELL_BYTES))
            )
        elsewhere.peers.close()
        elsewhere.store.close()
        server.close()

    def test_a_peer_that_hangs_up_in_the_middle(self) -> None:
        server = FakeServer(framed(Payload(CELL_BYTES, 0)) + b"half", hang_up=True)
        with pytest.raises(ConnectionError):
            Peers(KEY).fetch(server.address, GetCell(ID, 0, 0), memoryview(bytearray(CELL_BYTES)))
        server.close()

    def test_a_peer_that_sends_a_byte_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cells, "PEER_TIMEOUT_S", 0.5)
        monkeypatch.setattr(cells, "_LEAST_BYTES_PER_S", 1 << 30)
        drips = framed(Payload(CELL_BYTES, 0)) + bytes(CELL_BYTES)
        server = FakeServer(drips, hang_up=True, drip_s=0.01)
        with pytest.raises(TimeoutError, match="sends less than"):
            Peers(KEY).fetch(server.address, GetCell(ID, 0, 0), memoryview(bytearray(CELL_BYTES)))
        server.close()

    @pytest.mark.parametrize("address", ["", "host", "host:", "host:port"])
    def test_an_address_that_is_none(self, address: str) -> None:
        with pytest.raises(ProtocolError, match="is not a cell server's address"):
            Peers(KEY).fetch(address, GetCell(ID, 0, 0), memoryview(bytearray(1)))

    def test_a_connection_that_broke_while_idle_is_replaced(self, build: Build) -> None:
        """The agent on the other side has come back on its old port."""
        cluster = build([1, 1], 1)
        node, other = cluster.nodes
        request = GetManifest(ID, node.name)
        assert other.peers.fetch_manifest(node.address, request).node == node.name
        ((conn,),) = other.peers._idle.values()
        conn.shutdown(socket.SHUT_RDWR)
        assert other.peers.fetch_manifest(node.address, request).node == node.name
