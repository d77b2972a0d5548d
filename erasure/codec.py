"""Reed-Solomon over GF(256): `data_shards` buffers in, `parity_shards` buffers out, and back.

The code is zfec's. Its generator is a Vandermonde matrix over GF(256) (polynomial 0x11d) at the
points 0, 1, a, a², … with a = 2, multiplied by the inverse of its top square, so that the data
shards are kept as they are (L. Rizzo, "Effective erasure codes for reliable computer communication
protocols", CCR 27(2), 1997). Every engine must give these bytes: parity outlives the process, and
the machine, that made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

import zfec

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_SHARDS = 256
"""Elements of GF(256): the most data and parity shards that one code can have together."""

_PIECE_BYTES = 1 << 20
"""zfec returns fresh memory. Working in pieces bounds it, and the time a copy holds the GIL."""


class CodecError(ValueError):
    """A codec was asked for something it cannot do, or an engine does not compute our code."""


class Codec(Protocol):
    """A systematic code: any `data_shards` of all shards give back the data.

    Shards are numbered: 0 to `data_shards - 1` are the data, the rest are the parity rows in order.
    A buffer is any C-contiguous object with the buffer protocol, of at least one byte; all buffers
    of a call have the same length. A buffer that is written to must not overlap any other one.
    Calls do not depend on one another; several threads may use a codec at once.
    """

    name: str
    """The code (not the engine) as manifests name it. Equal names mean equal parity bytes."""
    engine: str
    """What computes it, for people: name, version, and where it comes from if there is a choice."""
    data_shards: int
    parity_shards: int

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Compute all parity rows of `data` into the writable buffers `parity`.

        Raises CodecError, with nothing written, if the buffers are not as described above.
        """

    def decode(self, shards: Mapping[int, Buffer], out: Mapping[int, Buffer]) -> None:
        """Write the data shards that `out` names into its writable buffers.

        `shards` holds at least `data_shards` of the shards by number; of more, data is preferred.
        They must be right: a wrong byte in one of them gives wrong bytes, not an error.
        Raises CodecError, with nothing written, if there are too few, or the buffers are not as
        described above.
        """


class ZfecCodec:
    """The engine that defines the code: zfec itself.

    zfec checks little of what it is given: in 1.6, numbers given twice hang it with the GIL held,
    numbers out of range give wrong bytes, and an empty buffer before a longer one is read past its
    end. So everything is checked here, before each call.
    """

    name = "zfec"
    engine = f"zfec {metadata.version('zfec')}"

    def __init__(self, data_shards: int, parity_shards: int) -> None:
        """Raises CodecError unless both are at least 1 and together at most MAX_SHARDS."""
        check_geometry(data_shards, parity_shards)
        self.data_shards = data_shards
        self.parity_shards = parity_shards
        self._rows = tuple(range(data_shards, data_shards + parity_shards))
        self._encoder = zfec.Encoder(data_shards, data_shards + parity_shards)
        self._decoder = zfec.Decoder(data_shards, data_shards + parity_shards)

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """See `Codec.encode`."""
        sources, targets = check_encode(self, data, parity)
        for piece in _pieces(sources[0].nbytes):
            rows = self._encoder.encode([source[piece] for source in sources], self._rows)
            for target, row in zip(targets, rows, strict=True):
                target[piece] = row

    def decode(self, shards: Mapping[int, Buffer], out: Mapping[int, Buffer]) -> None:
        """See `Codec.decode`."""
        sources, targets = check_decode(self, shards, out)
        if targets.keys() <= sources.keys():
            for number, target in targets.items():
                target[:] = sources[number]
            return
        # zfec wants data shard i at position i; the parity shards fill the holes in any order.
        spare = iter([number for number in sources if number >= self.data_shards])
        numbers = tuple(i if i in sources else next(spare) for i in range(self.data_shards))
        for piece in _pieces(sources[numbers[0]].nbytes):
            # A list and a tuple of our own: zfec may reorder what it is given.
            decoded = self._decoder.decode([sources[i][piece] for i in numbers], numbers)
            for number, target in targets.items():
                target[piece] = decoded[number]


_VECTORS = {
    (1, 1): "1a28a845a56d612b3d18aabb432f5d9ca966cdb002827172bbea0eb6768fd891",
    (2, 1): "e47a4170219a287eab3b6989ffb9b230e48d7bb85e87c4b61bc21ab91aa668e8",
    (4, 2): "ee0c6c745faedca51c54cbcc068a72e05e56f27a8c0c3c72207adf9ea7ed8547",
    (6, 2): "10c52a19ea0a3313c0b3572a52f84c5e228f5fe8b090c5cbd8eebfc3df13a599",
    (8, 3): "372c6b74b904f6e6c8c7bc91b79d969f1567dd41d3548a2604b8bbb141fea15f",
    (16, 4): "7e665452083232d6c2dde076a2d99ed0e8e530eeebb961e7c86ee00221e1af76",
}
"""SHA-256 of all parity rows, one after the other, of `_test_data`, by geometry."""

_VECTOR_BYTES = 4093
"""Long enough for every byte value to occur; odd, for engines treat the last few bytes apart."""

_SHORT_BYTES = (1, 15, 16, 31, 32, 33, 63, 64, 65, 127)
"""Lengths around those of vector registers; below them engines use other instructions."""


def self_test(engine: Callable[[int, int], Codec], data_shards: int, parity_shards: int) -> None:
    """Raise CodecError unless `engine` computes our code, and decodes what it encoded.

    The stored vectors fix the code in geometries that span its use; the geometry that is about to
    be used is encoded and decoded as well. Takes a few milliseconds.
    """
    for (data_count, parity_count), expected in _VECTORS.items():
        codec = engine(data_count, parity_count)
        found = hashlib.sha256(b"".join(_round_trip(codec))).hexdigest()
        if found != expected:
            raise CodecError(
                f"self-test of {_title(codec)}: parity has sha256 {found}, the zfec code has "
                f"{expected}. Parity made by it could not be read by others: install another "
                "version (zfec 1.6 and ISA-L 2.32 pass)"
            )
    _round_trip(engine(data_shards, parity_shards))


def _title(codec: Codec) -> str:
    return f"{codec.engine} {codec.data_shards}+{codec.parity_shards}"


def _test_data(data_shards: int) -> list[bytes]:
    """SHAKE-256 of the shard number as one byte: the same on every machine, and cheap."""
    return [hashlib.shake_256(bytes([i])).digest(_VECTOR_BYTES) for i in range(data_shards)]


def _round_trip(codec: Codec) -> list[bytearray]:
    """The parity of the test data, after as much of the data as it can replace was decoded."""
    data = _test_data(codec.data_shards)
    parity = [bytearray(_VECTOR_BYTES) for _ in range(codec.parity_shards)]
    codec.encode(data, parity)
    lost = min(codec.data_shards, codec.parity_shards)
    every: list[Buffer] = [*data, *parity]
    shards = {number: shard for number, shard in enumerate(every) if number >= lost}
    out = {number: bytearray(_VECTOR_BYTES) for number in range(lost)}
    codec.decode(shards, out)
    wrong = [number for number, decoded in out.items() if decoded != data[number]]
    if wrong:
        raise CodecError(
            f"self-test of {_title(codec)}: data shards {wrong} did not decode to what was "
            "encoded; reinstall the engine"
        )
    # Each byte is coded for itself: shorter shards have the first bytes of the parity.
    for length in _SHORT_BYTES:
        rows = [bytearray(length) for _ in parity]
        codec.encode([shard[:length] for shard in data], rows)
        if any(row != longer[:length] for row, longer in zip(rows, parity, strict=True)):
            raise CodecError(
                f"self-test of {_title(codec)}: shards of {length} bytes are coded otherwise than "
                "the first bytes of longer ones; reinstall the engine"
            )
    return parity


def check_geometry(data_shards: int, parity_shards: int) -> None:
    """Raise CodecError unless there is a code with this many data and parity shards."""
    for what, count in (("data_shards", data_shards), ("parity_shards", parity_shards)):
        if count < 1:
            raise CodecError(f"{what} is {count}; a code needs at least 1")
    if data_shards + parity_shards > MAX_SHARDS:
        raise CodecError(
            f"{data_shards} data and {parity_shards} parity shards are "
            f"{data_shards + parity_shards}; GF(256) has room for {MAX_SHARDS}: use smaller groups"
        )


def check_encode(
    codec: Codec, data: Sequence[Buffer], parity: Sequence[Buffer]
) -> tuple[list[memoryview], list[memoryview]]:
    """The buffers of a call of `encode` as flat byte views, or CodecError. For every engine."""
    for what, buffers, count in (
        ("data", data, codec.data_shards),
        ("parity", parity, codec.parity_shards),
    ):
        if len(buffers) != count:
            raise CodecError(
                f"{len(buffers)} {what} buffers given; {_shape(codec)} takes exactly {count}"
            )
    sources = [_view(buffer, "data shard", i) for i, buffer in enumerate(data)]
    targets = [_view(buffer, "parity row", i, writable=True) for i, buffer in enumerate(parity)]
    _check_lengths(("data shard", enumerate(sources)), ("parity row", enumerate(targets)))
    return sources, targets


def check_decode(
    codec: Codec, shards: Mapping[int, Buffer], out: Mapping[int, Buffer]
) -> tuple[dict[int, memoryview], dict[int, memoryview]]:
    """The `data_shards` shards to use and the buffers to fill, or CodecError. For every engine."""
    total = codec.data_shards + codec.parity_shards
    _check_numbers(shards, total, f"shard of {_shape(codec)}")
    _check_numbers(out, codec.data_shards, f"data shard of {_shape(codec)}; encode makes parity")
    if len(shards) < codec.data_shards:
        raise CodecError(
            f"{len(shards)} shards given ({sorted(shards)}); {_shape(codec)} needs "
            f"{codec.data_shards} of its {total} to decode: find more, or use another tier"
        )
    # All are looked at, also those that are left over: a wrong one is somebody's mistake.
    sources = {number: _view(shards[number], "shard", number) for number in sorted(shards)}
    targets = {
        number: _view(buffer, "out buffer", number, writable=True) for number, buffer in out.items()
    }
    _check_lengths(("shard", sources.items()), ("out buffer", targets.items()))
    return dict(list(sources.items())[: codec.data_shards]), targets


def _shape(codec: Codec) -> str:
    return f"a {codec.data_shards}+{codec.parity_shards} code"


def _check_numbers(numbers: Mapping[int, Buffer], limit: int, what: str) -> None:
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < limit:
            raise CodecError(f"{number!r} is no number from 0 to {limit - 1} of a {what}")


def _check_lengths(*groups: tuple[str, Iterable[tuple[int, memoryview]]]) -> None:
    """Raise CodecError unless all have one length, naming the first that is not like the first."""
    expected, first = 0, ""
    for what, views in groups:
        for number, view in views:
            if view.nbytes == expected:
                continue
            if first:
                raise CodecError(
                    f"{what} {number} has {view.nbytes} bytes and {first} has {expected}; all must "
                    "have one length: extend a short last cell with zeros"
                )
            expected, first = view.nbytes, f"{what} {number}"


def _view(buffer: Buffer, what: str, number: int, writable: bool = False) -> memoryview:
    """`buffer` as a flat view of bytes, without a copy, or CodecError naming it."""
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise CodecError(
            f"{what} {number}, a {type(buffer).__name__}, gives no buffer ({error}): pass bytes, a "
            "bytearray, a memoryview, an mmap or a NumPy array"
        ) from error
    if not view.c_contiguous:
        raise CodecError(
            f"{what} {number} is not C-contiguous (shape {view.shape}, strides {view.strides}): "
            "pass a copy"
        )
    if writable and view.readonly:
        raise CodecError(
            f"{what} {number}, a {type(buffer).__name__}, is read-only: pass a writable one"
        )
    if view.nbytes == 0:
        raise CodecError(f"{what} {number} is empty; a shard has at least 1 byte: check its slice")
    return view.cast("B")


def _pieces(length_bytes: int) -> list[slice]:
    return [slice(start, start + _PIECE_BYTES) for start in range(0, length_bytes, _PIECE_BYTES)]
