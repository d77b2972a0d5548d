"""The memory directory: what is there after a crash, what is served, what is refused."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.agent.store import Store, read_segment_sidecar, wrong_cells
from ckptd.digest import cell_count, cell_span, digest, pack
from ckptd.errors import ConfigError, CorruptData, Gone, MemoryTooSmall
from ckptd.ids import SnapshotId
from ckptd.manifest import Extent, Group, JobManifest, JobRecord, Member, NodeManifest
from ckptd.segment import (
    ParitySidecar,
    Sidecar,
    TensorSpec,
    checked_record,
    plan_layout,
    sidecar_path,
)

CELL_BYTES = 4096
ID = SnapshotId("job", 1, 30)
NAME = "job/segment-0.safetensors"
DEADLINE_S = 30.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "memory"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    store = Store(root)
    yield store
    store.close()


def segment_bytes(id: SnapshotId = ID, rank: int = 0, elements: int = 3000) -> bytes:
    layout = plan_layout([TensorSpec("model.w", "F32", (elements,))], 100)
    body = bytes((number * 7 + rank) % 256 for number in range(layout.size_bytes))
    return layout.header(id, rank, 2, 100) + body[layout.data_begin :]


def sidecar_of(raw: bytes, id: SnapshotId = ID, rank: int = 0) -> Sidecar:
    spans = [cell_span(i, len(raw), CELL_BYTES) for i in range(cell_count(len(raw), CELL_BYTES))]
    digests = pack(digest(raw[offset : offset + length]) for offset, length in spans)
    return Sidecar(id, rank, 2, len(raw), CELL_BYTES, digests)


def seal(store: Store, name: str = NAME, id: SnapshotId = ID, rank: int = 0) -> Path:
    """What a trainer leaves in the slot that the agent made for it."""
    raw = segment_bytes(id, rank)
    store.allocate(name, len(raw))
    path = store.path(name)
    with path.open("r+b") as file:
        file.write(raw)
    sidecar_path(path).write_bytes(checked_record(sidecar_of(raw, id, rank)))
    return path


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)


class TestTheDirectory:
    def test_two_agents_cannot_share_one(self, store: Store, root: Path) -> None:
        with pytest.raises(ConfigError, match=rf"another agent uses .*{root}.*--memory-dir"):
            Store(root)
        store.close()
        Store(root).close()

    def test_the_token_stays_until_the_memory_is_gone(self, root: Path) -> None:
        first = Store(root)
        first.close()
        second = Store(root)
        assert second.token == first.token
        second.destroy()
        assert not root.exists()
        third = Store(root)
        assert third.token != first.token
        third.close()

    def test_nobody_else_can_enter(self, root: Path) -> None:
        root.mkdir(mode=0o755)
        Store(root).close()
        assert root.stat().st_mode & 0o777 == 0o700

    def test_a_directory_of_everybody_is_refused_and_left_as_it_is(self, root: Path) -> None:
        """Such as /dev/shm itself: closing or wiping it would break others."""
        root.mkdir()
        root.chmod(0o1777)
        with pytest.raises(
            ConfigError, match=rf"everybody's; .*--memory-dir, such as {root}/ckptd"
        ):
            Store(root)
        assert root.stat().st_mode & 0o7777 == 0o1777
        assert list(root.iterdir()) == []

    def test_a_file_in_its_place(self, root: Path) -> None:
        root.write_text("not a directory")
        with pytest.raises(ConfigError, match="cannot use the memory directory"):
            Store(root)

    @pytest.mark.parametrize("job", ["lock", "token", "record"])
    def test_jobs_may_have_any_name(self, store: Store, root: Path, job: str) -> None:
        record = JobRecord(job, 1, {}, ())
        store.keep_record(record)
        path = seal(store, f"{job}/segment-0.safetensors", SnapshotId(job, 1, 1))
        store.close()
        again = Store(root)
        adopted = again.adopt()
        assert adopted.records == (record,)
        assert [name for name, _ in adopted.segments] == [str(path.relative_to(root))]
        assert adopted.problems == ()
        again.close()


class TestAllocate:
    def test_reserves_every_byte(self, store: Store) -> None:
        store.allocate(NAME, 100_000)
        status = store.path(NAME).stat()
        assert status.st_size == 100_000
        assert status.st_blocks * 512 >= 100_000
        assert status.st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("size_bytes", [1 << 50, 1 << 62, (1 << 64) - 1])
    def test_far_too_much(self, store: Store, size_bytes: int) -> None:
        with pytest.raises(
            MemoryTooSmall,
            match=rf"cannot reserve {size_bytes} bytes in .*: .*; \d+ bytes are free there; .*",
        ):
            store.allocate(NAME, size_bytes)
        assert not store.path(NAME).exists()

    def test_more_than_the_tmpfs_has(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        free = os.statvfs("/dev/shm")
        root = Path(f"/dev/shm/ckptd-test-{os.getpid()}-{os.urandom(4).hex()}")
        store = Store(root)
        try:
            with pytest.raises(MemoryTooSmall, match="No space left on device; "):
                store.allocate(NAME, 2 * free.f_blocks * free.f_frsize)
            assert not store.path(NAME).exists()
        finally:
            store.destroy()

    def test_again_is_another_file(self, store: Store) -> None:
        """A process that has mapped the old one is not hurt, and cannot write to the new one."""
        path = seal(store)
        with path.open("r+b") as old:
            store.allocate(NAME, 10)
            assert os.fstat(old.fileno()).st_size > 10
        assert path.read_bytes() == bytes(10)
        assert not sidecar_path(path).exists()

    def test_nothing(self, store: Store) -> None:
        """A node may hold no parity of a small snapshot."""
        store.allocate("job/parity-0.cells", 0)
        assert store.path("job/parity-0.cells").stat().st_size == 0


class TestSegments:
    def test_a_sealed_one_is_published(self, store: Store) -> None:
        path = seal(store)
        with pytest.raises(Gone, match=r"rank 0 of job/1\.30 is not here"), store.segment(ID, 0):
            pass
        sidecar = store.check_segment(NAME, ID, 0)
        with store.segment(ID, 0) as found:
            assert found == (path, sidecar)
        manifest = store.node_manifest(ID, "a")
        assert (manifest.node, manifest.cell_bytes) == ("a", CELL_BYTES)
        assert manifest.segment(0).digests == sidecar.digests

    def test_of_another_step_or_rank(self, store: Store) -> None:
        seal(store)
        with pytest.raises(CorruptData, match=r"holds rank 0 of job/1.30, not rank 1 of job/1.30"):
            store.check_segment(NAME, ID, 1)
        with pytest.raises(CorruptData, match=r"not rank 0 of job/1.31"):
            store.check_segment(NAME, SnapshotId("job", 1, 31), 0)

    def test_unsealed(self, store: Store) -> None:
        store.allocate(NAME, 10_000)
        with pytest.raises(CorruptData, match="was not sealed"):
            store.check_segment(NAME, ID, 0)

    def test_manifest_of_several_ranks_is_in_rank_order(self, store: Store) -> None:
        for rank in (5, 1, 3):
            name = f"job/segment-{rank}.safetensors"
            seal(store, name, rank=rank)
            store.check_segment(name, ID, rank)
        assert [s.rank for s in store.node_manifest(ID, "a").segments] == [1, 3, 5]
        with pytest.raises(Gone, match=r"a holds no segment of job/1\.31"):
            store.node_manifest(SnapshotId("job", 1, 31), "a")

    def test_a_released_one_is_unsealed(self, store: Store) -> None:
        path = seal(store)
        store.check_segment(NAME, ID, 0)
        store.release(NAME)
        with pytest.raises(Gone), store.segment(ID, 0):
            pass
        assert path.read_bytes()[:8] == bytes(8)
        assert not sidecar_path(path).exists()

    def test_a_pin_delays_release_but_not_unpublishing(self, store: Store) -> None:
        path = seal(store)
        store.check_segment(NAME, ID, 0)
        released = threading.Event()

        def release() -> None:
            store.release(NAME)
            released.set()

        with store.segment(ID, 0), store.segment(ID, 0):
            thread = threading.Thread(target=release)
            thread.start()
            gone = threading.Event()
            while not gone.is_set():  # until the other thread has unpublished it
                try:
                    with store.segment(ID, 0):
                        assert thread.is_alive()
                except Gone:
                    gone.set()
            assert not released.is_set()
            assert path.read_bytes()[:8] != bytes(8)
        assert released.wait(DEADLINE_S)
        thread.join()
        assert path.read_bytes()[:8] == bytes(8)


class TestSidecars:
    def refused(self, path: Path, why: str) -> None:
        with pytest.raises(CorruptData, match=why):
            read_segment_sidecar(path)

    def test_of_another_segment(self, store: Store) -> None:
        path = seal(store)
        other = sidecar_of(segment_bytes(rank=1), rank=1)
        sidecar_path(path).write_bytes(checked_record(other))
        self.refused(path, "the header and the digests are not of one segment")

    def test_missing(self, store: Store) -> None:
        path = seal(store)
        sidecar_path(path).unlink()
        self.refused(path, "has no digests beside it")

    def test_damaged(self, store: Store) -> None:
        path = seal(store)
        flip(sidecar_path(path), 20)
        self.refused(path, "its checksum does not match")

    @pytest.mark.parametrize("cell_bytes", [0, -4096, 2048])
    def test_digests_that_do_not_fit(self, store: Store, cell_bytes: int) -> None:
        path = seal(store)
        good = sidecar_of(path.read_bytes())
        wrong = Sidecar(good.id, 0, 2, good.size_bytes, cell_bytes, good.digests)
        sidecar_path(path).write_bytes(checked_record(wrong))
        self.refused(path, "bytes of digests do not fit")

    @pytest.mark.parametrize("length", [0, 3, 8, 5000])
    def test_truncated_segment(self, store: Store, length: int) -> None:
        path = seal(store)
        os.truncate(path, length)
        self.refused(path, "empty|damaged header|truncated|its header says|extent")

    def test_wrong_cells_are_named(self, store: Store) -> None:
        path = seal(store)
        sidecar = read_segment_sidecar(path)
        assert sidecar.cells == 4
        flip(path, 4096)
        flip(path, sidecar.size_bytes - 1)
        args = (path, sidecar.size_bytes, CELL_BYTES, sidecar.digests)
        assert wrong_cells(*args) == [1, 3]
        os.truncate(path, 2 * CELL_BYTES + 5)
        assert wrong_cells(*args) == [1, 2, 3]


def member(node: str, rank: int, size_bytes: int) -> Member:
    return Member(node, (Extent(rank, size_bytes),))


class TestComingBack:
    @pytest.fixture
    def again(self, store: Store, root: Path) -> Iterator[Callable[[], Store]]:
        """Another agent on the directory, once the first is gone."""
        opened = []

        def reopen() -> Store:
            store.close()
            opened.append(Store(root))
            return opened[-1]

        yield reopen
        for other in opened:
            other.close()

    def test_what_is_whole_is_published(self, store: Store, again: Callable[[], Store]) -> None:
        seal(store)
        record = JobRecord("job", 1, {"a": "t"}, ())
        store.keep_record(record)
        other = again()
        adopted = other.adopt()
        assert [(name, s.id, s.rank) for name, s in adopted.segments] == [(NAME, ID, 0)]
        assert (adopted.records, adopted.problems) == ((record,), ())
        with other.segment(ID, 0):
            pass

    def test_an_unsealed_slot_is_deleted(
        self, store: Store, again: Callable[[], Store], root: Path
    ) -> None:
        """The trainer that had it may still write to it: a new one gets another file."""
        path = seal(store)
        with path.open("r+b") as file:
            file.write(bytes(8))
        adopted = again().adopt()
        assert (adopted.segments, adopted.problems) == ((), ())
        assert list((root / "job").iterdir()) == []

    @pytest.mark.parametrize("length", [0, 3, 8, 5000])
    def test_a_truncated_segment_is_set_aside(
        self, store: Store, again: Callable[[], Store], length: int
    ) -> None:
        path = seal(store)
        os.truncate(path, length)
        adopted = again().adopt()
        assert adopted.segments == ()
        assert len(adopted.problems) == 1
        assert adopted.problems[0].startswith(f"{NAME} cannot be used and is now ")
        assert not path.exists()
        assert not sidecar_path(path).exists()

    def test_every_flipped_byte_is_found(self, store: Store, again: Callable[[], Store]) -> None:
        """In the header, the data, and the objects region; each is named, to be rebuilt."""
        size_bytes = len(segment_bytes())
        seal(store, "job/segment-9.safetensors", rank=1)
        places = [20, 3000, 4096, 9000, size_bytes - 1]
        for number, place in enumerate(places):
            flip(seal(store, f"job/segment-{number}.safetensors"), place)
        adopted = again().adopt()
        assert ("job/segment-9.safetensors", 1) in [(n, s.rank) for n, s in adopted.segments]
        assert len(adopted.problems) == len(places)
        assert all(f"segment-{n}" in adopted.problems[n] for n in range(len(places)))

    def test_foreign_files_are_left_alone(
        self, store: Store, again: Callable[[], Store], root: Path
    ) -> None:
        seal(store)
        (root / "job" / "notes.txt").write_text("mine")
        (root / "job" / "folder").mkdir()
        (root / "note").write_text("at the top")
        adopted = again().adopt()
        assert len(adopted.segments) == 1
        assert adopted.problems == (
            "foreign file job/folder in the memory directory: left alone",
            "foreign file job/notes.txt in the memory directory: left alone",
        )
        assert (root / "job" / "notes.txt").read_text() == "mine"

    def test_damaged_records_and_manifests_are_set_aside(
        self, store: Store, again: Callable[[], Store], root: Path
    ) -> None:
        store.keep_record(JobRecord("job", 1, {}, ()))
        store.keep_manifest(JobManifest(ID, 1, (), "zfec", CELL_BYTES, ()))
        flip(root / "job" / "record", 5)
        flip(root / "job" / "1.30.manifest", 5)
        adopted = again().adopt()
        assert (adopted.records, adopted.manifests) == ((), ())
        assert [problem.split()[0] for problem in adopted.problems] == [
            "job/1.30.manifest",
            "job/record",
        ]

    def test_what_was_being_written_when_it_died_is_cleared(
        self, store: Store, again: Callable[[], Store], root: Path
    ) -> None:
        store.keep_record(JobRecord("job", 1, {}, ()))
        (root / "job" / ".new.record").write_bytes(b"half")
        (root / "job" / "segment-4.safetensors.digests").write_bytes(b"its segment is gone")
        adopted = again().adopt()
        assert (len(adopted.records), adopted.problems) == (1, ())
        assert [path.name for path in (root / "job").iterdir()] == ["record"]

    @pytest.mark.parametrize("node", ["host.new", "host.manifest", "host.digests", "a.safetensors"])
    def test_node_manifests_of_nodes_with_odd_names_stay(
        self, store: Store, again: Callable[[], Store], root: Path, node: str
    ) -> None:
        (root / "job").mkdir()
        manifest = NodeManifest(ID, node, CELL_BYTES, ())
        store.keep_node_manifest(manifest)
        other = again()
        assert other.adopt().problems == ()
        assert other.read_node_manifest(ID, node) == manifest

    def test_manifests_of_one_snapshot_are_forgotten_alone(self, store: Store, root: Path) -> None:
        later = SnapshotId("job", 1, 300)
        for id in (ID, later):
            store.keep_manifest(JobManifest(id, 1, (), "zfec", CELL_BYTES, ()))
            store.keep_node_manifest(NodeManifest(id, "b", CELL_BYTES, ()))
        store.forget_manifests(ID)
        assert sorted(path.name for path in (root / "job").iterdir()) == [
            "1.300.manifest",
            "1.300.of.b",
        ]
        with pytest.raises(Gone, match=r"no manifest of b for job/1\.30 here"):
            store.read_node_manifest(ID, "b")

    def test_a_damaged_node_manifest_is_corrupt_not_gone(self, store: Store, root: Path) -> None:
        (root / "job").mkdir()
        store.keep_node_manifest(NodeManifest(ID, "b", CELL_BYTES, ()))
        flip(root / "job" / "1.30.of.b", 4)
        with pytest.raises(CorruptData):
            store.read_node_manifest(ID, "b")


class TestParity:
    """A mirror: node a keeps the parity of b's three cells."""

    SIZE_BYTES = 2 * CELL_BYTES + 100
    PARITY = "job/parity-1.cells"

    @pytest.fixture
    def manifest(self) -> JobManifest:
        members = (member("a", 0, self.SIZE_BYTES), member("b", 1, self.SIZE_BYTES))
        return JobManifest(ID, 2, (Group(members, 1),), "zfec", CELL_BYTES, ())

    def publish(self, store: Store, manifest: JobManifest, group: int = 0) -> Path:
        index = list(manifest.stripe_map(0).parity_of(0))
        lengths = (CELL_BYTES, CELL_BYTES, 100)
        store.keep_manifest(manifest)
        store.allocate(self.PARITY, len(index) * CELL_BYTES)
        path = store.path(self.PARITY)
        path.write_bytes(bytes(range(256)) * (len(index) * CELL_BYTES // 256))
        raw = path.read_bytes()
        digests = pack(digest(raw[i * CELL_BYTES :][:length]) for i, length in enumerate(lengths))
        sidecar = ParitySidecar(ID, group, 0, CELL_BYTES, lengths, digests)
        store.publish_parity(path, sidecar, index)
        return path

    def adopted(self, store: Store, root: Path) -> tuple[list[str], tuple[str, ...]]:
        store.close()
        other = Store(root)
        adopted = other.adopt()
        other.close()
        return [name for name, _, _ in adopted.parities], adopted.problems

    def test_comes_back(self, store: Store, root: Path, manifest: JobManifest) -> None:
        self.publish(store, manifest)
        assert self.adopted(store, root) == ([self.PARITY], ())

    def test_flipped(self, store: Store, root: Path, manifest: JobManifest) -> None:
        path = self.publish(store, manifest)
        flip(path, CELL_BYTES + 7)
        names, problems = self.adopted(store, root)
        assert names == []
        assert problems == (
            "job/parity-1.cells cannot be used and was deleted: "
            "parity cell 1 of job/1.30 has another digest",
        )
        assert not path.exists()

    def test_truncated(self, store: Store, root: Path, manifest: JobManifest) -> None:
        os.truncate(self.publish(store, manifest), CELL_BYTES)
        assert "does not fit the stripes" in self.adopted(store, root)[1][0]

    def test_never_finished(self, store: Store, root: Path, manifest: JobManifest) -> None:
        path = self.publish(store, manifest)
        sidecar_path(path).unlink()
        assert self.adopted(store, root) == ([], ())
        assert not path.exists()

    def test_without_its_manifest(self, store: Store, root: Path, manifest: JobManifest) -> None:
        self.publish(store, manifest)
        store.forget_manifests(ID)
        assert "the job manifest of job/1.30 is not here" in self.adopted(store, root)[1][0]

    def test_of_a_group_that_the_snapshot_does_not_have(
        self, store: Store, root: Path, manifest: JobManifest
    ) -> None:
        self.publish(store, manifest, group=3)
        assert "is of a group that job/1.30 does not have" in self.adopted(store, root)[1][0]

    def test_released(self, store: Store, manifest: JobManifest) -> None:
        path = self.publish(store, manifest)
        with store.parity(ID) as parity:
            assert parity.index == {(0, 0): 0, (2, 0): 1, (4, 0): 2}
        store.release(self.PARITY)
        with pytest.raises(Gone, match=r"there is no parity of job/1\.30 here"), store.parity(ID):
            pass
        assert path.exists()
        assert not sidecar_path(path).exists()
