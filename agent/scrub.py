"""Scrubbing: in idle time, cells at rest are verified, and mended through their stripe.

A digest proves that a cell is what was written, not that parity was computed rightly, so some
parity cells are also computed anew from the data and compared.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from ckptd.agent.decode import CellDecoder
from ckptd.agent.reader import CellReader, read_at
from ckptd.agent.store import Parity
from ckptd.digest import cell_count, cell_span, digest, unpack_one
from ckptd.errors import Gone, PeerError
from ckptd.ids import SnapshotId
from ckptd.manifest import SegmentDigests
from ckptd.segment import LENGTH_BYTES, Sidecar

AT_REST_S = 10.0
"""A snapshot is left alone for so long: most are overwritten before."""
_ENCODED_ANEW_EVERY = 16
_LOOK_AGAIN_S = 2.0
_NICE = 19

log = logging.getLogger("ckptd")


@dataclass(frozen=True, slots=True)
class ScrubStats:
    """What one agent's scrubbing has come to."""

    checked_bytes: int = 0
    damaged_cells: int = 0
    mended_cells: int = 0


class Scrubber:
    """Goes round and round over what the store has published, in a thread of its own."""

    def __init__(
        self,
        reader: CellReader,
        bytes_per_s: float,
        decoder_of: Callable[[SnapshotId], CellDecoder | None],
        found: Callable[[ScrubStats, str], None],
        at_rest_s: float = AT_REST_S,
    ) -> None:
        """`decoder_of` knows where the stripes of a snapshot are, if it has any.

        `found` is told after each damaged cell what has come to be, and what was done about it.
        """
        self._reader, self._bytes_per_s = reader, bytes_per_s
        self._decoder_of, self._found, self._at_rest_s = decoder_of, found, at_rest_s
        self._seen: dict[SnapshotId, float] = {}
        self._hopeless: set[tuple[SnapshotId, str, bool]] = set()
        self._stop = threading.Event()
        self._parity_cells = 0
        self._rested_at = 0
        self.stats = ScrubStats()

    def start(self) -> None:
        """Begin, with the lowest priority there is."""
        threading.Thread(target=self._run, name="ckptd-scrub", daemon=True).start()

    def stop(self) -> None:
        """End soon."""
        self._stop.set()

    def round(self, now: float) -> None:
        """Look once at all that has been at rest for long enough."""
        held = self._reader.store.published()
        self._seen = {id: self._seen.get(id, now) for id in held}
        self._hopeless = {one for one in self._hopeless if one[0] in held}
        for id, ranks in sorted(held.items()):
            if now - self._seen[id] < self._at_rest_s:
                continue
            for rank in ranks:
                with contextlib.suppress(Gone):
                    self._segment(id, rank)
            with contextlib.suppress(Gone):
                self._parity(id)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while not self._stop.wait(_LOOK_AGAIN_S):
            try:
                self.round(monotonic())
            except Exception:
                log.exception("scrubbing failed; it goes on with the next round")

    def _segment(self, id: SnapshotId, rank: int) -> None:
        for index in self._cells_of(id, rank):
            self._rest()
            # Pinned for one cell only, so that nobody waits long for the slot.
            with self._reader.store.segment(id, rank) as (path, sidecar):
                offset, length = cell_span(index, sidecar.size_bytes, sidecar.cell_bytes)
                want = unpack_one(sidecar.digests, index)
                with self._reader.buffers.lend(sidecar.cell_bytes) as (buffer,):
                    view = buffer[:length]
                    if self._is_right(path, offset, want, view):
                        continue
                    if index == 0 and view[:LENGTH_BYTES] == bytes(LENGTH_BYTES):
                        continue  # somebody mends it already, and publishes it last
                    what = f"cell {index} of rank {rank} of {id}"
                    self._mend(id, what, path, offset, view, partial(_decode, sidecar, index))

    def _cells_of(self, id: SnapshotId, rank: int) -> Iterable[int]:
        with self._reader.store.segment(id, rank) as (_, sidecar):
            return range(cell_count(sidecar.size_bytes, sidecar.cell_bytes))

    def _parity(self, id: SnapshotId) -> None:
        with self._reader.store.parity(id) as parity:
            places = list(parity.index)
        for stripe, row in places:
            self._rest()
            with self._reader.store.parity(id) as parity:
                self._parity_cell(id, parity, stripe, row)

    def _parity_cell(self, id: SnapshotId, parity: Parity, stripe: int, row: int) -> None:
        group = parity.sidecar.group
        offset, length, want = parity.cell(group, stripe, row)
        if not length:
            return
        what = f"parity row {row} of stripe {stripe} of {id}"
        with self._reader.buffers.lend(parity.sidecar.cell_bytes, 2) as (buffer, other):
            view, anew = buffer[:length], other[:length]
            if not self._is_right(parity.path, offset, want, view):
                restore = partial(_encode, group, stripe, row, want)
                self._mend(id, what, parity.path, offset, view, restore)
                return
            self._parity_cells += 1
            if self._parity_cells % _ENCODED_ANEW_EVERY:
                return
            decoder = self._decoder_of(id)
            if decoder is None:
                return
            try:
                decoder.encode(group, stripe, row, anew)
            except (PeerError, OSError):
                return  # not all data is there to compare with
            if anew != view:
                self._count(damaged=1)
                self._found(
                    self.stats,
                    f"{what} is not what its data gives, though it is as it was written; the "
                    "snapshot can be restored from its data only: look at this node's memory and "
                    "erasure engine",
                )

    def _rest(self) -> None:
        """Let as much time pass as the cell before was worth."""
        if self._bytes_per_s:
            self._stop.wait((self.stats.checked_bytes - self._rested_at) / self._bytes_per_s)
        self._rested_at = self.stats.checked_bytes

    def _is_right(self, path: Path, offset: int, want: int, into: memoryview) -> bool:
        got = read_at(path, offset, into)
        self._count(checked=len(into))
        return got == len(into) and digest(into) == want

    def _mend(
        self,
        id: SnapshotId,
        what: str,
        path: Path,
        offset: int,
        into: memoryview,
        restore: Callable[[CellDecoder, memoryview], None],
    ) -> None:
        decoder = self._decoder_of(id)
        hopeless = (id, what, decoder is None)  # its peers may become known
        if hopeless in self._hopeless:
            return
        self._count(damaged=1)
        try:
            if decoder is None:
                raise Gone("there is no parity of it")
            restore(decoder, into)
        except (PeerError, OSError) as error:
            self._hopeless.add(hopeless)
            self._found(self.stats, f"{what} is damaged and could not be mended: {error}")
            return
        with path.open("r+b", buffering=0) as file:
            file.seek(offset)
            file.write(into)
        self._count(mended=1)
        self._found(self.stats, f"{what} was damaged, and has been mended")

    def _count(self, checked: int = 0, damaged: int = 0, mended: int = 0) -> None:
        self.stats = ScrubStats(
            self.stats.checked_bytes + checked,
            self.stats.damaged_cells + damaged,
            self.stats.mended_cells + mended,
        )


def _decode(sidecar: Sidecar, index: int, decoder: CellDecoder, into: memoryview) -> None:
    segment = SegmentDigests(sidecar.rank, sidecar.size_bytes, sidecar.digests)
    decoder.decode(segment, index, into)


def _encode(
    group: int, stripe: int, row: int, want: int, decoder: CellDecoder, into: memoryview
) -> None:
    decoder.encode(group, stripe, row, into)
    if digest(into) != want:
        raise Gone("what its data gives does not have its digest")
