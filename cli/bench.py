"""`ckptd bench`."""

import click

from ckptd.cli.bench_capture import capture, overhead
from ckptd.cli.bench_erasure import command as erasure
from ckptd.cli.bench_restart import command as restart
from ckptd.cli.bench_timing import command as timing
from ckptd.cli.bench_transfer import network, protect, rebuild


@click.group()
def command() -> None:
    """Measure on this machine, beside what a user would use instead and the machine's limit."""


command.add_command(capture, "capture")
command.add_command(overhead, "overhead")
command.add_command(erasure, "erasure")
command.add_command(timing, "timing")
command.add_command(network, "network")
command.add_command(protect, "protect")
command.add_command(rebuild, "rebuild")
command.add_command(restart, "restart")
