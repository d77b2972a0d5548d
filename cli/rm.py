"""`ckptd rm`."""

from pathlib import Path

import click

from ckptd.cli import options
from ckptd.client import give_order
from ckptd.keys import ClusterKey
from ckptd.wire import RemoveJob


@click.command(cls=options.Command)
@click.argument("job")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.coordinator
@options.key_file
def command(job: str, yes: bool, coordinator: str, key_file: Path | None) -> None:
    """Forget JOB and free its memory on every node; it then starts from nothing."""
    if not yes:
        click.confirm(f"Give up every snapshot of {job!r}?", abort=True)
    give_order(coordinator, ClusterKey.read(key_file), RemoveJob(job))
    click.echo(f"{job}: forgotten, its memory is given back")
