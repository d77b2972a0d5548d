"""The segment: a safetensors file whose data region never moves, and its sidecar of digests.

Layout. The header region has a fixed reserved size, padded with spaces, so that data offsets stay
the same from step to step. Tensors are ordered by dtype size, which aligns each one without holes.
The last entry is the objects region: `uint8`, of fixed capacity, its real length in the metadata.

Sealing publishes, in this order: header length 0, data, sidecar, header, header length. A reader
never takes an unsealed file for a segment, because safetensors refuses a header of length 0.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ckptd.digest import Buffer, cell_count, digest
from ckptd.errors import CorruptData
from ckptd.ids import SnapshotId

FORMAT_VERSION = 1
OBJECTS_NAME = "ckptd.objects"
LENGTH_BYTES = 8
SIDECAR_SUFFIX = ".digests"

_Record = TypeVar("_Record", bound=msgspec.Struct)

_METADATA_NAME = "__metadata__"
_HEADER_ALIGN_BYTES = 4096
_METADATA_RESERVE_BYTES = 512
_DAMAGE = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, struct.error
)  # fmt: skip
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library refuses larger ones

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor (or the local chunk of a sharded one) needs in the segment.

    `global_shape` and `offset` are given for a chunk of a sharded tensor, in elements; `aliases`
    are further names of the same storage.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * DTYPE_BYTES[self.dtype]

    @property
    def key(self) -> str:
        """The name in the file: the tensor's own, plus the chunk's offset where it is sharded."""
        if self.offset is None:
            return self.name
        return f"{self.name}@{','.join(map(str, self.offset))}"


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and where its bytes lie: `begin` and `end` count from the start of the file."""

    spec: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a segment; computed once and reused at every step."""

    tensors: tuple[Placed, ...]
    objects_begin: int
    size_bytes: int
    data_begin: int
    fingerprint: str
    _entries_json: str
    _fixed_json: str
    """Metadata that is the same in every segment of this layout."""

    @property
    def objects_capacity(self) -> int:
        return self.size_bytes - self.objects_begin

    def header(self, id: SnapshotId, rank: int, world_size: int, objects_bytes: int) -> bytes:
        """The whole header region (8 bytes of length, JSON, spaces): `data_begin` bytes."""
        metadata = {
            "format": "ckptd",
            "version": str(FORMAT_VERSION),
            "job": id.job,
            "life": str(id.life),
            "step": str(id.step),
            "rank": str(rank),
            "world_size": str(world_size),
            "layout": self.fingerprint,
            "objects_bytes": str(objects_bytes),
        }
        metadata_json = f"{_compact(metadata)[:-1]},{self._fixed_json}}}"
        text = f'{{"{_METADATA_NAME}":{metadata_json},{self._entries_json}}}'.encode()
        room = self.data_begin - LENGTH_BYTES
        return struct.pack("<Q", room) + text.ljust(room)


def plan_layout(
    specs: Sequence[TensorSpec],
    objects_capacity: int,
    *,
    elsewhere: Sequence[tuple[TensorSpec, int]] = (),
    shares: Sequence[tuple[int, ...]] = (),
    structure: str = "{}",
) -> Layout:
    """Lay out `specs` and an objects region of at least `objects_capacity` bytes.

    `shares`: for each set of ranks that divide among them what they hold alike, the ranks;
    `elsewhere`: tensors that this rank holds, and of which other segments have the whole or a part,
    each with the number of its share. `structure`: a JSON document that goes into the metadata as
    it is. The size is rounded up a little, so that ranks with nearly the same state have slots of
    one size.

    Raises ValueError for two tensors of one name, or a name that the format keeps for itself.
    """
    keys = [spec.key for spec in specs]
    if reserved := {OBJECTS_NAME, _METADATA_NAME}.intersection(keys):
        raise ValueError(f"a tensor cannot be called {min(reserved)!r}: the format uses that name")
    if len(set(keys)) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"two tensors have the same name: {', '.join(twice[:3])}")
    ordered = sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.key))
    entries: dict[str, Any] = {}
    position = 0
    for spec in ordered:
        end = position + spec.size_bytes
        entries[spec.key] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": [position, end],
        }
        position = end
    chunks = {
        spec.key: {
            "name": spec.name,
            **({"global_shape": spec.global_shape} if spec.global_shape is not None else {}),
            **({"offset": spec.offset} if spec.offset is not None else {}),
            **({"aliases": spec.aliases} if spec.aliases else {}),
        }
        for spec in ordered
        if spec.offset is not None or spec.aliases
    }
    fixed = {
        "chunks": _compact(chunks),
        "elsewhere": _compact([{**_spec_json(spec), "share": share} for spec, share in elsewhere]),
        "shares": _compact(shares),
        "structure": structure,
    }
    fixed_json = _compact(fixed)[1:-1]
    text_bytes = len(_compact(entries)) + len(fixed_json) + _METADATA_RESERVE_BYTES
    data_begin = -(-(LENGTH_BYTES + text_bytes) // _HEADER_ALIGN_BYTES) * _HEADER_ALIGN_BYTES
    objects_capacity = _rounded(data_begin + position + objects_capacity) - data_begin - position
    entries[OBJECTS_NAME] = {
        "dtype": "U8",
        "shape": [objects_capacity],
        "data_offsets": [position, position + objects_capacity],
    }
    entries_json = _compact(entries)[1:-1]
    if data_begin > _HEADER_LIMIT_BYTES:
        raise ValueError(
            f"{len(specs)} tensors need a header of {data_begin} bytes, over the limit"
        )
    placed = []
    for spec in ordered:
        begin, end = entries[spec.key]["data_offsets"]
        placed.append(Placed(spec, data_begin + begin, data_begin + end))
    objects_begin = data_begin + position
    return Layout(
        tensors=tuple(placed),
        objects_begin=objects_begin,
        size_bytes=objects_begin + objects_capacity,
        data_begin=data_begin,
        fingerprint=f"{digest((entries_json + fixed_json).encode()):016x}",
        _entries_json=entries_json,
        _fixed_json=fixed_json,
    )


def _rounded(size_bytes: int) -> int:
    """Up to the next of 128 sizes between two powers of two (pages, for small ones)."""
    unit = max(_HEADER_ALIGN_BYTES, 1 << max(0, size_bytes.bit_length() - 8))
    return -(-size_bytes // unit) * unit


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"name": spec.name, "dtype": spec.dtype, "shape": spec.shape}
    if spec.global_shape is not None:
        found["global_shape"] = spec.global_shape
    if spec.offset is not None:
        found["offset"] = spec.offset
    if spec.aliases:
        found["aliases"] = spec.aliases
    return found


def _spec_of(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(
        name=entry["name"],
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        global_shape=tuple(entry["global_shape"]) if "global_shape" in entry else None,
        offset=tuple(entry["offset"]) if "offset" in entry else None,
        aliases=tuple(entry.get("aliases", ())),
    )


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed segment header: who it belongs to, and each tensor by its key."""

    id: SnapshotId
    rank: int
    world_size: int
    fingerprint: str
    tensors: dict[str, Placed]
    objects_begin: int
    objects_bytes: int
    size_bytes: int
    elsewhere: tuple[tuple[TensorSpec, int], ...] = ()
    """Tensors of this rank of which the whole or a part is in other segments; index in `shares`."""
    shares: tuple[tuple[int, ...], ...] = ()
    """Ranks whose segments have them; one entry for each set of ranks that share."""
    structure: str = "{}"

    def by_name(self) -> dict[str, list[Placed]]:
        """Chunks by the tensor's own name, aliases included."""
        found: dict[str, list[Placed]] = {}
        for placed in self.tensors.values():
            for name in (placed.spec.name, *placed.spec.aliases):
                found.setdefault(name, []).append(placed)
        return found


def parse_header(segment: Buffer, what: str) -> Header:
    """Read the header of a whole segment; `what` names it in errors.

    Raises CorruptData for anything that is not a sealed segment of this format version.
    """
    try:
        (length,) = struct.unpack_from("<Q", segment, 0)
        if length == 0:
            raise CorruptData(f"{what} is not sealed (its header length is 0)")
        if LENGTH_BYTES + length > len(segment):
            raise CorruptData(
                f"{what} is truncated: its header wants {LENGTH_BYTES + length} bytes, "
                f"the file has {len(segment)}"
            )
        header = json.loads(bytes(segment[LENGTH_BYTES : LENGTH_BYTES + length]))
        metadata = header.pop(_METADATA_NAME, {})
        if metadata.get("format") != "ckptd":
            raise CorruptData(f"{what} is a safetensors file, but not a ckptd segment")
        if metadata["version"] != str(FORMAT_VERSION):
            raise CorruptData(
                f"{what} has segment format {metadata['version']}, this ckptd reads "
                f"{FORMAT_VERSION}; use the ckptd version that wrote it"
            )
        chunks = json.loads(metadata["chunks"])
        data_begin = LENGTH_BYTES + length
        objects = header.pop(OBJECTS_NAME)
        tensors = {}
        position = 0
        for key, entry in header.items():
            spec = _spec_of({"name": key, **entry, **chunks.get(key, {})})
            begin, end = entry["data_offsets"]
            # `plan_layout` writes tensors in the order in which they lie, without holes.
            if not _is_shape(spec.shape) or (begin, end) != (position, position + spec.size_bytes):
                raise CorruptData(f"{what}: the extent of tensor {key!r} does not fit the file")
            tensors[key] = Placed(
                spec, data_begin + position, data_begin + position + spec.size_bytes
            )
            position += spec.size_bytes
        size_bytes = data_begin + objects["data_offsets"][1]
        if size_bytes != len(segment):
            raise CorruptData(f"{what} has {len(segment)} bytes, its header says {size_bytes}")
        shares = tuple(tuple(ranks) for ranks in json.loads(metadata["shares"]))
        if any(type(rank) is not int or rank < 0 for ranks in shares for rank in ranks):
            raise CorruptData(f"{what} names ranks that cannot be: {shares}")
        elsewhere = tuple(
            (_spec_of(entry), entry["share"]) for entry in json.loads(metadata["elsewhere"])
        )
        if any(
            not _is_shape(spec.shape) or share not in range(len(shares))
            for spec, share in elsewhere
        ):
            raise CorruptData(f"{what} names tensors in segments that it does not name")
        objects_begin = data_begin + position
        objects_bytes = int(metadata["objects_bytes"])
        if (
            objects["data_offsets"][0] != position
            or not 0 <= objects_bytes <= size_bytes - objects_begin
        ):
            raise CorruptData(f"{what}: the extent of its objects does not fit the file")
        return Header(
            id=SnapshotId(metadata["job"], int(metadata["life"]), int(metadata["step"])),
            rank=int(metadata["rank"]),
            world_size=int(metadata["world_size"]),
            fingerprint=metadata["layout"],
            tensors=tensors,
            objects_begin=objects_begin,
            objects_bytes=objects_bytes,
            size_bytes=size_bytes,
            elsewhere=elsewhere,
            shares=shares,
            structure=metadata["structure"],
        )
    except _DAMAGE as error:
        raise CorruptData(f"{what} has a damaged header: {error!r}") from error


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return all(type(extent) is int and extent >= 0 for extent in shape)


class Sidecar(msgspec.Struct, frozen=True):
    """Digests of a sealed segment's cells, as they lie beside it in `<segment>.digests`."""

    id: SnapshotId
    rank: int
    world_size: int
    size_bytes: int
    cell_bytes: int
    digests: bytes

    @property
    def cells(self) -> int:
        return cell_count(self.size_bytes, self.cell_bytes)


class ParitySidecar(msgspec.Struct, frozen=True):
    """Digests of one member's parity cells of one snapshot, beside the parity file."""

    id: SnapshotId
    group: int
    member: int
    cell_bytes: int
    lengths: tuple[int, ...]
    digests: bytes


def checked_record(record: msgspec.Struct) -> bytes:
    """A small record as it is stored: msgpack, then the xxh3-64 of it."""
    body = msgspec.msgpack.encode(record)
    return body + struct.pack("<Q", digest(body))


def read_checked_record(path: Path, kind: type[_Record]) -> _Record:
    """Read what `checked_record` wrote. Raises CorruptData, or OSError if it is not there."""
    raw = path.read_bytes()
    body, tail = raw[:-8], raw[-8:]
    if len(tail) != 8 or struct.unpack("<Q", tail)[0] != digest(body):
        raise CorruptData(f"{path} is damaged: its checksum does not match")
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptData(f"{path} is not a {kind.__name__}: {error}") from error


def sidecar_path(segment: Path) -> Path:
    """Where the digests of `segment` lie."""
    return segment.with_name(segment.name + SIDECAR_SUFFIX)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
