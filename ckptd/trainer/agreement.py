"""What ranks must agree on at resume, over the process group that training uses."""

import struct

import torch
import torch.distributed as dist

_LIMIT_BYTES = 4096


class Agreement:
    """Small broadcasts and gathers of bytes; trivial without torch.distributed."""

    def __init__(self) -> None:
        self._distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._distributed else 0
        self.world_size = dist.get_world_size() if self._distributed else 1
        # NCCL moves only CUDA tensors; a group that has gloo too is better off on the CPU.
        nccl_only = self._distributed and "gloo" not in str(dist.get_backend_config())
        self._device = "cuda" if nccl_only and torch.cuda.is_available() else "cpu"

    def broadcast(self, value: bytes) -> bytes:
        """Rank 0's value, on every rank."""
        if not self._distributed:
            return value
        box = _pack(value).to(self._device)
        dist.broadcast(box, src=0)
        return _unpack(box)

    def gather(self, value: bytes) -> list[bytes]:
        """Everybody's value, by rank."""
        if not self._distributed:
            return [value]
        box = _pack(value).to(self._device)
        boxes = [torch.empty_like(box) for _ in range(self.world_size)]
        dist.all_gather(boxes, box)
        return [_unpack(each) for each in boxes]


def _pack(value: bytes) -> torch.Tensor:
    value = value[: _LIMIT_BYTES - 4]
    framed = struct.pack("<I", len(value)) + value
    return torch.frombuffer(bytearray(framed.ljust(_LIMIT_BYTES, b"\0")), dtype=torch.uint8)


def _unpack(box: torch.Tensor) -> bytes:
    raw = box.cpu().numpy().tobytes()
    (length,) = struct.unpack_from("<I", raw)
    return raw[4 : 4 + length]
