"""Non-tensor state: what can be saved comes back as it was, what cannot is named, no code runs."""

import collections
import datetime
import enum
import io
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import CorruptData, UnsavableState
from ckptd.trainer.objects import dump_objects, load_objects


def again(value: Any) -> Any:
    return load_objects(dump_objects(value))


def same(one: Any, two: Any) -> bool:
    """Equal in type and in every bit, all the way down."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and one.tolist() == two.tolist()
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, float):
        return one.hex() == two.hex()
    return bool(one == two)


class Colour(enum.IntEnum):
    RED = 1


Pair = collections.namedtuple("Pair", "a b")


class Custom:
    pass


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
    ),
    max_leaves=10,
)  # fmt: skip


class TestComesBack:
    @settings(max_examples=60, deadline=None)
    @given(plain)
    def test_nested_plain_values(self, value: Any) -> None:
        assert same(again(value), value)

    @pytest.mark.parametrize(
        "value",
        [
            b"", b"\x00\xff", 2**1999, -(2**3000), 10**5000, "\ud800", -0.0, float("inf"), 1e-310,
            {}, [], (), set(), {(1, "a"): 2, None: 3, 1.5: 4}, {1, (2, "x"), None},
            OrderedDict([("b", 1), ("a", OrderedDict())]), [(1, {"a": [b"", 2**4000]})],
            list(range(70_000)), {n: str(n) for n in range(5_000)},
            torch.Size([1, 2]), torch.device("cuda:1"), torch.bfloat16, "__ckptd_ndarray__",
        ],
        ids=lambda value: type(value).__name__,
    )  # fmt: skip
    def test_odd_ones(self, value: Any) -> None:
        assert same(again(value), value)

    def test_nan(self) -> None:
        assert str(again(float("nan"))) == "nan"

    @pytest.mark.parametrize(
        "dtype",
        ["?", "i1", "u2", "<i4", ">i4", "i8", "u8", "f2", "<f4", ">f8", "c8", "c16", "g",
         "U5", "S3", "V8", "M8[ns]", "m8[s]"],
    )  # fmt: skip
    @pytest.mark.parametrize("shape", [(), (0,), (0, 3), (4,), (2, 3)])
    def test_numpy_arrays(self, dtype: str, shape: tuple[int, ...]) -> None:
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        raw = bytes(number % 2 for number in range(size)) if kind.kind != "U" else bytes(size)
        array = np.frombuffer(raw, kind).reshape(shape)
        found = again({"a": [array]})["a"][0]
        assert same(found, array)
        assert found.flags.writeable

    def test_numpy_views(self) -> None:
        array = np.arange(24).reshape(4, 6)
        for view in (array.T, array[::2, 1:5:3], array[::-1], np.asfortranarray(array)):
            assert same(again(view), view)

    def test_a_memory_mapped_array(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(5))
        assert same(again(np.load(tmp_path / "a.npy", mmap_mode="r")), np.arange(5))

    @pytest.mark.parametrize(
        ("scalar", "plain"),
        [(np.float32(0.1), float(np.float32(0.1))), (np.int64(-(2**63)), -(2**63)),
         (np.uint64(2**64 - 1), 2**64 - 1), (np.bool_(True), True), (np.complex64(1j), 1j),
         (np.float16(2), 2.0), (np.str_("x"), "x"), (np.bytes_(b""), b"")],
    )  # fmt: skip
    def test_numpy_scalars_become_plain(self, scalar: Any, plain: Any) -> None:
        assert same(again({"x": (scalar,)}), {"x": (plain,)})
        assert same(again({scalar: 1} if plain else {}), {plain: 1} if plain else {})

    def test_random_states_continue_where_they_were(self) -> None:
        random.seed(3)
        np.random.seed(3)
        random.gauss(0, 1)
        np.random.standard_normal()
        states = again((random.getstate(), np.random.get_state(), torch.get_rng_state()))
        want = (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        found = (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
        assert found == want

    def test_a_numpy_generators_state(self) -> None:
        generator = np.random.default_rng(1)
        state = again(generator.bit_generator.state)
        want = generator.random(4).tolist()
        other = np.random.default_rng(2)
        other.bit_generator.state = state
        assert other.random(4).tolist() == want

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.tensor(3), torch.empty(0, 4), torch.arange(6).reshape(2, 3).T,
            torch.arange(10)[3:5], torch.arange(10)[::3], torch.ones(1).expand(5),
            torch.tensor([True, False]), torch.tensor([1.5], dtype=torch.bfloat16),
            torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag,
            torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 2,
            torch.tensor([7], dtype=torch.uint16),
        ],
        ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
    )  # fmt: skip
    def test_tensors(self, tensor: torch.Tensor) -> None:
        found = again([tensor])[0]
        assert type(found) is torch.Tensor
        assert not found.requires_grad
        assert same(found, tensor.detach().clone())

    def test_a_view_does_not_bring_its_whole_storage(self) -> None:
        assert len(dump_objects(torch.zeros(1_000_000)[:3])) < 4096


class TestCannotBeSaved:
    @pytest.mark.parametrize(
        ("value", "path"),
        [
            ({"data": [1, {"when": datetime.datetime(2026, 1, 1)}]}, "['data'][1]['when'] is a da"),
            ({"lr": lambda step: step}, "['lr'] is a builtins.function"),
            ((1, Custom()), "[1] is a "),
            ({"a": np.array([None, 1])}, "['a'] is a NumPy array of dtype object"),
            ({"a": np.zeros(2, [("x", "i4")])}, "['a'] is a NumPy array of dtype [('x', '<i4')]"),
            ({"a": np.ma.array([1, 2], mask=[0, 1])}, "['a'] is a numpy.ma"),
            ([Colour.RED], "[0] is a "),
            ({"p": Pair(1, 2)}, "['p'] is a "),
            ({Colour.RED: 1}, " key <Colour.RED: 1> is a "),
            ({"s": {frozenset([1])}}, "['s'] key frozenset({1}) is a "),
            ({"b": bytearray(b"x")}, "['b'] is a builtins.bytearray"),
            ({"when": np.datetime64("2020-01-01", "ns")}, "['when'] is a numpy.datetime64"),
            ({"x": np.longdouble(1)}, "['x'] is a numpy.longdouble"),
            ({"t": torch.eye(2).to_sparse()}, "['t'] is a torch.sparse_coo tensor on cpu"),
            ({"t": torch.empty(2, device="meta")}, "['t'] is a torch.strided tensor on meta"),
            ({"d": {"__ckptd_ndarray__": 1}}, "['d'] has the key '__ckptd_ndarray__'"),
            ({"d": {float("nan"): 1}}, "['d'] has NaN as a key"),
            ({"d": {b"": 1}}, "['d'] has a key that cannot be saved: b''"),
            ({"d": {2**3000: 1}}, "['d'] has a key that cannot be saved: 123"),
            (Custom(), "the state is a "),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_named_by_its_path(self, value: Any, path: str) -> None:
        with pytest.raises(UnsavableState) as caught:
            dump_objects(value)
        assert str(caught.value).startswith(path)

    def test_a_list_that_contains_itself(self) -> None:
        loop: list[Any] = []
        loop.append(loop)
        with pytest.raises(UnsavableState, match="contains itself"):
            dump_objects({"extra": loop})


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


class TestNoCodeRuns:
    def test_a_pickle(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptData, match="cannot be read"):
            load_objects(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
        assert not (tmp_path / "ran").exists()

    def test_in_a_file_of_torch_save(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"step": 1, "extra": [Bomb(tmp_path / "ran")]}, buffer)
        with pytest.raises(CorruptData, match="cannot be read"):
            load_objects(buffer.getvalue())
        assert not (tmp_path / "ran").exists()
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert (tmp_path / "ran").exists()  # it would have run

    @pytest.mark.parametrize(
        "marked",
        [
            {"__ckptd_ndarray__": "O", "shape": [1], "data": torch.zeros(8, dtype=torch.uint8)},
            {"__ckptd_ndarray__": "f4", "shape": [9], "data": torch.zeros(8, dtype=torch.uint8)},
            {"__ckptd_ndarray__": "f4"},
            {"__ckptd_ndarray__": "f4", "shape": [0], "data": "text"},
            {"__ckptd_int__": "zzz"},
        ],
        ids=str,
    )
    def test_a_marked_value_that_makes_no_sense(self, marked: Any) -> None:
        buffer = io.BytesIO()
        torch.save([marked], buffer)
        with pytest.raises(CorruptData, match="cannot be read"):
            load_objects(buffer.getvalue())

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_damaged_bytes(self, data: st.DataObject) -> None:
        """They give CorruptData, or a value: the digests say whether it is the right one."""
        raw = bytearray(dump_objects({"a": np.arange(3), "b": [1, 2.5, "x", b""]}))
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
        del raw[data.draw(st.integers(len(raw) // 2, len(raw))) :]
        try:
            load_objects(bytes(raw))
        except CorruptData:
            return

    def test_an_empty_region(self) -> None:
        with pytest.raises(CorruptData):
            load_objects(b"")
