"""`ckptd drain`."""

from collections.abc import Mapping
from pathlib import Path
from time import sleep
from typing import Any

import click

from ckptd.cli import options
from ckptd.client import ask_status, give_order
from ckptd.errors import CoordinatorUnreachable
from ckptd.keys import ClusterKey
from ckptd.wire import DrainNode

_LOOK_S = 0.5


@click.command(cls=options.Command)
@click.argument("node")
@click.option("--undo", is_flag=True, help="The node is to stay after all.")
@click.option("--wait", "wait", is_flag=True, help="Return when it may go.")
@options.coordinator
@options.key_file
def command(node: str, undo: bool, wait: bool, coordinator: str, key_file: Path | None) -> None:
    """Let NODE leave the cluster without a loss.

    No spare on it is called any more. It may go when no rank runs on it, and each snapshot that can
    be restored can be so without it; until then, this and `ckptd status` say what it waits for.
    Ranks are moved by their launcher: stop it there, and start one elsewhere.
    """
    if undo and wait:
        raise click.UsageError("--undo or --wait, not both")
    key = ClusterKey.read(key_file)
    document = give_order(coordinator, key, DrainNode(node, not undo))
    if undo:
        click.echo(f"{node}: stays")
        return
    said = ""
    while True:
        text = _state(document, node)
        if text != said:
            click.echo(f"{node}: {text}")
            said = text
        if not wait or not text.startswith("waits"):
            return
        sleep(_LOOK_S)
        try:
            document = ask_status(coordinator, key)
        except CoordinatorUnreachable as error:
            click.echo(f"{node}: {error}", err=True)


def _state(document: Mapping[str, Any], node: str) -> str:
    found = next((one for one in document["nodes"] if one["node"] == node), None)
    if found is None or found["state"] == "lost":
        return "waits for a word of it, to know what it holds" if found is None else "is gone"
    if found["draining"] is None:
        return "stays, as somebody else has said"
    waits_for = found["draining"]["waits_for"]
    return f"waits for {'; '.join(waits_for)}" if waits_for else "drained: may go"
