"""What an agent tells about its ranks: small, the same operations everywhere, nothing made up."""

from math import isnan

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ckptd.collectives import Collective, GroupInfo, plain_op, size_class
from ckptd.sketches import SAMPLES_PER_SKETCH, Aggregator, Sketch, is_sampled, sample, unpack

WORLD = GroupInfo("world", (0, 1), "gloo")


def record(seq: int, rank: int = 0, **more: object) -> Collective:
    given: dict[str, object] = {
        "group": "world",
        "op": "all_reduce",
        "size_bytes": 1 << 20,
        "entered_at": 100.0 + seq,
        "resolution_s": 1e-6,
        "ended": True,
    }
    return Collective(seq=seq, rank=rank, **(given | more))  # type: ignore[arg-type]


def aggregator(*groups: GroupInfo) -> Aggregator:
    made = Aggregator("job", 1, "node-a")
    for group in groups or (WORLD,):
        made.learn(group)
    return made


def seqs(sketch: Sketch) -> tuple[int, ...]:
    return tuple(each.seq for each in unpack(sketch.samples))


@given(seq=st.integers(1, 1 << 40), level=st.integers(1, 20))
def test_samples_of_a_level_are_among_those_below(seq: int, level: int) -> None:
    assert not is_sampled(seq, level) or is_sampled(seq, level - 1)


@given(start=st.integers(0, 1 << 30), level=st.integers(0, 8))
def test_one_operation_of_each_block_is_sampled(start: int, level: int) -> None:
    block = start << level
    assert sum(is_sampled(seq, level) for seq in range(block, block + (1 << level))) == 1


def test_agents_that_see_different_numbers_of_operations_sample_the_same_ones() -> None:
    few, many = sample(range(100, 130), 8), sample(range(100, 400), 8)
    assert len(few) <= 8
    assert len(many) <= 8
    assert set(many) & set(range(100, 130)) <= set(few)


def test_positions_and_times_of_two_ranks() -> None:
    agent = aggregator()
    for seq in (1, 2, 3):
        agent.add(record(seq, 0))
        agent.add(record(seq, 1, ended=seq < 3))
    sketch = agent.sketch(at=110.0)
    assert [part.ranks for part in sketch.parts or ()] == [(0, 1)]
    assert sketch.entered == (3, 3)
    assert sketch.ended == (3, 2)
    assert isnan(sketch.waiting_s[0])
    assert sketch.waiting_s[1] == 7.0
    assert set(seqs(sketch)) == {1, 2, 3}
    assert set(sketch.kinds) == {("all_reduce", 20)}


def test_the_parts_are_sent_once_and_again_on_request() -> None:
    agent = aggregator()
    agent.add(record(1))
    first, second, third = (agent.sketch(1.0), agent.sketch(2.0), agent.sketch(3.0, whole=True))
    assert first.parts is not None
    assert second.parts is None
    assert third.parts == first.parts
    agent.add(record(1, 1))
    assert agent.sketch(4.0).layout == first.layout + 1


def test_a_record_that_is_polled_again_changes_nothing() -> None:
    agent = aggregator()
    for _ in range(3):
        agent.add(record(1, duration_s=0.5))
    sketch = agent.sketch(2.0)
    assert seqs(sketch) == (1,)
    assert sketch.waited_s == (0.5,)


def test_a_gap_is_unknown_and_not_absence() -> None:
    agent = aggregator()
    agent.add(record(1, ended=False))
    agent.add(record(9, ended=False))
    sketch = agent.sketch(20.0)
    assert sketch.unknown == 7
    assert sketch.entered == (9,)
    assert sketch.ended == (0,)  # the first is still open, as far as is known


def test_a_source_that_is_joined_midway_takes_the_past_for_done() -> None:
    agent = aggregator()
    agent.add(record(500, ended=False))
    sketch = agent.sketch(700.0)
    assert (sketch.entered, sketch.ended, sketch.unknown) == ((500,), (499,), 0)


def test_the_status_of_a_group_is_enough_for_positions() -> None:
    agent = aggregator()
    agent.position("world", 0, entered=12, ended=11)
    sketch = agent.sketch(1.0)
    assert (sketch.entered, sketch.ended) == ((12,), (11,))
    agent.position("world", 0, entered=10, ended=9)
    assert agent.sketch(2.0).entered == (12,)  # an older answer


def test_status_before_records_loses_no_times() -> None:
    agent = aggregator()
    agent.position("world", 0, entered=3, ended=3)
    agent.add(record(2))
    agent.add(record(3))
    assert seqs(agent.sketch(9.0)) == (2, 3)


def test_waiting_in_a_group_on_one_node_is_added_up_from_entering_times() -> None:
    agent = aggregator()
    for rank in (0, 1):
        agent.add(record(1, rank))  # until both are known, the group may be elsewhere too
    agent.add(record(2, 0))
    agent.add(record(2, 1, entered_at=102.25))
    sketch = agent.sketch(103.0)
    assert sketch.waited_s == (0.25, 0.0)


def test_when_ranks_last_showed_a_sign_and_were_read() -> None:
    agent = aggregator()
    agent.add(record(1, 0, ended=False))
    agent.read(0, 101.5)
    agent.read(1, 101.6)
    first = agent.sketch(102.0)
    assert first.still_s == (1.0,)
    assert first.read_s == (0.5,)
    assert isnan(first.gap_s)
    agent.add(record(1, 0, duration_s=2.5))
    agent.add(record(3, 0, ended=False))
    assert agent.sketch(104.0).still_s == (0.5,)  # the end of the first came after the entry
    agent.add(record(9, 1))
    last = agent.sketch(110.0)
    assert last.still_s == (6.5, 1.0)
    assert isnan(last.gap_s)


def test_the_longest_time_between_two_signs_of_a_rank() -> None:
    agent = aggregator()
    for seq in (1, 2, 5, 6):
        agent.add(record(seq, 0))
        agent.add(record(seq, 1, entered_at=100.0 + 0.1 * seq))
    assert agent.sketch(107.0).gap_s == 3.0


def test_in_which_operation_a_rank_waits() -> None:
    agent = aggregator()
    agent.add(record(1, 0))
    assert agent.sketch(101.0).open_kinds == ()
    agent.add(record(2, 0, ended=False, op="gloo:all_gather"))
    agent.add(record(2, 1))
    sketch = agent.sketch(102.0)
    assert [sketch.kinds[kind - 1][0] if kind else "" for kind in sketch.open_kinds] == [
        "all_gather",
        "",
    ]


def test_no_such_sum_for_a_group_that_is_elsewhere_too() -> None:
    agent = aggregator(GroupInfo("world", (0, 1, 2), "gloo"))
    agent.add(record(1, 0))
    agent.add(record(1, 1))
    assert all(isnan(value) for value in agent.sketch(1.0).waited_s)


def test_a_sum_that_lacks_operations_is_none() -> None:
    agent = aggregator()
    agent.add(record(1, duration_s=0.25))
    agent.add(record(2, duration_s=0.5))
    assert agent.sketch(at=110.0).waited_s == (0.75,)
    agent.add(record(4, duration_s=0.5))
    agent.add(record(5, duration_s=0.5))
    sketch = agent.sketch(at=111.0)
    assert isnan(sketch.waited_s[0])
    assert seqs(sketch) == (4, 5)


def test_a_group_whose_ranks_are_not_known_has_a_size_all_the_same() -> None:
    agent = aggregator(GroupInfo("nccl 0x1 Reduce", (), "nccl", "", 8, times_only=True))
    agent.add(record(1, group="nccl 0x1 Reduce", duration_s=0.25))
    (part,) = agent.sketch(at=110.0).parts or ()
    assert (part.size, part.ranks, part.enqueued, part.times_only) == (8, (0,), True, True)


def test_both_ends_of_a_pair_speak_of_the_same_operations() -> None:
    pp = GroupInfo("pp", (0, 1), "gloo", "pp")
    agent = aggregator(pp)
    agent.add(record(1, 0, group="pp", op="gloo:send", peer=1))
    agent.add(record(1, 1, group="pp", op="irecv", peer=0))
    (part,) = agent.sketch(1.0).parts or ()
    assert (part.group, part.ranks, part.pair, part.size) == ("pp:0>1", (0, 1), (0, 1), 2)


def test_a_sketch_is_bounded_and_survives_the_wire() -> None:
    agent = aggregator()
    for seq in range(1, 3001):
        agent.add(record(seq))
    sketch = agent.sketch(1.0)
    assert len(seqs(sketch)) <= SAMPLES_PER_SKETCH
    data = msgspec.msgpack.encode(sketch)
    assert len(data) < 1000
    assert msgspec.msgpack.decode(data, type=Sketch).entered == (3000,)


def test_records_of_unknown_groups_are_left_out() -> None:
    agent = aggregator()
    agent.add(record(1, group="other"))
    assert agent.sketch(1.0).parts == ()


def test_names_and_sizes() -> None:
    assert plain_op("gloo:all_reduce") == "all_reduce"
    assert plain_op("nccl:_all_gather_base") == "all_gather"
    assert plain_op("nccl:_reduce_scatter_base") == "reduce_scatter"
    assert plain_op("allreduce_coalesced") == "all_reduce"
    assert plain_op("all_to_all_single") == "all_to_all"
    assert plain_op("nccl:send 0->1") == "send"
    assert plain_op("broadcast") == "broadcast"
    assert size_class(1 << 20) == size_class((1 << 20) - 5) == 20
    assert GroupInfo("g", (0,), "cpu:gloo,cuda:nccl").enqueued
    assert not GroupInfo("g", (0,), "gloo").enqueued
