"""Which snapshots are kept beside the newest, and which of them a job can go back to. Pure."""

from collections.abc import Mapping

from ckptd.coordinator import recovery
from ckptd.coordinator.choice import live_holdings, origin
from ckptd.coordinator.state import Job, Node, Snapshot, State
from ckptd.ids import SnapshotId
from ckptd.manifest import is_ancestor


def kept(
    job: Job, newest: Snapshot, wanted: SnapshotId | None, nodes: Mapping[str, Node]
) -> set[SnapshotId]:
    """What stays when `newest` is committed: itself, and of its path the newest protected ones.

    They are as many as the job keeps. `wanted`, to which somebody wants to go back, is one of them;
    it stays beside `newest` even where only one is kept. So does what the life that runs began
    from, whatever newer ones of lives before there are: it could not load them.
    """
    found = {newest.id} if wanted is None else {newest.id, wanted}
    record = job.record
    if record is not None and newest.id.life < record.life and (start := origin(record)):
        found.add(start)
    ancestors = newest.manifest.ancestors if newest.manifest is not None else ()
    for id in sorted(job.snapshots, reverse=True):
        if len(found) >= job.keep:
            break
        if is_ancestor(id, newest.id, ancestors) and is_safe(job.snapshots[id], nodes):
            found.add(id)
    return found


def is_safe(snapshot: Snapshot, nodes: Mapping[str, Node]) -> bool:
    """Whether it is protected, as far as its nodes can, and can be restored."""
    manifest = snapshot.manifest
    if manifest is None:
        return False
    alone = not any(group.parity_shards for group in manifest.groups)
    if snapshot.state is not State.PROTECTED and not (alone and snapshot.state is State.SEALED):
        return False
    holdings = live_holdings(nodes, snapshot.id)
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
