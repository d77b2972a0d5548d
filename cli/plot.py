"""The demo's picture: the loss over time, with the faults marked."""

from pathlib import Path

from ckptd.cli.story import Result, count
from ckptd.errors import ConfigError


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result.losses.rows
    start = rows[0][0]
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
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
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
