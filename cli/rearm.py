"""`ckptd rearm`."""

from pathlib import Path

import click

from ckptd.cli import options
from ckptd.client import give_order
from ckptd.keys import ClusterKey
from ckptd.wire import Rearm


@click.command(cls=options.Command)
@click.argument("job")
@options.coordinator
@options.key_file
def command(job: str, coordinator: str, key_file: Path | None) -> None:
    """Let JOB be restarted by itself again, once what stopped that is mended.

    Restarts of a job stop at the third hang of the same rank or node at the same step, or at the
    seventh within an hour. If it hangs now, it is restarted now. What was counted is forgotten.
    """
    give_order(coordinator, ClusterKey.read(key_file), Rearm(job))
    click.echo(f"{job}: is restarted again when it hangs")
