"""Reading cells from wherever they are, verified: from this node's memory or from a peer's."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ckptd.agent.buffers import Buffers
from ckptd.agent.cells import Peers
from ckptd.agent.damage import Damage
from ckptd.agent.store import Store
from ckptd.digest import cell_span, digest, unpack_one
from ckptd.errors import CorruptData, Gone, PeerError, ProtocolError
from ckptd.ids import SnapshotId
from ckptd.manifest import NodeManifest, SegmentDigests
from ckptd.segment import LENGTH_BYTES
from ckptd.wire import GetCell, GetManifest, GetParity

_READS_AT_ONCE = 16
_UNPUBLISHED = bytes(LENGTH_BYTES) + b"{"

Read = Callable[[memoryview], int]
"""Reads a cell into a buffer, and returns its length in bytes."""


class CellReader:
    """Every read is verified against the digest that the cell had when it was captured."""

    def __init__(self, node: str, store: Store, peers: Peers) -> None:
        self.node, self.store, self.peers = node, store, peers
        self.buffers = Buffers()
        self.damage = Damage()
        """What peers have sent that was wrong."""
        self.pool = ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="ckptd-read")
        """For reads that need not wait for one another; nothing in it may wait for it."""

    def cell(
        self,
        id: SnapshotId,
        segment: SegmentDigests,
        index: int,
        cell_bytes: int,
        addresses: Sequence[str],
        into: memoryview,
        order: int = 0,
    ) -> int:
        """Read one data cell into `into`, from here or from the first address that has it whole.

        A peer that has many requests answers those of the lowest `order` first.

        Returns its length in bytes. Raises CorruptData if some copy was there but wrong, Gone if
        nobody has it, OSError if nobody could be reached.
        """
        _, length = cell_span(index, segment.size_bytes, cell_bytes)
        want = unpack_one(segment.digests, index)
        what = f"cell {index} of rank {segment.rank} of {id}"
        failures: list[Exception] = []
        for address in ("", *addresses):
            try:
                if address:
                    request = GetCell(id, segment.rank, index, order)
                    got, _ = self.peers.fetch(address, request, into[:length])
                else:
                    got = self._local_cell(id, segment.rank, index, into[:length])
                if got == length and digest(into[:length]) == want:
                    return length
                if index == 0 and into[: len(_UNPUBLISHED)] == _UNPUBLISHED:
                    # Its node mends another cell of the segment, and publishes it last.
                    failures.append(Gone(f"{what} is being mended"))
                    continue
                if address:
                    self.damage.found(address, what)
                whose = self.damage.name(address) if address else self.node
                failures.append(CorruptData(f"{what} from {whose} is damaged"))
            except (PeerError, OSError) as error:
                failures.append(error)
        raise _worst(failures)

    def parity(
        self, id: SnapshotId, group: int, stripe: int, row: int, address: str, into: memoryview
    ) -> int:
        """Read one parity cell; returns its length. Raises CorruptData, Gone or OSError."""
        what = f"parity row {row} of stripe {stripe} of {id}"
        if not address:
            with self.store.parity(id) as parity:
                offset, length, want = parity.cell(group, stripe, row)
                read_at(parity.path, offset, into[:length])
        else:
            length, want = self.peers.fetch(address, GetParity(id, group, stripe, row), into)
        if digest(into[:length]) != want:
            if address:
                self.damage.found(address, what)
            whose = self.damage.name(address) if address else self.node
            raise CorruptData(f"{what} from {whose} is damaged")
        return length

    def read_all(
        self, reads: Sequence[Read], buffers: Sequence[memoryview]
    ) -> list[int | PeerError | OSError]:
        """Read into one buffer each, at the same time; what each has returned, or why it failed.

        All have ended then, so that the buffers can be given back.
        """
        found: list[int | PeerError | OSError] = []
        for got in list(self.pool.map(_attempt, reads, buffers)):
            if isinstance(got, Exception) and not isinstance(got, PeerError | OSError):
                raise got
            found.append(got)
        return found

    def node_manifest(
        self, id: SnapshotId, node: str, addresses: Sequence[str], rank: int | None = None
    ) -> NodeManifest:
        """The node manifest of `node`, from here or from the first address that has it.

        With a `rank`, one that names it: this node may have been emptied, and hold only a part of
        what it held when others were told.
        """
        failures: list[Exception] = []
        reads: list[Callable[[], NodeManifest]] = [
            *([partial(self.store.node_manifest, id, node)] if node == self.node else ()),
            partial(self.store.read_node_manifest, id, node),
            *(partial(self.peers.fetch_manifest, a, GetManifest(id, node)) for a in addresses),
        ]
        for read in reads:
            try:
                found = read()
                if rank is not None:
                    found.segment(rank)
                return found
            except KeyError:
                failures.append(Gone(f"{node} has no rank {rank} of {id}"))
            except (PeerError, OSError) as error:
                failures.append(error)
        raise _worst(failures)

    def _local_cell(self, id: SnapshotId, rank: int, index: int, into: memoryview) -> int:
        with self.store.segment(id, rank) as (path, sidecar):
            offset, length = cell_span(index, sidecar.size_bytes, sidecar.cell_bytes)
            if length > len(into):
                raise ProtocolError(f"rank {rank} of {id} has another size here")
            return read_at(path, offset, into[:length])


def _attempt(read: Read, into: memoryview) -> Any:
    try:
        return read(into)
    except Exception as error:
        return error


def read_at(path: os.PathLike[str], offset: int, into: memoryview) -> int:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.readinto(into) or 0


def _worst(failures: Sequence[Exception]) -> Exception:
    """What says most about why a cell could not be read: damage, then the network, then absence.

    Of several of a kind the last: that this node does not have it comes first, and says little.
    """
    for kind in (CorruptData, OSError, ProtocolError, Gone):
        for failure in reversed(failures):
            if isinstance(failure, kind):
                return failure
    return failures[0]
