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
    """Number of the operation in its group, from 1; point-to-point operations have their own."""
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
    """Its ranks, as ranks of the job."""
    backend: str
    description: str = ""
    """What the program calls it, such as "tp" or "dp", where known."""
