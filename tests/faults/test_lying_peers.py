"""Peers that hold the key and give something else than what was asked for: right bytes all the
same, from the rest of the stripe, or an error that names the cell and the node."""

from collections.abc import Callable, Iterator

import pytest

from ckptd.digest import cell_count, digest
from ckptd.errors import PeerError, Unrecoverable
from ckptd.ids import SnapshotId
from ckptd.wire import GetCell, GetDecoded, GetEncoded, GetParity, NotHere, Payload, Source

from ..nodes import CELL_BYTES, ID, Build, Cluster, Node, framed, places_of
from .peers import HangUp, HastyPeers, Lie, LyingPeer, Silence

Peer = Callable[[Node, Lie], LyingPeer]


@pytest.fixture
def peer() -> Iterator[Peer]:
    made: list[LyingPeer] = []

    def make(honest: Node, lie: Lie) -> LyingPeer:
        made.append(LyingPeer(honest, lie))
        return made[-1]

    yield make
    for each in made:
        each.close()


def instead(body: bytes) -> bytes:
    """An answer in good form, with its own right digest."""
    return framed(Payload(len(body), digest(body))) + body


def through(source: Source, **liars: LyingPeer) -> Source:
    """The same places, but for those nodes at whose address somebody lies."""
    cells = {**source.cells, **{node: liar.address for node, liar in liars.items()}}
    return Source(source.manifest, source.ranks, source.sizes, source.parity, cells)


def hang_up(said: bytes) -> bytes:
    raise HangUp(said)


def one_byte_off(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:]


WRONG_CELLS: dict[str, Callable[[bytes], bytes]] = {
    "other bytes": lambda body: instead(one_byte_off(body)),
    "zeros": lambda body: instead(bytes(len(body))),
    "too little": lambda body: instead(body[:-1]),
    "nothing at all": lambda body: instead(b""),
}
"""Answers that are cells, but not the right ones: they count."""

NO_CELLS: dict[str, Callable[[bytes], bytes]] = {
    "too much": lambda body: instead(body + b"x"),
    "far too much": lambda body: framed(Payload(1 << 50, 0)) + body,
    "half, and then hangs up": lambda body: hang_up(
        framed(Payload(len(body), digest(body))) + body[: len(body) // 2]
    ),
    "hangs up": lambda body: hang_up(b""),
    "garbage": lambda body: b"\0\0\0\x05hello",
    "a request": lambda body: framed(GetCell(ID, 0, 0)),
    "gone": lambda body: framed(NotHere("I have moved on")),
}
"""Answers that bring no cell: another source is used, and nobody has damaged anything."""


def lie_about_cells(answer: Callable[[bytes], bytes]) -> Lie:
    return lambda request, body: answer(body) if isinstance(request, GetCell) else None


class TestCells:
    """The newcomer is sent to a liar for a rank's cells; the others of the stripe have parity."""

    def cluster(self, build: Build) -> tuple[Cluster, Node, int, int]:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        liar = cluster.nodes[1]
        (rank,) = cluster.ranks[liar.name]
        return cluster, liar, rank, cell_count(len(cluster.segments[rank]), CELL_BYTES)

    @pytest.mark.parametrize("what", WRONG_CELLS)
    def test_a_wrong_cell_is_a_lost_one_and_counts(
        self, build: Build, peer: Peer, what: str
    ) -> None:
        cluster, honest, rank, cells = self.cluster(build)
        liar = peer(honest, lie_about_cells(WRONG_CELLS[what]))
        newcomer = cluster.newcomer()
        outcome = cluster.fetch(newcomer, rank, through(cluster.source(), b=liar))
        assert (outcome.fetched_cells, outcome.rebuilt_cells) == (0, cells)
        assert newcomer.reader.damage.cells == {"b": cells}

    @pytest.mark.parametrize("what", NO_CELLS)
    def test_no_cell_is_a_lost_one_and_nobody_is_blamed(
        self, build: Build, peer: Peer, what: str
    ) -> None:
        cluster, honest, rank, cells = self.cluster(build)
        liar = peer(honest, lie_about_cells(NO_CELLS[what]))
        newcomer = cluster.newcomer()
        outcome = cluster.fetch(newcomer, rank, through(cluster.source(), b=liar))
        assert (outcome.fetched_cells, outcome.rebuilt_cells) == (0, cells)
        assert newcomer.reader.damage.cells == {}

    @pytest.mark.parametrize("said", [b"", framed(Payload(CELL_BYTES, 0)) + b"half"])
    def test_silence_ends_with_another_source(self, build: Build, peer: Peer, said: bytes) -> None:
        cluster, honest, rank, cells = self.cluster(build)

        def fall_silent(request: object, body: bytes) -> bytes | None:
            if isinstance(request, GetCell):
                raise Silence(said)
            return None

        newcomer = cluster.newcomer()
        newcomer.reader.peers = HastyPeers(newcomer.peers._key)
        liar = peer(honest, fall_silent)
        outcome = cluster.fetch(newcomer, rank, through(cluster.source(), b=liar))
        newcomer.reader.peers.close()
        assert outcome.rebuilt_cells == cells
        assert newcomer.reader.damage.cells == {}
        # The first silence is enough: nobody waits for each cell anew.
        assert len([r for r in liar.asked if isinstance(r, GetCell)]) <= cells

    def test_what_the_peer_says_of_the_digest_counts_for_nothing(
        self, build: Build, peer: Peer
    ) -> None:
        cluster, honest, rank, cells = self.cluster(build)
        liar = peer(honest, lie_about_cells(lambda body: framed(Payload(len(body), 7)) + body))
        newcomer = cluster.newcomer()
        outcome = cluster.fetch(newcomer, rank, through(cluster.source(), b=liar))
        assert (outcome.fetched_cells, outcome.rebuilt_cells) == (cells, 0)
        assert newcomer.reader.damage.cells == {}

    def test_without_parity_the_cell_and_the_node_are_named(self, build: Build, peer: Peer) -> None:
        cluster, honest, rank, _ = self.cluster(build)
        liar = peer(honest, lie_about_cells(WRONG_CELLS["other bytes"]))
        sealed = cluster.source()
        source = through(Source(None, sealed.ranks, sealed.sizes, (), sealed.cells), b=liar)
        with pytest.raises(
            Unrecoverable, match=rf"cell \d of rank {rank} of job/2.40 .*from b is damaged"
        ):
            cluster.fetch(cluster.newcomer(), rank, source)

    def test_every_other_node_lies_too(self, build: Build, peer: Peer) -> None:
        """Too few honest nodes: an error, and no segment."""
        cluster, _, rank, _ = self.cluster(build)
        lies = {
            node.name: peer(node, lambda request, body: instead(one_byte_off(body)))
            for node in cluster.nodes
        }
        newcomer = cluster.newcomer()
        # Its manifests were given to the group before: only cells can be lied about.
        for node in cluster.nodes:
            newcomer.store.keep_manifest(cluster.manifest)
            newcomer.store.keep_node_manifest(node.store.node_manifest(ID, node.name))
        # Where a lie about parity had its right digest, it shows in what comes out of it.
        with pytest.raises(
            PeerError,
            match=rf"of rank {rank} of job/2.40(, decoded .* its digest| cannot be rebuilt)",
        ):
            cluster.fetch(newcomer, rank, through(cluster.source(), **lies))
        assert "b" in newcomer.reader.damage.cells
        head = newcomer.store.path("job/new.safetensors").read_bytes()[:8]
        assert head == bytes(8)


def test_a_first_cell_that_is_being_mended_is_not_a_damaged_one(build: Build, peer: Peer) -> None:
    """Its node mends another cell of the segment, and has taken the header's length back."""
    cluster = build([1, 1, 1, 1], 2, seed=3)
    cluster.protect()
    (rank,) = cluster.ranks["b"]
    lie = lie_about_cells(lambda body: instead(bytes(8) + body[8:] if body[8:9] == b"{" else body))
    newcomer = cluster.newcomer()
    liar = peer(cluster.nodes[1], lie)
    outcome = cluster.fetch(newcomer, rank, through(cluster.source(), b=liar))
    assert outcome.rebuilt_cells == 1
    assert newcomer.reader.damage.cells == {}


class TestOtherCells:
    """A cell of something else, whole and with its right digest, in place of the one asked for."""

    @pytest.mark.parametrize("what", ["rank", "cell", "life", "step"])
    def test_offered_for_the_one_asked(self, build: Build, peer: Peer, what: str) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        honest = cluster.nodes[1]
        (rank,) = cluster.ranks["b"]
        other = next(r for r in cluster.segments if r != rank)
        offered = {
            "rank": cluster.segments[other],
            "cell": cluster.segments[rank][CELL_BYTES:],
            # The same state a life earlier, or a step later: only the header differs.
            "life": cluster.segments[rank].replace(b'"life":"2"', b'"life":"1"'),
            "step": cluster.segments[rank].replace(b'"step":"40"', b'"step":"41"'),
        }[what]
        assert offered[:CELL_BYTES] != cluster.segments[rank][:CELL_BYTES]

        def swap(request: object, body: bytes) -> bytes | None:
            if isinstance(request, GetCell) and request.cell == 0:
                return instead(offered[:CELL_BYTES])
            return None

        newcomer = cluster.newcomer()
        outcome = cluster.fetch(newcomer, rank, through(cluster.source(), b=peer(honest, swap)))
        assert outcome.rebuilt_cells == 1
        assert newcomer.reader.damage.cells == {"b": 1}

    def test_a_manifest_of_another_snapshot_is_refused(self, build: Build, peer: Peer) -> None:
        cluster = build([1, 1, 1], 1)
        cluster.protect()
        honest = cluster.nodes[0]
        (rank,) = cluster.ranks["a"]
        older = SnapshotId("job", 1, 40)

        def swap(request: object, body: bytes) -> bytes | None:
            return instead(body.replace(b"\xa3job\x02", b"\xa3job\x01"))

        source = through(cluster.source(tuple(cluster.nodes[1:])), a=peer(honest, swap))
        with pytest.raises(Unrecoverable, match=f"sent the manifest of a, {older}"):
            cluster.fetch(cluster.newcomer(), rank, source)


class TestParityAndHelpers:
    @pytest.mark.parametrize("what", ["other bytes", "the digest", "another row"])
    def test_a_wrong_parity_cell_is_a_lost_one(self, build: Build, peer: Peer, what: str) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        lost = cluster.nodes[0]
        (rank,) = cluster.ranks["a"]
        stripe, _ = places_of(cluster, lost, rank, 0)
        keeper = cluster.nodes[cluster.manifest.stripe_map(0).stripes[stripe].parity[0]]

        def lie(request: object, body: bytes) -> bytes | None:
            if not isinstance(request, GetParity):
                return None
            right = digest(body)
            return {
                "other bytes": framed(Payload(len(body), right)) + one_byte_off(body),
                "the digest": framed(Payload(len(body), right ^ 1)) + body,
                "another row": framed(Payload(len(body), right)) + body[::-1],
            }[what]

        source = through(cluster.source((lost,)), **{keeper.name: peer(keeper, lie)})
        # Decoded where it is wanted: nobody helps who could ask the keeper himself.
        where = cluster.newcomer()
        where.store.keep_manifest(cluster.manifest)
        where.store.keep_node_manifest(lost.store.node_manifest(ID, "a"))
        for node in cluster.nodes:
            node.job_manifest = None
        cluster.fetch(where, rank, source)
        assert where.reader.damage.cells.keys() <= {keeper.name}
        assert where.reader.damage.cells[keeper.name] >= 1

    def test_helpers_that_decode_wrongly_are_named(self, build: Build, peer: Peer) -> None:
        cluster = build([1, 1, 1, 1, 1, 1], 2, seed=5)
        cluster.protect()
        lost = cluster.nodes[2]
        (rank,) = cluster.ranks[lost.name]

        def lie(request: object, body: bytes) -> bytes | None:
            return instead(one_byte_off(body)) if isinstance(request, GetDecoded) else None

        newcomer = cluster.newcomer()
        liars = {node.name: peer(node, lie) for node in cluster.nodes if node is not lost}
        cluster.fetch(newcomer, rank, through(cluster.source((lost,)), **liars))
        wrong = {
            name: len([r for r in liar.asked if isinstance(r, GetDecoded)])
            for name, liar in liars.items()
        }
        assert sum(wrong.values()) >= cell_count(len(cluster.segments[rank]), CELL_BYTES)
        assert newcomer.reader.damage.cells == {name: n for name, n in wrong.items() if n}

    def test_a_wrong_parity_row_is_asked_for_again(self, build: Build, peer: Peer) -> None:
        """While it is encoded nobody else has it; what is kept in the end is right."""
        cluster = build([1, 1, 1, 1], 2, seed=3)
        lies: list[GetEncoded] = []

        def lie(request: object, body: bytes) -> bytes | None:
            if isinstance(request, GetEncoded) and not lies:
                lies.append(request)
                return framed(Payload(len(body), digest(body))) + one_byte_off(body)
            return None

        cluster.addresses["a"] = peer(cluster.nodes[0], lie).address
        for node in cluster.nodes:
            node.reader.damage.meet(cluster.addresses)
        cluster.protect()
        assert len(lies) == 1
        blamed = [node.reader.damage.cells for node in cluster.nodes if node.reader.damage.cells]
        assert blamed == [{"a": 1}]
        for lost in cluster.nodes:
            (rank,) = cluster.ranks[lost.name]
            cluster.fetch(cluster.nodes[0], rank, cluster.source((lost,)), f"job/{lost.name}")
