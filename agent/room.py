"""How many slots and bytes the trainers of a node need beside what is there. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from ckptd.agent.state import Slot, Trainer, Use
from ckptd.wire import Grant


@dataclass(frozen=True, slots=True)
class Room:
    """A view of the slots by name, and of the trainers by connection, as they are now."""

    slots: Mapping[str, Slot]
    trainers: Mapping[int, Trainer]

    def owned(self, trainer: Trainer) -> list[Slot]:
        """Its slots, whatever they are used for."""
        return [
            slot
            for slot in self.slots.values()
            if slot.owner == trainer.conn and slot.size_bytes == trainer.segment_bytes
        ]

    def slots_to_add(self, trainer: Trainer) -> int:
        """How many must be made, so that one is free now, and all of them sometime."""
        usable = (Use.FREE, Use.ALLOCATING, Use.RELEASING)
        least = 0 if any(slot.use in usable for slot in self.owned(trainer)) else 1
        return max(self.slots_lacking(trainer), least)

    def slots_lacking(self, trainer: Trainer, beside_moved: bool = True) -> int:
        """Slots that it has to get, beside its own and those that snapshots will leave to it.

        Slots of dead trainers that still hold snapshots are claimed once these are retired. Where
        ranks have moved, a node may hold more segments of a snapshot than it has ranks; as long as
        it is kept they are in the way of its successors, and are not counted if `beside_moved`; of
        what one snapshot will leave, no rank counts more than its share then.
        """
        left_by_id = Counter(
            s.id
            for s in self.slots.values()
            if not s.parity
            and s.owner is None
            and s.use is not Use.FREE
            and (s.job, s.size_bytes) == (trainer.job, trainer.segment_bytes)
        )
        left = share = left_by_id.total()
        if beside_moved:
            ranks = sum(
                (t.job, t.life) == (trainer.job, trainer.life) for t in self.trainers.values()
            )
            left = sum(min(ranks, count) for count in left_by_id.values())
            share = len(left_by_id)
        owed = sum(
            max(0, other.slots - len(self.owned(other)))
            for other in self.trainers.values()
            if other is not trainer
            and (other.job, other.segment_bytes) == (trainer.job, trainer.segment_bytes)
        )
        return trainer.slots - len(self.owned(trainer)) - min(share, max(0, left - owed))

    def generations(self, job: str) -> int:
        """How many snapshots there is parity of at a time: those that are kept, and the next."""
        return 1 + max((t.keep for t in self.trainers.values() if t.job == job), default=1)

    def parity_bytes(self, job: str, grant: Grant | None, cell_bytes: int) -> int:
        """What one generation of parity takes, as far as layouts are open."""
        if grant is None or not cell_bytes:
            return 0
        image = sum(t.segment_bytes for t in self.trainers.values() if t.job == job)
        return ceil(image / cell_bytes * grant.parity_fraction) * cell_bytes

    def parity_reserve(self, job: str, grant: Grant | None, cell_bytes: int) -> int:
        """Bytes that all generations of parity will need beyond those that are there."""
        there = sum(s.size_bytes for s in self.slots.values() if s.parity and s.job == job)
        return max(0, self.generations(job) * self.parity_bytes(job, grant, cell_bytes) - there)

    def over_quota(self, trainer: Trainer, grant: Grant | None, cell_bytes: int, node: str) -> str:
        """Why the job may not have what its layouts come to on `node`; "" if it may.

        What a restore needs besides, for a while, does not count: it must not be refused.
        """
        job = trainer.job
        if grant is None or grant.quota_bytes is None:
            return ""
        slots = [
            (t.slots, t.segment_bytes)
            for t in self.trainers.values()
            if (t.job, t.life) == (job, trainer.life) and t.segment_bytes
        ]
        in_slots = sum(number * size_bytes for number, size_bytes in slots)
        generations, each = self.generations(job), self.parity_bytes(job, grant, cell_bytes)
        needed = in_slots + generations * each
        if needed <= grant.quota_bytes:
            return ""
        fewer = "keep fewer snapshots (Checkpointer(keep=...)), or " if generations > 2 else ""
        return (
            f"the job {job!r} needs {needed} bytes on node {node}: {in_slots} in "
            f"{sum(number for number, _ in slots)} slots and {generations} generations of parity "
            f"of {each} bytes; its quota is {grant.quota_bytes}; {fewer}raise it with `ckptd "
            f"quota {job} {needed}`, or that of all jobs with `ckptd coordinator --job-quota`"
        )
