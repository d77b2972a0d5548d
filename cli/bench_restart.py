"""`ckptd bench restart`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ckptd.cli import options, show
from ckptd.cli.bench_numbers import Spread, order_of_turn
from ckptd.cli.local_cluster import LocalCluster

PLAIN, CKPTD, COLD, IMPORT = "torchrun", "ckptd", "ckptd --no-standby", "import torch"
_NODE, _JOB = "here", "bench-restart"
_EVERY = 10
_STEP_SECONDS = 0.1
_WARM_STEPS = 25
_PARTS = ("launcher", "imports", "group", "restore", "step")


@dataclass(frozen=True)
class Restart:
    """What one took, in seconds, from SIGKILL of a rank to the end of the last rank's first step.

    The parts are those of the rank that was last in each, so that they add up.
    """

    total: float
    launcher: float
    """Until the last process was there: noticing, ending the others, rendezvous."""
    imports: float
    """Until the last rank had its model."""
    group: float
    restore: float
    step: float
    steps_lost: int
    noticed: float | None
    """When the coordinator knew; None without one."""


@click.command(cls=options.Command)
@click.option("--ranks", type=click.IntRange(2), default=4, show_default=True)
@click.option(
    "--width", type=click.IntRange(8), default=1024, show_default=True, help="Of a layer."
)
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="How many times the methods take turns.",
)
@options.as_json
def command(ranks: int, width: int, layers: int, repeats: int, as_json: bool) -> None:
    """Time from SIGKILL of a rank to the first new step, over gloo on this machine.

    \b
    torchrun             torchrun; rank 0 saves to disk with torch.save every 10 steps, all load
    ckptd                ckptd run, snapshots in memory every 10 steps or more
    ckptd --no-standby   the same, without the process that ranks are forked from
    import torch         the machine's limit without one: as many processes import it at once
    """
    # Torchrun's workers outlive it: an end that is asked for must end them, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    restarts: dict[str, list[Restart]] = {PLAIN: [], CKPTD: [], COLD: []}
    imports: list[float] = []
    for turn in range(repeats):
        for name in order_of_turn([*restarts, IMPORT], turn):
            click.echo(f"turn {turn + 1} of {repeats}: {name}", err=True)
            if name == IMPORT:
                imports.append(_import_s(ranks))
                took_s = imports[-1]
            else:
                restarts[name].append(_measure(name, ranks, width, layers))
                took_s = restarts[name][-1].total
            click.echo(f"  {took_s:.2f} s", err=True)
    if as_json:
        found: dict[str, Any] = {
            name: [asdict(one) for one in all_] for name, all_ in restarts.items()
        }
        click.echo(json.dumps({"ranks": ranks, "cores": os.cpu_count(), **found, IMPORT: imports}))
    else:
        console = show.console()
        console.print(_table(ranks, restarts, imports))
        for remark in _remarks(restarts):
            console.print(Text(remark))


def _import_s(processes: int) -> float:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    started = [
        subprocess.Popen([sys.executable, "-c", "import torch"], env=environ)
        for _ in range(processes)
    ]
    for process in started:
        process.wait()
    return time.monotonic() - began


def _measure(name: str, ranks: int, width: int, layers: int) -> Restart:
    """A job is started, killed once, and ended."""
    flags = [f"--width={width}", f"--layers={layers}", f"--every={_EVERY}"]
    flags.append(f"--step-seconds={_STEP_SECONDS}")
    script = ["-m", "ckptd.trainer.bench_restart", *flags]
    own = ["--standalone", f"--nproc-per-node={ranks}"]
    with LocalCluster(environ={"OMP_NUM_THREADS": "1"}) as cluster:
        if name == PLAIN:
            # Without the variable the restarted ranks of a gloo job never come up.
            environ = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            file = f"--file={_disk(cluster.directory)}"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=100"]
            cluster.spawn(f"launcher-{_NODE}", [*torchrun, *own, *script, file], environ)
        else:
            cluster.start_coordinator()
            cluster.start_agent(_NODE)
            cluster.wait_for_nodes(1)
            cold = ["--no-standby"] if name == COLD else []
            cluster.start_launcher(_NODE, _JOB, [*own, *script], *cold)
        return _kill_once(cluster, name, ranks)


def _disk(directory: Path) -> Path:
    return directory / "checkpoint.pt"


def _kill_once(cluster: LocalCluster, name: str, ranks: int) -> Restart:
    def lines() -> Iterator[dict[str, Any]]:
        for line in cluster.log(f"launcher-{_NODE}").splitlines():
            if line.startswith("{") and line.endswith("}"):
                yield json.loads(line)

    def step() -> int:
        return max((line["step"] for line in lines()), default=0)

    cluster.wait("the job to train", lambda: step() >= _WARM_STEPS, 300)
    first = [line for line in lines() if line.get("event") == "start"]
    victim = next(line["pid"] for line in first if line["rank"] == ranks - 1)
    reached, killed_at = step(), time.time()
    os.kill(victim, signal.SIGKILL)

    def again() -> list[dict[str, Any]]:
        starts = [line for line in lines() if line.get("event") == "start"]
        new = [line for line in starts if line["at"] > killed_at]
        return new if len(new) >= ranks else []

    starts = cluster.wait("the job to train again", again, 300)
    noticed = None
    if name != PLAIN:
        left = [each for each in cluster.status()["events"] if each["kind"] == "rank_left"]
        noticed = min(each["time"] for each in left) - killed_at
    return _restart(killed_at, starts, reached, noticed)


def _restart(
    killed_at: float, starts: Sequence[Mapping[str, Any]], reached: int, noticed: float | None
) -> Restart:
    ends = [
        max(one[at] for one in starts)
        for at in ("process_began_at", "imported_at", "grouped_at", "restored_at", "at")
    ]
    launcher, imports, group, restore, step = (
        end - begin for begin, end in pairwise((killed_at, *ends))
    )
    return Restart(
        total=ends[-1] - killed_at,
        launcher=launcher,
        imports=imports,
        group=group,
        restore=restore,
        step=step,
        steps_lost=reached - (starts[0]["step"] - 1),
        noticed=noticed,
    )


def _table(
    ranks: int, restarts: Mapping[str, Sequence[Restart]], imports: Sequence[float]
) -> Table:
    table = Table(
        title=f"{ranks} ranks on {os.cpu_count()} cores, seconds: median (quartiles)",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for head in ("in all", *_PARTS):
        table.add_column(head, justify="right", no_wrap=True)
    for name, found in restarts.items():
        parts = [Spread.of([getattr(one, part) for one in found]).median for part in _PARTS]
        table.add_row(name, _text([one.total for one in found]), *(f"{s:.2f}" for s in parts))
    table.add_row(IMPORT, _text(imports))
    return table


def _remarks(restarts: Mapping[str, Sequence[Restart]]) -> Iterator[str]:
    for name, found in restarts.items():
        lost = Spread.of([one.steps_lost for one in found]).median
        noticed = [one.noticed for one in found if one.noticed is not None]
        knew = f"; the coordinator knew after {_text(noticed)} s" if noticed else ""
        yield f"{name}: {lost:.0f} steps made again{knew}"


def _text(samples_s: Sequence[float]) -> str:
    spread = Spread.of(samples_s)
    return f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"
