"""The pictures: the demo's loss over time with the faults marked, and what the benches found."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ckptd.cli.bench_numbers import Spread
from ckptd.cli.bench_report import Report
from ckptd.cli.story import Result, count
from ckptd.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_matplotlib() -> None:
    """Raise ConfigError, before any work is done, if the plot cannot be drawn."""
    try:
        import matplotlib  # noqa: F401 (only whether it is there)
    except ImportError:
        raise ConfigError(
            "the plot needs matplotlib: pip install 'ckptd[demo]', or pass --plot ''"
        ) from None


def plot_losses(result: Result, path: Path) -> None:
    """Write the PNG."""
    rows = result.losses.rows
    start = rows[0][0]
    with _figure(path, columns=1) as (axes,):
        for life in sorted({row[3] for row in rows}):
            of_life = [row for row in rows if row[3] == life]
            axes.plot(
                [row[0] - start for row in of_life],
                [row[2] for row in of_life],
                marker=".",
                label=f"life {life}: steps {of_life[0][1]} to {of_life[-1][1]}",
            )
        top = axes.get_ylim()[1]
        for fault in result.faults:
            begin = fault.at - start
            axes.axvspan(begin, begin + fault.training_s, color="tab:red", alpha=0.08, linewidth=0)
            axes.axvline(begin, color="tab:red", linewidth=1)
            axes.annotate(
                f"{fault.what}\nback after {fault.training_s:.1f} s, "
                f"{count(fault.steps_lost, 'step')} lost",
                (begin, top),
                xytext=(5, -4),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color="tab:red",
                rotation=90,
            )
        same = "equal to the calm run, bit for bit" if result.equal else "NOT equal to the calm run"
        axes.set_title(f"Training through {len(result.faults)} faults: every loss {same}")
        axes.set_xlabel("seconds since the first step")
        axes.set_ylabel("training loss (nats per byte)")
        axes.legend(loc="upper right")


def plot_capture(report: Report, path: Path) -> None:
    """Write the PNG: for each method the step time's ratio, and the blocked time on a log scale."""
    shown = {name: each for name, each in report.outcomes.items() if each.blocked_s}
    with _figure(path, columns=2) as (left, right):
        left.axvline(1.0, color="black", linewidth=1)
        _bars(left, {name: each.ratio for name, each in shown.items()}, scale=1.0)
        left.set_xlabel("step time, to that without snapshots")
        _bars(right, {name: each.blocked_s for name, each in shown.items()}, scale=1e3)
        right.set_xscale("log")
        right.set_xlabel("blocked for a snapshot (ms)")
        right.set_yticklabels([])
        left.set_title(f"A snapshot at every step: {_training(report)}", loc="left")


def plot_overhead(report: Report, path: Path) -> None:
    """Write the PNG: the step time's ratio in each turn, and its median and quartiles."""
    outcome = report.outcomes["ckptd"]
    with _figure(path, columns=1) as (axes,):
        axes.axhline(1.0, color="black", linewidth=1)
        turns = range(1, len(outcome.ratios) + 1)
        axes.plot(turns, outcome.ratios, "o", label="one turn")
        if outcome.ratio is not None:
            axes.axhspan(outcome.ratio.low, outcome.ratio.high, alpha=0.15, label="quartiles")
            axes.axhline(outcome.ratio.median, label=f"median {outcome.ratio.median:.3f}")
        axes.set_xticks(turns)
        axes.set_xlabel("turn")
        axes.set_ylabel("step time with ckptd, to that without")
        axes.legend()
        axes.set_title(f"ckptd at every step: {_training(report)}", loc="left")


def plot_matrix(nodes: Sequence[str], rows: Sequence[Sequence[float | None]], path: Path) -> None:
    """Write the PNG: seconds a GiB by source (row) and destination (column), as a heat map."""
    with _figure(path, columns=1) as (axes,):
        values = [[float("nan") if delay is None else delay for delay in row] for row in rows]
        picture = axes.imshow(values, cmap="inferno")
        axes.figure.colorbar(picture, label="seconds a GiB")
        axes.set_xticks(range(len(nodes)), nodes, rotation=45)
        axes.set_yticks(range(len(nodes)), nodes)
        axes.set_xlabel("to")
        axes.set_ylabel("from")
        axes.set_title("Transfers between agents")
        axes.grid(visible=False)


def _training(report: Report) -> str:
    size = report.training.state_bytes / 2**20
    return f"{size:.0f} MiB of state, on {report.training.device}; median and quartiles"


def _bars(axes: "Axes", spreads: Mapping[str, Spread | None], scale: float) -> None:
    found = {name: spread for name, spread in spreads.items() if spread is not None}
    medians = [scale * spread.median for spread in found.values()]
    ends = [
        [scale * (spread.median - spread.low) for spread in found.values()],
        [scale * (spread.high - spread.median) for spread in found.values()],
    ]
    colours = ["tab:blue" if name == "ckptd" else "tab:gray" for name in found]
    axes.barh(list(found), medians, xerr=ends, color=colours, ecolor="black", capsize=3)
    for row, median in enumerate(medians):
        label = f" {median:.0f}" if median >= 100 else f" {median:.3g}"
        axes.annotate(label, (ends[1][row] + median, row), va="center", fontsize=8)
    axes.margins(x=0.2)
    axes.invert_yaxis()


@contextmanager
def _figure(path: Path, columns: int) -> Iterator[tuple["Axes", ...]]:
    """Yields the axes, side by side; writes the picture at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(11, 5.5), layout="constrained", squeeze=False
    )
    for each in axes[0]:
        each.grid(alpha=0.3)
    yield tuple(axes[0])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
