"""`ckptd rollback`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ckptd.cli import ls, options, show
from ckptd.client import ask_status, give_order
from ckptd.keys import ClusterKey
from ckptd.wire import RollBack


@click.command(cls=options.Command)
@click.argument("job")
@click.option("--to", "to", metavar="STEP", help="The snapshot's step, or LIFE.STEP.")
@click.option("--clear", is_flag=True, help="Resume from the newest after all.")
@options.coordinator
@options.key_file
def command(job: str, to: str | None, clear: bool, coordinator: str, key_file: Path | None) -> None:
    """Let JOB resume next from an older snapshot, to go back past a loss spike, say.

    Without --to, lists the snapshots that it can go back to; how many are kept is said by
    Checkpointer(keep=N). The next resume takes the chosen one and no other: where it cannot be
    restored then, the job waits. The newer ones are given up: once the new life has a protected
    snapshot of its own, their memory is free. Until then the next rollback can still take one.
    """
    if clear and to is not None:
        raise click.UsageError("--to or --clear, not both")
    key = ClusterKey.read(key_file)
    if to is not None or clear:
        life, step = (None, None) if to is None else _parse(to)
        document = give_order(coordinator, key, RollBack(job, step, life))
        (one,) = show.choose_jobs(document, job)
        click.echo(_said(one))
        return
    (one,) = show.choose_jobs(ask_status(coordinator, key), job)
    able = [{"job": job, **found} for found in one["snapshots"] if found["restorable"]]
    show.console().print(ls.render(able))
    click.echo(_said(one), err=True)


def _parse(text: str) -> tuple[int | None, int]:
    """(life or None, step). Raises click.UsageError."""
    life, dot, step = text.rpartition(".")
    if not step.isdecimal() or (dot and not life.isdecimal()):
        raise click.UsageError(f"--to {text}: write a step, as 180, or LIFE.STEP, as 2.180")
    return (int(life) if dot else None), int(step)


def _said(job: Mapping[str, Any]) -> str:
    if job["rollback"] is None:
        return f"{job['job']}: resumes next from the newest snapshot"
    text = f"{job['job']}: resumes next from {job['rollback'].rpartition('/')[2]}"
    if job["training"]:
        text += f"; life {job['life']} still trains: restart the job"
    return text
