"""The log file: what is left of it after a crash, a flip and a full disk."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ckptd.agent import log_file
from ckptd.agent.log_file import LogFile
from ckptd.agent.store import Store
from ckptd.ids import SnapshotId
from ckptd.journal import Entry, Incident, Isolated, Restarts, Rollback
from ckptd.terms import KeptTerm, Term

ENTRIES = (
    Entry(1, 1, Isolated("a", True, "it hung twice")),
    Entry(1, 2, Rollback("job", SnapshotId("job", 2, 70))),
    Entry(2, 3, Restarts("job", (1.5, 2.5), ("x", "y"), "too often")),
    Entry(2, 4, Incident(1, "job", 7.0, "hang", "rank 3", "rank 3 did not enter", lost_work_s=2.0)),
)


def isolated(number: int, node: str = "a") -> Entry:
    return Entry(1, number, Isolated(node, bool(number % 2), f"for the {number}. time"))


def read(path: Path) -> tuple[tuple[Entry, ...], list[str]]:
    problems: list[str] = []
    return LogFile(path).read(problems), problems


def write(path: Path, *entries: Entry) -> list[int]:
    """One at a time; returns the size of the file after each."""
    log, sizes = LogFile(path), []
    for entry in entries:
        log.append([entry])
        sizes.append(path.stat().st_size)
    return sizes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_what_was_appended_is_there(path: Path) -> None:
    assert read(path) == ((), [])
    write(path, *ENTRIES)
    assert read(path) == (ENTRIES, [])


def test_a_crash_at_any_byte_of_an_append(path: Path) -> None:
    """What was there stays, nothing is complained of, and the next append is whole again."""
    sizes = write(path, *ENTRIES)
    whole = path.read_bytes()
    for size in range(sizes[1], sizes[2]):
        path.write_bytes(whole[:size])
        assert read(path) == (ENTRIES[:2], []), size
        assert path.stat().st_size == sizes[1]
        log = LogFile(path)
        log.read([])
        log.append(ENTRIES[3:])
        assert read(path) == ((*ENTRIES[:2], ENTRIES[3]), []), size


def test_a_flip_costs_the_entry_that_it_is_in_and_no_other(path: Path) -> None:
    sizes = write(path, *ENTRIES)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for mask in (0x01, 0x80):
            raw = bytearray(whole)
            raw[place] ^= mask
            path.write_bytes(raw)
            hit = next(number for number, size in enumerate(sizes) if place < size)
            expected = tuple(e for number, e in enumerate(ENTRIES) if number != hit)
            entries, problems = read(path)
            assert entries == expected, place
            (problem,) = problems
            assert "is damaged at byte" in problem
            assert "3 entries are left" in problem
            assert read(path) == (expected, []), "it is reported once"


def test_a_file_of_somebody_else(path: Path) -> None:
    path.write_bytes(b"\xc5ent" + os.urandom(100) + b"\xc5en")
    entries, problems = read(path)
    assert entries == ()
    assert len(problems) == 1
    write(path, *ENTRIES)
    assert read(path) == (ENTRIES, [])


def test_what_is_outdated_does_not_fill_the_disk(path: Path) -> None:
    """A thousand statements about two things."""
    log = LogFile(path, compact_bytes=2000)
    log.append(ENTRIES[1:2])
    for number in range(1, 1000):
        log.append([isolated(number)])
        assert path.stat().st_size < 2200
    assert set(read(path)[0]) == {ENTRIES[1], isolated(999)}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_much_that_counts_is_not_written_anew_each_time(path: Path) -> None:
    log = LogFile(path, compact_bytes=500)
    written = []
    for number in range(1, 200):
        before = path.stat().st_ino if number > 1 else 0
        log.append([isolated(number, f"n{number}")])
        written.append(path.stat().st_ino != before)
    assert len(read(path)[0]) == 199
    assert sum(written) < 12


class Disk:
    """`os.write` on a disk that has so many bytes left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left_bytes: int) -> None:
        self.left_bytes = left_bytes
        real = os.write

        def write(fd: int, data: Any) -> int:
            part = bytes(data)[: self.left_bytes]
            if not part:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left_bytes -= len(part)
            return real(fd, part)

        monkeypatch.setattr(log_file.os, "write", write)


@pytest.mark.parametrize("left_bytes", [0, 1, 30, 60])
def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch, left_bytes: int) -> None:
    """No half entry is left behind, and all of it is written once there is room."""
    log = LogFile(path)
    log.append(ENTRIES[:2])
    disk = Disk(monkeypatch, left_bytes)
    with pytest.raises(OSError, match="No space left"):
        log.append(ENTRIES[2:3])
    assert read(path) == (ENTRIES[:2], [])
    disk.left_bytes = 1 << 20
    log.append(ENTRIES[3:])
    assert read(path) == (ENTRIES, [])


def test_what_there_was_no_room_for_can_be_written_without_news(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogFile(path)
    disk = Disk(monkeypatch, 30)
    with pytest.raises(OSError, match="No space left"):
        log.append(ENTRIES)
    disk.left_bytes = 1 << 20
    assert log.catch_up()
    assert read(path) == (ENTRIES, [])
    assert not log.catch_up(), "there was nothing left to write"


def test_no_room_to_write_it_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows on instead, and nothing is lost."""
    log = LogFile(path, compact_bytes=100)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        log.append(ENTRIES)
    assert read(path) == (ENTRIES, [])


class TestInTheMemoryDirectory:
    def test_term_and_log_come_back(self, tmp_path: Path) -> None:
        kept = KeptTerm(Term(4, "c", "tcp://h:1", 4.0), 12.5)
        store = Store(tmp_path / "memory")
        store.keep_term(kept)
        store.log.append(ENTRIES)
        store.close()
        again = Store(tmp_path / "memory")
        adopted = again.adopt()
        again.close()
        assert (adopted.term, adopted.entries, adopted.problems) == (kept, ENTRIES, ())

    def test_they_keep_no_empty_memory_from_being_given_back(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "memory")
        store.keep_term(KeptTerm(Term(4, "c", "tcp://h:1", 4.0), 12.5))
        store.log.append(ENTRIES)
        store.vacate()
        assert not (tmp_path / "memory").exists()

    def test_a_damaged_term_is_reported_and_no_entry_s_term_is_undercut(
        self, tmp_path: Path
    ) -> None:
        store = Store(tmp_path / "memory")
        store.keep_term(KeptTerm(Term(4, "c", "tcp://h:1", 4.0), 12.5))
        store.log.append(ENTRIES)
        store.close()
        path = tmp_path / "memory" / ".term"
        raw = bytearray(path.read_bytes())
        raw[3] ^= 1
        path.write_bytes(raw)
        again = Store(tmp_path / "memory")
        adopted = again.adopt()
        again.close()
        (problem,) = adopted.problems
        assert ".term cannot be used" in problem
        assert adopted.term is not None
        assert adopted.term.term == Term(2)
