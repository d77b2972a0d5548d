"""Copies of CUDA tensors into a mapped slot. Every CUDA call of ckptd is in this file.

The training thread never waits for the device. `begin` makes the copy stream wait for the
training stream (an event), and sends all copies on their way with one launch (a CUDA graph of
copies); `gate` makes the training stream wait for the copies (another event). What may change
earlier, and what does not lie in memory as it is saved, is first copied on the device, on the
training stream.

Writes outside the gate are told from fingerprints of every tensor, taken on the device (`audited`),
or from windows, as on the CPU (see `ckptd.trainer.cpu`); they stay in the same places here. What
was found at the gate is known on the host only later: `written_later`.
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from ckptd.trainer.cpu import WINDOW_BYTES, window_offsets
from ckptd.trainer.pace import Pace
from ckptd.trainer.plan import Piece

_PIN_BYTES = 64 << 20  # registering much more at once stalls the device (vllm-project/vllm#42632)
_PACED_BYTES = 16 << 20
_ALIGN_BYTES = 16
_PORTABLE = 1
_SUCCESS = 0

log = logging.getLogger("ckptd")

_streams: dict[torch.device, torch.cuda.Stream] = {}


class PinnedMemory:
    """A mapped slot that is being registered with CUDA, piece by piece."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.ready = threading.Event()
        self.failed = ""
        self._device = torch.cuda.current_device()
        self._registered: list[int] = []

    def register(self) -> None:
        """Pin it; called in the background. Without it copies are slower, but not wrong."""
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch's own
        # A thread starts on device 0, and must not make a context there.
        with torch.cuda.device(self._device):
            for begin in range(0, len(self.view), _PIN_BYTES):
                size = min(_PIN_BYTES, len(self.view) - begin)
                code = int(runtime.cudaHostRegister(base + begin, size, _PORTABLE))
                if code != _SUCCESS:
                    self.failed = f"cudaHostRegister of {size} bytes: CUDA error {code}"
                    log.warning(
                        "ckptd: a slot cannot be pinned (%s): copies from the device are slower, "
                        "and training waits for them; raise `ulimit -l`",
                        self.failed,
                    )
                    break
                self._registered.append(base + begin)
        self.ready.set()

    def close(self) -> None:
        """Give it back before it is unmapped."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch's own
        with torch.cuda.device(self._device):
            for address in self._registered:
                runtime.cudaHostUnregister(address)
        self._registered = []


class CudaCopies:
    """One slot's copies from one device."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        pinned: PinnedMemory,
        device: torch.device,
        pace: Pace | None,
    ) -> None:
        self._device, self._pace = device, pace
        pieces = [piece for piece in pieces if piece.begin < piece.end]
        self._host = torch.frombuffer(pinned.view, dtype=torch.uint8)
        self._staged = [p for p in pieces if p.volatile or not p.lies_as_saved]
        self._settled = [p for p in pieces if not p.volatile and p.lies_as_saved]
        with torch.cuda.device(device):
            if device not in _streams:
                _streams[device] = _new_stream(device)
            self._stream = _streams[device]
            self._stage, staged_bytes = self._make_stage()
            self._moves = [
                move
                for piece, source in [
                    *((p, _bytes_of(p.source)) for p in self._settled),
                    *zip(self._staged, staged_bytes, strict=True),
                ]
                for move in self._split(piece, source)
            ]
            self._place_windows()
            self._ready, self._copied, self._passed = _new_event(), _new_event(), _new_event()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_failed = False
        self._issued = False
        self._issuing = threading.Lock()
        self._hurry = False
        self._landed = False
        self._lazy = self._audited = False
        self._sums: torch.Tensor | None = None
        self._differs: torch.Tensor | None = None
        """On the host, one flag for each settled piece, once `_passed` has been reached."""
        self._awaits_evidence = False

    # On the training thread; nothing here waits for the device.

    def begin(self, lazily: bool, audited: bool, number: int) -> None:
        """Send the copies on their way; unless `lazily`, the training stream waits for them."""
        self._lazy, self._audited = lazily, audited
        self._awaits_evidence = self._landed = self._hurry = self._issued = False
        with torch.no_grad(), torch.cuda.device(self._device):
            training = torch.cuda.current_stream(self._device)
            training.wait_event(self._copied)  # the stage may still be being read
            if self._staged:
                torch._foreach_copy_(self._stage, [p.source for p in self._staged])
            if audited:
                self._sums = self._fingerprints()
            elif lazily and self._windows:
                torch._foreach_copy_(self._sample_parts, self._windows)
            self._ready.record(training)
            self._stream.wait_event(self._ready)
            if self._pace is None or not lazily:
                self._launch()
        if not lazily:
            self._order(self._device)

    def gate(self) -> None:
        """Make the current stream wait for the copies, and look at what they were made of."""
        self._order(self._device)
        with torch.no_grad(), torch.cuda.device(self._device):
            training = torch.cuda.current_stream(self._device)
            if self._audited and self._sums is not None:
                differs = self._fingerprints() != self._sums
                self._differs = torch.empty(differs.shape, dtype=torch.bool, pin_memory=True)
                self._differs.copy_(differs, non_blocking=True)
                self._sums = None
            elif self._lazy and self._windows:
                torch._foreach_copy_(self._now_parts, self._windows)
                self._now_host.copy_(self._now, non_blocking=True)
            else:
                return
            self._passed.record(training)
            self._awaits_evidence = True

    def written(self) -> str:
        """Not known yet when the gate has just been passed."""
        return ""

    def written_later(self) -> str:
        """The first tensor that differed at the gate from what it was in `begin`, if known."""
        if not self._awaits_evidence or not self._passed.query():  # type: ignore[no-untyped-call] # torch's own
            return ""
        self._awaits_evidence = False
        if self._audited and self._differs is not None:
            for piece, differs in zip(self._settled, self._differs.tolist(), strict=True):
                if differs:
                    return piece.name
            return ""
        return self._first_difference(self._now_host)

    # In the background.

    def land(self, cell: int, reached: Callable[[int], None] | None) -> None:
        """Return when everything has arrived in the slot."""
        if self._landed:
            return
        with torch.cuda.device(self._device):
            self._issue_paced()
            self._copied.synchronize()
        self._landed = True

    def torn(self) -> str:
        """The first tensor that was written to before it was copied, or ""."""
        if not self._lazy or not self._windows:
            return ""
        there = torch.cat([self._host[b : b + n] for b, n, _ in self._places])
        return self._first_difference(self._padded(there))

    # Both.

    def _order(self, device: torch.device) -> None:
        """The current stream goes on only when the copies are made."""
        self._hurry = True
        self._issue_paced()
        torch.cuda.current_stream(device).wait_event(self._copied)

    def _launch(self) -> None:
        with torch.cuda.stream(self._stream):
            if self._graph is None and not self._graph_failed:
                self._graph = self._record()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._copy_all()
            self._copied.record(self._stream)
        self._issued = True

    def _record(self) -> torch.cuda.CUDAGraph | None:
        """All copies as one launch; on the copy stream, which is the current one."""
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._copy_all()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            self._graph_failed = True
            log.warning("ckptd: copies are launched one by one, not as a CUDA graph: %s", error)
            return None
        return graph

    def _copy_all(self) -> None:
        for target, source in self._moves:
            target.copy_(source, non_blocking=True)
        if self._windows:
            self._sample_host.copy_(self._sample, non_blocking=True)

    def _issue_paced(self) -> None:
        """Send what `begin` has left to the background; at full speed once the gate needs it."""
        with self._issuing, torch.no_grad(), torch.cuda.stream(self._stream):
            if self._issued:
                return
            for target, source in self._moves:
                for begin in range(0, len(target), _PACED_BYTES):
                    end = min(len(target), begin + _PACED_BYTES)
                    if self._pace is not None and not self._hurry:
                        self._pace.wait(end - begin)
                    target[begin:end].copy_(source[begin:end], non_blocking=True)
            if self._windows:
                self._sample_host.copy_(self._sample, non_blocking=True)
            self._copied.record(self._stream)
            self._issued = True

    def _make_stage(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Room on the device for what is staged: as tensors like the sources, and as bytes."""
        sizes = [p.end - p.begin for p in self._staged]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGN_BYTES) * _ALIGN_BYTES)
        room = torch.empty(starts[-1], dtype=torch.uint8, device=self._device)
        raw = [room[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        typed = [
            each.view(p.source.dtype).reshape(p.source.shape)
            for each, p in zip(raw, self._staged, strict=True)
        ]
        return typed, raw

    def _split(
        self, piece: Piece, source: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) in bytes; no copy goes over the edge of a registered piece."""
        begin = piece.begin
        while begin < piece.end:
            end = min(piece.end, (begin // _PIN_BYTES + 1) * _PIN_BYTES)
            first = begin - piece.begin
            yield self._host[begin:end], source[first : first + end - begin]
            begin = end

    def _place_windows(self) -> None:
        self._places: list[tuple[int, int, str]] = []
        """Of each window: where it begins in the slot, its bytes, and the tensor's name."""
        self._windows: list[torch.Tensor] = []
        for number, piece in enumerate(self._settled):
            raw = _bytes_of(piece.source)
            for offset, size in window_offsets(len(raw), shift=number):
                self._places.append((piece.begin + offset, size, piece.name))
                self._windows.append(raw[offset : offset + size])
        room = len(self._windows) * WINDOW_BYTES
        self._sample = torch.zeros(room, dtype=torch.uint8, device=self._device)
        self._now = torch.zeros_like(self._sample)
        self._sample_parts = self._parts(self._sample)
        self._now_parts = self._parts(self._now)
        self._sample_host = torch.empty(room, dtype=torch.uint8, pin_memory=True)
        self._now_host = torch.empty(room, dtype=torch.uint8, pin_memory=True)

    def _parts(self, room: torch.Tensor) -> list[torch.Tensor]:
        return [
            room[i * WINDOW_BYTES : i * WINDOW_BYTES + size]
            for i, (_, size, _) in enumerate(self._places)
        ]

    def _padded(self, windows: torch.Tensor) -> torch.Tensor:
        room = torch.zeros(len(self._places) * WINDOW_BYTES, dtype=torch.uint8)
        begin = 0
        for part, (_, size, _) in zip(self._parts(room), self._places, strict=True):
            part.copy_(windows[begin : begin + size])
            begin += size
        return room

    def _first_difference(self, later: torch.Tensor) -> str:
        differs = (self._sample_host != later).view(-1, WINDOW_BYTES).any(dim=1)
        found = differs.nonzero()
        return self._places[int(found[0])][2] if len(found) else ""

    def _fingerprints(self) -> torch.Tensor:
        """One number for each settled piece, that any write is all but sure to change."""
        if not self._settled:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        return torch.stack([_words(p.source).sum(dtype=torch.int64) for p in self._settled])


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call] # 0: the lowest


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's own


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as the widest integers that they can be read as."""
    raw = _bytes_of(tensor)
    for dtype in (torch.int64, torch.int32):
        if raw.data_ptr() % dtype.itemsize == 0 and len(raw) % dtype.itemsize == 0:
            return raw.view(dtype)
    return raw
