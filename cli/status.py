"""`ckptd status`."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from time import sleep
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from ckptd.cli import options, show
from ckptd.client import ask_status
from ckptd.errors import CkptdError
from ckptd.keys import ClusterKey

_WATCH_S = 1.0
_FAILED_SHOWN = 3
_RESTORING_SHOWN = 4
_MEMORY_WARN, _MEMORY_BAD = 0.85, 0.95


@click.command(cls=options.Command)
@click.argument("job", required=False)
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
@options.coordinator
@options.key_file
@options.as_json
def command(
    job: str | None, watch: bool, coordinator: str, key_file: Path | None, as_json: bool
) -> None:
    """Show nodes, groups, jobs and snapshots, and the reason for what is not well.

    With JOB, of jobs only this one.
    """
    key = ClusterKey.read(key_file)
    console = show.console()
    if watch and (as_json or not console.is_terminal):
        raise click.UsageError("--watch is for a terminal; for a pipe, repeat `status --json`")
    document = ask_status(coordinator, key)
    chosen = show.choose_jobs(document, job)
    if as_json:
        click.echo(json.dumps({**document, "jobs": chosen}, indent=2))
        return
    page = render(document, coordinator, job)
    if watch:
        page = _watch(page, coordinator, key, job)
    console.print(page)


def _watch(
    page: RenderableType, coordinator: str, key: ClusterKey, job: str | None
) -> RenderableType:
    """Refresh until Ctrl-C; returns the last page, so that it can stay on the terminal."""
    shown = page
    try:
        with Live(page, console=show.console(), screen=True, auto_refresh=False) as live:
            while True:
                sleep(_WATCH_S)
                try:
                    shown = page = render(ask_status(coordinator, key), coordinator, job)
                except CkptdError as error:
                    # A coordinator that is started again, or a job that is, comes back.
                    shown = Group(show.note(str(error), show.BAD), Text(), page)
                live.update(shown, refresh=True)
    except KeyboardInterrupt:
        return shown


def render(document: Mapping[str, Any], address: str, job: str | None = None) -> RenderableType:
    """The whole page. Raises Refused if there is no such job."""
    parts: list[RenderableType] = [_header(document["coordinator"], address), Text()]
    parts.append(_nodes(document["nodes"], address))
    jobs = show.choose_jobs(document, job)
    diagnosis = document.get("diagnosis") or {"policy": "", "jobs": {}}
    for one in jobs:
        parts += [Text(), _job(one, document["nodes"])]
        parts += [_indented(text) for text in _health(diagnosis, one["job"], one["training"])]
    if not jobs:
        where, flags = ", on each of its nodes", "--agent SOCKET --"
        if address.startswith("ipc:"):  # the embedded one
            where, flags = "", "-- --standalone"
        parts += [
            Text(),
            Text(f"No job yet. Start one{where}:", show.WARN),
            Text(f"  ckptd run --job NAME {flags} --nproc-per-node=8 train.py"),
        ]
    return Group(*parts)


def _header(coordinator: Mapping[str, Any], address: str) -> Text:
    entries = show.count(coordinator["log_entries"], "entry", "entries")
    term = f"term {coordinator['term']}" if coordinator["term"] else "no term yet"
    bad = coordinator["bad_messages"]
    dropped = f" · {show.count(bad, 'message', 'messages')} that made no sense dropped"
    return Text.assemble(
        ("coordinator ", "bold"),
        (address, "bold"),
        f" · {coordinator['id']} · {term} · log of {entries}"
        f" · up {show.age(coordinator['up_s'])} · cells of {show.size(coordinator['cell_bytes'])}",
        f" · nodes are lost after {coordinator['lease_s']:g} s of silence",
        (dropped if bad else "", show.WARN),
    )


def _nodes(nodes: list[dict[str, Any]], address: str) -> RenderableType:
    if not nodes:
        return Group(
            Text("No agent has said hello yet. Start one on each node:", show.WARN),
            Text(f"  ckptd agent --coordinator {address}"),
        )
    count = Counter(node["state"] for node in nodes)
    title = Text.assemble(("nodes", "bold"), f"  {count['live']} live")
    for state, style in (("suspect", show.WARN), ("lost", show.BAD)):
        if count[state]:
            title.append(", ").append(f"{count[state]} {state}", style)
    head = ["node", "state", "domain", "engine", "ranks", "memory", "seen"]
    return Group(title, show.Listing(head, [_node(node) for node in nodes], ["domain"]))


def _node(node: Mapping[str, Any]) -> tuple[list[Text | str], list[Text]]:
    lost = node["state"] == "lost"
    doubt = not lost and node["reasons"]
    notes = [show.note(reason, show.BAD if lost else show.WARN) for reason in node["reasons"]]
    if node["engine_reason"]:
        notes.append(show.note(f"parity by {node['engine']}: {node['engine_reason']}"))
    return (
        [
            node["node"],
            Text(node["state"], show.WARN) if doubt else show.state(node["state"]),
            node["domain"],
            node["engine"].partition(" (")[0],
            _ranks(node),
            _memory(node["memory_used_bytes"], node["memory_limit_bytes"]),
            Text(f"{show.age(node['seen_s_ago'])} ago", show.BAD if lost else ""),
        ],
        notes,
    )


def _ranks(node: Mapping[str, Any]) -> Text:
    by_job: dict[str, list[int]] = {}
    for held in node["ranks"]:
        by_job.setdefault(held["job"], []).append(held["rank"])
    words = [f"{job} {show.spans(ranks)}" for job, ranks in by_job.items()]
    if node["spare"]:
        words.append("spare")
    words += [f"waits for {job}" for job in node["waiting_launchers"]]
    return Text("; ".join(words)) if words else Text("none", show.PAST)


def _memory(used_bytes: int, limit_bytes: int) -> Text:
    part = used_bytes / limit_bytes if limit_bytes else 1.0
    style = show.BAD if part > _MEMORY_BAD else show.WARN if part > _MEMORY_WARN else ""
    return Text(f"{show.size(used_bytes)} / {show.size(limit_bytes)}  {part:4.0%}", style)


def _job(job: Mapping[str, Any], nodes: list[dict[str, Any]]) -> RenderableType:
    parts: list[RenderableType] = [_summary(job)]
    parts += [_indented(text) for text in (*_troubles(job, nodes), _risk(job["at_risk"]))]
    if job["groups"]:
        head = ["group", "k+m", "codec", "may lose", "nodes"]
        parts += [Text(), show.Listing(head, [_group(group) for group in job["groups"]])]
    failed = [past for past in job["ended"] if past["state"] != "retired"][:_FAILED_SHOWN]
    rows = [
        (show.snapshot_cells(snapshot), show.reason_of(snapshot))
        for snapshot in [*job["snapshots"], *({**show.NOWHERE, **past} for past in failed)]
    ]
    if rows:
        parts += [Text(), show.Listing(show.SNAPSHOT_HEAD, rows)]
    else:
        parts.append(_indented(show.note("no snapshot yet")))
    return Group(*parts)


def _health(diagnosis: Mapping[str, Any], job: str, training: bool) -> list[Text]:
    """What diagnosis has found, or why it finds nothing."""
    known = diagnosis["jobs"].get(job)
    if known is None:
        return []
    found = []
    for one in known["findings"]:
        style = show.BAD if one["is_hang"] else show.WARN
        found.append(show.note(f"{one['kind']} for {show.age(one['for_s'])}: {one['text']}", style))
        if one["witness"]:
            found.append(Text(f"  second witness: {one['witness']}", style))
    if found:
        found.append(Text("  `ckptd incidents` has more", show.PAST))
    for one in known["pauses"]:
        if one["over"]:
            text = (
                f"rank {one['rank']} is paused for {show.age(one['for_s'])} by now, and said "
                f"{show.age(one['at_most_s'])} at most: {one['what']}"
            )
            found.append(show.note(text, show.BAD))
    if known["restarts_stopped"]:
        text = f"{known['restarts_stopped']}. Once that is mended: ckptd rearm {job}"
        found.append(show.note(text, show.BAD))
    if training and known["unseen_ranks"]:
        found.append(show.note(known["quiet_because"]))
    elif training and not known["findings"]:
        quiet = known["quiet_because"] or "no rank hangs or is slow"
        found.append(Text(f"diagnosis  {quiet} · policy {diagnosis['policy']}", show.PAST))
    return found


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 2), expand=False)


def _summary(job: Mapping[str, Any]) -> Text:
    if job["training"]:
        doing = Text("training", show.GOOD)
    elif job["waiting_for"]:
        doing = Text("waits", show.WARN)
    elif job["attached_ranks"]:
        doing = Text("starting", show.BUSY)
    else:
        doing = Text("not running", show.WARN)
    line = Text.assemble(
        ("job ", "bold"), (job["job"], "bold"), "  ", doing, f" · life {job['life']}"
    )
    if job["training"]:
        line.append(f" · step {job['step']}")
        line.append(f" · {job['step_s']:.3g} s a step" if job["step_s"] else "")
    if job["resumed_from"]:
        line.append(f" · resumed from {_short(job['resumed_from'])}")
    if job["keep"] > 1:
        line.append(f" · keeps {job['keep']} snapshots")
    if job["quota_bytes"] is not None:
        line.append(f" · at most {show.size(job['quota_bytes'])} on a node")
    return line


def _short(id: str) -> str:
    """LIFE.STEP."""
    return id.rpartition("/")[2]


def _troubles(job: Mapping[str, Any], nodes: list[dict[str, Any]]) -> list[Text]:
    found = []
    if job["waiting_for"]:
        found.append(show.note(f"waits for {job['waiting_for']}"))
    if job["rollback"]:
        text = f"resumes next from {_short(job['rollback'])}, as `ckptd rollback` asked for"
        if job["training"]:
            text += "; it is held until then, in a slot of new snapshots"
        found.append(show.note(text))
    if job["suspect_nodes"] and job["training"]:
        found.append(show.note(f"no tickets until {', '.join(job['suspect_nodes'])} is heard"))
    for one in job["restoring"][:_RESTORING_SHOWN]:
        text = (
            f"rank {one['rank']} of {_short(one['id'])} comes to {one['node']}: "
            f"{one['done']:.0%}, {show.size(one['bytes_per_s'])}/s, {show.age(one['left_s'])} left"
        )
        found.append(Text(text, show.BUSY))
    found += [show.note(text, show.BAD) for text in job["no_room"]]
    if job["attached_ranks"] < job["world_size"]:
        text = f"{job['attached_ranks']} of {show.count(job['world_size'], 'rank')} attached"
        found.append(show.note(text))
    here = {n["node"] for n in nodes if n["state"] != "lost" and n["isolated"] is None}
    for lost, spare in job["vacancies"].items():
        if lost not in here:
            text = (
                f"{spare} was called in place of {lost}"
                if spare
                else f"no spare waits to replace {lost}; `ckptd run --spare` on a node makes one"
            )
            found.append(show.note(text))
    return found


def _risk(at_risk: Mapping[str, Any]) -> Text:
    def work(what: str) -> Text:
        steps, seconds = at_risk[f"{what}_steps"], at_risk[f"{what}_s"]
        if seconds is None:
            return Text("everything", show.BAD)
        return Text(f"{show.count(steps, 'step')}, " if steps is not None else "").append(
            show.age(seconds)
        )

    return Text.assemble(
        "at risk  ", work("process"), " if a process is lost · ", work("node"), " if a node is lost"
    )


def _group(group: Mapping[str, Any]) -> tuple[list[Text | str], list[Text]]:
    left = group["may_lose"]
    style = show.GOOD if not group["reasons"] else show.WARN if left else show.BAD
    return (
        [
            str(group["group"]),
            f"{group['data_shards']}+{group['parity_shards']}",
            group["codec"],
            Text(show.count(left, "node"), style),
            ", ".join(group["nodes"]),
        ],
        [show.note(reason, style) for reason in group["reasons"]],
    )
