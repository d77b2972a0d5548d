"""`python -m tests.sim --seeds 1-1000`, or `--seed N --story`."""

import os
import sys

import click

from .campaign import Summary, campaign, live_through


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


@click.command()
@click.option("--seeds", default="1-100", help="From the first to the last, such as 1-1000.")
@click.option("--seed", type=int, help="One seed only.")
@click.option("--story", is_flag=True, help="Tell all that happened in it.")
@click.option("--about", default="", help="Only lines of the story in which this occurs.")
@click.option("--jobs", default=os.cpu_count() or 1, help="Processes to use.")
@click.option("--brief", is_flag=True, help="Tell violations in a line each.")
def main(seeds: str, seed: int | None, story: bool, about: str, jobs: int, brief: bool) -> None:
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
    summary = Summary()
    for outcome in campaign(_seeds(seeds), jobs):
        summary.add(outcome)
        if outcome.failure:
            short = f"seed {outcome.seed}: {outcome.failure}"
            click.echo(short if brief else outcome.report())
    click.echo(summary)
    sys.exit(bool(summary.failures))


if __name__ == "__main__":
    main()
