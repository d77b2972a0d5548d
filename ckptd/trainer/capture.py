"""Capturing one rank's state into a slot: lazily, behind a gate, sealed last.

After `optimizer.step()` parameters and optimizer state stay as they are until the next one, so they
are copied in the background while the next forward and backward pass runs (DataStates-LLM, §4:
lazy asynchronous copies); the gate makes the next optimizer step wait for what is not copied yet.
What may change earlier is copied before `begin` returns.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ckptd.digest import cell_count, cell_span, digest, pack
from ckptd.errors import CkptdError, UnsavableState
from ckptd.ids import SnapshotId
from ckptd.segment import (
    LENGTH_BYTES,
    Layout,
    Sidecar,
    TensorSpec,
    checked_record,
    plan_layout,
    sidecar_path,
)
from ckptd.trainer import copier
from ckptd.trainer.objects import dump_objects
from ckptd.trainer.state import Item, LiveState

_OBJECTS_ROUND_BYTES = 4096
_UNSEALED = bytes(LENGTH_BYTES)

log = logging.getLogger("ckptd")


class LayoutChanged(CkptdError):
    """The live state no longer fits the layout; a new one must be opened."""


class CaptureError(CkptdError):
    """This capture failed; the next may not."""


@dataclass
class _Mapped:
    """A slot file mapped into this process."""

    map: mmap.mmap
    inode: int
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.view = memoryview(self.map)


class Capture:
    """The capture engine of one rank. Not thread-safe: called by the training thread."""

    def __init__(
        self,
        state: LiveState,
        rank: int,
        world_size: int,
        on_sealed: Callable[[SnapshotId], None],
        on_failed: Callable[[SnapshotId, str], None],
    ) -> None:
        self._state, self._rank, self._world_size = state, rank, world_size
        self._on_sealed, self._on_failed = on_sealed, on_failed
        self.layout: Layout | None = None
        self._specs: tuple[TensorSpec, ...] = ()
        self._mapped: dict[str, _Mapped] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._worker: threading.Thread | None = None
        self.at_point: Callable[[str], None] = lambda point: None
        """Called with the name of each point of a capture; tests kill the process there."""

    def plan(self, step: int) -> Layout:
        """Compute the layout for the state as it is now.

        Raises UnsavableState, naming what cannot be saved.
        """
        self.wait_sealed()
        items = self._state.items()
        objects = dump_objects(self._state.objects(step))
        capacity = 2 * len(objects) + _OBJECTS_ROUND_BYTES
        capacity -= capacity % _OBJECTS_ROUND_BYTES
        self._specs = tuple(item.spec for item in items)
        try:
            self.layout = plan_layout(self._specs, capacity)
        except ValueError as error:
            raise UnsavableState(str(error)) from error
        for mapped in self._mapped.values():
            mapped.view.release()
        self._mapped.clear()
        return self.layout

    def begin(self, id: SnapshotId, path: str, cell_bytes: int) -> None:
        """Start the capture of `id` into the slot at `path`; returns once volatile state is copied.

        Raises LayoutChanged, or CaptureError if the slot cannot be used, or the capture before is
        still being sealed.
        """
        if self._worker is not None and self._worker.is_alive():
            raise CaptureError("the capture before is not sealed yet")
        self.wait_sealed()
        layout = self.layout
        if layout is None:
            raise LayoutChanged("no layout has been planned")
        items = self._state.items()
        if tuple(item.spec for item in items) != self._specs:
            raise LayoutChanged(_what_changed(self._specs, tuple(item.spec for item in items)))
        objects = dump_objects(self._state.objects(id.step))
        if len(objects) > layout.objects_capacity:
            raise LayoutChanged(
                f"non-tensor state has grown to {len(objects)} bytes, "
                f"{layout.objects_capacity} were reserved"
            )
        slot = self._map(path, layout.size_bytes)
        slot[:LENGTH_BYTES] = _UNSEALED
        self.at_point("begun")
        places = {placed.spec.key: placed for placed in layout.tensors}
        settled: list[Item] = []
        for item in items:
            if item.volatile:
                placed = places[item.spec.key]
                copier.copy(item.local, slot, placed.begin, placed.end)
            else:
                settled.append(item)
        slot[layout.objects_begin : layout.objects_begin + len(objects)] = objects
        header = layout.header(id, self._rank, self._world_size, len(objects))
        self.at_point("volatile copied")
        self._copied.clear()
        worker = threading.Thread(
            target=self._finish,
            args=(id, Path(path), slot, settled, header, cell_bytes),
            name="ckptd-capture",
            daemon=True,
        )
        try:
            worker.start()
        except RuntimeError as error:
            self._copied.set()
            raise CaptureError(f"cannot start the thread that copies: {error}") from error
        self._worker = worker

    def gate(self) -> None:
        """Wait until nothing is being copied any more: call before writing to captured tensors."""
        self._copied.wait()

    def wait_sealed(self) -> None:
        """Wait until the capture under way, if any, is sealed or has failed."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _finish(
        self,
        id: SnapshotId,
        path: Path,
        slot: memoryview,
        settled: list[Item],
        header: bytes,
        cell_bytes: int,
    ) -> None:
        """On the background thread: copy what is settled, then digest and publish."""
        try:
            layout = self.layout
            if layout is None:
                raise CaptureError("the layout is gone")
            places = {placed.spec.key: placed for placed in layout.tensors}
            with torch.no_grad():
                for item in settled:
                    placed = places[item.spec.key]
                    copier.copy(item.local, slot, placed.begin, placed.end)
            self._copied.set()
            self.at_point("copied")
            digests = [
                _digest_cell(slot, header, index, layout.size_bytes, cell_bytes)
                for index in range(cell_count(layout.size_bytes, cell_bytes))
            ]
            sidecar = Sidecar(
                id, self._rank, self._world_size, layout.size_bytes, cell_bytes, pack(digests)
            )
            sidecar_path(path).write_bytes(checked_record(sidecar))
            self.at_point("sidecar written")
            slot[LENGTH_BYTES : len(header)] = header[LENGTH_BYTES:]
            self.at_point("header written")
            slot[:LENGTH_BYTES] = header[:LENGTH_BYTES]
            self.at_point("sealed")
            self._on_sealed(id)
        except Exception as error:
            log.warning("ckptd: the capture of %s failed: %s", id, error)
            self._on_failed(id, str(error))
        finally:
            self._copied.set()

    def _map(self, path: str, size_bytes: int) -> memoryview:
        """The slot's bytes; mapped once and kept, unless the agent made the file anew."""
        try:
            status = os.stat(path)
            held = self._mapped.get(path)
            if status.st_size != size_bytes:
                raise CaptureError(f"slot {path} has {status.st_size} bytes, not {size_bytes}")
            if held is not None and held.inode == status.st_ino:
                return held.view
            self._forget_deleted()
            with open(path, "r+b") as file:
                mapped = _Mapped(mmap.mmap(file.fileno(), size_bytes), status.st_ino)
        except OSError as error:
            raise CaptureError(f"cannot map the slot {path}: {error}") from error
        self._mapped[path] = mapped
        return mapped.view

    def _forget_deleted(self) -> None:
        """Unmap slots that the agent has deleted: a mapping keeps their memory."""
        for path, mapped in list(self._mapped.items()):
            try:
                there = os.stat(path).st_ino == mapped.inode
            except FileNotFoundError:
                there = False
            if not there:
                mapped.view.release()
                del self._mapped[path]


def _digest_cell(
    slot: memoryview, header: bytes, index: int, size_bytes: int, cell_bytes: int
) -> int:
    """Digest of a cell as it will be once the header is written."""
    begin, length = cell_span(index, size_bytes, cell_bytes)
    end = begin + length
    if begin >= len(header):
        return digest(slot[begin:end])
    return digest(header[begin:end], slot[len(header) : max(end, len(header))])


def _what_changed(old: tuple[TensorSpec, ...], new: tuple[TensorSpec, ...]) -> str:
    before = {spec.key: spec for spec in old}
    after = {spec.key: spec for spec in new}
    changed = [
        *(f"{key} is new" for key in after.keys() - before.keys()),
        *(f"{key} is gone" for key in before.keys() - after.keys()),
        *(
            f"{key} has changed"
            for key in after.keys() & before.keys()
            if after[key] != before[key]
        ),
    ]
    return "the state has changed: " + "; ".join(sorted(changed)[:3])
