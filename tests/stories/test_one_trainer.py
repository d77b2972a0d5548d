"""One trainer, one agent: what a capture costs in memory, and who hears of one that fails."""

import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from ckptd import Checkpointer
from ckptd.cli.local_cluster import wait_until
from ckptd.errors import CaptureFailure, CkptdError
from ckptd.trainer.client import AgentClient

from .town import JOB, Town

GROWTH_MIB = 64  # the budget in the design


def test_the_trainers_own_memory_hardly_grows(town):
    here = town(1, agent_flags=("--memory-limit", "1GiB"))
    script = Path(__file__).with_name("memory_of_trainer.py")
    trainer = here.spawn(
        "trainer", [sys.executable, str(script)], {"CKPTD_AGENT": str(here.socket("n0"))}
    )
    assert trainer.wait(100) == 0, here.log("trainer")
    # PyTorch's worker server says that it ends after everything else.
    said = [line for line in here.log("trainer").splitlines() if not line.startswith("[")]
    grown, captures = said[-1].split()
    assert int(captures) >= 5
    assert float(grown) < GROWTH_MIB


class Moody:
    """An object in `extra` whose state can be saved, or not."""

    def __init__(self) -> None:
        self.bad = False

    def state_dict(self):
        return {"thing": object() if self.bad else 1}

    def load_state_dict(self, state):
        pass


def begin(town: Town, strict: bool):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moody = Moody()
    ckpt = Checkpointer(
        model=model,
        optimizer=optimizer,
        extra={"moody": moody},
        job=JOB,
        agent=str(town.socket("n0")),
        strict=strict,
    )
    ckpt.resume()
    return ckpt, moody


def step_until(ckpt: Checkpointer, steps, what: str, check) -> None:
    """Go on with steps until `check()`."""

    def one_more():
        ckpt.step(next(steps))
        return check() or None

    wait_until(what, one_more)


def test_a_capture_that_fails_costs_a_snapshot_not_the_training(town, caplog):
    ckpt, moody = begin(town(1), strict=False)
    with ckpt:
        steps = count(1)
        step_until(ckpt, steps, "a snapshot", lambda: ckpt.stats.sealed)
        moody.bad = True
        step_until(ckpt, steps, "a warning", lambda: "['moody']['thing']" in caplog.text)
        for _ in range(20):
            ckpt.step(next(steps))
        assert caplog.text.count("['moody']") == 1, "said once, not at every step"
        moody.bad = False
        sealed = ckpt.stats.sealed
        step_until(ckpt, steps, "another snapshot", lambda: ckpt.stats.sealed > sealed)


def test_a_capture_that_fails_is_raised_if_strict(town):
    ckpt, moody = begin(town(1), strict=True)
    with ckpt:
        steps = count(1)
        step_until(ckpt, steps, "a snapshot", lambda: ckpt.stats.sealed)
        moody.bad = True
        with pytest.raises(CaptureFailure, match="moody"):
            step_until(ckpt, steps, "an error", lambda: False)
        moody.bad = False
        sealed = ckpt.stats.sealed
        step_until(ckpt, steps, "another snapshot", lambda: ckpt.stats.sealed > sealed)


def test_a_segment_that_is_damaged_after_its_agent_looked_is_not_taken(town, monkeypatch):
    here = town(1)
    ckpt, _ = begin(here, strict=True)
    with ckpt:
        step_until(ckpt, count(1), "a snapshot", lambda: ckpt.stats.sealed)
    asked = AgentClient.restore
    damaged: list[Path] = []

    def flip(path):
        with path.open("r+b") as file:
            file.seek(-1, 2)
            (last,) = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    def restore(self, *args):
        """It is damaged the first time."""
        path = Path(asked(self, *args))
        if not damaged:
            flip(path)
            damaged.append(path)
        return str(path)

    def mend_and_restore(self, *args):
        for path in damaged:
            flip(path)
        return restore(self, *args)

    monkeypatch.setattr(AgentClient, "restore", restore)
    with pytest.raises(CkptdError, match="could not be loaded"):
        begin(here, strict=True)  # the agent finds it, too, when it is asked once more
    flip(damaged.pop())
    monkeypatch.setattr(AgentClient, "restore", mend_and_restore)
    ckpt, _ = begin(here, strict=True)
    with ckpt:
        assert damaged, "it was asked twice"
        assert ckpt.life > 1
