"""Lightning's Trainer, killed and started again."""

import pytest

pytest.importorskip("lightning")

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

from ckptd.errors import ConfigError
from ckptd.integrations.lightning import CkptdCallback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = "train_lightning.py"


# Ten batches an epoch; the first snapshot is of the middle of one, the second of an end.
@pytest.mark.parametrize(
    ("flags", "die_at"),
    [
        ("--validate-every 4", [9, 21]),
        ("--two 1", [9, 21]),
        ("--accumulate 2 --generator 1", [7, 12]),
        ("--workers 2", [9, 21]),
        ("--stateful 1", [9, 21]),
    ],
)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(machine, flags, die_at):
    machine.check_story(SCRIPT, *flags.split(), die_at=die_at)


def test_so_do_two_ranks(machine):
    machine.check_story(SCRIPT, "--devices", "2", die_at=[4, 7], ranks=2)


def test_a_checkpoint_file_and_a_snapshot_are_one_too_many(machine):
    machine.run(SCRIPT, "--die-at", "9", fails=True)
    refused = machine.event(machine.run(SCRIPT, "--from-file", "1", fails=True), "refused")
    assert refused["kind"] == "ConfigError"
    assert "leave that out" in refused["text"]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 2))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FetchesByItself(Module):
    def training_step(self, dataloader_iter):
        return self.layer(next(dataloader_iter)[0]).sum()


class Unknown(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize(
    ("module", "options", "text"),
    [
        (Module, {"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging"),
        (Module, {"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging"),
        (Module, {"strategy": Unknown("cpu")}, "strategy Unknown"),
        (FetchesByItself, {}, "dataloader_iter"),
    ],
)
def test_what_would_come_back_wrong_is_refused(module, options, text, tmp_path):
    callbacks = [
        *options.get("callbacks", []),
        CkptdCallback(job="refused", agent="nowhere", resume_timeout_s=1),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **{**options, "callbacks": callbacks},
    )
    with pytest.raises(ConfigError, match=text):
        trainer.fit(module())
