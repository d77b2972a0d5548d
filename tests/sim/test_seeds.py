"""A short campaign, in parts so that several workers can share it; `make sim` runs longer ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .campaign import live_through

ROOT = Path(__file__).parents[2]
PARTS, SEEDS_OF_A_PART = 20, 10


@pytest.mark.parametrize("part", range(PARTS))
def test_what_must_hold_holds(part: int) -> None:
    first = 1 + part * SEEDS_OF_A_PART
    outcomes = [live_through(seed) for seed in range(first, first + SEEDS_OF_A_PART)]
    failed = [outcome for outcome in outcomes if outcome.failure]
    assert not failed, "\n\n".join(outcome.report() for outcome in failed)


def test_a_seed_tells_the_same_story_again() -> None:
    """Whatever order sets have in this process, and whenever it runs."""
    stories = [
        subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "6", "--story"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert len(stories[0].splitlines()) > 500
    assert stories[0] == stories[1]
