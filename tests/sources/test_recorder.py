"""The Flight Recorder, read from outside, of real jobs."""

import os
import signal
import time

from ckptd.agent import witness, worker_client

AGAIN_S = 8.0


def test_records_of_all_ranks_match(job):
    job = job("mixed", 3)
    for rank in range(3):
        job.wait(f"records of rank {rank}", lambda rank=rank: len(job.records(rank)) > 40)
    job.stop()
    world = [{key for key in job.records(rank) if key[0] == "0"} for rank in range(3)]
    common = world[0] & world[1] & world[2]
    assert len(common) > 30
    assert {op for _, _, op, _ in common} == {"all_reduce", "broadcast", "all_gather", "barrier"}
    for key in common:
        sizes = {job.records(rank)[key].size_bytes for rank in range(3)}
        assert len(sizes) == 1, (key, sizes)
    numbers = [sorted(seq for _, seq, _, _ in each) for each in world]
    assert all(each == list(range(each[0], each[-1] + 1)) for each in numbers)
    infos = job.groups(0)
    assert infos["0"].ranks == (0, 1, 2)
    (pair,) = [info for info in infos.values() if info.description == "tp"]
    assert (pair.ranks, pair.backend) == ((0, 1), "gloo")
    assert any(key[0] == pair.group for key in job.records(0))
    assert not any(key[0] == pair.group for key in job.records(2))


def test_a_stopped_rank_has_not_entered_and_the_others_wait(job):
    job = job("mixed", 3)
    for rank in range(3):
        job.wait(f"records of rank {rank}", lambda rank=rank: len(job.records(rank)) > 20)
    os.kill(job.pid(2), signal.SIGSTOP)
    job.wait("rank 2 to be silent", lambda: job.view(2).silent_since is not None)
    stopped_at = time.monotonic()

    def stop_again() -> None:
        nonlocal stopped_at
        os.kill(job.pid(2), signal.SIGCONT)
        job.wait("rank 2 to answer", lambda: job.view(2).silent_since is None)
        os.kill(job.pid(2), signal.SIGSTOP)
        stopped_at = time.monotonic()

    def waited_for() -> set[tuple[str, int, str, int | None]]:
        """What ranks 0 and 1 have entered, and rank 2 has not."""
        entered = [
            {(each.group, each.seq, each.op, each.peer) for each in job.open(rank)}
            for rank in (0, 1)
        ]
        common = {key for key in entered[0] & entered[1] if key[0] == "0"}
        found = common - job.records(2).keys()
        if not found and time.monotonic() > stopped_at + AGAIN_S:
            stop_again()  # it was stopped within an operation, which it has entered
        return found

    key = max(job.wait("ranks 0 and 1 to wait for rank 2", waited_for), key=lambda key: key[1])
    seen = len([each for each in job.observed if each.rank == 0])
    before = job.view(0).answer_s
    job.watcher.hurry(60.0)
    job.wait("rank 0 to be read again", lambda: job.view(0).answer_s != before)
    assert job.view(0).silent_since is None
    assert len([each for each in job.observed if each.rank == 0]) >= seen
    os.kill(job.pid(2), signal.SIGCONT)
    job.wait("rank 2 to answer", lambda: job.view(2).silent_since is None)
    job.wait("it to catch up", lambda: key in job.records(2))
    job.stop()


def test_a_rank_that_holds_the_interpreter_lock_still_answers(job):
    job = job("holds_the_lock", 2)
    job.wait("rank 0 to hold it", lambda: job.said(0).get("holds"))
    job.wait("rank 1 to wait", lambda: any(record.seq == 6 for record in job.open(1)))
    job.wait("no pulse", lambda: time.time() - job.view(0).pulse.at > 1.0)
    server = job.watcher.worker_server(job.view(0))
    raw = job.call(worker_client.ask(server, worker_client.ENTRIES, 10.0))
    sample = job.call(witness.sample(job.view(0).introduction, job.watcher.directory))
    assert b'"collective_seq_id":5' in raw
    assert "holds_the_lock" in sample.stacks
    assert not any(key[1] == 6 for key in job.records(0))
    (job.directory / "pipe").open("wb").close()
    job.wait("it to enter", lambda: any(key[1] == 6 for key in job.records(0)))
    job.stop()


def test_an_overrun_is_a_gap(job):
    job = job("hurries", 2, TORCH_FR_BUFFER_SIZE="16")
    for rank in range(2):
        job.wait(f"a gap of rank {rank}", lambda rank=rank: len(job.gaps(rank)) > 3)
    job.stop()
    for rank in range(2):
        seen = {seq for _, seq, _, _ in job.records(rank)}
        for gap in job.gaps(rank):
            assert not seen & set(range(gap.first_seq, gap.last_seq + 1))
        last = max(seen)
        unknown = {n for gap in job.gaps(rank) for n in range(gap.first_seq, gap.last_seq + 1)}
        assert seen | unknown >= set(range(1, last + 1))


def test_a_group_that_is_made_anew_counts_from_the_beginning(job):
    job = job("again", 2)
    job.wait("the first group", lambda: ("0", 20, "all_reduce", None) in job.records(0))
    seven = job.wait(
        "the second one",
        lambda: [
            r for each in list(job.observed) for r in each.collectives if r.size_bytes == 7 * 4
        ],
    )
    assert {record.seq for record in seven} <= {1, 2, 3, 4, 5}
    job.stop()


def test_a_dead_trainer_is_forgotten_and_its_files_are_taken_away(job):
    job = job("mixed", 2)
    assert job.view(0).introduction.pid == job.pid(0)
    for rank in range(2):
        os.kill(job.pid(rank), signal.SIGKILL)
    job.wait("it to be forgotten", lambda: not job.watcher.views())
    job.wait("its files to go", lambda: not list(job.watcher.directory.iterdir()))


def test_with_the_recorder_off_it_says_what_is_not_seen(job):
    job = job("mixed", 2, TORCH_FR_BUFFER_SIZE="0")
    problems = job.wait("the problem", lambda: job.view(0).problems)
    assert any("Flight Recorder is off; set TORCH_FR_BUFFER_SIZE=256" in text for text in problems)
    job.stop()
    assert not job.records(0)


def test_watching_can_be_switched_off(job):
    job = job("mixed", 2, CKPTD_WATCH="0")
    job.pid(0)
    job.stop()
    assert not job.observed
