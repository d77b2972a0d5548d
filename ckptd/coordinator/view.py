"""What `ckptd status` shows: plain data, from the coordinator's state."""

from typing import Any

from ckptd.coordinator import recovery
from ckptd.coordinator.again import has_parity, is_at_home
from ckptd.coordinator.decider import Coordinator
from ckptd.coordinator.diagnosis.incidents import from_journal
from ckptd.coordinator.leaving import waits_before_leaving
from ckptd.coordinator.state import Job, Node, Snapshot, State
from ckptd.erasure import default_parity, exposures
from ckptd.journal import Incident


def status(
    coordinator: Coordinator, now: float, wall_offset_s: float, bad_messages: int = 0
) -> dict[str, Any]:
    """Everything, JSON-ready. Ages in seconds, times in Unix seconds, sizes in bytes."""
    return {
        "coordinator": {
            "id": coordinator.claim.coordinator,
            "address": coordinator.claim.address,
            "term": coordinator.term,
            "log_entries": coordinator.journal.summary.entries,
            "up_s": now - coordinator.started_at,
            "cell_bytes": coordinator.settings.cell_bytes,
            "beat_s": coordinator.settings.beat_s,
            "lease_s": coordinator.settings.lease_s,
            "bad_messages": bad_messages + coordinator.bad_messages,
        },
        "nodes": [
            _node(coordinator, name, node, now) for name, node in sorted(coordinator.nodes.items())
        ],
        "jobs": [_job(coordinator, job, now) for _, job in sorted(coordinator.jobs.items())],
        "diagnosis": coordinator.supervisors.status(now),
        "incidents": _incidents(coordinator),
        "events": [
            {
                "time": event.at + wall_offset_s,
                "kind": event.kind,
                "job": event.job,
                "text": event.text,
                **event.fields,
            }
            for event in coordinator.events
        ],
    }


def _incidents(coordinator: Coordinator) -> list[dict[str, Any]]:
    """Oldest first; of those that a coordinator before this one saw, what the journal has."""
    bodies = [entry.body for entry in coordinator.journal.entries]
    known = {body.number: from_journal(body) for body in bodies if isinstance(body, Incident)}
    known.update(coordinator.supervisors.shared.records)
    return [record.as_json() for _, record in sorted(known.items())]


def _node(coordinator: Coordinator, name: str, node: Node, now: float) -> dict[str, Any]:
    silent_s = now - node.last_seen
    reasons = list(node.problems)
    sent = {
        receiver: other.damaged_from[name]
        for receiver, other in sorted(coordinator.nodes.items())
        if other.damaged_from.get(name)
    }
    if sent:
        count = sum(sent.values())
        to = ", ".join(f"{cells} to {receiver}" for receiver, cells in sent.items())
        reasons.insert(
            0,
            f"{name} sent {count} damaged cell{'s' * (count > 1)} ({to}): look at its memory, and "
            "at the network from it",
        )
    if node.bad_messages:
        reasons.append(
            f"it has dropped {node.bad_messages} message{'s' * (node.bad_messages > 1)} that made "
            "no sense: its log says what and from whom"
        )
    if not node.live:
        reasons.insert(0, f"lost: silent for {silent_s:.0f} s")
    elif node.suspect:
        reasons.insert(0, f"silent for {silent_s:.1f} s, longer than usual")
    isolated = coordinator.journal.is_isolated(name)
    if isolated is not None:
        reasons.append(f"isolated: {isolated.reason}; `ckptd readmit {name}` ends that")
    draining = None
    if coordinator.journal.is_draining(name):
        waits_for = waits_before_leaving(name, coordinator.nodes, coordinator.jobs)
        draining = {"may_go": not waits_for, "waits_for": list(waits_for)}
        reasons += [f"is to leave, and waits for {what}" for what in waits_for]
        reasons += [] if waits_for else ["drained: may go"]
    ranks = sorted(
        (job.name, held.state.rank)
        for job in coordinator.jobs.values()
        for held in job.attachments.values()
        if held.node == name
    )
    hello = node.hello
    return {
        "node": name,
        "state": "suspect" if node.suspect else "live" if node.live else "lost",
        "isolated": isolated.reason if isolated is not None else None,
        "draining": draining,
        "spare": hello.spare and not ranks,
        "address": hello.address,
        "cells": hello.cells,
        "domain": hello.domain,
        "codec": hello.codec,
        "engine": hello.engine,
        "engine_reason": hello.engine_reason,
        "memory_used_bytes": node.memory_used_bytes,
        "memory_limit_bytes": hello.memory_limit_bytes,
        "spare_bytes": node.spare_bytes,
        "ranks": [{"job": job, "rank": rank} for job, rank in ranks],
        "waiting_launchers": sorted(node.launchers),
        "damaged_cells": node.damaged_cells,
        "mended_cells": node.mended_cells,
        "sent_damaged_cells": sent,
        "bad_messages": node.bad_messages,
        "seen_s_ago": silent_s,
        "reasons": reasons,
    }


def _job(coordinator: Coordinator, job: Job, now: float) -> dict[str, Any]:
    steps = [held.state.step for held in job.attachments.values() if held.state.life == job.life]
    step = max(steps, default=0)
    snapshots = [
        _snapshot(coordinator, snapshot, now)
        for snapshot in sorted(job.snapshots.values(), key=lambda s: s.id, reverse=True)
    ]
    restorable = [s for s in snapshots if s["restorable"] and not s["given_up"]]
    rollback = coordinator.rollback_of(job)
    nodes = {held.node for held in job.attachments.values()}
    protected = [s for s in restorable if s["may_lose"] > 0]
    pending = job.pending
    return {
        "job": job.name,
        "life": job.life,
        "world_size": job.world_size,
        "attached_ranks": len(job.attachments),
        "step": step,
        "training": job.resumed and bool(steps),
        "step_s": job.pacer.step_s,
        "resumed_from": str(job.resumed_from) if job.resumed_from else None,
        "waiting_for": pending.said if pending else "",
        "keep": job.keep,
        "rollback": str(rollback) if rollback is not None else None,
        "quota_bytes": coordinator.quota_of(job.name),
        "suspect_nodes": sorted(n for n in nodes if coordinator.nodes[n].suspect),
        "at_risk": {
            "process_steps": step - restorable[0]["step"] if restorable and steps else None,
            "process_s": restorable[0]["age_s"] if restorable else None,
            "node_steps": step - protected[0]["step"] if protected and steps else None,
            "node_s": protected[0]["age_s"] if protected else None,
        },
        "restoring": _restoring(coordinator, job),
        "groups": _groups(coordinator, job),
        "vacancies": dict(job.vacancies),
        "no_room": [one.no_room for one in job.snapshots.values() if one.no_room],
        "snapshots": snapshots,
        "ended": [
            {
                "id": str(past.id),
                "life": past.id.life,
                "step": past.id.step,
                "state": past.state.value,
                "reason": past.reason,
                "age_s": now - past.created,
            }
            for past in reversed(job.ended)
        ],
    }


def _restoring(coordinator: Coordinator, job: Job) -> list[dict[str, Any]]:
    """The segments that are on their way to a node, the slowest first."""
    found = []
    for name, node in coordinator.nodes.items():
        for each in node.fetching if node.live else ():
            if each.id.job != job.name or not each.done:
                continue
            cells_per_s = each.done / max(each.for_s, 1e-3)
            found.append(
                {
                    "node": name,
                    "id": str(each.id),
                    "rank": each.rank,
                    "done": each.done / max(1, each.cells),
                    "bytes_per_s": cells_per_s * each.size_bytes / max(1, each.cells),
                    "left_s": (each.cells - each.done) / cells_per_s,
                }
            )
    return sorted(found, key=lambda one: (-one["left_s"], one["node"], one["rank"]))


def _snapshot(coordinator: Coordinator, snapshot: Snapshot, now: float) -> dict[str, Any]:
    holdings = coordinator.live_holdings(snapshot.id)
    verdict = recovery.judge(snapshot.manifest, snapshot.world_size, holdings)
    sizes = recovery.source(snapshot.manifest, holdings, {}).sizes
    partial = snapshot.state in (State.TICKETED, State.CAPTURING)
    again = _again(coordinator, snapshot)
    given_up = coordinator.jobs[snapshot.id.job].has_given_up(snapshot.id)
    undecided = snapshot.state is State.SEALED and snapshot.unprotected and not snapshot.reason
    return {
        "id": str(snapshot.id),
        "life": snapshot.id.life,
        "step": snapshot.id.step,
        "state": snapshot.state.value,
        "age_s": now - snapshot.created,
        "size_bytes": sum(sizes.values()),
        "ranks": snapshot.world_size,
        "restorable": verdict.restorable and not partial,
        "given_up": given_up,
        "tiers": [] if partial else list(verdict.tiers),
        "may_lose": 0 if partial else recovery.margin(snapshot.manifest, holdings),
        "ranks_on": {
            str(rank): list(nodes) for rank, nodes in recovery.rank_holders(holdings).items()
        },
        "parity_on": list(recovery.parity_holders(holdings)),
        "protected_again": again,
        "reason": "; ".join(
            x
            for x in (
                snapshot.reason,
                f"not protected: {snapshot.unprotected}" if undecided else "",
                "" if partial else verdict.reason,
                f"the parity of {', '.join(again['without'])} is gone" if again else "",
                *(again["hindrances"] if again else ()),
                "given up by a rollback" if given_up else "",
            )
            if x
        ),
    }


def _again(coordinator: Coordinator, snapshot: Snapshot) -> dict[str, Any] | None:
    """How a snapshot that has lost parity gets it back; None if it has not.

    `left_s` is None until it is known how fast it goes.
    """
    manifest = snapshot.manifest
    if manifest is None or (snapshot.state is not State.PROTECTED and snapshot.lost_at is None):
        return None
    holdings = coordinator.live_holdings(snapshot.id)
    places = [
        (number, member)
        for number, group in enumerate(manifest.groups)
        for member in group.members
        if group.parity_shards
    ]
    lacking = [(n, member) for n, member in places if not has_parity(member, holdings)]
    if not lacking:
        return None
    making = []
    for number, member in lacking:
        node = coordinator.nodes.get(member.node)
        ordered = number in snapshot.ordered and member.node not in snapshot.unable
        if node is not None and ordered and is_at_home(member, member.node, holdings):
            moved = next((one for one in node.recoding if one.id == snapshot.id), None)
            left_s = None
            if moved is not None and moved.done:
                left_s = (moved.cells - moved.done) * moved.for_s / moved.done
            done = moved.done / max(1, moved.cells) if moved is not None else 0.0
            making.append({"node": member.node, "done": done, "left_s": left_s})
    return {
        "without": [member.node for _, member in lacking],
        "nodes": len(places),
        "making": making,
        "hindrances": [
            *(f"it cannot be made again: {why}" for why in snapshot.hindrances),
            *(f"{node} cannot make it: {why}" for node, why in sorted(snapshot.unable.items())),
        ],
    }


def _groups(coordinator: Coordinator, job: Job) -> list[dict[str, Any]]:
    """The groups of the newest snapshot that has any, and how each stands."""
    for snapshot in sorted(job.snapshots.values(), key=lambda s: s.id, reverse=True):
        if snapshot.manifest is not None:
            break
    else:
        return []
    found, domains = [], coordinator.domains
    for index, group in enumerate(snapshot.manifest.groups):
        names = [member.node for member in group.members]
        lost = [n for n in names if n not in coordinator.nodes or not coordinator.nodes[n].live]
        reasons = []
        if len(names) == 1:
            reasons.append("one node: no group tier")
        elif group.parity_shards < default_parity(len(names)):
            reasons.append(f"only {group.parity_shards} parity shards")
        exposed = exposures(names, group.parity_shards, domains)
        reasons += [
            f"group {index} is exposed: {domain} holds {held} of its {len(names)} nodes, "
            f"and {group.parity_shards} may be lost"
            for domain, held in exposed.items()
        ]
        if lost:
            reasons.append(f"lost: {', '.join(lost)}")
        found.append(
            {
                "group": index,
                "nodes": names,
                "data_shards": group.data_shards,
                "parity_shards": group.parity_shards,
                "codec": snapshot.manifest.codec,
                "may_lose": max(0, group.parity_shards - len(lost)),
                "exposed": [{"domain": domain, "nodes": held} for domain, held in exposed.items()],
                "reasons": reasons,
            }
        )
    return found
