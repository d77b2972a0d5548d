"""`ckptd bench timing`."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import process_time
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ckptd.agent.watcher import Watcher
from ckptd.cli import options, show
from ckptd.cli.bench_numbers import Spread, order_of_turn, paired
from ckptd.config import (
    ENV_AGENT,
    ENV_TIMING,
    FLIGHT_RECORDER_ENTRIES,
    FLIGHT_RECORDER_SIZES,
)
from ckptd.errors import CkptdError
from ckptd.watching import Observed, trainers_dir

PLAIN, RECORDER, TIMING = "unwatched", "recorder", "timing"
_MODES = (PLAIN, RECORDER, TIMING)


@click.command(cls=options.Command)
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True, help="Processes.")
@click.option("--width", type=click.IntRange(8), default=128, show_default=True, help="Of a layer.")
@click.option("--layers", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--rate",
    type=click.FloatRange(1),
    default=500.0,
    show_default=True,
    help="Collectives a second, if the machine can: between steps, ranks rest.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="How many times the sources take turns.",
)
@click.option(
    "--steps",
    type=click.IntRange(2),
    default=160,
    show_default=True,
    help="Measured steps in a turn; two more, before them, are not measured.",
)
@options.as_json
def command(
    ranks: int, width: int, layers: int, rate: float, repeats: int, steps: int, as_json: bool
) -> None:
    """What it takes to watch a job, and its step time to that of one that is not watched.

    Some ranks train a small model together under DDP over gloo, several all-reduces a step. They
    take turns:

    \b
    unwatched    nobody reads; PyTorch's Flight Recorder is on, as it is by default
    recorder     an agent's watcher reads the Flight Recorder, once a second as it does
    timing       each collective is timed, and the watcher reads that

    Ratios are to the step of the unwatched job, and to its processor time. What watching takes of
    a processor is counted by the kernel, thread by thread, so that a busy machine hardly blurs it:
    the threads in a trainer that answer, and the agent's part for each trainer. What timing takes
    is in the training thread, and so in the ratios.
    """
    report = asyncio.run(_measure(ranks, width, layers, rate, repeats, steps))
    if as_json:
        click.echo(json.dumps(report))
    else:
        show.console().print(_table(report))


class _Ranks:
    """The processes of the job; rank 0 takes orders."""

    def __init__(self, ranks: int, arguments: Sequence[str], folder: Path) -> None:
        self._all = [self._start(rank, ranks, arguments, folder) for rank in range(ranks)]

    def _start(
        self, rank: int, ranks: int, arguments: Sequence[str], folder: Path
    ) -> "subprocess.Popen[str]":
        environ = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            ENV_AGENT: str(folder / "agent"),
            ENV_TIMING: "0",
            FLIGHT_RECORDER_SIZES[0]: str(FLIGHT_RECORDER_ENTRIES),
        }
        module = [sys.executable, "-m", "ckptd.trainer.bench_timing"]
        with (folder / f"{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [*module, *arguments, str(folder / "store")],
                env=environ,
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else log,
                stderr=log,
                text=True,
            )

    def train(self, timed: bool, steps: int) -> dict[str, Any]:
        """Order a block; returns what rank 0 measured. Raises CkptdError if it has died."""
        first = self._all[0]
        assert first.stdin is not None
        assert first.stdout is not None
        try:
            first.stdin.write(json.dumps({"timed": timed, "steps": steps}) + "\n")
            first.stdin.flush()
            told: dict[str, Any] = json.loads(first.stdout.readline())
        except (OSError, ValueError) as error:
            raise CkptdError(f"the training has failed: {error}; try fewer --ranks") from error
        return told

    def close(self) -> None:
        for process in self._all:
            process.kill()
            process.wait()


async def _measure(
    ranks: int, width: int, layers: int, rate: float, repeats: int, steps: int
) -> dict[str, Any]:
    medians: dict[str, dict[int, float]] = {mode: {} for mode in _MODES}
    cpu_s: dict[str, dict[int, float]] = {mode: {} for mode in _MODES}
    shares: dict[str, dict[str, list[float]]] = {mode: {} for mode in _MODES}
    records: list[Observed] = []
    collectives = per_s = 0.0
    with tempfile.TemporaryDirectory(prefix="ckptd-bench-") as folder:
        job = _Ranks(ranks, [str(width), str(layers), str(rate)], Path(folder))
        try:
            await _block(job, PLAIN, steps, Path(folder), [])  # warm
            for turn in range(repeats):
                for mode in order_of_turn(_MODES, turn):
                    began_s = process_time()
                    told = await _block(job, mode, steps, Path(folder), records)
                    agent_s = (process_time() - began_s) / ranks
                    for where, used_s in (("trainer", told["watching_s"]), ("agent", agent_s)):
                        shares[mode].setdefault(where, []).append(used_s / told["seconds"])
                    medians[mode][turn] = statistics.median(told["steps_s"])
                    cpu_s[mode][turn] = told["cpu_s"]
                    collectives = told["collectives"]
                    per_s = steps * collectives / told["seconds"]
        finally:
            job.close()
    return {
        "ranks": ranks,
        "cores": os.cpu_count(),
        "width": width,
        "layers": layers,
        "repeats": repeats,
        "steps": steps,
        "collectives_per_step": collectives,
        "collectives_per_s": per_s,
        "sources": {
            mode: {
                **_outcome(mode, medians, cpu_s, records),
                "watching": {
                    where: asdict(Spread.of(found)) for where, found in shares[mode].items()
                },
            }
            for mode in _MODES
        },
    }


def _outcome(
    mode: str,
    medians: dict[str, dict[int, float]],
    cpu_s: dict[str, dict[int, float]],
    records: list[Observed],
) -> dict[str, Any]:
    ratio = paired(medians[mode], medians[PLAIN])
    cpu_ratio = paired(cpu_s[mode], cpu_s[PLAIN])
    seen = [record for each in records if each.source == mode for record in each.collectives]
    timed = [record for record in seen if record.ended and record.duration_s is not None]
    return {
        "step_s": asdict(Spread.of(list(medians[mode].values()))),
        "ratio": asdict(ratio) if ratio is not None else None,
        "cpu_s": asdict(Spread.of(list(cpu_s[mode].values()))),
        "cpu_ratio": asdict(cpu_ratio) if cpu_ratio is not None else None,
        "records": len(seen),
        "timed": len(timed),
    }


async def _block(
    job: _Ranks, mode: str, steps: int, folder: Path, records: list[Observed]
) -> dict[str, Any]:
    """One source's turn, with a watcher for as long as it lasts."""
    watching = None
    if mode != PLAIN:
        watcher = Watcher(trainers_dir(folder / "agent"), records.append)
        watching = asyncio.create_task(watcher.run())
    try:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, job.train, mode == TIMING, steps)
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['ranks']} ranks on {report['cores']} cores, "
        f"{report['collectives_per_step']:.0f} collectives a step, "
        f"{report['collectives_per_s']:.0f} a second",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("source")
    for head in ("step, ms", "ratio", "CPU ratio", "in trainer", "in agent", "records"):
        table.add_column(head, justify="right")
    for mode, found in report["sources"].items():
        step = Spread(**found["step_s"])
        table.add_row(
            mode,
            f"{step.median * 1e3:.1f}\n{step.low * 1e3:.1f}–{step.high * 1e3:.1f}",
            *(_three(mode, found[name]) for name in ("ratio", "cpu_ratio")),
            *(_share(mode, found["watching"][where]) for where in ("trainer", "agent")),
            f"{found['records']}\n{found['timed']} timed",
        )
    return table


def _three(mode: str, ratio: dict[str, float] | None) -> str:
    if ratio is None or mode == PLAIN:
        return "1"
    spread = Spread(**ratio)
    return f"{spread.median:.2f}\n{spread.low:.2f}–{spread.high:.2f}"


def _share(mode: str, share: dict[str, float]) -> str:
    """Of one processor."""
    if mode == PLAIN:
        return "–"
    spread = Spread(**share)
    return f"{spread.median:.2%}\n{100 * spread.low:.1f}–{spread.high:.1%}"
