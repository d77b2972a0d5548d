"""From which snapshot a job goes on, or from nothing, or not yet. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass

from ckptd.coordinator import recovery
from ckptd.coordinator.state import Job, Node, PendingResume, State
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest, JobRecord
from ckptd.wire import Holding

_NOTES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Start:
    """Go on from `id`, or from nothing (None)."""

    id: SnapshotId | None
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet; `final`: nor by waiting."""

    reason: str
    final: bool = False


def choose(
    job: Job,
    pending: PendingResume,
    nodes: Mapping[str, Node],
    settled_at: float,
    silent_after_s: float,
    now: float,
    wanted: SnapshotId | None = None,
) -> Start | Wait:
    """The newest snapshot that live nodes can restore; or `wanted` and no other, if it is given.

    From nothing only if it is certain that there is none. Until `settled_at` (monotonic seconds)
    a coordinator may not have heard of all nodes; one that was not heard for `silent_after_s` is
    waited for until it answers or is lost.
    """
    expected = expected_nodes(job)
    unheard = sorted(name for name in expected if name not in nodes)
    early = f"({settled_at - now:.1f} s after the coordinator's start)"
    if now < settled_at and (unheard or not expected):
        whom = f"nodes {', '.join(unheard)}" if unheard else "agents that may know of this job"
        return Wait(f"{whom} {early}")
    silent = [
        name
        for name in sorted(expected & nodes.keys())
        if nodes[name].live and now - nodes[name].last_seen > silent_after_s
    ]
    if silent:
        return Wait(f"silent nodes {', '.join(silent)} to answer or be given up")
    if wanted is not None:
        return _go_back(job, pending, nodes, wanted)
    notes: list[str] = []
    partial: list[str] = []
    for id in sorted(job.snapshots, reverse=True):
        snapshot = job.snapshots[id]
        if job.has_given_up(id):
            notes.append(f"{id} was given up by a rollback")
            continue
        if id in pending.rejected:
            notes.append(f"{id} could not be loaded")
            continue
        verdict = recovery.judge(snapshot.manifest, snapshot.world_size, live_holdings(nodes, id))
        if snapshot.state in (State.TICKETED, State.CAPTURING):
            partial.append(f"{id} was not complete: {verdict.reason}")
        elif verdict.restorable:
            return Start(id, "; ".join([f"{id} is the newest that can be restored", *notes]))
        elif now < settled_at:  # whoever took a lost node's place is known only from itself
            return Wait(f"agents that may hold more of {id} {early}")
        else:
            notes.append(f"{id}: {verdict.reason}")
    found = _without_a_snapshot(job, pending, nodes, notes, partial)
    if isinstance(found, Wait) and now < settled_at:
        return Wait(f"agents that may hold a snapshot of this job {early}")
    return found


def _go_back(
    job: Job, pending: PendingResume, nodes: Mapping[str, Node], wanted: SnapshotId
) -> Start | Wait:
    way_out = f"to take the newest instead: ckptd rollback {job.name} --clear"
    if wanted in pending.rejected:
        text = f"{wanted}, to which somebody wants to go back, could not be loaded; {way_out}"
        return Wait(text, final=True)
    reason = "no live node holds any of it"
    snapshot = job.snapshots.get(wanted)
    if snapshot is not None:
        holdings = live_holdings(nodes, wanted)
        verdict = recovery.judge(snapshot.manifest, snapshot.world_size, holdings)
        if verdict.restorable:
            return Start(wanted, f"{wanted} was asked for with `ckptd rollback`")
        reason = verdict.reason
    return Wait(
        f"{wanted}, to which somebody wants to go back, to be restorable again ({reason}); "
        + way_out
    )


def _without_a_snapshot(
    job: Job,
    pending: PendingResume,
    nodes: Mapping[str, Node],
    notes: list[str],
    partial: list[str],
) -> Start | Wait:
    way_out = f"to give it up and start from nothing: ckptd rm {job.name}"
    if job.record is None and not job.snapshots:
        return Start(None, "no agent knows of a job of this name")
    if pending.rejected:
        return Wait(f"no snapshot could be loaded ({'; '.join(notes)}); {way_out}", final=True)
    absent = sorted(n for n in expected_nodes(job) if n not in nodes or not nodes[n].live)
    if absent:
        known = "; ".join([*notes, *partial][:_NOTES_SHOWN])
        return Wait(
            f"nodes {', '.join(absent)}, which may hold a snapshot of this job"
            + (f" ({known})" if known else "")
            + f"; bring one back, or, {way_out}"
        )
    tokens = job.record.nodes if job.record is not None else {}
    emptied = sorted(n for n, token in tokens.items() if nodes[n].hello.memory_token != token)
    past = [str(past.id) for past in job.ended if past.state is State.LOST][-1:]
    began = None if job.record is None else origin(job.record)
    if began is not None:
        # Its last life did not start from nothing, so the next one must not either.
        past.append(str(began))
    if emptied or notes or past:
        what = f"nodes {', '.join(emptied)} came back with empty memory" if emptied else ""
        lost = "; ".join(x for x in (what, *notes[:_NOTES_SHOWN], *past) if x)
        return Wait(f"the job's snapshots are lost ({lost}); {way_out}", final=True)
    return Start(None, "; ".join(["no snapshot was sealed in the life before", *partial]))


def live_holdings(nodes: Mapping[str, Node], id: SnapshotId) -> dict[str, Holding]:
    """What live nodes hold of one snapshot."""
    return {
        name: node.holdings[id] for name, node in nodes.items() if node.live and id in node.holdings
    }


def expected_nodes(job: Job) -> set[str]:
    """Nodes that may hold something of the job, as far as is known."""
    record = job.record
    expected = set() if record is None else {*record.nodes, *record.holders}
    for snapshot in job.snapshots.values():
        expected |= members_of(snapshot.manifest)
    return expected


def members_of(manifest: JobManifest | None) -> set[str]:
    """Nodes with a part in a snapshot."""
    groups = manifest.groups if manifest is not None else ()
    return {member.node for group in groups for member in group.members}


def origins_of(manifest: JobManifest | None) -> set[str]:
    """Nodes that had a part in a snapshot first, though others may have their places now."""
    groups = manifest.groups if manifest is not None else ()
    return {member.origin for group in groups for member in group.members}


def origin(record: JobRecord) -> SnapshotId | None:
    """The snapshot from which the record's life began, or None for nothing."""
    if not record.ancestors:
        return None
    last = record.ancestors[-1]
    return SnapshotId(record.job, last.life, last.step)
