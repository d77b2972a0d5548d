"""The journal as an agent keeps it: entries appended to one file, each with its checksum.

    header   b"\xc5ent", length of the body (u32), xxh3-64 of the body, xxh3-64 of all before it
    body     an Entry in msgpack

A header with a checksum of its own tells a body that was cut short (the agent died while it wrote)
from a length that was damaged. After damage, the next header is looked for.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from ckptd.digest import digest
from ckptd.journal import Entry, Journal

COMPACT_BYTES = 1 << 20
"""A file of this size is written anew, with only what still counts."""

_MAGIC = b"\xc5ent"
_FIELDS = struct.Struct("<4sIQ")
_CHECK = struct.Struct("<Q")
_HEADER_BYTES = _FIELDS.size + _CHECK.size


class LogFile:
    """Owns one file. Not thread-safe: one thread reads it, once, and appends to it."""

    def __init__(self, path: Path, compact_bytes: int = COMPACT_BYTES) -> None:
        self.path = path
        self._new = path.with_name(path.name + ".new")
        self._least_bytes = self._compact_bytes = compact_bytes
        self._journal = Journal()
        self._behind = False
        """Whether something could not be appended whole: then the file is written anew."""

    def read(self, problems: list[str]) -> tuple[Entry, ...]:
        """All entries that are whole; says what was not, and rids the file of it."""
        self._new.unlink(missing_ok=True)
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            problems.append(f"the log {self.path.name} cannot be read: {error}")
            self._behind = True
            return ()
        damaged = []
        end = 0
        for begin, after, entry in _records(raw):
            if entry is None:
                damaged.append(begin)
            else:
                self._journal.merge([entry])
                end = after
        if damaged:
            problems.append(
                f"the log {self.path.name} is damaged at byte {', '.join(map(str, damaged[:8]))}: "
                f"what was there is dropped; {len(self._journal.entries)} entries are left"
            )
        if end < len(raw) or damaged:
            try:
                if damaged:
                    self._rewrite()
                else:
                    os.truncate(self.path, end)  # takes no memory, so a full tmpfs does not matter
            except OSError as error:
                problems.append(f"the log {self.path.name} cannot be mended: {error}")
                self._behind = True
        return self._journal.entries

    def append(self, entries: Iterable[Entry]) -> None:
        """Add them. Raises OSError if there is no room: then the next call writes them, too."""
        news = self._journal.merge(entries)
        if self._behind:
            self._rewrite()
            return
        self._behind = True  # until all of it is there
        with self.path.open("ab", buffering=0) as file:
            _write(file.fileno(), b"".join(map(_record, news)))
            size_bytes = file.tell()
        self._behind = False
        if size_bytes > self._compact_bytes:
            self._rewrite()

    def catch_up(self) -> bool:
        """Write what there was no room for, if so. Raises OSError if there still is none."""
        if not self._behind:
            return False
        self._rewrite()
        return True

    def _rewrite(self) -> None:
        content = b"".join(map(_record, self._journal.entries))
        try:
            self._new.write_bytes(content)
            os.replace(self._new, self.path)
        except OSError:
            with suppress(OSError):
                self._new.unlink()
            raise
        self._behind = False
        # What still counts may itself be large: then it is not written anew at every entry.
        self._compact_bytes = max(self._least_bytes, 2 * len(content))


def _record(entry: Entry) -> bytes:
    body = msgspec.msgpack.encode(entry)
    fields = _FIELDS.pack(_MAGIC, len(body), digest(body))
    return fields + _CHECK.pack(digest(fields)) + body


def _records(raw: bytes) -> Iterator[tuple[int, int, Entry | None]]:
    """(begin, end, entry) of each record, None for damage; one cut short at the end is left out."""
    at = 0
    while at < len(raw):
        header = raw[at : at + _HEADER_BYTES]
        if len(header) < _HEADER_BYTES and _is_cut_short(header):
            return
        fields, check = header[: _FIELDS.size], header[_FIELDS.size :]
        if len(header) == _HEADER_BYTES and check == _CHECK.pack(digest(fields)):
            magic, length, content = _FIELDS.unpack(fields)
            body = raw[at + _HEADER_BYTES : at + _HEADER_BYTES + length]
            if magic == _MAGIC and len(body) < length:
                return
            if magic == _MAGIC:
                after = at + _HEADER_BYTES + length
                yield at, after, _decoded(body) if digest(body) == content else None
                at = after
                continue
        found = raw.find(_MAGIC, at + 1)
        yield at, found, None
        if found < 0:
            return
        at = found


def _is_cut_short(header: bytes) -> bool:
    """Whether this is the begin of a header, as far as one can see."""
    return header[: len(_MAGIC)] == _MAGIC[: len(header)]


def _decoded(body: bytes) -> Entry | None:
    try:
        return msgspec.msgpack.decode(body, type=Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # of another version of ckptd


def _write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
