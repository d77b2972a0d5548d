"""`ckptd incidents`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import gmtime, strftime
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ckptd.cli import options, show
from ckptd.client import ask_status
from ckptd.errors import Refused
from ckptd.keys import ClusterKey

_STACK_LINES = 12
_PARTS = (
    ("lost_work_s", "work lost since the snapshot"),
    ("detection_s", "detection"),
    ("diagnosis_s", "diagnosis"),
    ("restart_s", "restart"),
)
_SHORT = tuple((part, name.partition(" since")[0]) for part, name in _PARTS)


@click.group(cls=options.Group, invoke_without_command=True)
@options.coordinator
@options.key_file
@options.as_json
@click.pass_context
def command(context: click.Context, coordinator: str, key_file: Path | None, as_json: bool) -> None:
    """List what stopped or slowed jobs, newest first; `ckptd incidents show N` reports on one.

    Downtime has four parts, as in the C4 paper: work lost since the snapshot from which the job
    went on, and the time for detection, diagnosis and restart. A table below adds them up for each
    kind of incident.
    """
    if context.invoked_subcommand is not None:
        return
    found = ask_status(coordinator, ClusterKey.read(key_file))["incidents"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = show.console()
    if not found:
        console.print(Text("No incident yet; `ckptd status` shows what the jobs are doing."))
        return
    head = ["incident", "job", "time (UTC)", "what", "who", "downtime", "done"]
    rows = [(_row(one), [Text(one["text"], show.PAST)]) for one in reversed(found)]
    console.print(show.Listing(head, rows, indent=0))
    if any(downtime_s(one) is not None for one in found):
        console.print()
        console.print(downtime_table(found))


@command.command(cls=options.Command)
@click.argument("number", type=int)
@options.coordinator
@options.key_file
@options.as_json
def show_command(number: int, coordinator: str, key_file: Path | None, as_json: bool) -> None:
    """Report on incident NUMBER, as text to paste into a ticket."""
    found = ask_status(coordinator, ClusterKey.read(key_file))["incidents"]
    chosen = next((one for one in found if one["number"] == number), None)
    if chosen is None:
        known = show.spans(one["number"] for one in found) or "none"
        raise Refused(f"there is no incident {number}; known: {known}")
    click.echo(json.dumps(chosen, indent=2) if as_json else report(chosen))


command.add_command(show_command, "show")


def downtime_s(incident: Mapping[str, Any]) -> float | None:
    """All four parts together, as far as they are known; None if none is."""
    known = [incident[part] for part, _ in _PARTS if incident[part] is not None]
    return sum(known) if known else None


def downtime_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The four parts by kind of incident, as C4 counts them: sums of what is known."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("downtime")
    for head in ("incidents", *(name for _, name in _SHORT), "in all"):
        table.add_column(head, justify="right")
    kinds = sorted({one["kind"] for one in found})
    groups = {kind: [one for one in found if one["kind"] == kind] for kind in kinds}
    if len(groups) > 1:
        groups["all"] = list(found)
    for kind, those in groups.items():
        columns = [[one[part] for one in those if one[part] is not None] for part, _ in _SHORT]
        columns.append([known for one in those if (known := downtime_s(one)) is not None])
        cells = (f"{sum(column):.1f} s" if column else "–" for column in columns)
        table.add_row(kind, str(len(those)), *cells)
    return table


def _row(one: Mapping[str, Any]) -> list[Text | str]:
    hangs = one["kind"].endswith("hang")
    lost_s = downtime_s(one)
    return [
        str(one["number"]),
        one["job"],
        _time(one["at"]),
        Text(one["kind"], show.BAD if hangs else show.WARN),
        one["culprit"],
        "–" if lost_s is None else show.age(lost_s),
        Text(one["decision"] or "–", show.GOOD if one["over_at"] else show.WARN),
    ]


def report(one: Mapping[str, Any]) -> str:
    """Plain text: what was found, who, why it is believed, what was done, what it cost."""
    lines = [
        f"ckptd incident {one['number']}: {one['kind']} of job {one['job']}",
        "",
        f"  when      {_time(one['at'])} UTC, life {one['life']}, step {one['step']}",
        f"  who       {one['culprit']}",
        f"  finding   {one['text']}",
    ]
    if one["confidence"]:
        lines.append(f"  certain   {one['confidence']:.0%} by the timing")
    if one["witness"]:
        lines.append(f"  witness   {one['witness']}")
    if one["decision"]:
        lines.append(f"  decision  {one['decision']}: {one['reason']}")
    if one["evidence"]:
        lines += ["", "evidence"]
        lines += [f"  {name}: {value}" for name, value in one["evidence"].items()]
    if one["doing"]:
        lines += ["", "what the suspects were doing"]
        lines += [f"  rank {rank}: {doing}" for rank, doing in one["doing"].items()]
    for rank, stack in one["stacks"].items():
        lines += ["", f"stack of rank {rank}, innermost call last"]
        lines += [f"  {line}" for line in stack.splitlines()[-_STACK_LINES:]]
    if one["folders"]:
        lines += ["", "evidence on the nodes"]
        lines += [f"  {node}: {path}" for node, path in sorted(one["folders"].items())]
    lines += ["", "downtime"]
    for part, name in _PARTS:
        value = "not known" if one[part] is None else f"{one[part]:.1f} s"
        lines.append(f"  {name}: {value}")
    whole_s = downtime_s(one)
    if whole_s is not None:
        lines.append(f"  in all: {whole_s:.1f} s")
    if one["timeline"]:
        lines += ["", "timeline (UTC)"]
        lines += [f"  {_time(at, fine=True)}  {text}" for at, text in one["timeline"]]
    return "\n".join(lines)


def _time(at: float, fine: bool = False) -> str:
    text = strftime("%Y-%m-%d %H:%M:%S", gmtime(at))
    return f"{text}.{int(at % 1 * 10)}" if fine else text
