"""`ckptd matrix`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ckptd.cli import options, plot, show
from ckptd.client import ask_status
from ckptd.keys import ClusterKey

_WARN, _BAD = 1.5, 2.0


@click.command(cls=options.Command)
@click.option(
    "--png",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Also write the matrix as a picture to this file.",
)
@options.coordinator
@options.key_file
@options.as_json
def command(png: Path | None, coordinator: str, key_file: Path | None, as_json: bool) -> None:
    """Show how long transfers take from each node to each other, in seconds a GiB.

    Agents move cells between the nodes of a group at every snapshot, and time that. A hot row is a
    node that sends slowly, a hot column one that receives slowly, a single hot cell a link. It is
    the agents' network that is measured; training may use another.
    """
    if png is not None:
        plot.check_matplotlib()
    found = ask_status(coordinator, ClusterKey.read(key_file))["diagnosis"]["matrix"]
    if png is not None:
        plot.plot_matrix(*as_rows(found), png)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console = show.console()
    if not found["pairs"]:
        console.print(
            Text(
                "Nothing was measured yet: cells of at least 256 KiB that nodes get from one "
                "another are, once a snapshot is protected.",
                show.WARN,
            )
        )
        return
    console.print(render(found))
    for hot in found["hot"]:
        console.print(show.note(hot["text"], show.BAD))


def as_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[float | None]]]:
    """Names of nodes, and by source and destination seconds a GiB; None: not measured."""
    ends = {end for pair in found["pairs"] for end in (pair["source"], pair["destination"])}
    nodes = sorted(ends)
    delays = {(pair["source"], pair["destination"]): pair["s_per_gib"] for pair in found["pairs"]}
    return nodes, [[delays.get((row, column)) for column in nodes] for row in nodes]


def render(found: Mapping[str, Any]) -> Table:
    """The matrix, coloured by how far each cell is above the usual."""
    nodes, rows = as_rows(found)
    delays = sorted(delay for row in rows for delay in row if delay is not None)
    usual = delays[(len(delays) - 1) // 4]
    table = Table(title="seconds a GiB, from row to column", title_justify="left", box=None)
    table.add_column("from", style=show.PAST)
    for node in nodes:
        table.add_column(node, justify="right")
    for node, row in zip(nodes, rows, strict=True):
        table.add_row(node, *(_cell(delay, usual) for delay in row))
    return table


def _cell(delay: float | None, usual: float) -> Text:
    if delay is None:
        return Text("–", show.PAST)
    ratio = delay / usual
    style = show.BAD if ratio > _BAD else show.WARN if ratio > _WARN else show.GOOD
    return Text(f"{delay:.3g}", style)
