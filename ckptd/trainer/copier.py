"""Copies from live tensors into the mapped slot.

The one place that will know about devices: here, tensors are copied by the thread that calls. A
CUDA engine (side streams, pinned slots, events each way) replaces `copy` and `wait`.
"""

import ctypes

import torch


def copy(source: torch.Tensor, slot: memoryview, begin: int, end: int) -> None:
    """Copy `source` (local, detached, of `end - begin` bytes) into the slot's bytes."""
    if begin == end:
        return
    as_it_lies = source.is_contiguous() and not source.is_conj() and not source.is_neg()
    if source.is_cpu and as_it_lies:
        # One memmove on this thread: Tensor.copy_ would wake an OpenMP team that training needs.
        target = ctypes.addressof(ctypes.c_char.from_buffer(slot, begin))
        ctypes.memmove(target, source.data_ptr(), end - begin)
        return
    raw = torch.frombuffer(slot, dtype=torch.uint8, offset=begin, count=end - begin)
    raw.view(source.dtype).reshape(source.shape).copy_(source)
