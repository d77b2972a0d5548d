"""What a trainer may answer, or leave lying about, and harm nobody with."""

import asyncio
import json
import os
import random
import socket
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import pytest

from ckptd.agent import worker_client
from ckptd.agent.flight_recorder import RecorderReader
from ckptd.agent.timing_ring import TimingReader
from ckptd.agent.watcher import Pace, Watcher
from ckptd.collectives import GroupInfo
from ckptd.errors import CorruptData, Gone, ProtocolError
from ckptd.ring import RingReader, RingWriter
from ckptd.watching import Introduction, publish, seal_pulse, started_ticks

NOW = 1_800_000_000.0


def entry(id: int, seq: int, **changed) -> dict:
    return {
        "record_id": id,
        "process_group": ["0", "default_pg"],
        "collective_seq_id": seq,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": "gloo:all_reduce",
        "time_created_ns": int((NOW - 10 + id * 0.01) * 1e9),
        "retired": True,
        "state": "scheduled",
        "input_sizes": [[3, 4]],
        "input_dtypes": ["Float"],
        **changed,
    }


def dump(*entries: dict, **changed) -> bytes:
    return json.dumps({"version": "2.10", "entries": entries, **changed}).encode()


def reader() -> RecorderReader:
    return RecorderReader(3, NOW - 100)


def seqs(reading) -> list[int]:
    return [record.seq for record in reading.collectives]


def test_an_operation_comes_when_it_is_entered_and_when_it_has_ended():
    read = reader()
    first = read.take(dump(entry(0, 1), entry(1, 2, retired=False)), NOW)
    again = read.take(dump(entry(0, 1), entry(1, 2, retired=False)), NOW)
    ended = read.take(dump(entry(0, 1), entry(1, 2, duration_ms=1.5)), NOW)
    assert [(r.seq, r.ended) for r in first.collectives] == [(1, True), (2, False)]
    assert not again.collectives
    assert [(r.seq, r.ended, r.duration_s) for r in ended.collectives] == [(2, True, 0.0015)]
    assert first.collectives[0].size_bytes == 48


def test_entries_out_of_order_twice_or_of_absurd_times_are_dropped():
    found = reader().take(
        dump(
            entry(3, 4),
            entry(1, 2),
            entry(1, 2),
            entry(2, 3, time_created_ns=int((NOW + 1e6) * 1e9)),
            entry(0, 1, time_created_ns=int((NOW - 1000) * 1e9)),
            entry(4, 5, time_created_ns=-5),
        ),
        NOW,
    )
    assert seqs(found) == [2, 4]
    assert found.dropped == 4
    assert [(gap.first_seq, gap.last_seq) for gap in found.gaps] == [(1, 1), (3, 3)]


def test_a_recorder_that_was_reset_is_read_from_the_beginning():
    read = reader()
    read.take(dump(entry(100, 101), entry(101, 102)), NOW)
    found = read.take(dump(entry(0, 1), entry(1, 2)), NOW)
    assert seqs(found) == [1, 2]
    assert not found.gaps


def test_another_version_of_the_recorder_degrades_and_says_so():
    read = reader()
    few = {"process_group": ["0", ""], "collective_seq_id": 1, "profiling_name": "nccl:broadcast"}
    found = read.take(dump(few, few | {"collective_seq_id": 2}, version="9.1"), NOW)
    assert seqs(found) == [1, 2]
    assert not any(record.ended for record in found.collectives)
    assert {record.entered_at for record in found.collectives} == {NOW}
    told = " ".join(read.problems)
    for text in ("'9.1'", "when an operation was entered", "have ended", "number its entries"):
        assert text in told
    nothing = read.take(dump({"seq": 1}), NOW)
    assert nothing.dropped == 1
    assert any("missing required field" in text for text in read.problems)


def test_answers_of_any_shape_cost_records_and_nothing_else():
    dice = random.Random(1)
    whole = dump(*[entry(n, n + 1) for n in range(20)])
    scraps = [b"", b"{", b"[]", b"null", b"\x80\x04K\x01.", b'{"entries": 3}', b"[" * 100_000]
    scraps.append(dump(entry(0, 1, input_sizes=[[2**62] * 64] * 10)))
    scraps.append(dump(entry(0, 10**30), entry(0, 1, profiling_name="x" * 5000)))
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        scraps.append(bytes(damaged[: dice.randint(1, len(damaged))]))
    read = reader()
    for scrap in scraps:
        try:
            found = read.take(scrap, NOW)
        except ProtocolError:
            continue
        for record in found.collectives:
            msgspec.msgpack.encode(record)
    assert len(read.problems) < 10


def test_the_ring_tells_what_it_has_lost(tmp_path):
    writer = RingWriter(tmp_path / "ring", capacity=8)
    read = RingReader(tmp_path / "ring")
    records = [writer.enter(seq, 10, 5, -1, 0, 1) for seq in range(1, 5)]
    writer.end(records[0], 77)
    found, lost = read.read()
    assert [(r.seq, r.ended, r.duration_ns) for r in found][:2] == [(1, True, 77), (2, False, -1)]
    assert lost == 0
    writer.end(records[1], 78)
    assert [(r.seq, r.duration_ns) for r in read.read()[0]] == [(2, 78)]
    for seq in range(5, 25):
        writer.enter(seq, 10, 5, -1, 0, 1)
    writer.end(records[2], 79)  # it was written over long ago
    found, lost = read.read()
    assert [r.seq for r in found] == list(range(17, 25))
    assert lost == 12
    groups = (GroupInfo("0", (0, 1), "gloo"),)
    timing = TimingReader(1, 0.0)
    assert not timing.take(found[:1], groups, NOW)[1]
    gaps = timing.take(found[4:], groups, NOW)[1]
    assert [(gap.first_seq, gap.last_seq) for gap in gaps] == [(18, 20)]
    absurd = [found[0]._replace(entered_ns=int(NOW) * 10**9, seq=1 << 62)]
    assert timing.take(absurd, groups, NOW) == ([], [], 1)
    read.close()


def test_a_ring_of_nonsense_is_refused_or_read_as_nothing(tmp_path):
    dice = random.Random(2)
    path = tmp_path / "ring"
    RingWriter(path, capacity=8)
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:-1], b"y" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(CorruptData):
            RingReader(path)
    path.write_bytes(whole)
    read = RingReader(path)
    for _ in range(300):
        path.write_bytes(whole[:16] + dice.randbytes(len(whole) - 16))
        found, _ = read.read()
        assert TimingReader(0, 0.0).take(found, (), NOW)[0] == []
    path.write_bytes(b"")
    with pytest.raises(CorruptData):
        read.read()
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(OSError):  # noqa: PT011 # whatever the kernel says
        RingReader(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptData):
        RingReader(path)


ANSWERS = {
    "silence": None,
    "hangs up": b"",
    "no http": b"\x00\xff" * 100 + b"\r\n\r\n",
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000,
    "too long": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "too short": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    "an error": b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno",
    "pickle": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n\x80\x04K\x01.",
    "nested": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
}


class Impostor:
    """Listens like a worker server, and answers what it likes."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(8)
        self.answer, self.held = answer, []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                conn, _ = self.socket.accept()
                if self.answer is None:
                    self.held.append(conn)
                    continue
                conn.sendall(self.answer)
                conn.close()
            except OSError:
                return


@pytest.mark.parametrize("name", ANSWERS)
def test_a_server_that_answers_badly_is_left_alone(name):
    with tempfile.TemporaryDirectory(prefix="ckptd-") as directory:
        server = Impostor(Path(directory, "s"), ANSWERS[name])
        with pytest.raises((TimeoutError, Gone, ProtocolError)):
            ask_and_read(Path(directory, "s"))
        server.socket.close()


def ask_and_read(path: Path) -> None:
    reader().take(asyncio.run(worker_client.ask(path, "fr_trace_json", 0.3)), NOW)


def test_a_bad_trainer_does_not_keep_the_watcher_from_another():
    seen = []
    pace = Pace(slow_s=0.05, fast_s=0.02, deadline_s=0.3, share=1.0)

    async def watch(directory: Path) -> None:
        watcher = Watcher(directory, seen.append, pace)
        task = asyncio.create_task(watcher.run())
        until = time.monotonic() + 30
        while not any(each.collectives for each in seen) or len(watcher.views()) < len(ANSWERS):
            assert time.monotonic() < until, (seen, watcher.views())
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with tempfile.TemporaryDirectory(prefix="ckptd-") as base:
        directory = Path(base)
        servers = []
        for number, answer in enumerate(ANSWERS.values()):
            servers.append(show(directory, number, answer))
        (directory / "nonsense.json").write_bytes(b"\xff\xfe")
        (directory / "huge.json").write_bytes(b" " * (5 << 20))
        (directory / "wrong.json").write_text('{"pid": "x"}')
        (directory / "dangling.json").symlink_to("/nowhere")
        now_entry = entry(0, 1, time_created_ns=time.time_ns())
        body = dump(now_entry)
        good = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        servers.append(show(directory, 50, good))
        asyncio.run(watch(directory))
        for server in servers:
            server.socket.close()
    assert {each.rank for each in seen if each.collectives} == {50}


def show(directory: Path, rank: int, answer: bytes | None) -> Impostor:
    """Leave the files of a trainer that is this process."""
    stem = f"{os.getpid()}-{rank}"
    server = Impostor(directory / f"{stem}.sock", answer)
    introduction = Introduction(
        os.getpid(), started_ticks(os.getpid()), "job", rank, socket=f"{stem}.sock",
        recorder_entries=256, ring="/etc/passwd" if rank % 2 else "",
    )  # fmt: skip
    (directory / f"{stem}.groups").write_bytes(b"{{{" if rank < 50 else b"[]")
    (directory / f"{stem}.pulse").write_bytes(seal_pulse.__name__.encode())
    publish(directory / f"{stem}.json", introduction)
    return server
