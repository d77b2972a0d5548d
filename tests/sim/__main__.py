"""`python -m tests.sim --seeds 1-1000`, or `--seed N --story`."""

import os
import sys
from time import monotonic

import click

from .campaign import Summary, campaign, live_through

_SAY_EVERY_S = 30.0


def _seeds(context: click.Context, parameter: click.Parameter, text: str) -> range:
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise click.BadParameter(f"{text!r}: the first and the last, as 1-1000")
    return range(int(first), int(last or first) + 1)


def _live_through_all(seeds: range, jobs: int, brief: bool) -> Summary:
    """What came of them. Ctrl-C: it is said of those that were done, and this process ends."""
    summary, began = Summary(), monotonic()
    said = began
    try:
        for outcome in campaign(seeds, jobs):
            summary.add(outcome)
            if outcome.failure:
                short = f"seed {outcome.seed}: {outcome.failure}"
                click.echo(short if brief else outcome.report())
            if monotonic() - said > _SAY_EVERY_S:
                said = monotonic()
                left_min = (said - began) / summary.seeds * (len(seeds) - summary.seeds) / 60
                click.echo(
                    f"{summary.seeds} of {len(seeds)} seeds, {len(summary.failures)} violations, "
                    f"{left_min:.0f} minutes left",
                    err=True,
                )
    except KeyboardInterrupt:
        click.echo(f"interrupted; until then:\n{summary}")
        sys.exit(130)
    return summary


@click.command()
@click.option(
    "--seeds", default="1-100", callback=_seeds, help="From the first to the last, such as 1-1000."
)
@click.option("--seed", type=int, help="One seed only.")
@click.option("--story", is_flag=True, help="Tell all that happened in it.")
@click.option("--about", default="", help="Only lines of the story in which this occurs.")
@click.option("--jobs", default=os.cpu_count() or 1, help="Processes to use.")
@click.option("--brief", is_flag=True, help="Tell violations in a line each.")
def main(seeds: range, seed: int | None, story: bool, about: str, jobs: int, brief: bool) -> None:
    """Let the deciders live through faults, and say what they did wrong."""
    if seed is not None:
        outcome = live_through(seed, lines=None if story else 80)
        for line in outcome.story:
            if about in line:
                click.echo(line)
        click.echo(f"\n{outcome.plan}")
        click.echo(outcome.report().splitlines()[-2] if outcome.failure else "all is well")
        if outcome.trace:
            click.echo(outcome.trace)
        sys.exit(bool(outcome.failure))
    summary = _live_through_all(seeds, jobs, brief)
    click.echo(summary)
    sys.exit(bool(summary.failures))


if __name__ == "__main__":
    main()
