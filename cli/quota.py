"""`ckptd quota`."""

from pathlib import Path

import click

from ckptd.cli import options, show
from ckptd.client import give_order
from ckptd.ids import check_job_id
from ckptd.keys import ClusterKey
from ckptd.wire import SetQuota


@click.command(cls=options.Command)
@click.argument("job")
@click.argument("size", type=options.Size(), required=False)
@options.coordinator
@options.key_file
def command(job: str, size: int | None, coordinator: str, key_file: Path | None) -> None:
    """Limit the memory that JOB may have on each node to SIZE, from its next life on.

    Slots and parity count. A job that needs more is refused before it trains, with the numbers.
    Without SIZE, it has that of all jobs again (`ckptd coordinator --job-quota`).
    """
    give_order(coordinator, ClusterKey.read(key_file), SetQuota(check_job_id(job), size))
    click.echo(f"{job}: {'as all jobs' if size is None else f'{show.size(size)} on each node'}")
