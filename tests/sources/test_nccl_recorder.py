"""The Flight Recorder of NCCL, as PyTorch's source has it answer: no GPU takes part."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._C import _distributed_c10d as c10d

from ckptd.agent import worker_client
from ckptd.agent.flight_recorder import RecorderReader
from ckptd.agent.watcher import Pace, Watcher
from ckptd.collectives import GroupInfo
from ckptd.trainer import worker_server
from ckptd.watching import Introduction, Observed, publish, started_ticks

NOW = 1_800_000_000.0


def entry(id: int, seq: int, state: str = "completed", **changed: object) -> dict[str, object]:
    return {
        "record_id": id,
        "pg_id": 0,
        "process_group": ["0", "default_pg"],
        "thread_name": "pt_main_thread",
        "collective_seq_id": seq,
        "p2p_seq_id": 0,
        "op_id": seq,
        "profiling_name": "nccl:all_reduce",
        "time_created_ns": int((NOW - 10 + id * 0.01) * 1e9),
        "input_sizes": [[3, 4]],
        "input_dtypes": ["BFloat16"],
        "output_sizes": [[3, 4]],
        "output_dtypes": ["BFloat16"],
        "state": state,
        "time_discovered_started_ns": 0,
        "time_discovered_completed_ns": 0,
        "retired": state == "completed",
        "timeout_ms": 600000,
        "is_p2p": False,
        **changed,
    }


def dump(*entries: dict[str, object]) -> bytes:
    told = {"version": "2.10", "comm_lib_version": "2.28.9", "pg_config": {}, "pg_status": {}}
    return json.dumps(told | ({"entries": entries} if entries else {})).encode()


def reader() -> RecorderReader:
    return RecorderReader(3, NOW - 100, on_streams=True)


def told(read: RecorderReader, *entries: dict[str, object]) -> list[tuple[int, bool, float | None]]:
    found = read.take(dump(*entries), NOW)
    return [(each.seq, each.ended, each.duration_s) for each in found.collectives]


def test_without_timing_an_operation_ends_when_its_event_says_so() -> None:
    read = reader()
    assert told(read, entry(0, 1, "scheduled"), entry(1, 2, "started")) == [
        (1, False, None),
        (2, False, None),
    ]
    assert told(read, entry(0, 1, retired=False), entry(1, 2, "started")) == [(1, True, None)]
    assert not read.problems


def test_what_was_retired_because_its_time_was_up_has_not_ended() -> None:
    read = reader()
    assert told(read, entry(0, 1, "started")) == [(1, False, None)]
    assert told(read, entry(0, 1, "started", retired=True)) == []


def test_with_timing_the_duration_is_waited_for_but_only_once() -> None:
    read = reader()
    assert told(read, entry(0, 1, duration_ms=1.5)) == [(1, True, 0.0015)]
    known = entry(0, 1, duration_ms=1.5)
    late = [entry(1, 2, retired=False), entry(2, 3, retired=False)]
    assert told(read, known, *late) == [(2, False, None), (3, False, None)]
    late[0] = entry(1, 2, duration_ms=2.5)
    assert told(read, known, *late) == [(2, True, 0.0025), (3, True, None)]
    assert told(read, known, *late) == []


def test_sends_are_left_out_and_leave_no_gap() -> None:
    read = reader()
    sends = [
        entry(1, 1, "scheduled", is_p2p=True, p2p_seq_id=1, profiling_name="nccl:send 0->1"),
        entry(2, 1, is_p2p=True, p2p_seq_id=1, profiling_name="nccl:coalesced"),
    ]
    found = read.take(dump(entry(0, 1), *sends, entry(3, 2)), NOW)
    assert [each.seq for each in found.collectives] == [1, 2]
    assert (found.gaps, found.dropped) == ([], 0)


def test_what_ends_without_a_duration_is_not_kept_for_ever() -> None:
    read = reader()
    read.take(dump(entry(0, 1, duration_ms=1.0)), NOW)
    for id in range(1, 1000):
        read.take(dump(entry(id, id + 1, retired=False)), NOW)
    assert len(read._untimed) < 10
    assert len(read._open) < 10


SERVER = """
import os, sys
from torch._C import _distributed_c10d as c10d
def answer(request, response):
    response.set_content(open(sys.argv[2]).read(), "application/json")
    response.set_status(200)
c10d._register_handler("dump_nccl_trace_json", answer)
server = c10d._WorkerServer(sys.argv[1], -1)
print("ready", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture
def trainer() -> Iterator[Path]:
    """A real worker server, whose handler for NCCL answers as PyTorch's does."""
    with tempfile.TemporaryDirectory(prefix="ckptd-") as name:  # pytest's are too long for sockets
        directory = Path(name)
        answer = directory / "answer"
        now_ns = time.time_ns() + 1_000_000_000
        made = [entry(n, n + 1, time_created_ns=now_ns + n, duration_ms=2.0) for n in range(3)]
        answer.write_bytes(dump(*made))
        command = [sys.executable, "-c", SERVER, str(directory / "a.sock"), str(answer)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            ticks = started_ticks(process.pid)
            told = Introduction(process.pid, ticks, "job", 0, socket="a.sock", recorder_entries=256)
            publish(directory / "a.groups", [GroupInfo("0", (0, 1), "cpu:gloo,cuda:nccl")])
            publish(directory / "a.json", told)
            yield directory
            process.kill()


def test_the_agent_asks_each_recorder_that_a_group_has(trainer: Path) -> None:
    seen: list[Observed] = []

    async def watch() -> None:
        watching = Watcher(trainer, seen.append, Pace(slow_s=0.1, fast_s=0.05, share=1.0))
        task = asyncio.create_task(watching.run())
        async with asyncio.timeout(60):
            while sum(len(each.collectives) for each in seen) < 3:
                await asyncio.sleep(0.02)
        assert watching.views()[0].problems == ()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(watch())
    found = [each for one in seen for each in one.collectives]
    assert [(each.group, each.seq, each.ended, each.duration_s) for each in found] == [
        ("0", n, True, 0.002) for n in (1, 2, 3)
    ]


def test_the_pulse_has_both_recorders_where_nccl_is(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"last_enqueued_collective": "9", "last_completed_collective": "7"}
    raw = json.dumps({"version": "2.10", "pg_status": {"0": status}}).encode()
    monkeypatch.setattr(worker_server, "dump_recorder", lambda entries: raw)
    monkeypatch.delattr(c10d, "_dump_nccl_trace_json", raising=False)
    assert worker_server._pulse().enqueued == {"0": 9}
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda *_: raw, raising=False)
    pulse = worker_server._pulse()
    assert (pulse.enqueued, pulse.completed) == ({"0": 9, "nccl 0": 9}, {"0": 7, "nccl 0": 7})


def test_what_one_recorder_told_is_kept_if_the_other_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_ns = time.time_ns()
    told_once = dump(entry(0, 1, time_created_ns=at_ns), entry(1, 2, time_created_ns=at_ns))

    async def ask(path: Path, handler: str, timeout_s: float) -> bytes:
        if handler == worker_client.ENTRIES:
            raise TimeoutError
        return told_once

    monkeypatch.setattr(worker_client, "ask", ask)
    tmp_path.chmod(0o700)
    told = Introduction(
        os.getpid(), started_ticks(os.getpid()), "job", 0, socket="a", recorder_entries=256
    )
    publish(tmp_path / "a.groups", [GroupInfo("0", (0, 1), "cpu:gloo,cuda:nccl")])
    publish(tmp_path / "a.json", told)
    seen: list[Observed] = []

    async def watch() -> None:
        watching = Watcher(tmp_path, seen.append, Pace(slow_s=0.05, fast_s=0.02, share=1.0))
        task = asyncio.create_task(watching.run())
        async with asyncio.timeout(30):
            while sum(len(each.collectives) for each in seen) < 2:
                await asyncio.sleep(0.02)
        assert watching.views()[0].silent_since is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(watch())
