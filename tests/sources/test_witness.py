"""The second witness, and incident folders, of real jobs."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

from ckptd.agent import incident, witness
from ckptd.agent.diagnosis import Diagnosis

from .watched import PACE


def look(job, rank: int, apart_s: float = 0.5) -> tuple[witness.Sample, witness.Sample]:
    view = job.view(rank)
    return job.call(witness.sample_twice(view.introduction, job.watcher.directory, apart_s))


def test_stacks_name_the_function_where_a_rank_sleeps(job):
    job = job("asleep", 2)
    job.wait("rank 0 to wait", lambda: any(record.seq == 6 for record in job.open(0)))
    first, second = look(job, 1)
    assert "falls_asleep" in first.stacks
    assert "all_reduce" in look(job, 0)[0].stacks
    assert "sleeping" in (first.state, second.state)  # it may just have told its stacks
    assert second.cpu_s.keys() >= {job.pid(1)}


def test_a_deadlock_has_the_same_stacks_twice_and_makes_no_progress(job):
    job = job("deadlock", 2)
    job.wait("rank 1 to wait", lambda: any(record.seq == 2 for record in job.open(1)))
    found = witness.compare(*look(job, 0))
    assert found.same_stacks
    assert not found.progress
    assert "its stacks are the same" in found.sentence


def test_a_rank_that_computes_makes_progress(job):
    job = job("computes", 2)
    job.wait("rank 1 to wait", lambda: any(record.seq == 2 for record in job.open(1)))
    found = witness.compare(*look(job, 0, 1.0))
    assert found.progress
    assert found.cpu_s > 0


def test_a_stopped_rank_and_a_dead_one(job):
    job = job("asleep", 2)
    job.wait("rank 0 to wait", lambda: any(record.seq == 6 for record in job.open(0)))
    os.kill(job.pid(1), signal.SIGSTOP)
    job.wait("it to stop", lambda: witness.process_state(job.pid(1)) == "stopped")
    first, second = look(job, 1)
    assert (first.state, first.stacks) == ("stopped", "")
    assert not witness.compare(first, second).progress
    told = job.view(1).introduction
    os.kill(job.pid(1), signal.SIGKILL)
    job.wait("it to end", lambda: witness.process_state(job.pid(1)) in ("gone", "a zombie"))
    gone = job.call(witness.sample(told, job.watcher.directory))
    assert gone.state in ("gone", "a zombie")


def test_without_the_worker_server_a_signal_brings_the_stacks(job):
    job = job("asleep", 2)
    told = job.view(1).introduction
    job.wait("rank 0 to wait", lambda: any(record.seq == 6 for record in job.open(0)))
    (job.watcher.directory / told.socket).unlink()
    found = job.call(witness.sample(told, job.watcher.directory))
    assert "falls_asleep" in found.stacks


def test_an_incident_folder_holds_what_was_seen(job, tmp_path):
    job = job("asleep", 2)
    job.wait("rank 0 to wait", lambda: any(record.seq == 6 for record in job.open(0)))
    evidence = [
        incident.RankEvidence(rank, look(job, rank, 0.2), list(job.records(rank).values()))
        for rank in range(2)
    ]
    groups = list(job.groups(0).values())
    folder = incident.write(tmp_path, "watched", "n0", "rank 1 hangs", evidence, groups)
    told = json.loads((folder / "incident.json").read_text())
    assert told["reason"] == "rank 1 hangs"
    assert [each["last"]["seq"] for each in told["ranks"]] == [6, 5]
    assert told["groups"][0][:2] == ["0", [0, 1]]
    assert "falls_asleep" in (folder / "rank1.stacks1.txt").read_text()
    assert json.loads((folder / "rank0.records.json").read_text())[-1]["ended"] is False
    assert "available_bytes" in json.loads((folder / "host.json").read_text())["memory"]


def test_incident_folders_are_bounded_in_size_and_number(tmp_path, monkeypatch):
    monkeypatch.setattr(incident, "FOLDER_LIMIT_BYTES", 20_000)
    long = witness.Sample(0.0, 0, 1, "running", stacks="x" * 15_000)
    for number in range(incident.FOLDERS + 5):
        evidence = [incident.RankEvidence(0, [long, long])]
        folder = incident.write(tmp_path, "../a b", "n/0", "why", evidence, now=1e9 + number)
        assert sum(path.stat().st_size for path in folder.iterdir()) < 25_000
        assert "stacks2" in (folder / "LEFT_OUT").read_text()
    assert len(list(tmp_path.iterdir())) == incident.FOLDERS
    assert folder.exists()
    assert folder.parent == tmp_path


def test_an_agent_collects_an_incident_of_its_ranks_on_demand(job):
    job = job("asleep", 2, watch=False)
    told, forwarded = [], []
    found = Diagnosis("n0", job.socket, forwarded.append, told.append, PACE)

    async def wait_and_collect() -> Path:
        watching = asyncio.create_task(found.run())
        until = time.monotonic() + 60
        while not any(r.seq == 6 for each in forwarded for r in each.collectives):
            assert time.monotonic() < until
            await asyncio.sleep(0.05)
        folder = await found.collect("watched", "a test", 0.2)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return folder

    folder = asyncio.run(wait_and_collect())
    report = json.loads((folder / "incident.json").read_text())
    assert sorted(each["rank"] for each in report["ranks"]) == [0, 1]
    assert "falls_asleep" in (folder / "rank1.stacks2.txt").read_text()
    assert folder.parent == found.incidents
    assert not told
