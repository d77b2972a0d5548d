"""`ckptd isolate`."""

from pathlib import Path

import click

from ckptd.cli import options
from ckptd.client import give_order
from ckptd.keys import ClusterKey
from ckptd.wire import IsolateNode


@click.command(cls=options.Command)
@click.argument("node")
@click.option("--reason", required=True, help="Why, for everybody who will ask.")
@options.coordinator
@options.key_file
def command(node: str, reason: str, coordinator: str, key_file: Path | None) -> None:
    """Let NODE have no part in any new life, until `ckptd readmit`.

    A job whose ranks come up on it waits, and says so; spares on it are not called, and one is
    called in its place once its ranks have left. What it holds still counts for restore, and a life
    that runs goes on.
    """
    order = IsolateNode(node, True, reason)
    give_order(coordinator, ClusterKey.read(key_file), order)
    click.echo(f"{node}: isolated")
