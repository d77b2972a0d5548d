"""`ckptd bench capture` and `ckptd bench overhead`."""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import click
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ckptd.cli import options, show
from ckptd.cli.bench_report import (
    CKPTD,
    COPY,
    PLAIN,
    Report,
    about,
    capture_table,
    overhead_table,
    remarks,
    report_of,
)
from ckptd.cli.bench_runner import NODE, Trainer, measure
from ckptd.cli.local_cluster import LocalCluster
from ckptd.cli.plot import check_matplotlib, plot_capture, plot_overhead
from ckptd.errors import ConfigError
from ckptd.trainer.bench_messages import Method, Mode, Setup

_TMPFS = Path("/dev/shm")
# What must fit, in times the state. On tmpfs: two slots and a file. In memory besides: training
# with its gradients, and then copies that async_save stages and its process gets, and our copy's.
_TMPFS_STATES, _OVERHEAD_STATES, _CAPTURE_STATES = 3, 5, 10


def _methods(tmpfs: Path, disk: Path) -> dict[str, Method]:
    """By name; they write to folders in these two."""
    modes: tuple[Mode, ...] = ("thread", "process", "staged")
    saves = {
        f"async-{mode}-{where.name}": Method("async_save", str(where / mode), mode)
        for mode in modes
        for where in (tmpfs, disk)
    }
    return {
        PLAIN: Method("plain"),
        CKPTD: Method("ckptd"),
        **saves,
        "torch-save-tmpfs": Method("torch.save", str(tmpfs / "torch-save")),
        COPY: Method("copy"),
    }


_NAMES = tuple(_methods(Path("tmpfs"), Path("disk")))


@dataclass(frozen=True)
class _Plan:
    state_bytes: int
    step_s: float
    device: Literal["auto", "cpu", "cuda"]
    repeats: int
    steps: int


def _common(repeats: int, steps: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of both commands, with their own defaults."""
    decorators = [
        click.option(
            "--state",
            type=options.Size(),
            default="300MiB",
            show_default=True,
            help="Bytes of parameters and Adam state; a GPT-like model of about that size is made.",
        ),
        click.option(
            "--step-seconds",
            type=click.FloatRange(min=0.0),
            default=0.5,
            show_default=True,
            help="The batch is chosen so that a step without snapshots takes this long or more.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where to train; auto: CUDA if there is one.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(1),
            default=repeats,
            show_default=True,
            help="How many times the methods take turns.",
        ),
        click.option(
            "--steps",
            type=click.IntRange(2),
            default=steps,
            show_default=True,
            help="Measured steps in a turn; one more, before them, is not measured.",
        ),
        click.option("--plot", default="", help="Draw the result into this PNG file."),
        options.as_json,
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


@click.command(cls=options.Command)
@_common(repeats=5, steps=4)
@click.option(
    "--method",
    "chosen",
    multiple=True,
    type=click.Choice(_NAMES),
    help="Measure only this one, beside training without snapshots; may be given several times.",
)
@click.option(
    "--disk",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=tempfile.gettempdir,
    show_default="the directory for temporary files",
    help="Directory on the disk that the async-*-disk methods write to.",
)
def capture(
    state: int,
    step_seconds: float,
    device: Literal["auto", "cpu", "cuda"],
    repeats: int,
    steps: int,
    plot: str,
    as_json: bool,
    chosen: tuple[str, ...],
    disk: Path,
) -> None:
    """A snapshot at every step: ckptd beside what torch offers, and a plain copy.

    One process trains one model; the methods take turns in short blocks of steps, in an order
    that changes, so that noise hits them alike.

    \b
    plain               no snapshots
    ckptd               with an agent and a coordinator, checks on as they are by default
    async-thread-*      torch.distributed.checkpoint.async_save as it is by default
    async-process-*     the same, written by a process of its own
    async-staged-*      the same in a thread, with a stager that copies asynchronously
    torch-save-tmpfs    torch.save of the model and the optimizer; training waits
    copy                the same bytes to warm memory by one thread, or from CUDA to pinned
                        memory at once; training waits: the machine's limit

    async_save waits for the save before, as it must. A snapshot's blocked time is the time inside
    the call that begins it, and the time that the next optimizer step has to wait for it.
    """
    names = [name for name in _NAMES if name == PLAIN or name in (chosen or _NAMES)]
    plan = _Plan(state, step_seconds, device, repeats, steps)
    report = _run(plan, names, disk, plot)
    _show(report, as_json, plot, plot_capture, capture_table)


@click.command(cls=options.Command)
@_common(repeats=10, steps=5)
def overhead(
    state: int,
    step_seconds: float,
    device: Literal["auto", "cpu", "cuda"],
    repeats: int,
    steps: int,
    plot: str,
    as_json: bool,
) -> None:
    """Step time with ckptd at every step, to that without: what a training feels, end to end.

    One process trains one model, in turns of some steps with ckptd and some without it.
    """
    plan = _Plan(state, step_seconds, device, repeats, steps)
    report = _run(plan, [PLAIN, CKPTD], None, plot)
    _show(report, as_json, plot, plot_overhead, overhead_table)


def _run(plan: _Plan, names: Sequence[str], disk: Path | None, plot: str) -> Report:
    """Start everything, measure, and leave nothing behind. `disk` is for methods that want it."""
    if plot:
        check_matplotlib()
    _check_memory(plan, names)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    blocks = len(names) * (1 + plan.repeats)
    limit = str(3 * plan.state_bytes + 2**26)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ckptd-bench-", dir=disk) as folder,
            LocalCluster(agent_flags=["--memory-limit", limit]) as cluster,
            _progress(blocks) as tell,
        ):
            tell("starting a coordinator and an agent")
            cluster.start_coordinator()
            cluster.start_agent(NODE)
            cluster.wait_for_nodes(1)
            tell("building a model, choosing the batch")
            socket = str(cluster.socket(NODE))
            trainer = Trainer(cluster, Setup(plan.state_bytes, plan.step_s, plan.device, socket))
            methods = _methods(cluster.memory / "tmpfs", Path(folder) / "disk")
            chosen = {name: methods[name] for name in names}
            measured = measure(trainer, chosen, plan.repeats, plan.steps, tell)
    except KeyboardInterrupt:
        click.echo("stopped; no process, no memory and no file is left behind", err=True)
        sys.exit(130)
    kind = _file_system(disk) if disk is not None else ""
    return report_of(trainer.ready, kind, plan.repeats, plan.steps, measured)


def _check_memory(plan: _Plan, names: Sequence[str]) -> None:
    """Raise ConfigError before anything is started that would not fit."""
    in_memory = _OVERHEAD_STATES if set(names) == {PLAIN, CKPTD} else _CAPTURE_STATES
    for where, states, free in (
        (str(_TMPFS), _TMPFS_STATES, shutil.disk_usage(_TMPFS).free),
        ("memory", in_memory, psutil.virtual_memory().available),
    ):
        if free < states * plan.state_bytes:
            raise ConfigError(
                f"a state of {show.size(plan.state_bytes)} needs about {states} times as much in "
                f"{where}, and {show.size(free)} are free: pass a smaller --state"
            )


def _file_system(path: Path) -> str:
    mounted = psutil.disk_partitions(all=True)
    under = [each for each in mounted if path.absolute().is_relative_to(each.mountpoint)]
    return max(under, key=lambda each: len(each.mountpoint)).fstype if under else "unknown"


@contextmanager
def _progress(blocks: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that says what is being done; on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    before = -2  # the start of the daemons, and the building of the model
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=blocks)

        def tell(what: str) -> None:
            nonlocal before
            progress.update(task, description=what, completed=max(0, before))
            before += 1

        yield tell


def _show(
    report: Report,
    as_json: bool,
    plot: str,
    draw: Callable[[Report, Path], None],
    table: Callable[[Report], Table],
) -> None:
    if plot:
        draw(report, Path(plot))
    if as_json:
        click.echo(json.dumps(report.as_json()))
        return
    console = show.console()
    console.print(about(report), soft_wrap=True)
    console.print(table(report))
    for line in remarks(report):
        console.print(line, soft_wrap=True, markup=False)
    if plot:
        console.print(f"drawn: {Path(plot).absolute()}", soft_wrap=True, markup=False)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
