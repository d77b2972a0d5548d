"""The first half of seeds 1 to 1000, in parts for several workers; `make sim` runs any seeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .campaign import must_hold

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", range(1, 501, 25))
def test_what_must_hold_holds(first: int) -> None:
    must_hold(range(first, first + 25))


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
