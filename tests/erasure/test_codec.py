"""The contract of `Codec`, run over every engine, against a slow oracle."""

import contextlib
import mmap
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import MAX_SHARDS, Codec, CodecError, ZfecCodec, open_codec
from ckptd.erasure.codec import self_test
from ckptd.erasure.isal import IsalCodec, Library, load_bundled, load_system

from . import oracle


def _isal_engines() -> Iterator[Any]:
    """ISA-L from each place that has it; where the bundled one is missing, its tests are skipped.

    Few machines have one of the system's, and none needs it.
    """
    try:
        yield pytest.param(partial(IsalCodec, library=load_bundled()), id="isal-bundled")
    except CodecError as error:
        yield pytest.param(None, id="isal-bundled", marks=pytest.mark.skip(reason=str(error)))
    with contextlib.suppress(CodecError):
        yield pytest.param(partial(IsalCodec, library=load_system()), id="isal-system")


ENGINES = [pytest.param(ZfecCodec, id="zfec"), *_isal_engines()]

every_engine = pytest.mark.parametrize("engine", ENGINES)
geometries = st.tuples(st.integers(1, 12), st.integers(1, 4))


def random_shards(count: int, length: int, seed: int = 0) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(length) for _ in range(count)]


def encode(codec: Codec, data: Sequence[Any]) -> list[bytes]:
    parity = [bytearray(memoryview(data[0]).nbytes) for _ in range(codec.parity_shards)]
    codec.encode(data, parity)
    return [bytes(row) for row in parity]


def decode(codec: Codec, shards: Mapping[int, Any], wanted: Sequence[int]) -> dict[int, bytes]:
    length = memoryview(next(iter(shards.values()))).nbytes
    out = {number: bytearray(b"\xee" * length) for number in wanted}
    codec.decode(shards, out)
    return {number: bytes(shard) for number, shard in out.items()}


class TestTheCode:
    """Which bytes come out."""

    @every_engine
    @settings(deadline=None, max_examples=150)
    @given(geometry=geometries, length=st.integers(1, 300), seed=st.integers(0, 2**32))
    def test_parity_has_the_bytes_of_the_oracle(
        self, engine: Callable[[int, int], Codec], geometry: tuple[int, int], length: int, seed: int
    ) -> None:
        data = random_shards(geometry[0], length, seed)
        assert encode(engine(*geometry), data) == oracle.encode(data, geometry[1])

    @every_engine
    @settings(deadline=None, max_examples=200)
    @given(data=st.data(), geometry=geometries, length=st.integers(1, 100))
    def test_any_loss_that_parity_covers_decodes_to_the_same_bytes(
        self,
        engine: Callable[[int, int], Codec],
        data: st.DataObject,
        geometry: tuple[int, int],
        length: int,
    ) -> None:
        k, m = geometry
        codec = engine(k, m)
        originals = random_shards(k, length, seed=k * m * length)
        shards = dict(enumerate([*originals, *encode(codec, originals)]))
        lost = data.draw(st.sets(st.integers(0, k + m - 1), max_size=m), label="lost")
        order = data.draw(st.permutations(sorted(shards.keys() - lost)), label="order of arrival")
        wanted = data.draw(st.lists(st.integers(0, k - 1), unique=True), label="wanted")

        decoded = decode(codec, {number: shards[number] for number in order}, wanted)

        assert decoded == {number: originals[number] for number in wanted}

    @every_engine
    @settings(deadline=None, max_examples=60)
    @given(data=st.data(), k=st.integers(1, 32), m=st.integers(1, 8), length=st.integers(1, 200))
    def test_every_count_of_losses_in_large_groups(
        self,
        engine: Callable[[int, int], Codec],
        data: st.DataObject,
        k: int,
        m: int,
        length: int,
    ) -> None:
        """The survivors, some of the data among them, are decoded by engine and oracle alike."""
        originals = random_shards(k, length, seed=k * m * length)
        codec = engine(k, m)
        shards = dict(enumerate([*originals, *oracle.encode(originals, m)]))
        for losses in range(m + 1):
            lost = data.draw(st.permutations(range(k + m)), label="order of loss")[:losses]
            left = {number: shards[number] for number in sorted(shards.keys() - set(lost))}
            used = dict(list(left.items())[:k])
            assert list(decode(codec, left, range(k)).values()) == oracle.decode(used, k, m)

    @every_engine
    @pytest.mark.parametrize("k", [1, 2, 7, 32])
    def test_every_length_and_alignment_around_the_width_of_vectors(
        self, engine: Callable[[int, int], Codec], k: int
    ) -> None:
        """Shards begin at any byte, and not a byte beside the targets is touched."""
        codec = engine(k, 3)
        whole = random_shards(k, 200)
        parity = oracle.encode(whole, 3)
        for length in range(1, 135):
            at = length % 17
            data = [memoryview(bytes(at + i % 3) + shard)[at + i % 3 :][:length]
                    for i, shard in enumerate(whole)]  # fmt: skip
            memory = [bytearray(b"\xee" * (length + 64)) for _ in parity]
            rows = [memoryview(room)[at + i : at + i + length] for i, room in enumerate(memory)]
            codec.encode(data, rows)
            for i, (room, row) in enumerate(zip(memory, parity, strict=True)):
                around = room[: at + i] + room[at + i + length :]
                assert room[at + i : at + i + length] == row[:length], (length, i)
                assert around == b"\xee" * 64, (length, i)
            out = bytearray(b"\xee" * (length + 64))
            shards = {n: data[n] for n in range(1, k)} | {k + 2: rows[2]}
            codec.decode(shards, {0: memoryview(out)[at : at + length]})
            assert out == b"\xee" * at + whole[0][:length] + b"\xee" * (64 - at)

    @every_engine
    @pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 3), (2, 1), (4, 2), (6, 3)])
    def test_every_possible_set_of_survivors_suffices(
        self, engine: Callable[[int, int], Codec], k: int, m: int
    ) -> None:
        codec = engine(k, m)
        data = random_shards(k, 33)
        shards = [*data, *encode(codec, data)]
        for survivors in combinations(range(k + m), k):
            decoded = decode(codec, {i: shards[i] for i in survivors}, range(k))
            assert list(decoded.values()) == data, survivors

    @every_engine
    @pytest.mark.parametrize(("k", "m"), [(255, 1), (1, 255), (128, 128), (200, 56)])
    def test_the_largest_codes_replace_as_much_as_they_promise(
        self, engine: Callable[[int, int], Codec], k: int, m: int
    ) -> None:
        codec = engine(k, m)
        data = random_shards(k, 5)
        shards = [*data, *encode(codec, data)]
        survivors = {i: shards[i] for i in range(k + m - 1, m - 1, -1)}
        assert list(decode(codec, survivors, range(k)).values()) == data

    @every_engine
    def test_cells_longer_than_the_piece_an_engine_works_in(
        self, engine: Callable[[int, int], Codec]
    ) -> None:
        data = random_shards(2, (2 << 20) + 17)
        codec = engine(2, 1)
        parity = encode(codec, data)
        assert parity == oracle.encode(data, 1)
        assert decode(codec, {0: data[0], 2: parity[0]}, [0, 1]) == dict(enumerate(data))

    @every_engine
    def test_with_one_data_shard_the_parity_is_a_mirror(
        self, engine: Callable[[int, int], Codec]
    ) -> None:
        assert encode(engine(1, 2), [b"state"]) == [b"state", b"state"]

    @every_engine
    def test_virtual_cells_may_be_left_out_as_zeros(
        self, engine: Callable[[int, int], Codec]
    ) -> None:
        """A node without a cell for the stripe sends nothing, and the others still decode."""
        codec = engine(4, 2)
        zeros = bytes(64)
        data = [*random_shards(2, 64), zeros, zeros]
        parity = encode(codec, data)
        survivors = {2: zeros, 3: zeros, 4: parity[0], 5: parity[1]}
        assert decode(codec, survivors, [0, 1]) == {0: data[0], 1: data[1]}
        assert encode(codec, [zeros] * 4) == [zeros, zeros]


class TestIsal:
    """What only an engine that takes addresses and a C int can do wrong."""

    class Recorder:
        """In the place of ISA-L: notes the lengths and addresses of calls, and touches nothing."""

        def __init__(self) -> None:
            self.calls: list[tuple[int, list[int], list[int]]] = []
            self.tables = 0

        def init_tables(self, k: int, rows: int, matrix: bytes, tables: Any) -> None:
            assert len(matrix) == k * rows
            assert len(tables) == 32 * k * rows
            self.tables += 1

        def encode_data(
            self, length: int, k: int, rows: int, tables: Any, data: Any, parity: Any
        ) -> None:
            self.calls.append((length, list(data), list(parity)))

        def codec(self, k: int, m: int) -> IsalCodec:
            return IsalCodec(k, m, Library("recorder", self.init_tables, self.encode_data))

    def test_lengths_that_no_c_int_holds_are_split_without_a_gap(self, tmp_path: Path) -> None:
        length = 2 * (1 << 31) + 65
        recorder = self.Recorder()
        path = tmp_path / "sparse"
        path.touch()
        os.truncate(path, length)
        with path.open("r+b") as file:
            maps = [mmap.mmap(file.fileno(), length) for _ in range(3)]
        recorder.codec(2, 1).encode(maps[:2], maps[2:])
        starts = [np.frombuffer(one, np.uint8).ctypes.data for one in maps]
        done = 0
        for size, data, parity in recorder.calls:
            assert 0 < size < 1 << 31
            assert [*data, *parity] == [start + done for start in starts]
            done += size
        assert done == length

    @pytest.mark.parametrize("engine", ENGINES[1:])
    def test_pieces_of_a_split_call_have_the_bytes_of_one(
        self, engine: Callable[[int, int], Codec], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckptd.erasure.isal._CALL_BYTES", 64)
        data = random_shards(5, 64 * 3 + 1)
        codec = engine(5, 2)
        parity = encode(codec, data)
        assert parity == oracle.encode(data, 2)
        shards = {1: data[1], 3: data[3], 4: data[4], 5: parity[0], 6: parity[1]}
        assert decode(codec, shards, [2, 0]) == {0: data[0], 2: data[2]}

    def test_only_lost_shards_that_are_wanted_are_computed(self) -> None:
        recorder = self.Recorder()
        shards = {0: GOOD, 1: GOOD, 4: GOOD, 5: GOOD}
        out = {0: room(), 3: room()}
        recorder.codec(4, 2).decode(shards, out)
        [(_, _, rows)] = recorder.calls
        assert rows == [np.frombuffer(out[3], np.uint8).ctypes.data]
        assert out[0] == GOOD

    def test_the_same_losses_need_their_tables_once_and_few_are_kept(self) -> None:
        recorder = self.Recorder()
        codec = recorder.codec(4, 2)
        after_opening = recorder.tables
        for _ in range(3):
            codec.decode({1: GOOD, 2: GOOD, 3: GOOD, 5: GOOD}, {0: room()})
        assert recorder.tables == after_opening + 1
        wide = recorder.codec(100, 1)
        for lost in [*range(100), 0]:
            shards = {number: GOOD for number in range(101) if number != lost}
            wide.decode(shards, {lost: room()})
        assert recorder.tables == after_opening + 1 + 1 + 101


class TestBuffers:
    """What may be given, and what is left alone."""

    @every_engine
    def test_any_contiguous_buffer_will_do(self, engine: Callable[[int, int], Codec]) -> None:
        data = random_shards(4, 96)
        expected = oracle.encode(data, 2)
        mapped = mmap.mmap(-1, 96)
        mapped[:] = data[1]
        kinds: list[Any] = [
            bytearray(data[0]),
            mapped,
            np.frombuffer(data[2], dtype=np.float32).reshape(4, 6),
            memoryview(b"before" + data[3] + b"after")[6:-5],
        ]
        parity: list[Any] = [np.zeros((3, 4), dtype=np.float64), mmap.mmap(-1, 96)]

        engine(4, 2).encode(kinds, parity)

        assert parity[0].tobytes() == expected[0]
        assert parity[1][:] == expected[1]

    @every_engine
    def test_what_is_given_stays_as_it_was(self, engine: Callable[[int, int], Codec]) -> None:
        codec = engine(3, 2)
        data = [bytearray(shard) for shard in random_shards(3, 50)]
        before = [bytes(shard) for shard in data]
        parity = encode(codec, data)
        shards = {4: parity[1], 2: data[2], 3: parity[0], 1: data[1]}
        decode(codec, shards, [0, 2])
        assert data == before
        assert list(shards) == [4, 2, 3, 1]

    @every_engine
    def test_only_the_wanted_shards_are_written(self, engine: Callable[[int, int], Codec]) -> None:
        data = random_shards(3, 8)
        codec = engine(3, 2)
        parity = encode(codec, data)
        memory = bytearray(b"\x55" * 24)
        codec.decode({0: data[0], 3: parity[0], 4: parity[1]}, {2: memoryview(memory)[8:16]})
        assert memory == b"\x55" * 8 + data[2] + b"\x55" * 8

    @every_engine
    def test_of_more_shards_than_needed_the_data_is_preferred(
        self, engine: Callable[[int, int], Codec]
    ) -> None:
        """Seen by giving wrong parity, which then has no influence."""
        data = random_shards(3, 16)
        shards = {3: bytes(16), 4: bytes(16), **dict(enumerate(data))}
        assert decode(engine(3, 2), shards, [0, 1, 2]) == dict(enumerate(data))

    @every_engine
    def test_threads_may_share_a_codec(self, engine: Callable[[int, int], Codec]) -> None:
        codec = engine(4, 2)
        stripes = [random_shards(4, 50_000, seed) for seed in range(16)]

        def there_and_back(data: list[bytes]) -> bool:
            parity = encode(codec, data)
            survivors = {0: data[0], 3: data[3], 4: parity[0], 5: parity[1]}
            return list(decode(codec, survivors, range(4)).values()) == data

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(there_and_back, stripes))


GOOD = bytes(range(1, 9))


def room(length: int = 8) -> bytearray:
    return bytearray(b"\xee" * length)


BAD_ENCODES = {
    "too few data": ([GOOD], [room(), room()], r"1 data buffers given; a 2\+2 code takes exactly"),
    "too many data": ([GOOD] * 3, [room(), room()], r"3 data buffers given"),
    "too few parity": ([GOOD] * 2, [room()], r"1 parity buffers given"),
    "a longer shard": ([GOOD, GOOD * 2], [room(), room()], r"data shard 1 has 16 bytes.* 0 has 8"),
    "a shorter row": ([GOOD] * 2, [room(), room(7)], r"parity row 1 has 7 bytes.*zeros"),
    "an empty shard": ([b"", GOOD], [room(), room()], r"data shard 0 is empty"),
    "read-only parity": ([GOOD] * 2, [room(), GOOD], r"parity row 1, a bytes, is read-only"),
    "no buffer": ([GOOD, 8], [room(), room()], r"data shard 1, a int, gives no buffer"),
    "text": ([GOOD, "x" * 8], [room(), room()], r"data shard 1, a str, gives no buffer"),
    "every other byte": (
        [GOOD, memoryview(GOOD * 2)[::2]], [room(), room()],
        r"data shard 1 is not C-contiguous \(shape \(8,\), strides \(2,\)\): pass a copy",
    ),
    "a transposed parity": (
        [GOOD] * 2, [room(), np.full((4, 2), 0xEE, np.uint8).T], r"parity row 1 is not C-contiguous"
    ),
}  # fmt: skip

BAD_DECODES = {
    "too few": ({1: GOOD}, {0: room()}, r"1 shards given \(\[1\]\); a 2\+2 code needs 2 of its 4"),
    "none": ({}, {0: room()}, r"0 shards given"),
    "a shard out of range": ({1: GOOD, 4: GOOD}, {0: room()}, r"4 is no number from 0 to 3"),
    "a shard below range": ({1: GOOD, -1: GOOD}, {0: room()}, r"-1 is no number from 0 to 3"),
    "a huge number": ({1: GOOD, 2**70: GOOD}, {0: room()}, r"is no number from 0 to 3"),
    "not a number": ({1: GOOD, "2": GOOD}, {0: room()}, r"'2' is no number from 0 to 3"),
    "parity wanted": ({1: GOOD, 2: GOOD}, {3: room()}, r"3 is no number from 0 to 1 of a data"),
    "lengths differ": ({1: GOOD, 2: GOOD[:5]}, {0: room()}, r"shard 2 has 5 bytes and shard 1 has"),
    "one to spare differs": (
        {0: GOOD, 1: GOOD, 3: GOOD * 2}, {0: room()}, r"shard 3 has 16 bytes and shard 0 has 8"
    ),
    "an empty shard": ({1: b"", 2: GOOD}, {0: room()}, r"shard 1 is empty"),
    "out too short": ({1: GOOD, 2: GOOD}, {0: room(4)}, r"out buffer 0 has 4 bytes"),
    "out read-only": ({1: GOOD, 2: GOOD}, {0: GOOD}, r"out buffer 0, a bytes, is read-only"),
    "out in pieces": (
        {1: GOOD, 2: GOOD}, {0: memoryview(room(16))[::2]}, r"out buffer 0 is not C-contiguous"
    ),
}  # fmt: skip


class TestMistakes:
    """Each is an error that names the value and the limit, and leaves the outputs as they were."""

    @every_engine
    @pytest.mark.parametrize(("data", "parity", "says"), BAD_ENCODES.values(), ids=BAD_ENCODES)
    def test_encode(
        self, engine: Callable[[int, int], Codec], data: Any, parity: Any, says: str
    ) -> None:
        before = [bytes(row) for row in parity]
        with pytest.raises(CodecError, match=says):
            engine(2, 2).encode(data, parity)
        assert [bytes(row) for row in parity] == before

    @every_engine
    @pytest.mark.parametrize(("shards", "out", "says"), BAD_DECODES.values(), ids=BAD_DECODES)
    def test_decode(
        self, engine: Callable[[int, int], Codec], shards: Any, out: Any, says: str
    ) -> None:
        before = {number: bytes(buffer) for number, buffer in out.items()}
        with pytest.raises(CodecError, match=says):
            engine(2, 2).decode(shards, out)
        assert {number: bytes(buffer) for number, buffer in out.items()} == before

    @every_engine
    @settings(deadline=None, max_examples=200)
    @given(
        numbers=st.lists(st.integers(-2, 9), unique=True),
        lengths=st.lists(st.integers(0, 3), min_size=12, max_size=12) | st.just([4] * 12),
        wanted=st.sets(st.integers(-1, 5), max_size=3),
    )
    def test_whatever_numbers_and_lengths_are_given_decode_answers_or_refuses(
        self,
        engine: Callable[[int, int], Codec],
        numbers: list[int],
        lengths: list[int],
        wanted: set[int],
    ) -> None:
        codec = engine(4, 3)
        length = lengths[0]
        data = random_shards(4, max(length, 1))
        truth = [*data, *oracle.encode(data, 3)]
        shards = {
            number: truth[number % 7].ljust(size, b"\0")[:size]
            for number, size in zip(numbers, lengths, strict=False)
        }
        out = {number: bytearray(length) for number in wanted}
        sound = (
            len(shards) >= 4
            and length > 0
            and all(0 <= number < 7 and len(shard) == length for number, shard in shards.items())
            and all(0 <= number < 4 for number in wanted)
        )
        if sound:
            codec.decode(shards, out)
            assert out == {number: data[number] for number in wanted}
        else:
            with pytest.raises(CodecError):
                codec.decode(shards, out)

    @pytest.mark.parametrize("opened", [ZfecCodec, open_codec])
    @pytest.mark.parametrize(
        ("geometry", "says"),
        [
            ((0, 1), "data_shards is 0; a code needs at least 1"),
            ((4, 0), "parity_shards is 0"),
            ((4, -1), "parity_shards is -1"),
            ((200, 57), f"are 257.* room for {MAX_SHARDS}: use smaller groups"),
        ],
    )
    def test_impossible_geometry(
        self, opened: Callable[[int, int], Codec], geometry: tuple[int, int], says: str
    ) -> None:
        with pytest.raises(CodecError, match=says):
            opened(*geometry)


class OracleCodec:
    """An engine made from the definition of the code."""

    name = "zfec"
    engine = "oracle"

    def __init__(self, data_shards: int, parity_shards: int) -> None:
        self.data_shards = data_shards
        self.parity_shards = parity_shards

    def encode(self, data: Sequence[Any], parity: Sequence[Any]) -> None:
        for target, row in zip(parity, oracle.encode(data, self.parity_shards), strict=True):
            target[:] = row

    def decode(self, shards: Mapping[int, Any], out: Mapping[int, Any]) -> None:
        used = {number: bytes(shards[number]) for number in sorted(shards)[: self.data_shards]}
        decoded = oracle.decode(used, self.data_shards, self.parity_shards)
        for number, target in out.items():
            target[:] = decoded[number]


def xor(shards: Iterable[bytes]) -> bytes:
    return bytes(np.bitwise_xor.reduce([np.frombuffer(shard, np.uint8) for shard in shards]))


class XorCodec(OracleCodec):
    """Another good code, consistent in itself, with one parity row: but not ours."""

    engine = "xor"

    def encode(self, data: Sequence[Any], parity: Sequence[Any]) -> None:
        parity[0][:] = xor(data)

    def decode(self, shards: Mapping[int, Any], out: Mapping[int, Any]) -> None:
        for target in out.values():
            target[:] = xor(shards.values())


class OneByteWrong(OracleCodec):
    """Encodes rightly; the last byte decodes wrongly, as by a faulty vector kernel."""

    engine = "one byte wrong"

    def decode(self, shards: Mapping[int, Any], out: Mapping[int, Any]) -> None:
        super().decode(shards, out)
        for target in out.values():
            target[-1] ^= 1


class TestOpening:
    """Before an engine is used it must show that its parity is the parity of everybody else."""

    def test_the_stored_vectors_are_those_of_the_definition(self) -> None:
        self_test(OracleCodec, 5, 2)

    def test_an_engine_for_another_code_is_refused(self) -> None:
        with pytest.raises(CodecError, match=r"self-test of xor 2\+1: parity has sha256"):
            self_test(XorCodec, 1, 1)

    def test_an_engine_that_decodes_wrongly_is_refused(self) -> None:
        with pytest.raises(CodecError, match=r"one byte wrong 1\+1: data shards \[0\] did not"):
            self_test(OneByteWrong, 4, 2)

    def test_an_engine_wrong_only_in_the_geometry_asked_for_is_refused(self) -> None:
        def engine(data_shards: int, parity_shards: int) -> Codec:
            kind = OneByteWrong if (data_shards, parity_shards) == (5, 2) else OracleCodec
            return kind(data_shards, parity_shards)

        with pytest.raises(CodecError, match=r"5\+2: data shards \[0, 1\] did not"):
            self_test(engine, 5, 2)

    def test_what_is_opened_says_what_it_is(self) -> None:
        codec = open_codec(6, 2)
        assert (codec.name, codec.data_shards, codec.parity_shards) == ("zfec", 6, 2)
