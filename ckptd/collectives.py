"""Timing records of collectives: what every source is turned into, and the detector reads.

Collectives of training are periodic and homogeneous (C4): the same operations, in the same order,
on every rank of a process group. So records of different ranks are matched by process group and
sequence number.
"""

import msgspec

from ckptd.ids import Count


class Collective(msgspec.Struct, frozen=True, array_like=True):
    """One operation of one rank, as one source has seen it. Times in seconds since the epoch.

    `entered_at` is when the rank called it. On GPU that is when it was put on the stream, and says
    little about when it ran. A time or duration is None where the source does not have it.
    """

    group: str
    """Name of the process group: the same on all of its ranks, another for each group."""
    seq: Count
    """Number of the operation in its group, from 1. Point-to-point operations are counted apart,
    for each ordered pair (source, destination) of the group: so both ends give the same number."""
    op: str
    """As PyTorch calls it: "all_reduce", "broadcast", "send" …"""
    size_bytes: Count
    rank: Count
    """Rank of the job, not of the group."""
    entered_at: float
    resolution_s: float
    """How exact the times are."""
    ended: bool = False
    """Whether it is known to have ended."""
    duration_s: float | None = None
    """How long the operation itself took, this rank's waiting for others included."""
    peer: int | None = None
    """The other rank of a point-to-point operation."""


class GroupInfo(msgspec.Struct, frozen=True, array_like=True):
    """A process group of a job."""

    group: str
    ranks: tuple[Count, ...]
    """Its ranks, as ranks of the job; empty where the source does not know them."""
    backend: str
    description: str = ""
    """What the program calls it, such as "tp" or "dp", where known."""
    count: Count = 0
    """How many ranks it has, where they are not known."""
    times_only: bool = False
    """Its operations are those of other groups, seen by a source that knows how long they took."""

    @property
    def size(self) -> int:
        return len(self.ranks) or self.count

    @property
    def enqueued(self) -> bool:
        """Whether `entered_at` is only when an operation was put on a stream of the GPU."""
        return any(word in self.backend.lower() for word in _ON_STREAMS)

    @property
    def is_nccl(self) -> bool:
        """Whether NCCL is one of its backends."""
        return "nccl" in self.backend.lower()


_ON_STREAMS = ("nccl", "rccl", "hccl", "xccl", "ucc")
_ALIASES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "isend": "send",
    "irecv": "recv",
}
SYMMETRIC = frozenset({"all_reduce", "all_gather", "reduce_scatter"})
"""Each rank gives and gets alike, and none ends before all have entered."""
MEETING = SYMMETRIC | {"all_to_all", "barrier", "send", "recv"}
"""A rank that enters one of these early waits for those that enter late."""
POINT_TO_POINT = frozenset({"send", "recv"})


def plain_op(op: str) -> str:
    """One name for what backends and PyTorch's layers spell differently.

    "gloo:all_reduce", "nccl:_all_gather_base" and "allreduce_coalesced" become "all_reduce",
    "all_gather" and "all_reduce"; an unknown name stays as it is, without the backend's.
    """
    name = op.rpartition(":")[2].strip("_").lower().split(" ")[0]
    squeezed = name.replace("_", "")
    for start, plain in _ALIASES.items():
        if squeezed.startswith(start):
            return plain
    return name


def size_class(size_bytes: int) -> int:
    """Operations of one class are compared with one another: the power of two above the size."""
    return max(0, size_bytes - 1).bit_length()
