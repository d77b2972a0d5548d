"""Which snapshots are kept beside the newest, and which of them a job can go back to. Pure."""

from collections.abc import Mapping
from itertools import islice

from ckptd.coordinator import recovery
from ckptd.coordinator.choice import live_holdings, origin
from ckptd.coordinator.state import Job, Node, Snapshot, State
from ckptd.ids import SnapshotId
from ckptd.manifest import is_ancestor


def kept(
    job: Job, newest: Snapshot, wanted: SnapshotId | None, nodes: Mapping[str, Node]
) -> set[SnapshotId]:
    """What stays when `newest` is committed: itself, and of its path the newest protected ones.

    They are as many as the job keeps. `wanted`, to which somebody wants to go back, stays whatever
    it is, even where only one is kept; where it is one of the path, another goes for it. So does
    what the life that runs began from, whatever newer ones of lives before there are: it could not
    load them.
    """
    pinned = set() if wanted is None else {wanted}
    record = job.record
    if record is not None and newest.id.life < record.life and (start := origin(record)):
        pinned.add(start)
    ancestors = newest.manifest.ancestors if newest.manifest is not None else ()
    path = (
        id
        for id in sorted(job.snapshots, key=lambda id: (id in pinned, id), reverse=True)
        if is_ancestor(id, newest.id, ancestors) and is_safe(job.snapshots[id], nodes)
    )
    return {newest.id, *pinned, *islice(path, job.keep - 1)}


def is_safe(snapshot: Snapshot, nodes: Mapping[str, Node]) -> bool:
    """Whether it can be restored, and was protected as far as its nodes can, or is as good as that.

    A coordinator that was not there when it was protected knows only what is left of it.
    """
    manifest = snapshot.manifest
    if manifest is None or snapshot.state not in (State.SEALED, State.PROTECTED):
        return False
    holdings = live_holdings(nodes, snapshot.id)
    if snapshot.state is State.SEALED and not recovery.was_protected(holdings):
        shards = [group.parity_shards for group in manifest.groups if group.parity_shards]
        if shards and recovery.margin(manifest, holdings) < min(shards):
            return False
    return recovery.judge(manifest, snapshot.world_size, holdings).restorable


def choices(job: Job, nodes: Mapping[str, Node]) -> list[SnapshotId]:
    """The snapshots that can be restored now, the newest first."""
    return [
        id
        for id in sorted(job.snapshots, reverse=True)
        if job.snapshots[id].state not in (State.TICKETED, State.CAPTURING)
        and recovery.judge(
            job.snapshots[id].manifest, job.snapshots[id].world_size, live_holdings(nodes, id)
        ).restorable
    ]


def find(job: Job, nodes: Mapping[str, Node], step: int, life: int | None) -> SnapshotId | str:
    """The snapshot that is meant, or why there is none, or not only one."""
    able = choices(job, nodes)
    meant = [id for id in able if id.step == step and life in (None, id.life)]
    if len(meant) == 1:
        return meant[0]
    if meant:
        lives = " and ".join(str(id.life) for id in reversed(meant))
        example = f"--to {meant[0].life}.{step}"
        return f"{job.name} has snapshots of step {step} of lives {lives}; say which: {example}"
    listed = ", ".join(f"{id.life}.{id.step}" for id in able)
    what = f"step {step}" if life is None else f"step {step} of life {life}"
    return f"{job.name} has no snapshot of {what} that can be restored; " + (
        f"it has {listed}" if able else "it has none at all"
    )
