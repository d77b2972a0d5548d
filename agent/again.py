"""Protecting a snapshot again: a node that lost its parity, or took a lost node's place, gets it.

Every row comes from a node that holds data of its stripe, each turn's with another: one cell comes
here for each that is kept, not as many as the code has data shards, and all survivors share the
work.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ckptd.agent.decode import CellDecoder, Geometry
from ckptd.agent.fetch import HELPER_TIMEOUT_S, HELPERS_ASKED
from ckptd.agent.protect import ROWS_AT_ONCE, EncodeRun
from ckptd.digest import digest
from ckptd.erasure import Stripe
from ckptd.errors import PeerError
from ckptd.manifest import JobManifest, NodeManifest
from ckptd.wire import Source

Ranks = dict[int, tuple[str, ...]]


class RecodeRun(EncodeRun):
    """An EncodeRun, with its arguments, that has its rows computed by others.

    `ranks`: the nodes that hold each rank's segment.
    """

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = ranks
        self._on_demand = True
        self._known = Geometry()
        self._silent: set[str] = set()
        self._computing = threading.BoundedSemaphore(1)  # as much memory as a stripe's data

    def update(self, manifest: JobManifest, cells: dict[str, str], ranks: Ranks) -> None:
        """As of an EncodeRun; whoever was silent is asked again."""
        super().update(manifest, cells, ranks)
        self._ranks, self._silent = ranks or self._ranks, set()

    def _fill(self) -> None:
        with ThreadPoolExecutor(ROWS_AT_ONCE, thread_name_prefix="ckptd-again") as pool:
            for place in self._index:
                pool.submit(self._guard, partial(self._recode, place))

    def _recode(self, place: tuple[int, int]) -> None:
        number, row = place
        stripe = self._stripe(number)
        length = self._row_length(stripe)
        with self._reader.buffers.lend(self._manifest.cell_bytes) as (buffer,):
            self._again(partial(self._get_row, stripe, row, buffer[:length]))
            self._keep(number, row, buffer[:length])

    def _decoder(self) -> CellDecoder:
        source = Source(self._manifest, self._ranks, {}, (), self._cells)
        return CellDecoder(self._reader, self._manifest.id, source, self._known)

    def _pull_manifest(self, number: int) -> NodeManifest:
        """Of the segments of a place, wherever they are."""
        member, decoder = self._group.members[number], self._decoder()
        try:
            segments = tuple(decoder.segment(extent.rank)[0] for extent in member.extents)
        except PeerError as error:
            raise ConnectionError(str(error)) from error
        return NodeManifest(self._manifest.id, member.origin, self._manifest.cell_bytes, segments)

    def _holders(self, member: int, rank: int) -> list[str]:
        return self._decoder().holders(rank)

    def _get_row(self, stripe: Stripe, row: int, into: memoryview) -> None:
        """From a helper, or another, or computed here. Raises OSError if none of that works now."""
        decoder = self._decoder()
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
