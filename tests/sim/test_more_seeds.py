"""The second half of the seeds: a file of its own, for a worker of its own."""

import pytest

from .campaign import must_hold


@pytest.mark.parametrize("first", range(501, 1001, 25))
def test_what_must_hold_holds(first: int) -> None:
    must_hold(range(first, first + 25))
