"""Capturing one rank's state into a slot: lazily, behind a gate, checked, sealed last.

After `optimizer.step()` parameters and optimizer state stay as they are until the next one, so they
are copied in the background while the next forward and backward pass runs (DataStates-LLM, §4:
lazy asynchronous copies); the gate makes the next optimizer step wait for what is not copied yet.
What may change earlier is copied before `begin` returns.

Something may write to captured tensors without passing the gate. So the first captures of a
layout, and every `audit_every`-th, copy everything before `begin` returns, and at the gate compare
all bytes with the copy: they cannot be torn, and they find who writes. The others look at samples.
Once a write outside the gate has been seen, everything is copied before `begin` returns.
"""

import atexit
import contextlib
import logging
import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import xxhash

from ckptd.digest import cell_count, cell_span, pack
from ckptd.errors import CkptdError
from ckptd.ids import SnapshotId
from ckptd.segment import (
    LENGTH_BYTES,
    Layout,
    Sidecar,
    checked_record,
    sidecar_path,
)
from ckptd.trainer.cpu import CpuCopies
from ckptd.trainer.cuda import CudaCopies, PinnedMemory
from ckptd.trainer.objects import dump_objects, plain_copy, serialise
from ckptd.trainer.pace import Pace
from ckptd.trainer.plan import Plan, make_plan, what_changed
from ckptd.trainer.state import Census, Item, LiveState
from ckptd.wire import Outcome

AUDITED_FIRST = 3
"""Captures of a new layout that are audited in full."""
_OBJECTS_ROUND_BYTES = 4096
_VOLATILE_WARNING_BYTES = 64 << 20
_WORKER_NICE = 5
_MADV_POPULATE_WRITE = 23
_STOP_S = 30.0
_UNSEALED = bytes(LENGTH_BYTES)

log = logging.getLogger("ckptd")

Copies = CpuCopies | CudaCopies


class LayoutChanged(CkptdError):
    """The live state no longer fits the layout; a new one must be opened."""


class CaptureError(CkptdError):
    """This capture failed; the next may not."""


@dataclass(frozen=True, slots=True)
class CaptureStats:
    """What the captures of one rank have come to so far."""

    captures: int = 0
    """Begun."""
    sealed: int = 0
    torn: int = 0
    """Given up, because something had written to a tensor before it was copied."""
    failed: int = 0
    """Given up for another reason."""
    audits: int = 0
    """Captures that compared all bytes."""
    blocked_s: float = 0.0
    """Time in captures on the training thread: in `begin` and at the gate, audits excluded."""
    audit_blocked_s: float = 0.0
    copied_bytes: int = 0
    copy_s: float = 0.0
    """Time from the beginning of each capture until its bytes were copied and digested."""
    eager_because: str = ""
    """Why captures copy everything before they return, if they do."""


@dataclass
class _Mapped:
    """A slot file mapped into this process."""

    map: mmap.mmap
    inode: int
    view: memoryview = field(init=False)
    pinned: PinnedMemory | None = None
    copies: list[Copies] | None = None
    """Made for the sources of the last capture into this slot."""
    copies_of: int = -1

    def __post_init__(self) -> None:
        self.view = memoryview(self.map)

    def is_at(self, path: Path) -> bool:
        """Whether this is still the file of that name."""
        try:
            return path.stat().st_ino == self.inode
        except OSError:
            return False

    def close(self) -> None:
        self.copies = None
        if self.pinned is not None:
            self.pinned.close()
        with contextlib.suppress(BufferError):  # somebody still looks at it
            self.view.release()


@dataclass
class _Flight:
    """One capture, from `begin` until the gate has been passed and it is sealed or given up."""

    id: SnapshotId
    path: Path
    mapped: _Mapped
    layout: Layout
    plain: Any
    copies: list[Copies]
    audited: bool
    cell_bytes: int
    began: float
    gated: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Capture:
    """The capture engine of one rank. Not thread-safe: called by the training thread."""

    def __init__(
        self,
        state: LiveState,
        rank: int,
        world_size: int,
        on_sealed: Callable[[SnapshotId], None],
        on_failed: Callable[[SnapshotId, Outcome, str], None],
        *,
        once: bool = True,
        audit_every: int = 100,
        rate_bytes_per_s: float | None = None,
    ) -> None:
        """`on_failed` gets the snapshot, "torn" or "dropped", and the reason.

        `once`: save state that several ranks hold alike only once. `audit_every`: see above; 0 for
        never after the first. `rate_bytes_per_s`: at most so much is copied in the background.
        """
        self._state, self._rank, self._world_size = state, rank, world_size
        self._on_sealed, self._on_failed = on_sealed, on_failed
        self.once = once
        self._audit_every = audit_every
        self._pace = Pace(rate_bytes_per_s) if rate_bytes_per_s else None
        self.plan: Plan | None = None
        self.outgrown = ""
        """Why the layout must be planned anew, if a capture found that in the background."""
        self._census: Census | None = None
        self._items: list[Item] = []
        self._bound = 0
        self._captures_of_layout = 0
        self._mapped: dict[str, _Mapped] = {}
        self._flight: _Flight | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._pid = 0
        self._eager_because = ""
        self._counts = dict.fromkeys(CaptureStats.__dataclass_fields__, 0.0)
        self.at_point: Callable[[str], None] = lambda point: None
        """Called with the name of each point of a capture; tests kill the process there."""

    @property
    def stats(self) -> CaptureStats:
        """What the captures have come to so far."""
        counts = self._counts
        return CaptureStats(
            captures=int(counts["captures"]),
            sealed=int(counts["sealed"]),
            torn=int(counts["torn"]),
            failed=int(counts["failed"]),
            audits=int(counts["audits"]),
            blocked_s=counts["blocked_s"],
            audit_blocked_s=counts["audit_blocked_s"],
            copied_bytes=int(counts["copied_bytes"]),
            copy_s=counts["copy_s"],
            eager_because=self._eager_because,
        )

    def lay_out(self, step: int) -> Plan:
        """Plan for the state as it is now.

        Raises UnsavableState, naming what cannot be saved.
        """
        self.wait_sealed()
        self.outgrown = ""
        self._state.reshard()
        items = self._state.items()
        objects = len(dump_objects(self._state.objects(step)))
        capacity = 2 * objects + _OBJECTS_ROUND_BYTES
        capacity -= capacity % _OBJECTS_ROUND_BYTES
        structure = self._state.structure()
        self.plan = make_plan(items, self._rank, capacity, structure, self.once)
        _warn_of_volatile(items, objects)
        self._bind(items)
        self._captures_of_layout = 0
        self._flight = None
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()
        return self.plan

    def prepare(self, paths: Sequence[str]) -> None:
        """Map these slots, and pin them for CUDA, in the background."""
        if self.plan is None:
            return
        size_bytes = self.plan.layout.size_bytes
        pin = any(item.local.is_cuda for item in self._items)
        for path in paths:
            try:
                mapped = self._map(path, size_bytes)
            except CaptureError as error:
                log.warning("ckptd: %s", error)
                continue
            self._warm(mapped, pin)

    def begin(self, id: SnapshotId, path: str, cell_bytes: int) -> None:
        """Start the capture of `id` into the slot at `path`; returns once volatile state is copied.

        Raises LayoutChanged, or CaptureError if the slot cannot be used, or the capture before is
        still being sealed.
        """
        began = perf_counter()
        if self._flight is not None and not self._flight.done.is_set():
            raise CaptureError("the capture before is not sealed yet")
        plan = self._current_plan()
        self._look_back()
        plain = plain_copy(self._state.objects(id.step, self._census))
        mapped = self._map(path, plan.layout.size_bytes)
        copies = self._copies(mapped, plan, cell_bytes)
        slot = mapped.view
        slot[:LENGTH_BYTES] = _UNSEALED
        self.at_point("begun")
        number = self._captures_of_layout
        every = self._audit_every
        audited = number < AUDITED_FIRST or (every > 0 and number % every == every - 1)
        lazily = not audited and not self._eager_because
        for each in copies:
            each.begin(lazily, audited, number)
        self.at_point("volatile copied")
        self._captures_of_layout += 1
        flight = _Flight(
            id, Path(path), mapped, plan.layout, plain, copies, audited, cell_bytes, began
        )
        self._flight = flight
        self._count("captures")
        self._count("audits", int(audited))
        self._submit(lambda: self._finish(flight), flight.done)
        self._count_blocked(flight, perf_counter() - began)

    def gate(self) -> None:
        """Return when captured tensors may be written to.

        On the CPU that is when all is copied; on CUDA the current stream is made to wait, not the
        caller.
        """
        flight = self._flight
        if flight is None or flight.gated:
            return
        began = perf_counter()
        flight.gated = True
        for each in flight.copies:
            each.gate()
            if name := each.written():
                self._go_eager(f"{name} was written to after step(), outside of optimizer.step()")
        self._count_blocked(flight, perf_counter() - began)

    def wait_sealed(self) -> None:
        """Wait until the capture under way, if any, is sealed or has failed."""
        if self._flight is not None:
            self._flight.done.wait()

    # On the training thread.

    def _current_plan(self) -> Plan:
        plan, census = self.plan, self._census
        if plan is None or census is None:
            raise LayoutChanged("no layout has been planned")
        if self.outgrown:
            raise LayoutChanged(self.outgrown)
        if census.holds() or (self._state.reshard() and census.holds()):
            return plan
        items = self._state.items()
        structure = self._state.structure()
        if not plan.fits(items) or structure != self._structure:
            raise LayoutChanged(what_changed(plan.specs, [item.spec for item in items]))
        self._bind(items)
        return plan

    def _bind(self, items: list[Item]) -> None:
        """From now on the sources are these."""
        self._items, self._census = items, self._state.census()
        self._structure = self._state.structure()
        self._bound += 1

    def _look_back(self) -> None:
        """Whether the capture before was followed by writes although the gate never ran.

        A step that is replayed as a CUDA graph, or compiled without hooks, does that.
        """
        flight = self._flight
        if flight is not None and not flight.gated:
            flight.gated = True
            for each in flight.copies:
                each.gate()
                if name := each.written():
                    self._go_eager(f"{name} was written to after step(), and the gate never ran")
        for mapped in self._mapped.values():
            for each in mapped.copies or ():
                if name := each.written_later():
                    self._go_eager(
                        f"{name} was written to after step(), outside of optimizer.step()"
                    )

    def _go_eager(self, why: str) -> None:
        if self._eager_because:
            return
        self._eager_because = why
        log.warning(
            "ckptd: %s. From now on every capture copies all before step() returns, which takes "
            "longer; call Checkpointer.gate() before anything but the optimizer's own step() "
            "writes to parameters or optimizer state",
            why,
        )

    def _copies(self, mapped: _Mapped, plan: Plan, cell_bytes: int) -> list[Copies]:
        if mapped.copies is not None and mapped.copies_of == self._bound:
            return mapped.copies
        pieces = plan.pieces(self._items)
        found: list[Copies] = []
        here = [piece for piece in pieces if piece.source.is_cpu]
        if here:
            found.append(CpuCopies(here, mapped.view, cell_bytes, self._pace))
        devices = {piece.source.device for piece in pieces if piece.source.is_cuda}
        if devices:
            if mapped.pinned is None:
                self._warm(mapped, pin=True)
            if mapped.pinned is None or not mapped.pinned.ready.is_set():
                raise CaptureError("the slot's memory is still being pinned for CUDA")
            for device in sorted(devices, key=str):
                theirs = [piece for piece in pieces if piece.source.device == device]
                found.append(CudaCopies(theirs, mapped.pinned, device, self._pace))
        others = {p.source.device.type for p in pieces} - {"cpu", "cuda"}
        if others:
            raise CaptureError(f"tensors on {', '.join(sorted(others))} cannot be captured")
        mapped.copies, mapped.copies_of = found, self._bound
        return found

    def _count(self, name: str, amount: float = 1) -> None:
        self._counts[name] += amount

    def _count_blocked(self, flight: _Flight, took_s: float) -> None:
        self._count("audit_blocked_s" if flight.audited else "blocked_s", took_s)

    # The background thread.

    def _submit(self, job: Callable[[], None], done: threading.Event) -> None:
        if self._worker is None or not self._worker.is_alive():
            worker = threading.Thread(target=self._work, name="ckptd-capture", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:
                done.set()
                raise CaptureError(f"cannot start the thread that copies: {error}") from error
            if self._worker is None:
                atexit.register(_stop_if_there, weakref.ref(self))
            self._worker, self._pid = worker, os.getpid()
        self._jobs.put(job)

    def _stop(self) -> None:
        """Let the background thread end before Python does: it may be inside of torch."""
        worker = self._worker
        if worker is not None and os.getpid() == self._pid:
            self.wait_sealed()
            self._jobs.put(None)
            worker.join(_STOP_S)

    def _work(self) -> None:
        # Below the training's own threads, but not so far that other ranks starve it.
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WORKER_NICE)
        except OSError as error:
            log.debug("ckptd: the copying thread keeps its priority: %s", error)
        while (job := self._jobs.get()) is not None:
            job()

    def _finish(self, flight: _Flight) -> None:
        """Copy what is settled, then digest and publish."""
        try:
            if name := self._seal(flight):
                reason = f"{name} was written to before it was copied"
                self._count("torn")
                self._on_failed(flight.id, "torn", reason)
                self._go_eager(f"{name} was written to after step(), outside of optimizer.step()")
            else:
                self._count("sealed")
                self._on_sealed(flight.id)
        except Exception as error:
            self._count("failed")
            self._on_failed(flight.id, "dropped", str(error))
        finally:
            flight.plain = None
            flight.done.set()

    def _seal(self, flight: _Flight) -> str:
        """Publish the segment; returns the name of a tensor that was torn instead, or ""."""
        layout, slot, copies = flight.layout, flight.mapped.view, flight.copies
        for each in copies:
            each.land(0, None)  # whatever else was sent on its way from a CUDA device has come, too
        objects = serialise(flight.plain)
        if len(objects) > layout.objects_capacity:
            self.outgrown = (
                f"non-tensor state has grown to {len(objects)} bytes, "
                f"{layout.objects_capacity} were reserved"
            )
            raise CaptureError(self.outgrown)
        slot[layout.objects_begin : layout.objects_begin + len(objects)] = objects
        header = layout.header(flight.id, self._rank, self._world_size, len(objects))
        digests = []
        for index in range(cell_count(layout.size_bytes, flight.cell_bytes)):
            cell = _CellDigest(slot, header, *cell_span(index, len(slot), flight.cell_bytes))
            for each in copies:
                each.land(index, cell.reach)
            digests.append(cell.finish())
        self._count("copy_s", perf_counter() - flight.began)
        self._count("copied_bytes", layout.size_bytes - layout.data_begin)
        self.at_point("copied")
        for each in copies:
            if name := each.torn():
                return name
        sidecar = Sidecar(
            flight.id, self._rank, self._world_size, layout.size_bytes, flight.cell_bytes,
            pack(digests),
        )  # fmt: skip
        if not flight.mapped.is_at(flight.path):  # another's segment may be there by now
            raise CaptureError(f"the agent has given up the slot {flight.path}")
        sidecar_path(flight.path).write_bytes(checked_record(sidecar))
        self.at_point("sidecar written")
        slot[LENGTH_BYTES : len(header)] = header[LENGTH_BYTES:]
        self.at_point("header written")
        slot[:LENGTH_BYTES] = header[:LENGTH_BYTES]
        self.at_point("sealed")
        return ""

    # Slots.

    def _map(self, path: str, size_bytes: int) -> _Mapped:
        """The slot's bytes; mapped once and kept, unless the agent made the file anew."""
        try:
            status = os.stat(path)
            held = self._mapped.get(path)
            if status.st_size != size_bytes:
                raise CaptureError(f"slot {path} has {status.st_size} bytes, not {size_bytes}")
            if held is not None and held.inode == status.st_ino:
                return held
            self._forget_deleted()
            with open(path, "r+b") as file:
                mapped = _Mapped(mmap.mmap(file.fileno(), size_bytes), status.st_ino)
        except OSError as error:
            raise CaptureError(f"cannot map the slot {path}: {error}") from error
        self._mapped[path] = mapped
        return mapped

    def _forget_deleted(self) -> None:
        """Unmap slots that the agent has deleted: a mapping keeps their memory."""
        for path, mapped in list(self._mapped.items()):
            try:
                there = os.stat(path).st_ino == mapped.inode
            except FileNotFoundError:
                there = False
            if not there:
                mapped.close()
                del self._mapped[path]

    def _warm(self, mapped: _Mapped, pin: bool) -> None:
        """In the background: have the pages ready, so that the first capture is not slow."""
        if pin and mapped.pinned is None:
            mapped.pinned = PinnedMemory(mapped.view)

        def work() -> None:
            with contextlib.suppress(OSError, ValueError):  # an old kernel, or unmapped since
                mapped.map.madvise(_MADV_POPULATE_WRITE)
            if mapped.pinned is not None:
                mapped.pinned.register()

        self._submit(work, threading.Event())


def _stop_if_there(capture: "weakref.ref[Capture]") -> None:
    found = capture()
    if found is not None:
        found._stop()


def _warn_of_volatile(items: Sequence[Item], objects_bytes: int) -> None:
    """State that must be copied before step() returns should be small."""
    volatile = [(item.spec.size_bytes, item.spec.name) for item in items if item.volatile]
    volatile.append((objects_bytes, "the state in `extra`"))
    total = sum(size for size, _ in volatile)
    if total > _VOLATILE_WARNING_BYTES:
        size, name = max(volatile)
        log.warning(
            "ckptd: %d MiB of state may change at any time (buffers, `extra`) and must be copied "
            "before step() returns; the largest is %s, with %d MiB",
            total >> 20,
            name,
            size >> 20,
        )


class _CellDigest:
    """The digest of a cell as it will be once the header is written, made as its bytes arrive."""

    def __init__(self, slot: memoryview, header: bytes, begin: int, length: int) -> None:
        self._slot, self._end = slot, begin + length
        self._state = xxhash.xxh3_64(header[begin : self._end])
        self._at = max(begin, min(self._end, len(header)))

    def reach(self, end: int) -> None:
        """Everything of the cell before `end` (counted from the start of the slot) is there."""
        if end > self._at:
            self._state.update(self._slot[self._at : end])
            self._at = end

    def finish(self) -> int:
        self.reach(self._end)
        return self._state.intdigest()
