"""Who saves what of the state that several ranks hold alike, without asking one another."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import CorruptData, UnsavableState
from ckptd.ids import SnapshotId
from ckptd.segment import DTYPE_BYTES, LENGTH_BYTES, TensorSpec, parse_header
from ckptd.trainer.loading import OpenSegment, SavedState
from ckptd.trainer.plan import Plan, make_plan
from ckptd.trainer.shares import Rows, chunk, cut, fingerprint, is_whole
from ckptd.trainer.state import TORCH_DTYPES, Item

shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 30]), max_size=3).map(tuple)
dtypes = st.sampled_from(["U8", "BF16", "F32", "I64"])


@st.composite
def tapes(draw: st.DrawFn) -> list[TensorSpec]:
    kinds = draw(st.lists(st.tuples(dtypes, shapes), max_size=8))
    return [TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(kinds)]


def rows_of(spec: TensorSpec) -> list[tuple[int, ...]]:
    """The shape of each row, along the first dimension that can be cut."""
    for dim, extent in enumerate(spec.shape):
        if extent != 1:
            return [(*spec.shape[:dim], 1, *spec.shape[dim + 1 :])] * extent
    return [spec.shape]


def cut_slowly(tape: Sequence[TensorSpec], ways: int) -> list[list[set[int]]]:
    """For each piece and tensor the rows whose first byte is in the piece, one by one."""
    total = sum(spec.size_bytes for spec in tape)
    pieces: list[list[set[int]]] = [[set() for _ in tape] for _ in range(ways)]
    position = 0
    for number, spec in enumerate(tape):
        for row, shape in enumerate(rows_of(spec)):
            size = int(np.prod(shape, dtype=int)) * DTYPE_BYTES[spec.dtype]
            # Piece p begins at byte p * total / ways.
            piece = position * ways // total if size else 0
            pieces[piece][number].add(row)
            position += size
    assert position == total
    return pieces


class TestCutting:
    @given(tapes(), st.integers(1, 9))
    def test_each_row_goes_to_the_piece_in_which_it_begins(
        self, tape: list[TensorSpec], ways: int
    ) -> None:
        got = [
            [
                set() if rows.empty else set(range(rows.first, rows.stop)) & set(range(len(all_)))
                for rows, all_ in zip(piece, map(rows_of, tape), strict=True)
            ]
            for piece in cut(tape, ways)
        ]
        assert got == cut_slowly(tape, ways)

    @given(tapes(), st.integers(1, 9))
    def test_pieces_differ_from_their_part_by_less_than_a_row(
        self, tape: list[TensorSpec], ways: int
    ) -> None:
        total = sum(spec.size_bytes for spec in tape)
        row = max(
            (spec.size_bytes // len(rows_of(spec)) for spec in tape if spec.size_bytes), default=1
        )
        for piece in cut(tape, ways):
            size = sum(
                chunk(spec, rows).size_bytes
                for spec, rows in zip(tape, piece, strict=True)
                if not rows.empty
            )
            assert abs(size - total / ways) < row

    @given(tapes(), st.integers(1, 9))
    def test_chunks_cover_each_element_once_and_lie_in_one_run(
        self, tape: list[TensorSpec], ways: int
    ) -> None:
        pieces = cut(tape, ways)
        for number, spec in enumerate(tape):
            times = np.zeros(spec.shape, int)
            taken = [piece[number] for piece in pieces if not piece[number].empty]
            assert taken, "even a tensor of no bytes has a place"
            for rows in taken:
                part = chunk(spec, rows)
                assert (part is spec) == is_whole(spec, rows)
                begin = part.offset or (0,) * len(spec.shape)
                box = tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))
                assert times[box].shape == part.shape
                assert times[box].flags.c_contiguous
                times[box] += 1
            assert (times == 1).all()

    def test_leading_dimensions_of_one_are_passed_over(self) -> None:
        spec = TensorSpec("w", "U8", (1, 1, 6, 2))
        first, second = (piece[0] for piece in cut([spec], 2))
        assert (first, second) == (Rows(2, 0, 3), Rows(2, 3, 6))
        assert chunk(spec, second) == TensorSpec("w", "U8", (1, 1, 3, 2), spec.shape, (0, 0, 3, 0))

    def test_a_chunk_of_a_shard_counts_from_the_start_of_the_whole(self) -> None:
        shard = TensorSpec("w", "F32", (4, 3), (12, 3), (8, 0), ("tied",))
        assert chunk(shard, Rows(0, 1, 3)) == TensorSpec(
            "w", "F32", (2, 3), (12, 3), (9, 0), ("tied",)
        )

    def test_scalars_are_not_cut(self) -> None:
        tape = [TensorSpec(f"s{i}", "F32", ()) for i in range(4)]
        assert cut(tape, 2) == [
            [Rows(None, 0, 1)] * 2 + [Rows(None, 0, 0)] * 2,
            [Rows(None, 1, 1)] * 2 + [Rows(None, 0, 1)] * 2,
        ]


class TestFingerprint:
    SPEC = TensorSpec("w", "F32", (4, 3), (8, 3), (4, 0), ("tied",))

    @pytest.mark.parametrize(
        "other",
        [replace(SPEC, name="v"), replace(SPEC, dtype="I32"), replace(SPEC, shape=(3, 4)),
         replace(SPEC, aliases=())],
    )  # fmt: skip
    def test_tells_tapes_apart(self, other: TensorSpec) -> None:
        assert fingerprint([self.SPEC]) != fingerprint([other])
        assert fingerprint([self.SPEC, other]) != fingerprint([other, self.SPEC])

    def test_is_the_same_for_another_shard(self) -> None:
        assert fingerprint([self.SPEC]) == fingerprint([replace(self.SPEC, offset=(0, 0))])


@dataclass
class World:
    """What each of some ranks has."""

    items: list[list[Item]]
    unique_bytes: int
    """Without what is held twice."""


def _tensor(spec: TensorSpec, numbers: np.random.Generator, transposed: bool) -> torch.Tensor:
    tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    if spec.size_bytes:
        raw = torch.from_numpy(numbers.integers(0, 256, spec.size_bytes, np.uint8))
        tensor = raw.view(tensor.dtype).reshape(spec.shape)
    if transposed and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Ranks with tensors that are alike on all, on groups of them, or on none.

    Groups may have shards of one tensor, or, as stages of a pipeline, other tensors by one name.
    """
    world_size = draw(st.integers(1, 6), label="world_size")
    numbers = np.random.default_rng(draw(st.integers(0, 1000), label="seed"))
    items: list[list[Item]] = [[] for _ in range(world_size)]
    unique_bytes = 0
    for number in range(draw(st.integers(0, 8), label="tensors")):
        place = draw(st.lists(st.integers(0, 2), min_size=world_size, max_size=world_size))
        groups = [[r for r in range(world_size) if place[r] == g] for g in sorted(set(place))]
        alone = draw(st.booleans())
        if alone:
            groups = [[rank] for rank in range(world_size)]
        sharded = draw(st.booleans())
        dtype, shape = draw(dtypes), draw(shapes)
        extents = [draw(st.sampled_from([0, 1, 4, 9])) for _ in groups]
        for index, members in enumerate(groups):
            spec = TensorSpec(f"model.t{number}", dtype, shape)
            if sharded and shape:
                spec = replace(
                    spec,
                    shape=(extents[index], *shape[1:]),
                    global_shape=(sum(extents), *shape[1:]),
                    offset=(sum(extents[:index]), *(0 for _ in shape[1:])),
                )
            volatile = alone and draw(st.booleans())
            ranks = () if alone else tuple(members)
            local = _tensor(spec, numbers, draw(st.booleans()))
            unique_bytes += spec.size_bytes
            for rank in members:
                items[rank].append(Item(spec, local.clone(), volatile, ranks))
    for rank, held in enumerate(items):
        random.Random(rank).shuffle(held)
    return World(items, unique_bytes)


def planned(world: World, once: bool = True) -> list[Plan]:
    """Each rank's plan, made alone."""
    return [make_plan(held, rank, 100, "{}", once) for rank, held in enumerate(world.items)]


def bits(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def segments(world: World, plans: Sequence[Plan]) -> Iterator[OpenSegment]:
    """What the ranks save, each byte of which is written to once."""
    for rank, (plan, held) in enumerate(zip(plans, world.items, strict=True)):
        data, times = bytearray(plan.layout.size_bytes), bytearray(plan.layout.size_bytes)
        for piece in plan.pieces(held):
            raw = bits(piece.source)
            assert len(raw) == piece.end - piece.begin
            data[piece.begin : piece.end] = raw
            for at in range(piece.begin, piece.end):
                times[at] += 1
        placed = plan.layout.tensors
        assert all(times[at] == 1 for p in placed for at in range(p.begin, p.end))
        assert sum(times) == sum(p.end - p.begin for p in placed)
        header = plan.layout.header(SnapshotId("job", 1, 1), rank, len(plans), 0)
        data[: len(header)] = header
        assert len(header) >= LENGTH_BYTES
        yield OpenSegment(parse_header(data, f"rank {rank}"), memoryview(data))


class TestPlans:
    @settings(deadline=None, max_examples=60)
    @given(worlds())
    def test_made_alone_they_save_every_byte_once_and_give_each_rank_all(
        self, world: World
    ) -> None:
        plans = planned(world)
        saved = list(segments(world, plans))
        assert world.unique_bytes == sum(
            placed.spec.size_bytes for plan in plans for placed in plan.layout.tensors
        )
        for rank, held in enumerate(world.items):
            shares = saved[rank].header.shares
            others = {r for ranks in shares for r in ranks} - {rank}
            state = SavedState(saved[rank], [saved[r] for r in others], None)
            assert state.specs == {item.spec.name: item.spec for item in held}
            for item in held:
                assert bits(state.tensor(item.spec.name)) == bits(item.local)

    @settings(deadline=None, max_examples=30)
    @given(worlds())
    def test_without_sharing_each_rank_has_all_it_needs(self, world: World) -> None:
        plans = planned(world, once=False)
        for rank, segment in enumerate(segments(world, plans)):
            assert plans[rank].shares == segment.header.shares == ()
            state = SavedState(segment, [], None)
            for item in world.items[rank]:
                assert bits(state.tensor(item.spec.name)) == bits(item.local)

    @settings(deadline=None, max_examples=60)
    @given(worlds())
    def test_ranks_that_share_can_see_that_they_cut_alike(self, world: World) -> None:
        plans = planned(world)
        for plan, held in zip(plans, world.items, strict=True):
            groups = {item.ranks for item in held if len(item.ranks) > 1}
            assert len(plan.shares) == len(groups)
            for group, share in zip(sorted(groups), plan.shares, strict=True):
                assert share.ranks == len(group)
                assert all(share in plans[member].shares for member in group)

    @settings(deadline=None, max_examples=30)
    @given(worlds())
    def test_a_missing_segment_is_found_out(self, world: World) -> None:
        saved = list(segments(world, planned(world)))
        for rank, own in enumerate(saved):
            here = own.header.by_name()
            if any(
                sum(placed.spec.size_bytes for placed in here.get(spec.name, ())) < spec.size_bytes
                for spec, _ in own.header.elsewhere
            ):
                with pytest.raises(CorruptData, match=rf"ranks \[{rank}\] do not have all of"):
                    SavedState(own, [], None)

    def test_fit_only_what_they_were_made_for(self) -> None:
        item = Item(TensorSpec("model.w", "F32", (4, 3)), torch.zeros(4, 3), False, (0, 1))
        plan = make_plan([item], 0, 100, "{}", once=True)
        assert plan.fits([replace(item, local=torch.ones(4, 3))])
        assert not plan.fits([])
        assert not plan.fits([replace(item, spec=TensorSpec("model.w", "F32", (3, 4)))])

    def test_a_rank_that_is_not_among_those_keeps_all(self) -> None:
        item = Item(TensorSpec("model.w", "F32", (4, 3)), torch.zeros(4, 3), False, (0, 1))
        plan = make_plan([item], 2, 100, "{}", once=True)
        assert plan.shares == ()
        assert [placed.spec for placed in plan.layout.tensors] == [item.spec]

    @pytest.mark.parametrize("ranks", [(), (0, 1), (0, 1, 2, 3)])
    def test_two_tensors_of_one_name_are_refused(self, ranks: tuple[int, ...]) -> None:
        """Also where this rank's segment has neither of them."""
        item = Item(TensorSpec("model.w", "F32", (4,)), torch.zeros(4), False, ranks)
        for rank, other in itertools.product(ranks or (0,), (item, replace(item, ranks=()))):
            with pytest.raises(UnsavableState, match="two tensors have the same name"):
                make_plan([item, other], rank, 100, "{}", once=True)
