"""Each planted bug is found within a bounded number of seeds: what the simulator is worth."""

import pytest

from .campaign import live_through
from .planted import BUGS

SEEDS = range(1, 81)


@pytest.mark.parametrize("name", BUGS)
def test_it_is_found(name: str) -> None:
    bug = BUGS[name]
    with bug.at_work():
        for seed in SEEDS:
            kinds = bug.coordinator, bug.lifecycle
            if live_through(seed, *kinds, plan=bug.plan(seed)).failure:
                return
    pytest.fail(f"a coordinator or agent that {bug.says} lives through {len(SEEDS)} seeds")
