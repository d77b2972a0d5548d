"""Bits that flip where they lie: in data, in parity, in manifests; and memory that is older than
the cluster."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.agent.fetch import SegmentFetch
from ckptd.errors import Unrecoverable
from ckptd.ids import SnapshotId
from ckptd.segment import ParitySidecar, Sidecar, parse_header, read_checked_record, sidecar_path

from ..nodes import CELL_BYTES, ID, Build, Cluster, Node, flip, flip_parity, places_of
from .fleet import JOB, Fleet

Open = Callable[..., Fleet]


def wide_stripe(cluster: Cluster) -> tuple[int, list[tuple[Node, int, int]]]:
    """A stripe whose data cells are all real: its number, and (node, rank, cell) of each."""
    _, places = cluster.manifest.stripe_map(0), []
    for stripe in cluster.manifest.stripe_map(0).stripes:
        places = []
        for member, cell in stripe.data:
            if cell is not None:
                ranks = list(cluster.group.members[member].cell_ranks(CELL_BYTES))
                places.append((cluster.nodes[member], *ranks[cell]))
        if len(places) == len(stripe.data):
            return stripe.number, places
    raise AssertionError("no stripe is full")


class TestOneStripe:
    """A 4+2 group, with as many flips in one stripe as it can bear, or one more."""

    def cluster(self, build: Build) -> tuple[Cluster, int, list[tuple[Node, int, int]]]:
        cluster = build([1, 1, 1, 1, 1, 1], 2, seed=6)
        cluster.protect()
        return cluster, *wide_stripe(cluster)

    def test_two_data_cells(self, build: Build) -> None:
        cluster, _, places = self.cluster(build)
        newcomer = cluster.newcomer()
        for node, rank, cell in places[:2]:
            flip(node.segment(rank), cell * CELL_BYTES + 20)
        for node, rank, _ in places[:2]:
            assert cluster.fetch(newcomer, rank, cluster.source()).rebuilt_cells == 1
            # And in place, where they were flipped.
            path = node.segment(rank)
            mended = SegmentFetch(node.reader, ID, rank, cluster.source()).run(path, present=True)
            assert mended.rebuilt_cells == 1
            assert path.read_bytes() == cluster.segments[rank]

    def test_a_data_cell_and_a_parity_cell(self, build: Build) -> None:
        cluster, stripe, places = self.cluster(build)
        node, rank, cell = places[0]
        flip(node.segment(rank), cell * CELL_BYTES + 20)
        flip_parity(cluster, stripe, row=0)
        assert cluster.fetch(cluster.newcomer(), rank, cluster.source()).rebuilt_cells == 1

    @pytest.mark.parametrize("row", [None, 0, 1])
    def test_one_more_than_parity_can_bear(self, build: Build, row: int | None) -> None:
        cluster, stripe, places = self.cluster(build)
        flipped = places[:3] if row is None else places[:2]
        for node, rank, cell in flipped:
            flip(node.segment(rank), cell * CELL_BYTES + 20)
        if row is not None:
            flip_parity(cluster, stripe, row)
        newcomer = cluster.newcomer()
        node, rank, cell = flipped[0]
        with pytest.raises(
            Unrecoverable,
            match=rf"^cell {cell} of rank {rank} of job/2.40 cannot be rebuilt: 3 of the 4 cells "
            rf"that stripe {stripe} needs are there \(cell {cell} of rank {rank} .* is damaged",
        ):
            cluster.fetch(newcomer, rank, cluster.source())
        assert newcomer.store.path("job/new.safetensors").read_bytes()[:8] == bytes(8)
        # The other segments of the stripe's nodes are not harmed by it.
        others = [r for r in cluster.segments if r not in {r for _, r, _ in flipped}]
        for other in others:
            cluster.fetch(newcomer, other, cluster.source(), f"job/{other}")

    def test_a_flip_on_a_survivor_while_another_node_is_lost(self, build: Build) -> None:
        cluster, stripe, places = self.cluster(build)
        (lost, rank, _), (node, other, cell) = places[:2]
        flip(node.segment(other), cell * CELL_BYTES + 20)
        assert places_of(cluster, node, other, cell)[0] == stripe
        cluster.fetch(cluster.newcomer(), rank, cluster.source((lost,)))


class TestNodeManifests:
    """Each node of the group keeps those of the others; a flipped one is a lost one."""

    def damaged(self, cluster: Cluster, of: str, keepers: list[Node]) -> None:
        for keeper in keepers:
            flip(keeper.store.root / "job" / f"2.40.of.{of}", 30)

    def test_another_node_has_it_too(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        (rank,) = cluster.ranks["a"]
        self.damaged(cluster, "a", cluster.nodes[1:3])
        source = cluster.source((cluster.nodes[0],))
        for where in (cluster.newcomer(), cluster.nodes[1]):
            cluster.fetch(where, rank, source)

    def test_all_of_them(self, build: Build) -> None:
        cluster = build([1, 1, 1, 1], 2, seed=3)
        cluster.protect()
        (rank,) = cluster.ranks["a"]
        self.damaged(cluster, "a", cluster.nodes[1:])
        with pytest.raises(
            Unrecoverable, match=rf"the digests of rank {rank} of job/2.40 are lost: .*checksum"
        ):
            cluster.fetch(cluster.newcomer(), rank, cluster.source((cluster.nodes[0],)))


def at_rest(fleet: Fleet) -> SnapshotId:
    """Train until something is protected, and stop; returns the newest that is."""
    fleet.train()
    fleet.wait_for_start()
    fleet.wait_for_protected()
    return fleet.rest()


def segments_of(fleet: Fleet, node: str, id: SnapshotId) -> list[Path]:
    found = []
    for path in fleet.files(node, "segment-*.safetensors"):
        raw = path.read_bytes()
        if raw[:8] != bytes(8) and parse_header(raw, path.name).id == id:
            found.append(path)
    return found


def parity_of(fleet: Fleet, node: str, id: SnapshotId) -> list[Path]:
    return [
        path
        for path in fleet.files(node, "parity-*.cells")
        if sidecar_path(path).exists()
        and read_checked_record(sidecar_path(path), ParitySidecar).id == id
    ]


def node_of(fleet: Fleet, name: str) -> dict:
    return next(node for node in fleet.status()["nodes"] if node["node"] == name)


@pytest.mark.slow
@pytest.mark.timeout(200)
class TestWholeAgents:
    def test_flips_in_data_and_parity_are_mended_counted_and_named(self, fleet: Open) -> None:
        here = fleet(4, agent_flags=("--scrub-rate", "0"))
        newest = at_rest(here)
        (path,) = segments_of(here, "n1", newest)
        sidecar = read_checked_record(sidecar_path(path), Sidecar)
        for cell in (1, 5):
            flip(path, cell * sidecar.cell_bytes + 7)
        (parity,) = parity_of(here, "n2", newest)
        flip(parity, 3)
        here.train()
        assert here.wait_for_start() == newest
        here.wait("the count", lambda: node_of(here, "n1")["damaged_cells"] == 2)
        assert node_of(here, "n1")["mended_cells"] == 2

    def test_flips_on_one_node_when_another_is_lost(self, fleet: Open) -> None:
        """The survivors blame the node that sent them damaged cells."""
        here = fleet(4, agent_flags=("--scrub-rate", "0"))
        newest = at_rest(here)
        (path,) = segments_of(here, "n1", newest)
        for cell in range(1, 20):
            flip(path, cell * 4096 + 7)
        here.destroy_node("n0")
        here.places = [here.newcomer(), "n2", "n3", here.newcomer()]
        here.train()
        assert here.wait_for_start() == newest
        blamed = here.wait("n1 to be named", lambda: node_of(here, "n1")["sent_damaged_cells"])
        assert sum(blamed.values()) > 0
        for other in ("n2", "n3"):
            assert not node_of(here, other)["sent_damaged_cells"]

    def test_a_job_manifest(self, fleet: Open) -> None:
        """Its agent finds it when it comes back, says so, and gives up what needs it."""
        here = fleet(4)
        newest = at_rest(here)
        here.kill("agent-n1")
        for path in here.files("n1", f"{newest.life}.{newest.step}.manifest"):
            flip(path, 40)
        here.start_agent("n1")
        here.wait_for_nodes(4)
        said = here.wait(
            "the problem", lambda: [r for r in node_of(here, "n1")["reasons"] if "manifest" in r]
        )
        assert any("checksum does not match" in reason for reason in said)
        here.destroy_node("n0")
        here.places[0] = here.newcomer()
        here.train()
        assert here.wait_for_start() == newest

    @pytest.mark.parametrize("token", ["other", "same"])
    def test_a_node_that_comes_back_with_old_memory(
        self, fleet: Open, tmp_path: Path, token: str
    ) -> None:
        """An older snapshot under the same node id: what the others hold is newer, and wins."""
        here = fleet(4)
        older = at_rest(here)
        here.kill("agent-n1")
        shutil.copytree(here.memory_of("n1"), tmp_path / "old")
        if token == "other":
            (tmp_path / "old" / ".token").unlink()
        here.start_agent("n1")
        here.wait_for_nodes(4)
        here.train()
        here.wait_for_start()
        here.wait_for_protected(SnapshotId(JOB, older.life + 1, 0))
        newest = here.rest()
        assert newest > older
        here.kill("agent-n1")
        shutil.rmtree(here.memory_of("n1"))
        shutil.copytree(tmp_path / "old", here.memory_of("n1"))
        here.start_agent("n1")
        here.train()
        assert here.wait_for_start() == newest
        # What was retired long ago does not come back to life, nor keep its memory.
        here.wait("it to be given up", lambda: not segments_of(here, "n1", older))
        assert older not in here.snapshots("sealed") + here.snapshots("protected")
