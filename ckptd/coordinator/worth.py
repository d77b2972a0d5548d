"""What a snapshot is worth that could not be protected, beside others and a free slot. Pure."""

from collections.abc import Callable

from ckptd.coordinator import recovery
from ckptd.coordinator.state import Job, Snapshot, State
from ckptd.ids import SnapshotId
from ckptd.manifest import Ancestor, is_ancestor

HoldingsOf = Callable[[SnapshotId], recovery.Holdings]
"""What live nodes hold of a snapshot."""


def waits_for_room(job: Job, id: SnapshotId, holdings_of: HoldingsOf) -> bool:
    """Whether the life that runs gets nothing newer than `id` unless it has more free slots."""
    if not job.runs or all(state.free_slots for state in job.states):
        return False
    if any(held.extents for past in job.ended for held in holdings_of(past.id).values()):
        return False  # slots are about to be free
    return not any(
        other.id > id
        and other.id.life == job.life
        and other.state in (State.TICKETED, State.CAPTURING, State.SEALED)
        and not other.unprotected
        and other.lost_at is None
        for other in job.snapshots.values()
    )


def may_stay(
    job: Job,
    snapshot: Snapshot,
    verdict: recovery.Verdict,
    holdings: recovery.Holdings,
    wanted: SnapshotId | None,
) -> bool:
    """Whether it is kept beside an older one that survives more losses.

    If it was protected; or if it may have been, for all that a coordinator knows that was not there
    then, as long as there are slots for new ones. What somebody wants to go back to does not count:
    it stays in any case.
    """
    if recovery.was_protected(holdings):
        return job.keep > 1
    whole = (State.SEALED, State.PROTECTED)
    older = sum(
        id < snapshot.id and id != wanted and other.state in whole
        for id, other in job.snapshots.items()
    )
    return snapshot.learned and verdict.restorable and older < job.keep


def better(
    job: Job, snapshot: Snapshot, ancestors: tuple[Ancestor, ...], holdings_of: HoldingsOf
) -> SnapshotId | None:
    """One that survives more losses, and is newer, or was to be replaced by this one.

    One that was protected is better than one that never was, even if it has since lost so much that
    it surely survives no more: what is known of the other is only that it was sealed. Nor is an
    older one better than one that was protected, and had replaced it then. And one that is damaged
    survives less than is counted, which is what was reported before.
    """
    mine = holdings_of(snapshot.id)
    margin = 0 if snapshot.damaged else recovery.margin(snapshot.manifest, mine)
    proven = recovery.was_protected(mine)
    whole = recovery.judge(snapshot.manifest, snapshot.world_size, mine).restorable
    replaces = proven and whole and not snapshot.damaged
    for id in sorted(job.snapshots, reverse=True):
        other, holdings = job.snapshots[id], holdings_of(id)
        older = is_ancestor(id, snapshot.id, ancestors) and not replaces
        if not (id > snapshot.id or older) or job.has_given_up(id):
            continue
        its = recovery.margin(other.manifest, holdings)
        if its > margin:
            return id
        protected = other.state is State.PROTECTED or recovery.was_protected(holdings)
        damaged = snapshot.damaged and id < snapshot.id  # a newer one may be damaged, too
        as_safe = its == margin and (damaged or (protected and not proven))
        if as_safe and recovery.judge(other.manifest, other.world_size, holdings).restorable:
            return id
    return None
