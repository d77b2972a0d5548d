"""Bits that flip on the way, connections of strangers, and what is retired in mid-transfer."""

import threading
from collections.abc import Callable, Iterator

import pytest

from ckptd.agent.cells import Peers
from ckptd.agent.store import verify_cells
from ckptd.digest import cell_count
from ckptd.errors import Gone, ProtocolError, Unrecoverable
from ckptd.keys import NONCE_BYTES, ClusterKey
from ckptd.wire import GetCell, GetDecoded, GetEncoded, GetManifest, GetParity, Source

from ..nodes import CELL_BYTES, ID, KEY, Build, Cluster, Node, connect, read_exactly, wait_for
from .peers import BadWire, Replay, Wire

ANY = (GetCell, GetParity, GetEncoded, GetDecoded, GetManifest)
Between = Callable[..., BadWire]


@pytest.fixture
def bad_wire() -> Iterator[Between]:
    made: list[BadWire] = []

    def make(node: Node, *kinds: type, times: int = 1 << 30) -> BadWire:
        made.append(BadWire(node.address, kinds, times))
        return made[-1]

    yield make
    for each in made:
        each.close()


def over(wires: dict[str, BadWire], source: Source) -> Source:
    cells = {**source.cells, **{name: wire.address for name, wire in wires.items()}}
    return Source(source.manifest, source.ranks, source.sizes, source.parity, cells)


class TestFlippedBits:
    @pytest.mark.parametrize("times", [1, 2, 1 << 30], ids=["once", "twice", "always"])
    def test_in_a_segment_on_its_way(self, build: Build, bad_wire: Between, times: int) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        node = cluster.nodes[1]
        (rank,) = cluster.ranks["b"]
        cells = cell_count(len(cluster.segments[rank]), CELL_BYTES)
        wire = bad_wire(node, GetCell, times=times)
        newcomer = cluster.newcomer()
        outcome = cluster.fetch(newcomer, rank, over({"b": wire}, cluster.source()))
        assert outcome.rebuilt_cells == len(wire.hit) == min(times, cells)
        assert newcomer.reader.damage.cells == {"b": len(wire.hit)}

    @pytest.mark.parametrize("kind", [GetCell, GetParity, GetDecoded])
    def test_in_what_a_rebuild_needs(self, build: Build, bad_wire: Between, kind: type) -> None:
        """One of the survivors has a bad wire; what it sends is as lost as the lost node."""
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        lost, bad = cluster.nodes[0], cluster.nodes[2]
        (rank,) = cluster.ranks["a"]
        wire = bad_wire(bad, kind)
        newcomer = cluster.newcomer()
        cluster.fetch(newcomer, rank, over({bad.name: wire}, cluster.source((lost,))))
        blamed = sum(
            node.reader.damage.cells.get(bad.name, 0) for node in (newcomer, *cluster.nodes)
        )
        assert blamed == len(wire.hit)

    def test_in_everything_that_a_node_gives_away(self, build: Build, bad_wire: Between) -> None:
        cluster = build([1, 1, 1, 1, 1, 1], 2, seed=4)
        cluster.protect()
        lost = cluster.nodes[0]
        (rank,) = cluster.ranks["a"]
        wires = {"b": bad_wire(cluster.nodes[1], *ANY)}
        cluster.fetch(cluster.newcomer(), rank, over(wires, cluster.source((lost,))))

    def test_on_more_wires_than_there_is_parity(self, build: Build, bad_wire: Between) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        lost = cluster.nodes[0]
        (rank,) = cluster.ranks["a"]
        wires = {
            node.name: bad_wire(node, GetCell, GetParity, GetDecoded) for node in cluster.nodes[1:]
        }
        newcomer = cluster.newcomer()
        with pytest.raises(Unrecoverable, match=rf"of rank {rank} of job/2.40 .*is damaged"):
            cluster.fetch(newcomer, rank, over(wires, cluster.source((lost,))))
        assert newcomer.store.path("job/new.safetensors").read_bytes()[:8] == bytes(8)

    @pytest.mark.parametrize("kind", [GetCell, GetEncoded, GetManifest])
    def test_while_the_snapshot_is_protected(
        self, build: Build, bad_wire: Between, kind: type
    ) -> None:
        """Nothing can mend it yet, but it is still whole where it came from: asked again."""
        cluster = build([1, 1, 1, 1], 2, seed=3)
        wire = bad_wire(cluster.nodes[1], kind, times=2)
        cluster.addresses["b"] = wire.address
        for node in cluster.nodes:
            node.reader.damage.meet(cluster.addresses)
        cluster.protect()
        assert len(wire.hit) == 2
        if kind is not GetManifest:
            blamed = sum(node.reader.damage.cells.get("b", 0) for node in cluster.nodes)
            assert blamed == 2
        where = cluster.newcomer()
        for lost in cluster.nodes:
            (rank,) = cluster.ranks[lost.name]
            source = cluster.source((lost,))
            source.cells.update({node.name: node.address for node in cluster.nodes})
            cluster.fetch(where, rank, source)


class TestStrangers:
    """What one connection has proved is of no use for another."""

    @pytest.fixture
    def node(self, build: Build) -> Node:
        return build([1, 1], 1).nodes[0]

    def overhear(self, node: Node) -> tuple[bytes, bytes]:
        """What both ends of an honest connection say before the first request."""
        wire = Wire(node.address)
        peers = Peers(KEY)
        peers.fetch_manifest(wire.address, GetManifest(ID, node.name))
        peers.close()
        wire.close()
        return wire.recorded[0]

    def refused(self, node: Node, said: bytes) -> None:
        """The server hangs up without having said more than its part of the challenge."""
        before = node.server.bad.count
        with connect(node.address) as conn:
            conn.sendall(said)
            heard = b""
            while piece := conn.recv(4096):
                heard += piece
        assert len(heard) <= NONCE_BYTES + 32
        wait_for(lambda: node.server.bad.count == before + 1)

    def test_an_answer_that_was_overheard(self, node: Node) -> None:
        client_said, _ = self.overhear(node)
        self.refused(node, client_said)

    def test_a_request_without_any_proof(self, node: Node) -> None:
        self.refused(node, bytes(NONCE_BYTES) + bytes(32))

    def test_the_servers_own_words_said_back(self, node: Node) -> None:
        before = node.server.bad.count
        with connect(node.address) as conn:
            conn.sendall(read_exactly(conn, NONCE_BYTES))
            conn.sendall(read_exactly(conn, 32))
            assert conn.recv(1) == b""
        wait_for(lambda: node.server.bad.count == before + 1)

    def test_a_server_that_replays_what_it_overheard_gets_no_request(self, node: Node) -> None:
        _, server_said = self.overhear(node)
        impostor, peers = Replay(server_said), Peers(KEY)
        with pytest.raises(ProtocolError, match="does not have this cluster's key"):
            peers.fetch(impostor.address, GetCell(ID, 0, 0), memoryview(bytearray(CELL_BYTES)))
        wait_for(lambda: len(impostor.heard) == 1)
        assert len(impostor.heard[0]) <= NONCE_BYTES + 32
        impostor.close()
        peers.close()

    def test_an_impostor_in_a_nodes_place_only_makes_its_cells_lost(self, build: Build) -> None:
        """It serves right cells, under another key."""
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        (rank,) = cluster.ranks["b"]
        node = cluster.nodes[1]
        node.server._key = ClusterKey(bytes(32))
        newcomer = cluster.newcomer()
        outcome = cluster.fetch(newcomer, rank, cluster.source())
        assert outcome.fetched_cells == 0
        assert newcomer.reader.damage.cells == {}


class TestRetiredInMidTransfer:
    def retire_after(
        self, cluster: Cluster, keepers: list[Node], first: int
    ) -> tuple[Node, Wire, int]:
        """These nodes give their part of the snapshot away once `first` cells are on their way."""
        cluster.protect()
        node = cluster.nodes[1]
        (rank,) = cluster.ranks["b"]
        newcomer = cluster.newcomer()
        sent: list[int] = []
        mutex = threading.Lock()

        def retire(request: object, body: bytearray) -> None:
            with mutex:
                sent.append(1)
                if len(sent) != first:
                    return
                # In other threads, for they wait until nothing is being sent any more.
                files = [
                    (keeper, f"job/segment-{r}.safetensors")
                    for keeper in keepers
                    for r in cluster.ranks[keeper.name]
                ]
                files += [(keeper, "job/parity-0.cells") for keeper in keepers]
                threads = [
                    threading.Thread(target=keeper.store.release, args=(name,))
                    for keeper, name in files
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(10)

        return newcomer, Wire(node.address, retire), rank

    def test_by_one_node_the_rest_is_decoded(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        newcomer, wire, rank = self.retire_after(cluster, cluster.nodes[1:2], 1)
        source = over({"b": wire}, cluster.source())
        outcome = cluster.fetch(newcomer, rank, source)
        wire.close()
        assert outcome.rebuilt_cells > 0
        for node in (newcomer, *cluster.nodes):
            assert node.reader.damage.cells == {}

    def test_by_all_it_is_gone_and_nobody_is_blamed(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        newcomer, wire, rank = self.retire_after(cluster, cluster.nodes, 1)
        source = over({"b": wire}, cluster.source())
        with pytest.raises(Unrecoverable, match=r"job/2.40 .*is not here") as caught:
            cluster.fetch(newcomer, rank, source)
        wire.close()
        assert "damaged" not in str(caught.value)
        for node in (newcomer, *cluster.nodes):
            assert node.reader.damage.cells == {}
        assert newcomer.store.path("job/new.safetensors").read_bytes()[:8] == bytes(8)

    def test_a_cell_that_is_on_its_way_arrives_whole(self, build: Build) -> None:
        """Its slot is not given to the next capture before the last byte is out."""
        cluster = build([1, 1, 1], 1)
        node = cluster.nodes[0]
        (rank,) = cluster.ranks["a"]
        path = node.segment(rank)
        with node.store.segment(ID, rank) as (_, sidecar):
            released = threading.Thread(
                target=node.store.release, args=(f"job/segment-{rank}.safetensors",)
            )
            released.start()
            wait_for(lambda: not node.store.published())
            with pytest.raises(Gone):
                node.peers.fetch(node.address, GetCell(ID, rank, 0), memoryview(bytearray(9)))
            verify_cells(path, sidecar)
            assert released.is_alive()
        released.join(10)
        assert not released.is_alive()
