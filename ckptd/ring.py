"""A ring of timing records in a file that two processes map: the trainer writes, the agent reads.

Writing never waits: when the reader is late the oldest records are written over, and it finds a
gap. Each record carries its number and a checksum, so that a record that is just being written, or
was written over, is never taken for a whole one.
"""

import mmap
import os
import stat
import struct
import threading
import zlib
from pathlib import Path
from typing import NamedTuple

from ckptd.errors import CorruptData

CAPACITY = 4096
RECORD_BYTES = 64
OPS = (
    "other",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "barrier",
    "send",
    "recv",
)
"""As they are numbered in records; only ever added to."""

_MAGIC = b"ckring1\0"
_HEADER = struct.Struct("<8sII")
_HEAD = struct.Struct("<Q")
_HEAD_AT = 16
_HEADER_BYTES = 64
_BODY = struct.Struct("<QQQqqiHBB")
_CRC = struct.Struct("<I")
_ENDED = 1


class Record(NamedTuple):
    """One operation. Times in nanoseconds: `entered_ns` since the epoch."""

    number: int
    """Of the record, from 1."""
    seq: int
    size_bytes: int
    entered_ns: int
    duration_ns: int
    """-1: not known."""
    peer: int
    """-1: none."""
    group: int
    """Place of its group in the trainer's list of groups."""
    op: int
    ended: bool


class RingWriter:
    """The trainer's end. Several threads may write."""

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        """Make the file, which must not be there. Raises OSError."""
        size = _HEADER_BYTES + capacity * RECORD_BYTES
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)
            self._map = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        self._capacity, self._number = capacity, 0
        self._mutex = threading.Lock()
        _HEADER.pack_into(self._map, 0, _MAGIC, RECORD_BYTES, capacity)

    def enter(
        self, seq: int, size_bytes: int, entered_ns: int, peer: int, group: int, op: int
    ) -> Record:
        """Write down that an operation was called; `end()` takes what this returns."""
        with self._mutex:
            self._number = number = self._number + 1
            record = Record(number, seq, size_bytes, entered_ns, -1, peer, group, op, False)
            self._write(record)
            _HEAD.pack_into(self._map, _HEAD_AT, number)
        return record

    def end(self, record: Record, duration_ns: int) -> None:
        """Write down that it has ended, if it was not written over meanwhile."""
        with self._mutex:
            if record.number + self._capacity > self._number:
                self._write(record._replace(duration_ns=duration_ns, ended=True))

    def _write(self, record: Record) -> None:
        at = _HEADER_BYTES + (record.number - 1) % self._capacity * RECORD_BYTES
        body = _BODY.pack(*record[:8], _ENDED if record.ended else 0)
        self._map[at : at + _BODY.size + _CRC.size] = body + _CRC.pack(zlib.crc32(body))


class RingReader:
    """The agent's end: gives each record when it was entered and again when it has ended.

    It reads the file instead of mapping it: a file that becomes shorter must not kill the agent.
    """

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError, or CorruptData if it is no ring of this version."""
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(self._handle)
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.getuid()):
                raise CorruptData(f"{path} is not a file of this user")
            header = os.pread(self._handle, _HEADER.size, 0)
            if len(header) < _HEADER.size:
                raise CorruptData(f"{path} is no ring: {found.st_size} bytes")
            magic, record_bytes, self._capacity = _HEADER.unpack(header)
            self._size = _HEADER_BYTES + self._capacity * RECORD_BYTES
            if magic != _MAGIC or record_bytes != RECORD_BYTES or found.st_size != self._size:
                raise CorruptData(f"{path} is no ring of this version of ckptd")
        except BaseException:
            os.close(self._handle)
            raise
        self._next = 1
        self._open: set[int] = set()
        """Numbers of records that had not ended when they were read."""

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._handle)

    def read(self) -> tuple[list[Record], int]:
        """What is new, in order, and how many records were written over before they were read.

        Raises CorruptData if the file has become shorter, OSError if it cannot be read.
        """
        raw = os.pread(self._handle, self._size, 0)
        if len(raw) != self._size:
            raise CorruptData(f"the ring has become shorter: {len(raw)} of {self._size} bytes")
        (head,) = _HEAD.unpack_from(raw, _HEAD_AT)
        oldest = head - self._capacity + 1
        found: list[Record] = []
        for number in sorted(self._open):
            record = self._parse(raw, number)
            if record is not None and record.ended:
                found.append(record)
            if number < oldest or (record is not None and record.ended):
                self._open.discard(number)
        lost = max(0, oldest - self._next)
        for number in range(max(self._next, oldest), head + 1):
            record = self._parse(raw, number)
            if record is None and number > head - self._capacity // 2:
                head = number - 1  # it is just being written; next time
                break
            if record is None:
                lost += 1
                continue
            found.append(record)
            if not record.ended:
                self._open.add(number)
        self._next = max(self._next, head + 1)
        return sorted(found), lost

    def _parse(self, raw: bytes, number: int) -> Record | None:
        """The record, or None where it is half written, or another is by now."""
        at = _HEADER_BYTES + (number - 1) % self._capacity * RECORD_BYTES
        body = raw[at : at + _BODY.size]
        if zlib.crc32(body) != _CRC.unpack_from(raw, at + _BODY.size)[0]:
            return None
        *fields, flags = _BODY.unpack(body)
        record = Record._make([*fields, bool(flags & _ENDED)])
        return record if record.number == number else None
