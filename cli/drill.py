"""`ckptd drill`."""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ckptd.cli import drill_job, options
from ckptd.cli.drill_faults import FAULTS, Fault
from ckptd.cli.drill_run import Drill, Range, Run
from ckptd.client import ask_status
from ckptd.coordinator.diagnosis.score import Confusion, Row, Said, spread
from ckptd.keys import ClusterKey
from ckptd.trainer.embedded import places

_SHARE = 0.95
_NAMES = [fault.name for fault in FAULTS]


@click.command(cls=options.Command)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(_NAMES),
    help="This fault only; may be given several times.",
)
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Of each.")
@click.option(
    "--timing", is_flag=True, help="Time each collective; else PyTorch's recorder is read."
)
@click.option(
    "--step",
    "step_s",
    default=0.5,
    show_default=True,
    type=click.FloatRange(0.05, 60),
    help="Seconds that a step takes, nearly all of it asleep.",
)
@click.option(
    "--compute",
    is_flag=True,
    help="Steps take so many seconds of a processor instead; with more ranks than processors they "
    "last longer, and unevenly.",
)
@click.option(
    "--side-by-side",
    default=1,
    show_default=True,
    type=click.IntRange(1, 8),
    help="Jobs at a time. More than the processors have room for makes the times worse.",
)
@click.option("--job", help="Strike this job, which runs already, instead of jobs made for it.")
@click.option("--fault", type=click.Choice(list(drill_job.KINDS)), help="With --job: what to do.")
@click.option("--rank", type=click.IntRange(0), help="With --job: to whom; it runs on this node.")
@click.option(
    "--percent",
    default=50,
    show_default=True,
    type=click.IntRange(5, 1000),
    help="With --fault slow: by so much.",
)
@click.option(
    "--for",
    "for_s",
    type=options.Duration(),
    default="60s",
    show_default=True,
    help="With --job: for so long at most; it is undone once the right one was named.",
)
@click.option("--yes", is_flag=True, help="With --job: do not ask.")
@options.socket
@options.coordinator
@options.key_file
@options.as_json
def command(
    only: Sequence[str],
    repeats: int,
    timing: bool,
    step_s: float,
    compute: bool,
    side_by_side: int,
    job: str | None,
    fault: str | None,
    rank: int | None,
    percent: int,
    for_s: float,
    yes: bool,
    agent: str | None,
    coordinator: str,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Inject faults into real jobs, and see who is blamed for them.

    Everything is on this machine: a coordinator, four nodes, and jobs of 4 or 8 gloo ranks that
    train with DDP, FSDP2, or a pipeline of two stages. Each run has one fault; what the diagnosis
    says is compared with it. Links are shaped, and memory is limited, where this user may. Exit
    code 1: less than 95 % of what can be seen was found, or somebody was blamed in error.

    With --job, --fault and --rank it is a job of your own that is struck, once, on the node of that
    rank; `stop` and `slow` are undone afterwards.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if job is not None:
        if fault is None or rank is None:
            raise click.UsageError("--job needs --fault and --rank")
        socket = Path(agent) if agent else places().socket
        _strike_job(job, fault, rank, percent, for_s, yes, socket, coordinator, key_file, as_json)
        return
    if fault is not None or rank is not None:
        raise click.UsageError("--fault and --rank are for --job; --only chooses faults without it")
    console = Console(stderr=as_json)
    chosen = [fault for fault in FAULTS if not only or fault.name in only]
    skipped = {fault.name: reason for fault in chosen if (reason := fault.why_not())}
    for name, reason in skipped.items():
        console.print(f"{name} is skipped: {reason}", highlight=False, soft_wrap=True)
    chosen = [fault for fault in chosen if fault.name not in skipped]

    def make(place: Range, fault: Fault, number: int) -> Drill:
        return Drill(place, fault, number, timing=timing, step_s=step_s, computes=compute)

    runs, is_whole = _hold(console, chosen, repeats, make, side_by_side)
    if not is_whole:
        console.print("stopped; no process and no network is left behind")
    seen, unseen = _count(runs)
    ok = _is_good(seen, seen.bold + unseen.bold, runs)
    if as_json:
        click.echo(json.dumps(_json(runs, skipped, ok), indent=1))
    else:
        _print(console, seen, unseen, runs)
    if not is_whole:
        sys.exit(130)
    if not ok:
        sys.exit(1)


def _strike_job(
    job: str,
    fault: str,
    rank: int,
    percent: int,
    for_s: float,
    yes: bool,
    agent: Path,
    coordinator: str,
    key_file: Path | None,
    as_json: bool,
) -> None:
    def status() -> dict[str, Any]:
        return ask_status(coordinator, key, timeout_s=10.0)

    def tell(said: Said) -> None:
        click.echo(f"{said.after_s:6.1f} s  {said.kind}: {said.culprit}", err=as_json)

    key = ClusterKey.read(key_file)
    target = drill_job.find(job, rank, agent)
    policy = status()["diagnosis"]["policy"]
    click.echo(drill_job.consequences(fault, target, percent, for_s, policy), err=as_json)
    if not yes:
        click.confirm("Do it?", abort=True, err=as_json)
    ear = drill_job.hold(fault, target, percent, for_s, status, tell)
    if as_json:
        found = {"said": [asdict(said) for said in ear.said], "ok": ear.named is not None}
        click.echo(json.dumps(_finite(found), indent=1))
    elif ear.named is not None:
        click.echo(f"right: {ear.named.culprit} was named after {ear.named.after_s:.1f} s")
    else:
        (culprit,) = ear.expected.culprits
        click.echo(
            f"{culprit} was not named within {for_s:.0f} s. `ckptd status` says what the diagnosis "
            "sees of the job; docs/diagnosis.md what each source can see"
        )
    if ear.named is None:
        sys.exit(1)


def _hold(
    console: Console,
    chosen: Sequence[Fault],
    repeats: int,
    make: Callable[[Range, Fault, int], Drill],
    side_by_side: int,
) -> tuple[list[tuple[Fault, Drill]], bool]:
    """The runs that were held, and whether these are all."""
    began = monotonic()
    runs: list[tuple[Fault, Drill]] = []
    total = len(chosen) * repeats

    def hold(place: Range, fault: Fault, number: int) -> None:
        drill = make(place, fault, number)
        if not place.stopped.is_set():
            drill.hold()
        if place.stopped.is_set():
            return
        runs.append((fault, drill))
        console.print(
            f"[dim]{monotonic() - began:6.1f} s  {len(runs)} of {total}[/]  "
            f"{fault.name} ({drill.run.kind}, {drill.run.ranks} ranks): {_words(drill.run)}",
            highlight=False,
            soft_wrap=True,
        )

    def hold_all(place: Range, faults: Sequence[Fault]) -> None:
        for number in range(repeats):
            for fault in faults:
                hold(place, fault, number)

    # There is one network, so that one job at a time can have a bad link.
    apart = [fault for fault in chosen if fault.needs_network]
    together = [fault for fault in chosen if not fault.needs_network]
    with Range(network=bool(apart)) as place, ThreadPoolExecutor(side_by_side) as pool:
        try:
            held = [pool.submit(hold_all, place, apart)]
            held += [
                pool.submit(hold, place, fault, number)
                for number in range(repeats)
                for fault in together
            ]
            for each in held:
                each.result()
        except BaseException as error:
            place.stopped.set()
            pool.shutdown(cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
    return runs, not place.stopped.is_set()


def _words(run: Run) -> str:
    """What became of a run, in a line."""
    if run.problem:
        return f"[bold red]the drill failed:[/] {escape(run.problem.splitlines()[0])}"
    if not run.final:
        return "nothing was said" + (f" ({run.suspicions} suspicions)" if run.suspicions else "")
    (said,) = run.final
    return (
        f"{said.kind}, {said.culprit} ({said.confidence:.2f}) after {said.after_s:.1f} s, "
        f"{said.after_steps:.1f} steps"
    )


def _count(runs: Sequence[tuple[Fault, Drill]]) -> tuple[Confusion, Confusion]:
    """Of what the source can see, and of the rest."""
    seen, unseen = Confusion(), Confusion()
    for fault, drill in runs:
        run = drill.run
        if not run.problem:
            is_seen = run.source == "timing" or run.kind not in fault.unseen
            confusion = seen if is_seen else unseen
            confusion.add(fault.name, drill.expected, run.final)
            confusion.bold += sum(map(drill.expected.is_bold, run.said[:-1]))
    return seen, unseen


def _is_good(seen: Confusion, bold: int, runs: Sequence[tuple[Fault, Drill]]) -> bool:
    rows = seen.rows.values()
    total = sum(row.runs for row in rows)
    return (
        not any(drill.run.problem for _, drill in runs)
        and bold == 0
        and sum(row.right for row in rows) >= _SHARE * total
    )


def _json(runs: Sequence[tuple[Fault, Drill]], skipped: dict[str, str], ok: bool) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "ok": ok,
        "skipped": skipped,
        "runs": [_finite(asdict(drill.run)) for _, drill in runs],
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _print(
    console: Console,
    seen: Confusion,
    unseen: Confusion,
    runs: Sequence[tuple[Fault, Drill]],
) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("injected", "runs", "right", "said", "culprit", "confidence", "after, s", "steps"):
        table.add_column(
            name, justify="left" if name in ("injected", "said", "culprit") else "right"
        )
    for what, confusion in (("", seen), (" (not to be seen)", unseen)):
        for fault, row in confusion.rows.items():
            table.add_row(fault + what, *_cells(row))
    console.print(table)
    late = [
        (drill.run, drill.run.named)
        for fault, drill in runs
        if drill.run.named is not None and _is_late(fault, drill.run, drill.run.named)
    ]
    for run, said in late:
        console.print(
            f"late: {run.fault} ({run.kind}) after {said.after_s:.1f} s, "
            f"{said.after_steps:.1f} steps of {run.step_s:.2f} s",
            highlight=False,
        )
    for _, drill in runs:
        if drill.run.problem:
            console.print(f"[bold red]failed:[/] {drill.run.fault}: {escape(drill.run.problem)}")
    rows = seen.rows.values()
    console.print(
        f"{sum(row.right for row in rows)} of {sum(row.runs for row in rows)} right, "
        f"{seen.bold + unseen.bold} wrong with confidence, {len(late)} late",
        highlight=False,
    )


def _cells(row: Row) -> list[str]:
    return [
        str(row.runs),
        str(row.right),
        ", ".join(f"{kind} {count}" for kind, count in row.found.most_common()),
        ", ".join(f"{who.value} {count}" for who, count in row.who.most_common()),
        spread(row.confidences, 2),
        spread(row.after_s),
        spread(row.after_steps),
    ]


def _is_late(fault: Fault, run: Run, said: Said) -> bool:
    """Whether it was named later than it should be. Steps of a slowed job count as they come."""
    if fault.is_slow:
        return said.after_steps > fault.within_steps
    return said.after_s > fault.within_s + fault.within_steps * run.step_s


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not end the cleaning up
    raise KeyboardInterrupt
