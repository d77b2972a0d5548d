"""The score over many simulated jobs, and that it falls when a rule is taken away.

`python -m tests.diagnosis.campaign` runs more of the same, and prints the table.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from ckptd.coordinator.diagnosis import slowness, windows
from ckptd.coordinator.diagnosis.table import Ints, Table

from .campaign import SHAPES, Case, Score, cases, healthy_hours, score

SEED = 20


def chosen(*words: str, seed: int = SEED, rounds: int = 1) -> Iterator[Case]:
    """Cases whose names have all the words in them."""
    return (case for case in cases(seed, rounds) if all(word in case.name for word in words))


def of(sorts: tuple[str, ...], shape: str, source: str) -> Score:
    return score(c for c in chosen(f" {shape} {source}") if c.name.startswith(sorts))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_fault_is_found_and_nothing_else(shape: str) -> None:
    total = score(chosen(f" {shape} "))
    assert total.precision >= 0.98, f"seed {SEED}\n{total}"
    assert total.recall >= 0.98, f"seed {SEED}\n{total}"


def test_healthy_jobs_are_left_alone() -> None:
    done, restarts, _, slow = healthy_hours(2, SEED)
    assert (done, restarts, slow) == (2, 0, 0)


def test_with_one_group_only_victims_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation: lateness is looked at in data-parallel groups alone."""
    whole = windows.Meter._compare

    def shortsighted(self: windows.Meter, table: Table, share: Ints, known: Ints) -> Ints:
        compared = np.isin(table.group[: table.used], self.position)
        return whole(self, table, np.where(compared, share, 0.0), known)  # type: ignore[arg-type,return-value]

    sorts = ("slow 1.5", "loader")
    assert of(sorts, "tensor", "durations").precision == 1
    monkeypatch.setattr(windows.Meter, "_compare", shortsighted)
    assert of(sorts, "tensor", "durations").precision < 0.5


def test_without_history_a_slow_transfer_is_not_told_from_a_slow_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mutation: transfers are compared with nothing."""
    monkeypatch.setattr(
        slowness.History, "_judge_transfers", lambda *_: ({}, np.zeros(0, np.int64), (0, 0.0, 0.0))
    )
    assert of(("link slow", "node network slow"), "tensor", "durations").recall == 0
