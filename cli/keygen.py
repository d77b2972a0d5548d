"""`ckptd keygen`."""

import os
from pathlib import Path

import click

from ckptd.cli import options
from ckptd.errors import ConfigError
from ckptd.keys import new_key


@click.command(cls=options.Command)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def command(file: Path) -> None:
    """Make a cluster key in FILE, readable by you alone; copy it to every node."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{file} exists; a key is not overwritten: choose another name") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    with os.fdopen(fd, "wb") as out:
        out.write(new_key())
    click.echo(f"{file}: give it to the coordinator and to every agent with --key-file")
