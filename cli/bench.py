"""`ckptd bench`."""

import click

from ckptd.cli.bench_capture import capture, overhead
from ckptd.cli.bench_erasure import command as erasure


@click.group()
def command() -> None:
    """Measure on this machine, beside what a user would use instead and the machine's limit."""


command.add_command(capture, "capture")
command.add_command(overhead, "overhead")
command.add_command(erasure, "erasure")
