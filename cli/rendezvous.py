"""`ckptd rendezvous`."""

from pathlib import Path

import click

from ckptd.cli import options
from ckptd.errors import ConfigError


@click.command(cls=options.Command)
@click.option(
    "--listen",
    default="127.0.0.1:29400",
    show_default=True,
    help="HOST:PORT to listen on; port 0: any. It has no protection: keep it in the cluster.",
)
@click.option(
    "--announce",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the address to this file once it is bound.",
)
def command(listen: str, announce: Path | None) -> None:
    """Run the store through which torchrun's launchers find one another.

    It stands beside the coordinator, so that no node of the job is special. Give its address to
    every `ckptd run` with --rendezvous.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--listen {listen}: give HOST:PORT, such as 127.0.0.1:29400")
    from ckptd.trainer.rendezvous import serve_rendezvous

    serve_rendezvous(host, int(port), announce)
