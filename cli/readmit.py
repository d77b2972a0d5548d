"""`ckptd readmit`."""

from pathlib import Path

import click

from ckptd.cli import options
from ckptd.client import give_order
from ckptd.keys import ClusterKey
from ckptd.wire import IsolateNode


@click.command(cls=options.Command)
@click.argument("node")
@click.option("--reason", default="", help="Why it may take part again.")
@options.coordinator
@options.key_file
def command(node: str, reason: str, coordinator: str, key_file: Path | None) -> None:
    """Let NODE, which `ckptd isolate` has put aside, take part again."""
    order = IsolateNode(node, False, reason)
    give_order(coordinator, ClusterKey.read(key_file), order)
    click.echo(f"{node}: takes part again")
