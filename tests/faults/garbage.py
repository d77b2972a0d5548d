"""Messages that make no sense, made from ones that do."""

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from ckptd.errors import ProtocolError
from ckptd.wire import Decoder

HEAD_BYTES = 3
_DEEP: Any = []
for _ in range(200):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 1e308, float("nan"), "", "..",
    "../../x", "a\0b", "x" * 5000, b"", b"\xff" * 40, (), {}, {"": 1}, _DEEP,
)  # fmt: skip
"""What may stand where something else belongs."""


def spoilt(frame: bytes, numbers: random.Random) -> bytes:
    """A frame that was sent by somebody who is broken."""
    at = numbers.randrange(len(frame))
    match numbers.randrange(8):
        case 0:
            return frame[:at]
        case 1:
            return frame + numbers.randbytes(numbers.randrange(1, 40))
        case 2:
            return frame[:at] + frame[at + numbers.randrange(1, 9) :]
        case 3:
            return frame[:at] + numbers.randbytes(numbers.randrange(1, 9)) + frame[at:]
        case 4:
            bits = bytearray(frame)
            for _ in range(numbers.randrange(1, 5)):
                bits[numbers.randrange(len(bits))] ^= 1 << numbers.randrange(8)
            return bytes(bits)
        case 5:
            return numbers.randbytes(numbers.randrange(200))
        case _:
            return altered(frame, numbers)


def altered(frame: bytes, numbers: random.Random) -> bytes:
    """A frame in good form, in which one value is another one, is missing, or is one too many."""
    body = msgspec.msgpack.decode(frame[HEAD_BYTES:])
    within, key = numbers.choice(list(_places(body)))
    match numbers.randrange(6):
        case 0:
            del within[key]
        case 1 if isinstance(within, dict):
            within["surplus"] = 1
        case _:
            within[key] = numbers.choice(ODD)
    return frame[:HEAD_BYTES] + msgspec.msgpack.encode(body)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of each value in a decoded body."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def is_sense(frame: bytes, decoder: Decoder[Any]) -> bool:
    with suppress(ProtocolError):
        decoder.decode(frame)
        return True
    return False


def nonsense(
    frames: Sequence[bytes], decoder: Decoder[Any], numbers: random.Random, count: int
) -> list[bytes]:
    """So many frames that must be dropped, made from good ones."""
    found: list[bytes] = []
    while len(found) < count:
        frame = spoilt(numbers.choice(frames), numbers)
        if not is_sense(frame, decoder):
            found.append(frame)
    return found
