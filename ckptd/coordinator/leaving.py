"""What a node that is to leave waits for. Pure."""

from collections.abc import Mapping

from ckptd.coordinator import recovery
from ckptd.coordinator.choice import live_holdings
from ckptd.coordinator.state import Job, Node, State


def waits_before_leaving(
    name: str, nodes: Mapping[str, Node], jobs: Mapping[str, Job]
) -> tuple[str, ...]:
    """Why a node cannot leave yet without a loss; nothing if it may go.

    Its ranks must have left it, and each snapshot that can be restored now must be so without it.
    """
    if name not in nodes or not nodes[name].live:
        return ()
    others = {other: node for other, node in nodes.items() if other != name}
    found = []
    for _, job in sorted(jobs.items()):
        ranks = sorted({held.state.rank for held in job.attachments.values() if held.node == name})
        if ranks:
            found.append(
                f"{recovery.name_ranks(ranks)} of {job.name}, which must be stopped there, and "
                "started elsewhere"
            )
        for id in sorted(job.snapshots, reverse=True):
            snapshot = job.snapshots[id]
            if job.has_given_up(id):
                continue
            if snapshot.state not in (State.SEALED, State.PROTECTED) or id not in (
                nodes[name].holdings
            ):
                continue
            now, then = (
                recovery.judge(snapshot.manifest, snapshot.world_size, live_holdings(some, id))
                for some in (nodes, others)
            )
            if now.restorable and not then.restorable:
                found.append(f"{id}, which cannot be restored without it ({then.reason})")
                break
    return tuple(found)
