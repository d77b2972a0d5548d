"""Trainers that are stopped in mid-capture, and wake up when the next life has long begun."""

import signal
from collections.abc import Callable

import pytest

from ckptd.ids import SnapshotId

from .fleet import JOB, Fleet


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_it_ends_its_capture_and_nothing_of_it_counts(fleet: Callable[..., Fleet]) -> None:
    here = fleet(2)
    here.train()
    here.wait_for_start()
    here.wait_for_protected()
    here.hold.touch()
    torn = SnapshotId(JOB, 1, here.wait_for("held")["step"])
    old = here.ranks
    here.kill(old, signal.SIGSTOP)

    here.train()
    began = here.wait_for_start()
    assert began is not None
    assert began < torn
    here.wait_for_protected(SnapshotId(JOB, 2, 0))

    here.kill(old, signal.SIGCONT)
    here.wait("it to be told", lambda: "was started again: life 2 runs" in here.log(old))
    here.wait("its capture to end", lambda: f'"sealed", "step": {torn.step}}}' in here.log(old))
    newest = here.wait_for_protected()
    for _ in range(3):
        newest = here.wait_for_protected(newest)
        assert newest.life == here.job(JOB)["life"] == 2
        assert torn not in here.snapshots("sealed") + here.snapshots("protected")

    here.kill(old)
    newest = here.rest()
    assert newest.life == 2
    here.train()
    assert here.wait_for_start() == newest  # every byte is as the new life captured it
