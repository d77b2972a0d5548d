"""`ckptd demo`."""

import json
import signal
import sys
from pathlib import Path
from time import monotonic
from types import FrameType

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import ckptd
from ckptd.cli import options
from ckptd.cli.local_cluster import LocalCluster
from ckptd.cli.plot import check_matplotlib, plot_losses
from ckptd.cli.story import Result, Story
from ckptd.errors import ConfigError

_CELLS = "256KiB"  # the model is small; with cells of 4 MiB a rank would have three
_MINIMUM_STEPS = 150


@click.command(cls=options.Command)
@click.option(
    "--steps",
    default=180,
    show_default=True,
    type=click.IntRange(_MINIMUM_STEPS),
    help="Training steps in all.",
)
@click.option(
    "--plot",
    default="ckptd-demo.png",
    show_default=True,
    help="Where to write the picture of the loss; '' for none.",
)
@click.option(
    "--script",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Training script. Default: examples/train_lm.py of this clone.",
)
@options.as_json
def command(steps: int, plot: str, script: Path | None, as_json: bool) -> None:
    """Train, lose a process, a node, two nodes at once, hang, and go on as if nothing had happened.

    Everything is real and on this machine: a coordinator, four nodes and three spares as processes
    with memory and addresses of their own, torchrun, FSDP2. At the end the same training runs
    without faults and without ckptd, and every loss and the final state must be equal, bit for
    bit. Ctrl-C leaves nothing behind.
    """
    if script is None:
        script = Path(ckptd.__file__).resolve().parent.parent / "examples" / "train_lm.py"
        if not script.exists():
            raise ConfigError(
                f"{script} is not there; run the demo in a clone of ckptd's repository, or give "
                "its training script with --script"
            )
    if plot:
        check_matplotlib()
    console = Console(stderr=as_json)
    began = monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)

    def tell(text: str) -> None:
        console.print(
            f"[dim]{monotonic() - began:6.1f} s[/]  {text}", highlight=False, soft_wrap=True
        )

    try:
        with (
            LocalCluster(
                coordinator_flags=[
                    *("--cell-size", _CELLS, "--lease", "3"),
                    *("--policy", "restart", "--window", "0.5"),
                ],
                agent_flags=["--memory-limit", "512MiB"],
                environ={"PYTHONUNBUFFERED": "1"},
            ) as cluster,
            console.status("") as spinner,
        ):
            result = Story(cluster, script, steps, tell, spinner.update).run()
    except KeyboardInterrupt:
        console.print("stopped; no process and no memory is left behind")
        sys.exit(130)
    picture = Path(plot).absolute() if plot else None
    if picture is not None:
        plot_losses(result, picture)
    if as_json:
        click.echo(json.dumps({**result.as_json(), "plot": str(picture or "")}))
    else:
        _print(console, result, picture)
    if not result.equal:
        sys.exit(1)


def _print(console: Console, result: Result, picture: Path | None) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("fault", width=20)
    for name, width in (
        ("noticed after", 8),
        ("rebuilt after", 10),
        ("training again after", 11),
        ("steps lost", 5),
    ):
        table.add_column(name, justify="right", width=width)
    table.add_column("losses", width=9)
    for fault in result.faults:
        rebuilt = f"{fault.state_back_s:.1f} s ({fault.rebuilt_cells} cells)"
        table.add_row(
            fault.what,
            f"{fault.noticed_s:.1f} s",
            rebuilt if fault.rebuilt_cells else "no need",
            f"{fault.training_s:.1f} s",
            str(fault.steps_lost),
            "[green]equal[/]" if fault.equal else "[bold red]DIFFERENT[/]",
        )
    console.print(table)
    slow = result.slowness
    if slow is not None:
        mark = "[green]right[/]" if slow.right else "[bold red]WRONG[/]"
        console.print(f"{slow.what}: named after {slow.named_s:.1f} s: {slow.named} ({mark})")
    if result.different_steps:
        console.print(f"[bold red]different losses at steps {result.different_steps}[/]")
    else:
        console.print(
            f"[green]{result.compared_steps} losses (repeated steps included) compared with the "
            "run without ckptd: all equal, bit for bit[/]"
        )
    same = result.final_digest == result.calm_digest
    console.print(
        "final parameters and optimizer state of all ranks, sha256:\n"
        f"  {result.final_digest} through the faults\n"
        f"  {result.calm_digest} without ckptd\n  "
        + ("[green]equal[/]" if same else "[bold red]DIFFERENT[/]"),
        highlight=False,
        soft_wrap=True,
    )
    if picture is not None:
        console.print(f"the loss over time: {picture}", highlight=False, soft_wrap=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
