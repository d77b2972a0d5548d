"""What NCCL's Inspector writes, as its source has it (plugins/profiler/inspector): no GPU here."""

import asyncio
import json
import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ckptd.agent import inspector
from ckptd.agent.flight_recorder import Reading
from ckptd.agent.inspector import InspectorReader
from ckptd.agent.watcher import Pace, Watcher
from ckptd.collectives import Collective, GroupInfo
from ckptd.config import watch_config
from ckptd.coordinator.diagnosis.detector import Detector
from ckptd.coordinator.diagnosis.finding import Kind
from ckptd.coordinator.diagnosis.thresholds import Thresholds
from ckptd.sketches import Aggregator
from ckptd.trainer import environment
from ckptd.watching import Introduction, Observed, publish, started_ticks

NOW = 1_800_000_000.0
PID = 4711


def line(sn: int, us: int = 250, op: str = "AllReduce", at: float = NOW - 5, **changed: Any) -> str:
    """One as `inspectorCommInfoDump` writes it, by NCCL 2.30; older ones lack comm_name."""
    whole = {
        "header": {
            "id": "0x7f8c496ae9f661",
            "comm_name": "unknown",
            "rank": 1,
            "n_ranks": 4,
            "nnodes": 2,
        },
        "metadata": {
            "inspector_output_format_version": "v4.0",
            "git_rev": "",
            "rec_mechanism": "nccl_profiler_interface",
            "dump_timestamp_us": int(at * 1e6),
            "hostname": "node-1",
            "pid": PID,
        },
        "coll_perf": {
            "coll": op,
            "coll_sn": sn,
            "coll_msg_size_bytes": 1 << 20,
            "coll_exec_time_us": us,
            "coll_timing_source": "kernel_gpu",
            "coll_algobw_gbs": 277.210914,
            "coll_busbw_gbs": 485.119099,
        },
    }
    for part, value in changed.items():
        whole[part] = whole[part] | value if value is not None else None
    return json.dumps(whole, separators=(",", ":")) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / f"node-1-pid{PID}.log"


def reader(file: Path) -> InspectorReader:
    return InspectorReader(file, PID, 5, NOW - 100)


def add(file: Path, *lines: str) -> None:
    with file.open("a") as out:
        out.write("".join(lines))


def seqs(read: InspectorReader) -> list[int]:
    return [each.seq for each in read.read(NOW).collectives]


def test_a_line_is_an_operation_that_has_ended(file: Path) -> None:
    read = reader(file)
    assert read.read(NOW).collectives == []
    add(file, line(0), line(0, 90, "ReduceScatter"))
    first, second = read.read(NOW).collectives
    assert (first.seq, first.op, first.size_bytes, first.rank) == (1, "all_reduce", 1 << 20, 5)
    assert (first.ended, first.duration_s, first.resolution_s) == (True, 250e-6, 1e-6)
    assert first.entered_at == pytest.approx(NOW - 5 - 250e-6)
    assert (second.seq, second.op, second.duration_s) == (1, "reduce_scatter", 90e-6)
    infos = read.groups
    assert list(infos) == [first.group, second.group]
    assert [(info.size, info.enqueued, info.times_only) for info in infos.values()] == [
        (4, True, True)
    ] * 2
    assert infos[first.group].description == "AllReduce of communicator 0x7f8c496ae9f661"
    assert seqs(read) == []


def test_with_its_events_the_time_of_entry_is_exact(file: Path) -> None:
    kernel = {"channel_id": 0, "kernel_start_ts": 1, "kernel_stop_ts": 2, "kernel_record_ts": 2}
    starts = {"coll_start_ts": int((NOW - 7) * 1e6), "coll_stop_ts": 1, "kernel_events": [kernel]}
    add(file, line(3, coll_perf={"event_trace_sn": {}, "event_trace_ts": starts}))
    (found,) = reader(file).read(NOW).collectives
    assert found.entered_at == NOW - 7


def test_other_versions(file: Path) -> None:
    old = json.loads(line(0))  # as the plugin's README has it
    del old["header"]["comm_name"], old["coll_perf"]["coll_timing_source"]
    p2p = {"p2p": "Send", "p2p_sn": 3, "p2p_peer": 2, "p2p_exec_time_us": 5}
    sent = {"header": old["header"], "metadata": old["metadata"], "p2p_perf": p2p}
    later = line(2, header={"comm_name": "dp"}, metadata={"new": [1]}, coll_perf={"algo": "RING"})
    add(file, json.dumps(old) + "\n", json.dumps(sent) + "\n", later)
    read = reader(file)
    found = read.read(NOW)
    assert [(each.seq, each.resolution_s) for each in found.collectives] == [(1, 1e-3), (3, 1e-6)]
    assert found.dropped == 0


def test_what_is_of_no_use_is_left_out(file: Path) -> None:
    add(
        file,
        line(0, coll_perf={"coll_timing_source": "collective_cpu"}),
        line(1, header={"n_ranks": 1}),
        line(2, op="SendRecv"),
    )
    read = reader(file)
    found = read.read(NOW)
    assert (found.collectives, found.dropped, read.groups) == ([], 0, {})


def test_lines_of_other_processes_and_other_times_are_dropped(file: Path) -> None:
    add(
        file,
        line(0, metadata={"pid": PID + 1}),
        line(1, metadata={"hostname": "node-2"}),
        line(2, at=NOW - 1000),
        line(3, at=NOW + 1000),
        line(4),
    )
    found = reader(file).read(NOW)
    assert [each.seq for each in found.collectives] == [5]
    assert found.dropped == 4


def test_a_line_is_read_when_it_is_whole_and_only_once(file: Path) -> None:
    read = reader(file)
    text = line(0) + line(1) + line(2)
    found = []
    for start in range(0, len(text), 97):
        add(file, text[start : start + 97])
        found += seqs(read)
    assert found == [1, 2, 3]
    assert read.read(NOW).dropped == 0


def test_a_file_that_begins_anew_is_read_from_its_beginning(file: Path) -> None:
    read = reader(file)
    add(file, *(line(n) for n in range(10)))
    assert len(seqs(read)) == 10
    file.write_text(line(50))  # shortened
    assert seqs(read) == [51]
    file.rename(file.with_suffix(".1"))  # rotated
    assert seqs(read) == []
    add(file, *(line(n) for n in range(60, 80)))
    assert seqs(read) == list(range(61, 81))
    file.unlink()
    assert seqs(read) == []


def test_of_a_huge_file_only_the_end_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file.open("wb") as out:
        out.truncate(1 << 40)  # a hole
    with file.open("ab") as out:
        out.write(("\n" + "".join(line(n) for n in range(5))).encode())
    monkeypatch.setattr(inspector, "READ_LIMIT_BYTES", 4000)
    read = reader(file)
    assert seqs(read) == [1, 2, 3, 4, 5]
    add(file, *(line(n) for n in range(5, 100)))
    latest = seqs(read)
    assert 4 < len(latest) < 12
    assert latest == list(range(101 - len(latest), 101))
    assert seqs(read) == []


def test_a_line_without_an_end_is_passed_by(file: Path) -> None:
    read = reader(file)
    add(file, "x" * (inspector.LINE_LIMIT_BYTES + 1))
    found = read.read(NOW)
    assert (found.collectives, found.dropped) == ([], 1)
    add(file, "y" * 100 + "\n" + line(7))
    assert seqs(read) == [8]


def test_files_of_any_content_cost_records_and_nothing_else(file: Path) -> None:
    dice = random.Random(4)
    whole = "".join(line(n) for n in range(20)).encode()
    scraps = [b"\x00" * 1000, b"\n" * 1000, b"[" * 50_000 + b"\n", b'{"header": 3}\n', b"\xff\n"]
    scraps.append(line(1 << 70).encode() + line(-1).encode() + line(0, 1 << 63).encode())
    scraps.append(line(0, coll_perf={"coll_msg_size_bytes": 2**64 - 1}).encode())
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 40)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        scraps.append(bytes(damaged[dice.randrange(100) : dice.randint(100, len(damaged))]))
    found = 0
    for scrap in scraps:
        file.write_bytes(scrap)
        for each in reader(file).read(NOW).collectives:
            assert 0 <= each.seq <= 1 << 62
            found += 1
    assert found > 1000


def test_communicators_without_end_are_not_kept(file: Path) -> None:
    read = reader(file)
    add(file, *(line(0, header={"id": hex(n)}) for n in range(3000)))
    while read.read(NOW).collectives:
        pass
    assert len(read.groups) == 1024


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_only_a_plain_file_is_opened(file: Path, kind: str) -> None:
    if kind == "symlink":
        file.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(OSError):  # noqa: PT011 # whatever the kernel says
        reader(file).read(NOW)


def watched(directory: Path, *names: str) -> tuple[list[Observed], list[tuple[str, ...]]]:
    """Watch trainers that are this process, whose Inspector writes to `names`."""
    seen: list[Observed] = []
    directory.chmod(0o700)
    for rank, name in enumerate(names):
        told = Introduction(
            os.getpid(), started_ticks(os.getpid()), "job", rank, inspector=str(directory / name)
        )
        publish(directory / f"{rank}.groups", [GroupInfo("0", (0, 1, 2, 3), "nccl", "dp")])
        publish(directory / f"{rank}.json", told)

    async def watch() -> list[tuple[str, ...]]:
        watching = Watcher(directory, seen.append, Pace(slow_s=0.05, fast_s=0.02))
        task = asyncio.create_task(watching.run())
        async with asyncio.timeout(30):
            while {each.rank for each in seen} != set(range(len(names))) or not any(
                each.collectives for each in seen
            ):
                await asyncio.sleep(0.02)
            while not all(view.problems for view in watching.views()[1:]):
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return [view.problems for view in watching.views()]

    return seen, asyncio.run(watch())


def test_the_agent_reads_only_the_file_that_the_trainer_would_write(tmp_path: Path) -> None:
    mine = f"{socket.gethostname()}-pid{os.getpid()}.log"
    at = {"pid": os.getpid(), "hostname": socket.gethostname()}
    text = "".join(line(n, at=time.time() + 1, metadata=at) for n in range(3)) + "garbage\n"
    (tmp_path / mine).write_text(text)
    (tmp_path / "other.log").write_text(text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / mine).symlink_to(tmp_path / mine)
    seen, problems = watched(tmp_path, mine, "other.log", f"sub/{mine}")
    assert {each.rank for each in seen if each.collectives} == {0}
    found = [each for one in seen for each in one.collectives]
    assert [each.seq for each in found] == [1, 2, 3]
    assert sum(each.dropped for each in seen) == 1
    groups = {info.group for one in seen if one.rank == 0 for info in one.groups}
    assert groups == {"0", found[0].group}
    assert [bool(each) for each in problems] == [False, True, True]
    assert f"other.log is not HOST-pid{os.getpid()}.log" in problems[1][0]


def test_a_file_system_that_is_stuck_keeps_nothing_else_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = threading.Event()
    plain_read = InspectorReader.read

    def read(reading: InspectorReader, now: float) -> Reading:
        mended.wait(60)
        return plain_read(reading, now)

    monkeypatch.setattr(InspectorReader, "read", read)
    mine = f"{socket.gethostname()}-pid{os.getpid()}.log"
    at = {"pid": os.getpid(), "hostname": socket.gethostname()}
    (tmp_path / mine).write_text(line(0, at=time.time() + 1, metadata=at))
    told = Introduction(os.getpid(), started_ticks(os.getpid()), "job", 0)
    tmp_path.chmod(0o700)
    publish(tmp_path / "0.json", told)
    publish(tmp_path / "1.json", replace(told, rank=1, inspector=str(tmp_path / mine)))
    seen: list[Observed] = []

    async def watch() -> None:
        watching = Watcher(tmp_path, seen.append, Pace(slow_s=0.05, fast_s=0.02))
        task = asyncio.create_task(watching.run())
        async with asyncio.timeout(30):
            while min(sum(each.rank == rank for each in seen) for rank in (0, 1)) < 5:
                await asyncio.sleep(0.02)
            mended.set()
            while not any(each.collectives for each in seen):
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    try:
        asyncio.run(watch())
    finally:
        mended.set()
    assert [each.rank for each in seen if each.collectives] == [1]


def test_it_is_where_the_plugin_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{socket.gethostname()}-pid{os.getpid()}.log"
    on = {"NCCL_INSPECTOR_ENABLE": "1"}
    assert watch_config({}).inspector == ""
    assert watch_config({}).inspector_problem == ""
    told = watch_config(on)
    assert told.inspector == str(tmp_path / "nccl-inspector-unknown-jobid" / name)
    assert "INTERVAL_MICROSECONDS=1000" in told.inspector_problem
    told = watch_config(on | {"SLURM_JOBID": "77", "NCCL_INSPECTOR_PROM_DUMP": "1"})
    assert told.inspector == str(tmp_path / "nccl-inspector-77" / name)
    assert "unset NCCL_INSPECTOR_PROM_DUMP" in told.inspector_problem
    every = {"NCCL_INSPECTOR_DUMP_THREAD_INTERVAL_MICROSECONDS": "500"}
    told = watch_config(on | every | {"NCCL_INSPECTOR_DUMP_DIR": "/x"})
    assert (told.inspector, told.inspector_problem) == (f"/x/{name}", "")


def test_ckptd_run_switches_on_the_plugin_that_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        if name.startswith(("NCCL_", "TORCH_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    environment.prepare("job", None)
    assert not any(name.startswith("NCCL_INSPECTOR") for name in os.environ)
    os.environ["NCCL_PROFILER_PLUGIN"] = "/opt/libnccl-profiler-inspector.so"
    os.environ["NCCL_INSPECTOR_DUMP_MIN_SIZE_BYTES"] = "4096"
    environment.prepare("job", None)
    assert watch_config(os.environ).inspector_problem == ""
    assert watch_config(os.environ).inspector
    assert os.environ["NCCL_INSPECTOR_DUMP_MIN_SIZE_BYTES"] == "4096"


RANKS, STEP_S = 4, 0.5


@pytest.mark.parametrize("lost", [0.0, 0.3])
@pytest.mark.parametrize("fault", ["", "slow rank", "slow link"])
def test_slow_ranks_and_transfers_are_found_from_its_times(
    tmp_path: Path, fault: str, lost: float
) -> None:
    """The recorder of NCCL tells only when operations were put on the stream, as it does.

    `lost`: before NCCL 2.30 the plugin keeps only the last operation until it is written.
    """
    dice = random.Random(5)
    files = [tmp_path / f"node-1-pid{PID + rank}.log" for rank in range(RANKS)]
    reads = [InspectorReader(file, PID + n, n, NOW - 100) for n, file in enumerate(files)]
    nodes = [Aggregator("job", 1, f"n{rank}") for rank in range(RANKS)]
    detector = Detector(Thresholds(window_min_s=2.0))
    world = GroupInfo("0", tuple(range(RANKS)), "nccl", "default_pg")
    found = []
    for step in range(400):
        at = NOW + step * STEP_S
        begins_late = fault if step > 200 else ""
        made = [("AllReduce", 2 * step), ("AllReduce", 2 * step + 1), ("AllGather", step)]
        for op, sn in [("Broadcast", 0), *made] if step == 0 else made:
            transfer_us = 60_000 if begins_late == "slow link" else 20_000
            for rank, file in enumerate(files):
                waits_us = dice.randint(2000, 6000)
                if begins_late == "slow rank":
                    waits_us += 0 if rank == 2 else 60_000
                told = {"metadata": {"pid": PID + rank}, "header": {"comm_name": "DP Group 0"}}
                if dice.random() >= lost:
                    add(file, line(sn, transfer_us + waits_us, op, at, **told))
        for rank, node in enumerate(nodes):
            reading = reads[rank].read(at)
            for info in (world, *reads[rank].groups.values()):
                node.learn(info)
            for each in reading.collectives:
                node.add(each)
            for n in range(3):
                enqueued = Collective("0", 3 * step + n + 1, "all_reduce", 4, rank, at, 1e-6, True)
                node.add(enqueued)
            node.read(rank, at)
            detector.observe(node.sketch(at, whole=True), at - NOW)
        found += detector.findings(at - NOW)
    if not fault:
        assert found == []
        return
    first = found[0]
    if fault == "slow rank":
        assert (first.kind, first.culprit.ranks) == (Kind.NON_COMMUNICATION_SLOW, (2,))
    else:
        assert first.kind is Kind.COMMUNICATION_SLOW
