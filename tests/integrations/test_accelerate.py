"""A loop written with accelerate, killed and started again."""

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from ckptd.errors import ConfigError
from ckptd.integrations.accelerate import checkpointer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


# Eleven batches an epoch, the last one of 2 rows.
@pytest.mark.parametrize(
    ("flags", "die_at"),
    [
        ("--seedable 1", [8, 22]),
        ("--workers 2", [8, 23]),
        ("--accumulate 4 --generator 1", [3, 7]),
    ],
)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(machine, flags, die_at):
    machine.check_story("train_accelerate.py", *flags.split(), die_at=die_at)


def test_so_do_two_ranks(machine):
    machine.check_story("train_accelerate.py", die_at=[4, 9], ranks=2)


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setenv("CKPTD_JOB", "refused")
    monkeypatch.setenv("CKPTD_AGENT", "nowhere")
    model = torch.nn.Linear(2, 1)
    return Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_optimizer_that_is_not_torchs_is_refused(parts):
    accelerator, model, optimizer = parts
    foreign = AcceleratedOptimizer(optimizer)
    foreign.optimizer = object()
    with pytest.raises(ConfigError, match="class object, not a torch"):
        checkpointer(accelerator, model, foreign)


def test_a_step_amid_accumulation_is_refused(parts):
    ckpt = checkpointer(*parts)
    parts[0].gradient_state._set_sync_gradients(False)
    with pytest.raises(ConfigError, match="gradients accumulate"):
        ckpt.step(1)
    parts[0].gradient_state._set_sync_gradients(True)


def test_batches_need_a_loader(parts):
    with pytest.raises(ConfigError, match="dataloader="):
        next(checkpointer(*parts).batches())
