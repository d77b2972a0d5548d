"""Copies of CPU tensors into a mapped slot: by a background thread, and by whoever waits for it.

The training thread copies what is volatile; the rest is copied cell by cell in the background. At
the gate the training thread does not wait for the background: it copies what is left itself.

Whether something wrote to the tensors in the meantime is told from their bytes, since version
counters miss writes by fused optimizers: from all of them (`audited`), or from windows of
`WINDOW_BYTES` spread over each tensor, one for each MiB of it and at most 16. A write that touches
the share *f* of a tensor in one run is missed by *n* windows with the probability (1 - f)^n: one to
all of it, such as an average of the weights, is seen in every tensor, while eight rows of an
embedding of 128,000 rows nearly always pass.
"""

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ckptd.digest import cell_count
from ckptd.trainer.pace import Pace
from ckptd.trainer.plan import Piece

WINDOW_BYTES = 64
_WINDOW_EVERY_BYTES = 1 << 20
_WINDOWS_MAX = 16
_CACHED_BYTES = 256 << 10  # stays in a core's cache between its copy and its digest
_SCATTER = 0x9E3779B97F4A7C15  # an odd number without a pattern (Knuth, TAOCP 3, §6.4)
_ODD = -1
"""Stands for the pieces that do not lie in memory as they are saved; they go first."""

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_Move = tuple[int, int, int]
"""Target address, source address, bytes."""


class CpuCopies:
    """One slot's copies, made anew for each place that the sources may have moved to."""

    def __init__(
        self, pieces: Sequence[Piece], slot: memoryview, cell_bytes: int, pace: Pace | None
    ) -> None:
        pieces = [piece for piece in pieces if piece.begin < piece.end]
        base = ctypes.addressof(ctypes.c_char.from_buffer(slot))
        self._slot, self._base, self._pace = slot, base, pace
        self._settled = [p for p in pieces if not p.volatile]
        self._odd = [p for p in self._settled if not p.lies_as_saved]
        self._volatile_odd = [p for p in pieces if p.volatile and not p.lies_as_saved]
        self._volatile = [_move(p, base) for p in pieces if p.volatile and p.lies_as_saved]
        plain = sorted((p for p in self._settled if p.lies_as_saved), key=lambda p: p.begin)
        self._plain = [(_move(p, base), p.name) for p in plain]
        self._cells: dict[int, list[_Move]] = {_ODD: []} if self._odd else {}
        for piece in plain:
            target, source, _ = _move(piece, base)
            for cell in range(piece.begin // cell_bytes, cell_count(piece.end, cell_bytes)):
                begin = max(piece.begin, cell * cell_bytes)
                end = min(piece.end, (cell + 1) * cell_bytes)
                done = begin - piece.begin
                self._cells.setdefault(cell, []).append((target + done, source + done, end - begin))
        windows = _place_windows(self._plain)
        self._windows = [(size, name) for *_, size, name in windows]
        self._at_slot = np.array([w[0] for w in windows], dtype=np.int64)
        self._live = np.array([w[1] for w in windows], dtype=np.int64)
        self._strides = np.array([w[2] for w in windows], dtype=np.int64)
        self._sizes = [size for size, _ in self._windows]
        self._sample = ctypes.create_string_buffer(max(1, WINDOW_BYTES * len(self._windows)))
        self._now = ctypes.create_string_buffer(len(self._sample))
        self._landed = ctypes.create_string_buffer(len(self._sample))
        self._shift = 0
        self._lazy = self._audited = False
        self._todo: set[int] = set()
        self._busy: set[int] = set()
        self._changed = threading.Condition()

    # On the training thread.

    def begin(self, lazily: bool, audited: bool, number: int) -> None:
        """Copy what is volatile and, unless `lazily`, all the rest.

        `number` moves the windows from capture to capture.
        """
        for target, source, size in self._volatile:
            ctypes.memmove(target, source, size)
        for piece in self._volatile_odd:
            self._copy_odd(piece)
        self._lazy, self._audited = lazily, audited
        self._shift = number * _SCATTER % (1 << 62)
        self._todo = set(self._cells)
        if lazily:
            self._take(self._sample, at_slot=False)
        else:
            self.gate()

    def gate(self) -> None:
        """Return when everything is copied; lends a hand with what is not yet."""
        while True:
            with self._changed:
                if not self._todo:
                    while self._busy:
                        self._changed.wait()
                    return
                cell = self._todo.pop()
                self._busy.add(cell)
            self._copy(cell)

    def written(self) -> str:
        """The first tensor that is no longer as it was in `begin`, or ""; all must be copied.

        Looks at all bytes of an audited capture, else at the windows.
        """
        if self._audited:
            return next((n for (t, s, size), n in self._plain if _memcmp(t, s, size)), "") or next(
                (p.name for p in self._odd if not self._is_odd_same(p)), ""
            )
        if not self._lazy:
            return ""
        self._take(self._now, at_slot=False)
        return self._first_difference(self._now)

    # In the background.

    def land(self, cell: int, reached: Callable[[int], None] | None) -> None:
        """Return when everything of this cell of the slot is copied.

        If it is copied here, `reached` is told now and then up to which byte of the slot, so that
        what it does with the bytes finds them in the cache.
        """
        if cell == 0 and _ODD in self._cells:
            self.land(_ODD, None)
        moves = self._cells.get(cell)
        if moves is None:
            return
        if self._pace is not None and cell in self._todo:
            self._pace.wait(sum(size for _, _, size in moves))
        with self._changed:
            while cell in self._busy:
                self._changed.wait()
            if cell not in self._todo:
                return
            self._todo.discard(cell)
            self._busy.add(cell)
        self._copy(cell, reached)

    def written_later(self) -> str:
        """`written` has said all."""
        return ""

    def torn(self) -> str:
        """The first tensor that was written to before it was copied, or "".

        What was copied in `begin` cannot be torn.
        """
        if not self._lazy:
            return ""
        self._take(self._landed, at_slot=True)
        return self._first_difference(self._landed)

    # Both.

    def _copy(self, cell: int, reached: Callable[[int], None] | None = None) -> None:
        try:
            for target, source, size in self._cells[cell]:
                for done in range(0, size, _CACHED_BYTES):
                    length = min(_CACHED_BYTES, size - done)
                    ctypes.memmove(target + done, source + done, length)
                    if reached is not None:
                        reached(target + done + length - self._base)
            if cell == _ODD:
                for piece in self._odd:
                    self._copy_odd(piece)
        finally:
            with self._changed:
                self._busy.discard(cell)
                self._changed.notify_all()

    def _copy_odd(self, piece: Piece) -> None:
        with torch.no_grad():
            _target(piece, self._slot).copy_(piece.source)

    def _is_odd_same(self, piece: Piece) -> bool:
        there = _target(piece, self._slot)
        now = torch.empty_like(there).copy_(piece.source)
        return torch.equal(now.reshape(-1).view(torch.uint8), there.reshape(-1).view(torch.uint8))

    def _take(self, into: "ctypes.Array[ctypes.c_char]", at_slot: bool) -> None:
        base, memmove = ctypes.addressof(into), ctypes.memmove
        bases = self._at_slot if at_slot else self._live
        sources = (bases + self._shift % self._strides).tolist()
        targets = range(base, base + len(into), WINDOW_BYTES)
        for target, source, size in zip(targets, sources, self._sizes, strict=False):
            memmove(target, source, size)

    def _first_difference(self, later: "ctypes.Array[ctypes.c_char]") -> str:
        if self._sample.raw == later.raw:
            return ""
        for index, (size, name) in enumerate(self._windows):
            begin = index * WINDOW_BYTES
            if self._sample[begin : begin + size] != later[begin : begin + size]:
                return name
        return ""


_Window = tuple[int, int, int, int, str]
"""Addresses in the slot and of the tensor; places it can be moved to; bytes; the tensor's name."""


def window_offsets(size_bytes: int, shift: int = 0) -> list[tuple[int, int]]:
    """(offset, bytes) of the windows of a tensor; `shift` moves them within their strides."""
    return [
        (begin + (shift * _SCATTER % (room + 1)), length)
        for begin, room, length in _windows(size_bytes)
    ]


def _windows(size_bytes: int) -> list[tuple[int, int, int]]:
    """(begin, how far it can be moved, bytes) of each window."""
    if not size_bytes:
        return []
    count = min(_WINDOWS_MAX, -(-size_bytes // _WINDOW_EVERY_BYTES))
    length = min(WINDOW_BYTES, size_bytes)
    edges = [index * size_bytes // count for index in range(count + 1)]
    return [
        (begin, max(0, end - begin - length), length) for begin, end in itertools.pairwise(edges)
    ]


def _place_windows(plain: Sequence[tuple[_Move, str]]) -> list[_Window]:
    return [
        (target + begin, source + begin, room + 1, length, name)
        for (target, source, size), name in plain
        for begin, room, length in _windows(size)
    ]


def _move(piece: Piece, base: int) -> _Move:
    return base + piece.begin, piece.source.data_ptr(), piece.end - piece.begin


def _target(piece: Piece, slot: memoryview) -> torch.Tensor:
    raw = torch.frombuffer(
        slot, dtype=torch.uint8, offset=piece.begin, count=piece.end - piece.begin
    )
    return raw.view(piece.source.dtype).reshape(piece.source.shape)
