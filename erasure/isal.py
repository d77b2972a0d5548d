"""The fast engine: Intel's ISA-L through ctypes, computing the same code as zfec.

ISA-L multiplies buffers by any matrix over the same field. It is given the coefficients of our
code, for encoding and for decoding alike. A call releases the GIL, and reads and writes the buffers
where they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptd.erasure.codec import CodecError, check_decode, check_encode, check_geometry
from ckptd.erasure.field import coefficients

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SYSTEM_NAME = "libisal.so.2"
_BUNDLE = "pyeclib"
_BUNDLED_NAMES = "libisal*.so*"

_CALL_BYTES = 1 << 30
"""ISA-L counts bytes of a buffer in a C int. Up to there, one call is faster than several."""

TABLE_BYTES = 32
"""Of each coefficient's table, as ISA-L's documentation of `ec_init_tables` gives it."""

_TABLES_KEPT = 64
"""Most tables for decoding that a codec keeps; in a rebuild the same losses come again and again.
One has at most 0.5 MiB, in the largest codes; 2 KiB and less up to 32+2."""


@dataclass(frozen=True)
class Library:
    """ISA-L's two functions for erasure codes, from one shared library."""

    name: str
    """Such as "isa-l 2.32.0 (pyeclib)"; the version is left out where the library does not say."""
    init_tables: Callable[..., None]
    """`ec_init_tables(data count, row count, coefficients, tables)`."""
    encode_data: Callable[..., None]
    """`ec_encode_data(length, data count, row count, tables, data, rows)`."""


def bundled_path() -> Path:
    """The library within the installed `pyeclib`. Raises CodecError, saying what is missing."""
    try:
        files = metadata.files(_BUNDLE)
    except metadata.PackageNotFoundError:
        raise CodecError(f"{_BUNDLE} is not installed: pip install {_BUNDLE}") from None
    for path in files or ():
        if path.match(_BUNDLED_NAMES):
            return Path(str(path.locate()))
    # Its list of files is missing or does not tell: look where wheels put such libraries.
    for folder in _folders_beside_package():
        for found in sorted(folder.glob(_BUNDLED_NAMES)):
            return found
    raise CodecError(
        f"the installed {_BUNDLE} brings no {_BUNDLED_NAMES}; its wheel from 1.8 on does, one "
        "that was built from source does not"
    )


def _folders_beside_package() -> Iterator[Path]:
    spec = find_spec(_BUNDLE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield Path(folder).with_name(f"{_BUNDLE}.libs")


def load_bundled() -> Library:
    """ISA-L as `pyeclib` brings it. Raises CodecError if it is not to be had."""
    return load(str(bundled_path()), _BUNDLE)


def load_system() -> Library:
    """ISA-L as the dynamic loader finds it. Raises CodecError if it is not to be had."""
    return load(_SYSTEM_NAME, "system")


def load_any() -> Library:
    """The bundled one, or else the system's. Raises CodecError, with both reasons, without any."""
    try:
        return load_bundled()
    except CodecError as bundled:
        try:
            return load_system()
        except CodecError as system:
            raise CodecError(f"{bundled}; {system}") from None


def load(path: str, origin: str) -> Library:
    """ISA-L from a file, or from a name that the dynamic loader knows.

    Raises CodecError if it cannot be loaded, or lacks a function.
    """
    try:
        library = ctypes.CDLL(path)
        init, encode = library.ec_init_tables, library.ec_encode_data
    except (OSError, AttributeError) as error:
        raise CodecError(f"cannot be loaded: {error}") from error
    pointers = ctypes.POINTER(ctypes.c_void_p)
    init.restype = encode.restype = None
    init.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
    encode.argtypes = [*[ctypes.c_int] * 3, ctypes.c_void_p, pointers, pointers]
    return Library(f"isa-l {_version(library)}({origin})", init, encode)


def _version(library: ctypes.CDLL) -> str:
    try:
        version = library.isal_get_version_str
    except AttributeError:
        return ""  # before 2.31
    version.argtypes, version.restype = [], ctypes.c_char_p
    return f"{version().decode()} "


class IsalCodec:
    """ISA-L with the coefficients of the zfec code. It checks nothing; all is checked here."""

    name = "zfec"

    def __init__(self, data_shards: int, parity_shards: int, library: Library) -> None:
        """Raises CodecError unless both are at least 1 and together at most MAX_SHARDS."""
        check_geometry(data_shards, parity_shards)
        self.engine = library.name
        self.data_shards = data_shards
        self.parity_shards = parity_shards
        self._library = library
        data = tuple(range(data_shards))
        rows = tuple(range(data_shards, data_shards + parity_shards))
        self._encode_tables = self._make_tables(data, rows)
        self._decode_tables = lru_cache(_TABLES_KEPT)(self._make_tables)

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """See `Codec.encode`."""
        sources, targets = check_encode(self, data, parity)
        self._multiply(self._encode_tables, sources, targets)

    def decode(self, shards: Mapping[int, Buffer], out: Mapping[int, Buffer]) -> None:
        """See `Codec.decode`. Computes the shards that are asked for and not given, no others."""
        sources, targets = check_decode(self, shards, out)
        for number in targets.keys() & sources.keys():
            # NumPy copies without the GIL.
            source = np.frombuffer(sources[number], np.uint8)
            np.copyto(np.frombuffer(targets[number], np.uint8), source)
        lost = tuple(number for number in targets if number not in sources)
        if lost:
            tables = self._decode_tables(tuple(sources), lost)
            self._multiply(tables, list(sources.values()), [targets[number] for number in lost])

    def _make_tables(self, given: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
        """ISA-L's form of the coefficients: opaque, and good for this library and machine only."""
        tables = ctypes.create_string_buffer(TABLE_BYTES * len(given) * len(wanted))
        self._library.init_tables(len(given), len(wanted), coefficients(given, wanted), tables)
        return tables

    def _multiply(
        self, tables: Any, sources: Sequence[memoryview], targets: Sequence[memoryview]
    ) -> None:
        """Fill `targets` from `sources`. All have one length, which has been checked."""
        # The views hold on to the buffers, so that none moves or goes while ISA-L is at work.
        inputs, outputs = (
            [address_of(view) for view in sources],
            [address_of(view) for view in targets],
        )
        length_bytes = sources[0].nbytes
        for start in range(0, length_bytes, _CALL_BYTES):
            self._library.encode_data(
                min(_CALL_BYTES, length_bytes - start),
                len(inputs),
                len(outputs),
                tables,
                _pointers(inputs, start),
                _pointers(outputs, start),
            )


def address_of(view: memoryview) -> int:
    """Where its bytes are, as long as the view lives. ctypes is quicker, but not for read-only."""
    if view.readonly:
        return int(np.frombuffer(view, np.uint8).ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _pointers(addresses: Sequence[int], start: int) -> Any:
    array = ctypes.c_void_p * len(addresses)
    return array(*[address + start for address in addresses] if start else addresses)
