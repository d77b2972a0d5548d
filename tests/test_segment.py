"""The segment format: layouts of random tensors, damaged headers, records with digests."""

import json
import math
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ckptd.errors import CorruptData
from ckptd.ids import SnapshotId
from ckptd.segment import (
    DTYPE_BYTES,
    LENGTH_BYTES,
    OBJECTS_NAME,
    Layout,
    ParitySidecar,
    Sidecar,
    TensorSpec,
    checked_record,
    parse_header,
    plan_layout,
    read_checked_record,
)

ID = SnapshotId("job", 3, 120)
# What NumPy can hold; the others are checked by size and offset alone.
NUMPY = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2",
         "I32": "<i4", "U32": "<u4", "F32": "<f4",
         "I64": "<i8", "U64": "<u8", "F64": "<f8"}  # fmt: skip

names = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12
).filter(lambda name: name not in (OBJECTS_NAME, "__metadata__") and "@" not in name)


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    """A whole tensor or a chunk of a sharded one, scalars and empty ones among them."""
    name = draw(names)
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    aliases = tuple(draw(st.lists(names, max_size=2, unique=True)))
    if not draw(st.booleans()):
        return TensorSpec(name, dtype, shape, aliases=aliases)
    offset = tuple(draw(st.integers(0, 9)) for _ in shape)
    whole = tuple(o + extent for o, extent in zip(offset, shape, strict=True))
    return TensorSpec(name, dtype, shape, whole, offset, aliases)


tensor_sets = st.lists(specs(), max_size=8, unique_by=lambda spec: spec.key)


def sealed(layout: Layout, id: SnapshotId = ID, rank: int = 1, objects_bytes: int = 5) -> bytearray:
    """A whole segment whose data bytes are 0, 1, 2 and so on (bools stay bools)."""
    raw = bytearray(layout.header(id, rank, 4, objects_bytes))
    raw += bytes(number % 251 for number in range(layout.size_bytes - layout.data_begin))
    for placed in layout.tensors:
        if placed.spec.dtype == "BOOL":
            raw[placed.begin : placed.end] = bytes(placed.end - placed.begin)
    return raw


def small() -> bytearray:
    return sealed(
        plan_layout(
            [
                TensorSpec("model.w", "F32", (2, 3), aliases=("model.tied",)),
                TensorSpec("model.chunk", "BF16", (2, 2), (8, 2), (4, 0)),
                TensorSpec("model.empty", "I64", (0, 4)),
                TensorSpec("optimizer.w.step", "F32", ()),
            ],
            64,
        )
    )


def with_header(raw: bytearray, change: dict[str, object]) -> bytearray:
    """`raw` with entries of its header (or of its metadata) replaced, in the same room."""
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[LENGTH_BYTES : LENGTH_BYTES + length])
    for key, value in change.items():
        (header["__metadata__"] if key in header["__metadata__"] else header)[key] = value
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    return bytearray(raw[:LENGTH_BYTES] + text.ljust(length) + raw[LENGTH_BYTES + length :])


class TestLayout:
    @settings(max_examples=40, deadline=None)
    @given(tensor_sets, st.integers(0, 100))
    def test_aligned_and_without_holes(self, tensors: list[TensorSpec], capacity: int) -> None:
        layout = plan_layout(tensors, capacity)
        assert sorted(p.spec.key for p in layout.tensors) == sorted(t.key for t in tensors)
        position = layout.data_begin
        for placed in layout.tensors:
            assert placed.begin == position
            assert placed.begin % DTYPE_BYTES[placed.spec.dtype] == 0
            assert placed.end - placed.begin == placed.spec.size_bytes
            position = placed.end
        assert layout.objects_begin == position
        assert layout.size_bytes == position + layout.objects_capacity
        assert capacity <= layout.objects_capacity <= capacity + max(4096, layout.size_bytes // 64)

    @settings(max_examples=40, deadline=None)
    @given(
        tensor_sets,
        st.integers(0, 2**63),
        st.integers(0, 2**63),
        st.text("abcXYZ019._-", min_size=1, max_size=128),
    )
    def test_a_header_round_trips(
        self, tensors: list[TensorSpec], life: int, step: int, job: str
    ) -> None:
        layout = plan_layout(tensors, 40)
        id = SnapshotId(job, life, step)
        raw = sealed(layout, id, rank=2**31, objects_bytes=40)
        assert len(layout.header(id, 2**31, 4, 40)) == layout.data_begin
        header = parse_header(memoryview(raw), "it")
        assert (header.id, header.rank, header.world_size) == (id, 2**31, 4)
        assert header.fingerprint == layout.fingerprint
        assert header.tensors == {placed.spec.key: placed for placed in layout.tensors}
        assert (header.objects_begin, header.objects_bytes) == (layout.objects_begin, 40)
        for spec in tensors:
            for name in (spec.name, *spec.aliases):
                assert spec in [placed.spec for placed in header.by_name()[name]]

    def test_the_data_does_not_move_from_step_to_step(self) -> None:
        layout = plan_layout([TensorSpec("w", "F32", (3,))], 10)
        first = layout.header(SnapshotId("j", 1, 9), 0, 1, 0)
        assert len(first) == len(layout.header(SnapshotId("j" * 128, 2**40, 10**15), 9, 1, 10))

    def test_order_of_tensors_does_not_matter_but_shape_does(self) -> None:
        one, two = TensorSpec("a", "F32", (3,)), TensorSpec("b", "I64", (2,))
        assert plan_layout([one, two], 8) == plan_layout([two, one], 8)
        other = plan_layout([TensorSpec("a", "F32", (3, 1)), two], 8)
        assert other.fingerprint != plan_layout([one, two], 8).fingerprint

    def test_two_tensors_of_one_name_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"same name: w$"):
            plan_layout([TensorSpec("w", "F32", ()), TensorSpec("w", "I64", ())], 0)

    @pytest.mark.parametrize("name", [OBJECTS_NAME, "__metadata__"])
    def test_names_that_the_format_uses_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="the format uses that name"):
            plan_layout([TensorSpec(name, "F32", ())], 0)


class TestTheSafetensorsLibrary:
    @settings(deadline=None, max_examples=40)
    @given(tensors=tensor_sets)
    def test_opens_a_sealed_one_and_refuses_an_unsealed_one(
        self, tensors: list[TensorSpec], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        layout = plan_layout(tensors, 24)
        raw = sealed(layout)
        path = tmp_path_factory.getbasetemp() / "segment.safetensors"
        path.write_bytes(raw)
        with safe_open(path, framework="np") as file:
            assert sorted(file.keys()) == sorted([*(t.key for t in tensors), OBJECTS_NAME])
            assert file.metadata()["step"] == "120"
            assert all(isinstance(value, str) for value in file.metadata().values())
            for placed in layout.tensors:
                if placed.spec.dtype in NUMPY:
                    found = file.get_tensor(placed.spec.key)
                    want = np.frombuffer(
                        bytes(raw[placed.begin : placed.end]), NUMPY[placed.spec.dtype]
                    )
                    assert found.shape == placed.spec.shape
                    assert found.tobytes() == want.tobytes()
        path.write_bytes(bytes(LENGTH_BYTES) + raw[LENGTH_BYTES:])
        with pytest.raises(SafetensorError), safe_open(path, framework="np"):
            pass


class TestDamagedHeaders:
    """Whatever lies there: CorruptData, and nothing else."""

    def test_unsealed(self) -> None:
        raw = small()
        raw[:LENGTH_BYTES] = bytes(LENGTH_BYTES)
        with pytest.raises(CorruptData, match="it is not sealed"):
            parse_header(memoryview(raw), "it")

    @settings(max_examples=50)
    @given(st.data())
    def test_truncated(self, data: st.DataObject) -> None:
        raw = small()
        length = data.draw(st.integers(0, len(raw) - 1))
        with pytest.raises(CorruptData):
            parse_header(memoryview(raw)[:length], "it")

    def test_longer_than_it_says(self) -> None:
        with pytest.raises(CorruptData, match="its header says"):
            parse_header(memoryview(small() + b"x"), "it")

    @settings(max_examples=250, deadline=None)
    @given(st.data())
    def test_flipped_bits(self, data: st.DataObject) -> None:
        """What still parses has the extents of the original: only names can have changed."""
        raw = small()
        good = parse_header(memoryview(raw), "it")
        text_end = bytes(raw).rindex(b"}", 0, good.objects_begin) + 1
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, text_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            header = parse_header(memoryview(raw), "it")
        except CorruptData:
            return
        for placed in header.tensors.values():
            assert good.objects_begin - 200 <= placed.begin <= placed.end <= good.objects_begin
            assert all(type(extent) is int for extent in placed.spec.shape)
        assert header.objects_begin + header.objects_bytes <= len(raw)

    @settings(max_examples=120)
    @given(st.binary(max_size=200), st.booleans())
    def test_foreign_bytes(self, body: bytes, framed: bool) -> None:
        raw = struct.pack("<Q", len(body)) + body if framed else body
        with pytest.raises(CorruptData):
            parse_header(raw, "it")

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )

    @settings(max_examples=120, deadline=None)
    @given(
        st.sampled_from(
            ["__metadata__", "format", "version", "job", "life", "step", "rank", "world_size",
             "layout", "objects_bytes", "chunks", OBJECTS_NAME, "model.w", "extra"]
        ),
        json_values,
    )  # fmt: skip
    def test_any_value_anywhere(self, key: str, value: object) -> None:
        raw = with_header(small(), {key: value})
        try:
            header = parse_header(memoryview(raw), "it")
        except CorruptData:
            return
        assert header.objects_begin + header.objects_bytes <= len(raw)

    @settings(max_examples=120, deadline=None)
    @given(
        st.sampled_from(["model.w", OBJECTS_NAME]),
        st.sampled_from(["dtype", "shape", "data_offsets"]),
        json_values | st.lists(st.integers(-8, 80) | st.floats(-8, 80), max_size=3),
    )
    def test_any_value_in_an_entry(self, key: str, field: str, value: object) -> None:
        raw = small()
        (length,) = struct.unpack_from("<Q", raw)
        entry = json.loads(raw[LENGTH_BYTES : LENGTH_BYTES + length])[key]
        assume(entry[field] != value or field == "dtype")
        raw = with_header(raw, {key: {**entry, field: value}})
        try:
            header = parse_header(memoryview(raw), "it")
        except CorruptData:
            return
        if key == "model.w":
            spec = header.tensors[key].spec
            assert math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] == 24

    def test_nested_without_end(self) -> None:
        text = b"[" * 200_000
        with pytest.raises(CorruptData, match="damaged header"):
            parse_header(struct.pack("<Q", len(text)) + text, "it")

    def test_another_safetensors_file(self) -> None:
        text = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        with pytest.raises(CorruptData, match="not a ckptd segment"):
            parse_header(struct.pack("<Q", len(text)) + text + b"\0", "it")

    def test_another_format_version(self) -> None:
        with pytest.raises(CorruptData, match="segment format 2, this ckptd reads 1"):
            parse_header(with_header(small(), {"version": "2"}), "it")


class TestRecords:
    def sidecar(self) -> Sidecar:
        return Sidecar(ID, 1, 4, 10_000, 4096, bytes(range(24)))

    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(checked_record(self.sidecar()))
        assert read_checked_record(path, Sidecar) == self.sidecar()
        assert self.sidecar().cells == 3

    def test_a_flipped_bit_anywhere_is_noticed(self, tmp_path: Path) -> None:
        raw, path = checked_record(self.sidecar()), tmp_path / "record"
        for place in range(len(raw)):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            with pytest.raises(CorruptData, match="its checksum does not match"):
                read_checked_record(path, Sidecar)

    def test_every_truncation_is_noticed(self, tmp_path: Path) -> None:
        raw, path = checked_record(self.sidecar()), tmp_path / "record"
        for length in range(len(raw)):
            path.write_bytes(raw[:length])
            with pytest.raises(CorruptData, match="its checksum does not match"):
                read_checked_record(path, Sidecar)

    def test_another_kind_of_record(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(checked_record(self.sidecar()))
        with pytest.raises(CorruptData, match="is not a ParitySidecar"):
            read_checked_record(path, ParitySidecar)

    def test_text_that_is_not_utf_8(self, tmp_path: Path) -> None:
        """With the right checksum: made by something else, not damaged."""

        class Odd(msgspec.Struct):
            id: tuple[bytes, int, int]

        path = tmp_path / "record"
        raw = bytearray(msgspec.msgpack.encode(Odd((b"\xff\xfe", 1, 1))))
        raw[raw.index(b"\xc4\x02")] = 0xA2  # a string where there were bytes
        del raw[raw.index(b"\x02\xff")]
        path.write_bytes(checked_record(msgspec.Raw(bytes(raw))))  # type: ignore[arg-type]
        with pytest.raises(CorruptData, match="is not a Sidecar"):
            read_checked_record(path, Sidecar)

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_checked_record(tmp_path / "record", Sidecar)
