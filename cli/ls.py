"""`ckptd ls`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from ckptd.cli import options, show
from ckptd.client import ask_status
from ckptd.keys import ClusterKey


@click.command(cls=options.Command)
@click.argument("job", required=False)
@click.option("--all", "ended", is_flag=True, help="Also those that have ended.")
@options.coordinator
@options.key_file
@options.as_json
def command(
    job: str | None, ended: bool, coordinator: str, key_file: Path | None, as_json: bool
) -> None:
    """List snapshots, newest first: where each can be restored from, and where it lies.

    With JOB, only those of this job.
    """
    document = ask_status(coordinator, ClusterKey.read(key_file))
    snapshots = select(document, job, ended)
    if as_json:
        click.echo(json.dumps(snapshots, indent=2))
    else:
        show.console().print(render(snapshots))


def select(document: Mapping[str, Any], job: str | None, ended: bool) -> list[dict[str, Any]]:
    """Snapshots with their job's name, newest first, the job with the newest first of all."""
    by_job = []
    for one in show.choose_jobs(document, job):
        found = [*one["snapshots"], *(one["ended"] if ended else [])]
        if found:
            # A coordinator that was restarted knows the order of ids, but no longer that of ages.
            found.sort(key=lambda snapshot: (snapshot["life"], snapshot["step"]), reverse=True)
            by_job.append([{"job": one["job"], **show.NOWHERE, **past} for past in found])
    by_job.sort(key=lambda found: float(found[0]["age_s"]))
    return [snapshot for found in by_job for snapshot in found]


def render(snapshots: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The list as a table."""
    if not snapshots:
        return Text("No snapshot yet; `ckptd status` shows what the jobs are doing.", show.WARN)
    head = ["job", *show.SNAPSHOT_HEAD]
    rows = [
        ([snapshot["job"], *show.snapshot_cells(snapshot)], _below(snapshot))
        for snapshot in snapshots
    ]
    return show.Listing(head, rows, indent=0)


def _below(snapshot: Mapping[str, Any]) -> list[Text]:
    ranks_of: dict[str, list[int]] = {}
    for rank, nodes in snapshot["ranks_on"].items():
        for node in nodes:
            ranks_of.setdefault(node, []).append(int(rank))
    where = []
    if ranks_of:
        places = [f"{node} ({show.spans(ranks)})" for node, ranks in sorted(ranks_of.items())]
        where.append(f"segments on {', '.join(places)}")
    if snapshot["parity_on"]:
        where.append(f"parity on {', '.join(snapshot['parity_on'])}")
    return [*(Text(line, show.PAST) for line in where), *show.reason_of(snapshot)]
