"""The timing source in real jobs."""

from ckptd.collectives import Collective


def of(job, rank: int, op: str) -> list[Collective]:
    return [record for record in job.records(rank).values() if record.op == op]


def ended(job, rank: int) -> bool:
    return "digest" in job.said(rank)


def test_everything_has_a_duration_and_training_is_the_same_to_the_last_bit(job):
    jobs = {timing: job("trains", 2, CKPTD_TIMING=timing) for timing in ("1", "0")}
    for each in jobs.values():
        for rank in range(2):
            each.wait(f"rank {rank} to train", lambda e=each, r=rank: ended(e, r))
    timed, plain = jobs["1"], jobs["0"]
    for rank in range(2):
        assert timed.said(rank)["digest"] == plain.said(rank)["digest"]
        # DDP's reducer, FSDP2, batch_isend_irecv, and plain sends.
        timed.wait("all of it", lambda rank=rank: len(of(timed, rank, "reduce_scatter")) >= 10)
        timed.wait("messages", lambda rank=rank: len(of(timed, rank, "recv")) >= 5 + 5 * rank)
        timed.wait("their ends", lambda rank=rank: not timed.open(rank))
        assert {each.source for each in timed.observed if each.collectives} == {"timing"}
        assert {each.source for each in plain.observed if each.collectives} == {"recorder"}
    for rank in range(2):
        records = timed.records(rank).values()
        assert all(r.duration_s is None or r.duration_s >= 0 for r in records)
        untold = {r.op for r in records if r.duration_s is None}
        assert untold <= {"reduce_scatter", "send", "recv"}
        assert {r.op for r in records} >= {"all_reduce", "all_gather", "reduce_scatter", "recv"}
        assert not timed.gaps(rank)
    sends = {(r.seq, r.size_bytes) for r in of(timed, 0, "send") if r.peer == 1}
    receives = {(r.seq, r.size_bytes) for r in of(timed, 1, "recv") if r.peer == 0}
    assert sends == receives
    assert len(sends) == 10
    common = [key[:3] for key in timed.records(0) if key[3] is None]
    assert sorted(common) == sorted(key[:3] for key in timed.records(1) if key[3] is None)
    for job_ in jobs.values():
        job_.stop()


def test_both_sources_number_alike(job):
    timed, plain = job("mixed", 2, CKPTD_TIMING="1"), job("mixed", 2)
    found = []
    for each in (timed, plain):
        each.wait("records", lambda e=each: ("0", 40, "all_gather", None) in e.records(0))
        each.stop()
        found.append({seq: (g, op) for g, seq, op, _ in each.records(0) if g == "0" and seq <= 40})
    timed_ops, plain_ops = found
    common = timed_ops.keys() & plain_ops.keys()
    assert len(common) > 20
    for seq in common:
        # gloo's recorder calls a reduce_scatter what it is made of.
        assert timed_ops[seq] == plain_ops[seq] or timed_ops[seq][1] == "reduce_scatter"


def test_the_rank_that_is_late_waits_for_nobody(job):
    job = job("late", 2, CKPTD_TIMING="1")
    key = ("0", 10, "all_reduce", None)
    job.wait("ten of them", lambda: all(key in job.records(r) for r in range(2)) and both(job, key))
    waited, late = job.records(0)[key], job.records(1)[key]
    assert waited.entered_at < late.entered_at
    assert waited.duration_s > late.duration_s
    job.stop()


def test_what_had_ended_before_it_was_waited_for_has_no_duration(job):
    job = job("overlaps", 2, CKPTD_TIMING="1")

    def over(rank: int, op: str) -> list[Collective]:
        return [record for record in of(job, rank, op) if record.ended]

    job.wait("ten of them", lambda: len(over(0, "send")) > 10 and len(over(1, "recv")) > 10)

    def known(rank: int, op: str) -> float:
        found = over(rank, op)
        return sum(record.duration_s is not None for record in found) / len(found)

    # On a busy machine the one or the other comes late now and then.
    assert known(0, "send") < 0.5 < known(1, "recv")
    job.stop()


def both(job, key) -> bool:
    return all(job.records(rank)[key].ended for rank in range(2))


def test_who_waits_has_entered_and_who_sleeps_has_not(job):
    job = job("asleep", 2, CKPTD_TIMING="1")
    job.wait("rank 0 to wait", lambda: [record.seq for record in job.open(0)] == [6])
    job.wait("rank 1's", lambda: ("0", 5, "all_reduce", None) in job.records(1))
    assert ("0", 6, "all_reduce", None) not in job.records(1)


def test_without_a_place_for_the_ring_the_recorder_is_read(job, tmp_path):
    job = job("mixed", 2, CKPTD_TIMING="1", CKPTD_TEST_NO_RING="1")
    job.wait("records", lambda: len(job.records(0)) > 10)
    assert {each.source for each in job.observed if each.collectives} == {"recorder"}
    assert any("collectives are not timed" in text for text in job.view(0).problems)
    job.stop()
