"""How far nodes' clocks are off, also when one of them is set."""

import pytest

from ckptd.coordinator.diagnosis.clocks import Clocks


@pytest.mark.parametrize("by_s", [-3600.0, 3600.0, -0.1])
def test_a_clock_that_is_set_is_known_from_its_next_answer(by_s: float) -> None:
    clocks = Clocks()
    for asked in (0.0, 2.0, 4.0):
        clocks.heard("a", asked, asked + 5.0, asked + 0.002)
    assert clocks.offset("a", 5.0).ahead_s == pytest.approx(5.0, abs=0.002)
    clocks.heard("a", 6.0, 6.0 + 5.0 + by_s, 6.02)  # a slower answer than those before
    assert clocks.offset("a", 7.0).ahead_s == pytest.approx(5.0 + by_s, abs=0.02)


def test_a_slow_answer_does_not_hide_a_fast_one() -> None:
    clocks = Clocks()
    clocks.heard("a", 0.0, 5.0005, 0.001)
    clocks.heard("a", 2.0, 7.9, 3.0)
    assert clocks.offset("a", 3.0).ahead_s == pytest.approx(5.0, abs=0.001)
