"""A small network, trained by Lightning."""

import tempfile

import torch
from diary import end_of_step, numbers, parse_args, say
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from ckptd.errors import CkptdError
from ckptd.integrations.lightning import CkptdCallback


class Module(LightningModule):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.rows = numbers(60, 8, seed=0)
        self.first = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.last = nn.Linear(16, 1)

    def loss(self, batch):
        return (self.last(self.first(batch[0])) - batch[0].sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch) + torch.rand(()) / 100)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": plateau,
                "monitor": "val",
                "interval": "epoch",
            },
        }

    def train_dataloader(self):
        if self.args.stateful:
            return Counting(self.rows)
        dataset, _ = random_split(TensorDataset(self.rows), [50, 10])
        generator = torch.Generator().manual_seed(9) if self.args.generator else None
        return DataLoader(
            dataset, 5, shuffle=True, generator=generator, num_workers=self.args.workers
        )

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.rows), 20)


class TwoOptimizers(Module):
    def __init__(self, args):
        super().__init__(args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.AdamW(self.first.parameters(), lr=1e-2)
        last = torch.optim.SGD(self.last.parameters(), lr=1e-2, momentum=0.9)
        return [first, last], [torch.optim.lr_scheduler.StepLR(first, 3, 0.9)]


class Counting:
    """A data loader that keeps its place by itself: how many batches it has ever given."""

    def __init__(self, rows):
        self.rows, self.given = rows, 0

    def __len__(self):
        return 10

    def __iter__(self):
        while True:
            self.given += 1
            begin = self.given * 5 % len(self.rows)
            yield [self.rows[begin : begin + 5]]
            if self.given % 10 == 0:
                return

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class Diary(Callback):
    def __init__(self, args):
        self.args, self.step, self.begun, self.seen = args, 0, False, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not self.begun:
            self.begun, self.seen = True, trainer.global_step
            self.step = self.seen // len(trainer.optimizers)
            say(event="start", step=self.step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step != self.seen:
            self.step, self.seen = self.step + 1, trainer.global_step
            more = (
                [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs],
                (trainer.current_epoch, batch_idx, trainer.is_last_batch),
                trainer.fit_loop.epoch_loop._batches_that_stepped,
            )
            end_of_step(self.args, self.step, module, trainer.optimizers, more)


class Values(Callback):
    """What the validations found; the list is state that a snapshot must bring back."""

    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.found.append(float(trainer.callback_metrics["val"]))

    def state_dict(self):
        return {"found": list(self.found)}

    def load_state_dict(self, state):
        self.found = state["found"]


def checkpoint_file(folder, args):
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    trainer.fit(Module(args))
    trainer.save_checkpoint(f"{folder}/one.ckpt")
    return f"{folder}/one.ckpt"


def main():
    args = parse_args(
        two=0,
        stateful=0,
        generator=0,
        workers=0,
        accumulate=1,
        devices=1,
        validate_every=0,
        from_file=0,
    )
    torch.set_num_threads(1)
    seed_everything(3, workers=True)
    values = Values()
    callbacks = [Diary(args), values, EarlyStopping("val", patience=100)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=args.devices,
            strategy="ddp" if args.devices > 1 else "auto",
            max_epochs=3,
            accumulate_grad_batches=args.accumulate,
            val_check_interval=args.validate_every or None,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            callbacks=callbacks if args.plain else [*callbacks, CkptdCallback(every=1)],
        )
        try:
            file = checkpoint_file(folder, args) if args.from_file else None
            trainer.fit(TwoOptimizers(args) if args.two else Module(args), ckpt_path=file)
        except CkptdError as error:
            say(event="refused", kind=type(error).__name__, text=str(error))
            raise
    say(event="end", epoch=trainer.current_epoch, steps=trainer.global_step, found=values.found)


if __name__ == "__main__":
    main()
