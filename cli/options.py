"""Flags that several verbs share, and how errors become exit codes."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ckptd.config import ENV_AGENT, ENV_COORDINATOR
from ckptd.errors import CkptdError
from ckptd.trainer.embedded import places

ENV_MEMORY_DIR = "CKPTD_MEMORY_DIR"
ENV_MEMORY_LIMIT = "CKPTD_MEMORY_LIMIT"

_DEFAULT_COORDINATOR = "tcp://127.0.0.1:7070"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)(bit|b|B)(?:/s|ps)?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w|y)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}

MAX_PARITY_SHARDS, MAX_GROUP_NODES = 32, 128


class Size(click.ParamType[int]):
    """Bytes, as in 512MiB, 4G or 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size; write it like 512MiB, 4GiB or 1000000", param, ctx)
        number, unit, _ = match.groups()
        return int(float(number) * 1024 ** _POWERS[unit.upper()])


class Rate(click.ParamType[float]):
    """Bytes per second, as in 25Gbit, 10Gbit/s, 400Gbps, 1GB/s or 512MiB/s.

    As for networks and unlike `Size`: b or bit are bits, B is bytes, and k, M, G, T are powers of
    1000, but those of 1024 before an i. A rate of 0 is refused.
    """

    name = "rate"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = _RATE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a rate; write it like 25Gbit/s or 1GB/s", param, ctx)
        number, power, binary, unit = match.groups()
        base = 1024 if binary else 1000
        rate = float(number) * float(base ** _POWERS[power.upper()]) / (1 if unit == "B" else 8)
        if not rate:
            self.fail(f"{value!r}: at a rate of 0 nothing ever arrives", param, ctx)
        return rate


class Duration(click.ParamType[float]):
    """Seconds, as in 30s, 15min, 1000h, 30d, 2w or 5y (of 365 days)."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a time; write it like 30s, 15min, 8h or 30d", param, ctx)
        number, unit = match.groups()
        return float(number) * _SECONDS[unit]


def parse_code(text: str) -> tuple[int, int]:
    """k and m of "k+m". Raises click.UsageError; both are at least 1."""
    data, plus, parity = text.partition("+")
    if not plus or not data.isdecimal() or not parity.isdecimal():
        raise click.UsageError(f"--code {text}: write k+m, such as 4+2")
    if not int(data) or not 1 <= int(parity) <= MAX_PARITY_SHARDS:
        raise click.UsageError(
            f"--code {text}: it takes at least 1 data shard, and 1 to {MAX_PARITY_SHARDS} parity "
            "shards"
        )
    return int(data), int(parity)


class Command(click.Command):
    """A verb whose CkptdErrors become one clear line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CkptdError as error:
            click.echo(f"ckptd {ctx.info_name}: {error}", err=True)
            sys.exit(1)


class Group(Command, click.Group):
    """A verb with verbs of its own."""


def _known_coordinator() -> str:
    where = places()
    return where.coordinator if where.running() else _DEFAULT_COORDINATOR


cluster = click.option(
    "--coordinator",
    envvar=ENV_COORDINATOR,
    default=_DEFAULT_COORDINATOR,
    show_default=True,
    show_envvar=True,
    help="Address of the cluster's coordinator.",
)
coordinator = click.option(
    "--coordinator",
    envvar=ENV_COORDINATOR,
    default=_known_coordinator,
    show_default=f"that of this machine's embedded agent if one runs, else {_DEFAULT_COORDINATOR}",
    show_envvar=True,
    help="Address of the coordinator to ask.",
)
key_file = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    envvar="CKPTD_KEY_FILE",
    show_envvar=True,
    help="Cluster key made by `ckptd keygen`; needed as soon as anything leaves loopback.",
)
socket = click.option(
    "--agent",
    "agent",
    envvar=ENV_AGENT,
    show_envvar=True,
    help="Unix socket of this node's agent. Without one, the trainers start one for this machine.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for a pipe.")


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--log-level and --log-json."""
    command = click.option(
        "--log-json", is_flag=True, help="Log JSON lines instead of readable ones."
    )(command)
    return click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="What to log, on standard error.",
    )(command)
