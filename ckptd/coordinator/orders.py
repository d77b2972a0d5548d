"""What people ask of the coordinator, as an entry of its journal, or why it cannot be. Pure."""

from collections.abc import Mapping

from ckptd.coordinator import keeping
from ckptd.coordinator.state import Job, Node
from ckptd.journal import Body, Draining, Isolated, Journal, Quota, Restarts, Rollback
from ckptd.wire import DrainNode, IsolateNode, Rearm, RollBack, SetQuota

Order = RollBack | DrainNode | IsolateNode | SetQuota | Rearm


def entry_for(
    order: Order, nodes: Mapping[str, Node], jobs: Mapping[str, Job], journal: Journal
) -> Body | str:
    """What to put into the journal; or, as text, why the order is refused, and the way out."""
    match order:
        case RollBack():
            return _rollback(order, nodes, jobs)
        case SetQuota():
            return Quota(order.job, order.size_bytes)
        case Rearm():
            return _rearmed(order.job, jobs, journal)
        case DrainNode():
            if order.drain and order.node not in nodes:
                return _unknown(order.node, nodes)
            return Draining(order.node, order.drain)
        case IsolateNode():
            known = order.node in nodes or journal.is_isolated(order.node) is not None
            if not known:
                return _unknown(order.node, nodes)
            return Isolated(order.node, order.isolated, order.reason)


def describe(body: Body) -> tuple[str, str]:
    """(kind of event, sentence) for an entry that somebody asked for."""
    match body:
        case Rollback(job=job, id=None):
            return "rollback_cleared", f"{job} is not to be rolled back any more"
        case Rollback():
            return "rollback_asked", f"{body.job} is to resume next from {body.id}"
        case Draining():
            what = "is to leave" if body.draining else "is to stay after all"
            return "node_draining" if body.draining else "node_stays", f"{body.node} {what}"
        case Isolated():
            what = "isolated" if body.isolated else "readmitted"
            why = f": {body.reason}" if body.reason else ""
            return f"node_{what}", f"{body.node} is {what}{why}"
        case Quota():
            size = "the default" if body.size_bytes is None else f"{body.size_bytes} bytes"
            return "quota_set", f"the quota of {body.job} on each node is {size}"
        case Restarts():
            return "rearmed", f"{body.job} is restarted again when it hangs"
        case _:
            return "noted", body.about


def _rollback(
    order: RollBack, nodes: Mapping[str, Node], jobs: Mapping[str, Job]
) -> Rollback | str:
    job = jobs.get(order.job)
    if job is None:
        return _unknown_job(order.job, jobs)
    if order.step is None:
        return Rollback(job.name, None)
    found = keeping.find(job, nodes, order.step, order.life)
    if isinstance(found, str):
        return found
    granted = job.record.life if job.record is not None else 0
    return Rollback(job.name, found, after=max(job.life, granted))


def _rearmed(job: str, jobs: Mapping[str, Job], journal: Journal) -> Restarts | str:
    """What was counted is forgotten: the breaker begins anew."""
    past = journal.restarts(job)
    if past is None or not past.broken:
        if job not in jobs:
            return _unknown_job(job, jobs)
        return f"restarts of {job!r} are not stopped: there is nothing to rearm"
    return Restarts(job, (), ())


def _unknown_job(job: str, jobs: Mapping[str, Job]) -> str:
    return f"no job {job!r} is known; known jobs: {', '.join(sorted(jobs)) or 'none'}"


def _unknown(node: str, nodes: Mapping[str, Node]) -> str:
    return f"no node {node!r} is known; known nodes: {', '.join(sorted(nodes)) or 'none'}"
