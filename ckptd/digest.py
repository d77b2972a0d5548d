"""Cells of a byte range and their digests (xxh3-64, little-endian, packed)."""

import struct
from collections.abc import Iterable

import xxhash

Buffer = bytes | bytearray | memoryview

DIGEST_BYTES = 8


def cell_count(size_bytes: int, cell_bytes: int) -> int:
    """How many cells cover `size_bytes`."""
    return -(-size_bytes // cell_bytes)


def cell_span(index: int, size_bytes: int, cell_bytes: int) -> tuple[int, int]:
    """(offset, length) in bytes of cell `index`; the last cell may be short."""
    offset = index * cell_bytes
    return offset, min(cell_bytes, size_bytes - offset)


def digest(*pieces: Buffer) -> int:
    """xxh3-64 of the pieces, one after the other."""
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0])
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


def pack(digests: Iterable[int]) -> bytes:
    """Digests as stored in sidecars and manifests."""
    values = list(digests)
    return struct.pack(f"<{len(values)}Q", *values)


def unpack_one(packed: bytes, index: int) -> int:
    """Digest number `index` of a packed list."""
    value: int = struct.unpack_from("<Q", packed, index * DIGEST_BYTES)[0]
    return value
