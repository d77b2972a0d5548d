"""Protecting a snapshot again: a node that lost its parity, or took a lost node's place, gets it.

Every row comes from a node that holds data of its stripe, each turn's with another: one cell comes
here for each that is kept, not as many as the code has data shards, and all survivors share the
work.
"""

import threading
from functools import partial
from typing import Any

from ckptd.agent.decode import CellDecoder, Geometry, source_when_protected
from ckptd.agent.fetch import HELPER_TIMEOUT_S, HELPERS_ASKED
from ckptd.agent.protect import ROWS_AT_ONCE, EncodeRun
from ckptd.digest import digest
from ckptd.erasure import Stripe
from ckptd.errors import PeerError
from ckptd.manifest import JobManifest


class RecodeRun(EncodeRun):
    """An EncodeRun, with its arguments, that has its rows computed by others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_demand = True
        self._known = Geometry()
        self._silent: set[str] = set()
        self._computing = threading.BoundedSemaphore(1)  # as much memory as a stripe's data

    def update(self, manifest: JobManifest, cells: dict[str, str]) -> None:
        """As of an EncodeRun; whoever was silent is asked again."""
        super().update(manifest, cells)
        self._silent = set()

    def _fill(self) -> None:
        self._in_threads(ROWS_AT_ONCE, self._recode, list(self._index))

    def _recode(self, place: tuple[int, int]) -> None:
        number, row = place
        stripe = self._stripe(number)
        length = max(self._cell_length(member, cell) for member, cell in stripe.data)
        with self._reader.buffers.lend(self._manifest.cell_bytes) as (buffer,):
            self._again(partial(self._get_row, stripe, row, buffer[:length]))
            self._keep(number, row, buffer[:length])

    def _get_row(self, stripe: Stripe, row: int, into: memoryview) -> None:
        """From a helper, or another, or computed here. Raises OSError if none of that works now."""
        source = source_when_protected(self._manifest, self._cells)
        decoder = CellDecoder(self._reader, self._manifest.id, source, self._known)
        request = decoder.row_request(self._group_index, stripe, row)
        silent = self._silent
        helpers = [h for h in decoder.recoders(self._group_index, stripe) if h not in silent]
        for helper in helpers[:HELPERS_ASKED]:
            try:
                length, want = self._reader.peers.fetch(helper, request, into, HELPER_TIMEOUT_S)
            except PeerError:
                continue  # it cannot; perhaps another, or this node, can
            except OSError:
                silent.add(helper)
                continue
            if length == len(into) and digest(into) == want:
                return
        with self._computing:
            if self._stop.is_set():
                return
            try:
                into[:] = self._encode(stripe)[row]
            except PeerError as error:
                # Data that is damaged or gone may be mended, or brought back, in a while.
                raise ConnectionError(str(error)) from error
