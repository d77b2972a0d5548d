"""Snapshots of a `lightning.Trainer`.

::

    from ckptd.integrations.lightning import CkptdCallback

    trainer = Trainer(..., callbacks=[CkptdCallback(every=1)])
    trainer.fit(module, loader)

Restored are module, optimizers, schedulers, precision, loops, the states of the other callbacks and
of the data module, random numbers, and the position in the data: the batches of the epoch that were
already trained on are fetched again and passed over. Averages over an epoch are not: what
`self.log(on_epoch=True)` and metrics collect begins anew at the step of the snapshot.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import ckptd
from ckptd.errors import ConfigError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
    from lightning.pytorch.strategies import (
        DDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
    )
except ImportError as error:
    raise ImportError(
        "ckptd.integrations.lightning needs lightning: pip install lightning"
    ) from error

from ckptd.integrations.randomness import random_state, set_random_state

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


class CkptdCallback(Callback):
    """Takes a snapshot at the steps of the optimizers, and goes on from the newest one.

    `every`, `job`, `agent` and `options` are those of `ckptd.Checkpointer`; `extra` adds objects to
    what it captures. A step is a batch at which an optimizer stepped, so with several optimizers it
    is not Lightning's `global_step`, which counts each of them. A snapshot is taken just before the
    next batch begins, so that the validation that came between is in it.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        job: str | None = None,
        agent: str | None = None,
        extra: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._options = {"every": every, "job": job, "agent": agent, **options}
        self._extra = dict(extra or {})
        self._ckpt: ckptd.Checkpointer | None = None
        self._fit: _Fit | None = None
        self._step = 0
        self._at_first_step: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_supported(trainer, pl_module)
        self._fit = fit = _Fit(trainer, self)
        self._ckpt = ckptd.Checkpointer(
            model=trainer.model,
            optimizer=_named(trainer.optimizers),
            extra={**self._extra, "lightning": fit},
            **self._options,
        )
        self._step = self._ckpt.resume()
        self._at_first_step = None
        if self._step:
            if trainer.ckpt_path:
                job = self._ckpt.job
                raise ConfigError(
                    f"fit() was given ckpt_path={trainer.ckpt_path!r}, but job {job} has a "
                    f"snapshot of step {self._step}: leave that out, or give the snapshot up with "
                    f"`ckptd rm {job}`"
                )
            self._at_first_step = random_state()
            # The data loaders are made after this, and may split or shuffle at random.
            set_random_state(fit.restore())
        fit.fit_random = random_state()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None:
            self._fit.check_loaders()
            if self._at_first_step is not None:
                self._fit.find_position()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None and trainer.current_epoch > 0:
            self._fit.epoch_random = random_state(_loaders(trainer))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._fit is None or self._ckpt is None:
            return
        if self._at_first_step is not None:
            self._fit.settle()
            set_random_state(self._at_first_step)
            self._at_first_step = None
        elif trainer.global_step != self._fit.global_step:
            self._fit.global_step = trainer.global_step
            self._step += 1
            self._ckpt.step(self._step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._fit is not None:  # the next snapshot is taken after the next batch is fetched
            self._fit.loader_states = trainer.fit_loop.on_save_checkpoint().get("combined_loader")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ckpt is not None:  # some callbacks swap weights for a validation
            self._ckpt.gate()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Stopped early, by time for instance, a training may want to go on: keep its snapshot.
        self._close(finished=not trainer.should_stop)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close(finished=False)

    def _close(self, finished: bool) -> None:
        if self._ckpt is not None:
            self._ckpt.close(finished)
        self._ckpt = self._fit = None


class _Fit:
    """What a fit consists of besides the module and the optimizers' tensors."""

    def __init__(self, trainer: Trainer, owner: Callback) -> None:
        self._trainer, self._owner = trainer, owner
        self._loaded: dict[str, Any] = {}
        self.global_step = 0
        self.loader_states: list[Any] | None = None  # of loaders that keep a state of their own
        self.fit_random: dict[str, Any] = {}
        self.epoch_random: dict[str, Any] | None = None  # None in the first epoch: it is the fit's

    def state_dict(self) -> dict[str, Any]:
        loops = self._trainer.fit_loop.state_dict()
        loops["state_dict"] = {}
        if self.loader_states is not None:
            loops["state_dict"] = {"combined_loader": self.loader_states}
        return {
            "loops": loops,
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
            "fit_random": self.fit_random,
            "epoch_random": self.epoch_random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state  # nothing is touched before all ranks have loaded theirs

    def restore(self) -> dict[str, Any]:
        """Put back all but the position in the data; returns the random state of the start."""
        for name, part in self._parts().items():
            if name in self._loaded["parts"]:
                part.load_state_dict(self._loaded["parts"][name])
        self._trainer.fit_loop.load_state_dict(self._loaded["loops"])
        self.global_step = self._trainer.global_step
        self.epoch_random = self._loaded["epoch_random"]
        random: dict[str, Any] = self._loaded["fit_random"]
        return random

    def check_loaders(self) -> None:
        """Raise ConfigError where some data loaders keep a state, and others do not."""
        states = self._trainer.fit_loop.on_save_checkpoint().get("combined_loader", [])
        loaders = _loaders(self._trainer)
        if 0 < len(states) < len(loaders):
            raise ConfigError(
                f"{len(states)} of {len(loaders)} data loaders have state_dict() and "
                "load_state_dict(), and their positions would part: give them to all, or to none"
            )

    def find_position(self) -> None:
        """Pass over what the epoch has already trained on; Lightning does not."""
        if self._loaded["loops"]["state_dict"]:
            return  # the loaders have done it by themselves
        fetcher = self._trainer.fit_loop._data_fetcher
        if self.epoch_random is not None:
            for loader in _loaders(self._trainer):
                _set_epoch(loader, self._trainer.current_epoch)
            set_random_state(self.epoch_random, _loaders(self._trainer))
            iter(fetcher)
        batches = self._trainer.fit_loop.epoch_loop.batch_progress.current.completed
        for _ in range(batches):
            next(fetcher)
        fetcher.fetched = max(0, fetcher.fetched - batches)  # Lightning adds them
        if fetcher.length is not None:  # else it has fetched one ahead by itself
            # Some samplers draw their order with the first batch: now, not after a validation loop
            # has been made ready.
            fetcher.iterator = _with_first(next(fetcher.iterator), fetcher.iterator)

    def settle(self) -> None:
        """Lightning adds a step to its logs, or not, by a guess at which hook saved the state."""
        loop = self._trainer.fit_loop.epoch_loop
        loop.on_load_checkpoint(self._loaded["loops"]["epoch_loop.state_dict"])

    def _parts(self) -> dict[str, Any]:
        trainer = self._trainer
        parts = {f"callback {c.state_key}": c for c in trainer.callbacks if c is not self._owner}
        for number, config in enumerate(trainer.lr_scheduler_configs):
            parts[f"scheduler {number}"] = config.scheduler
        parts["precision"] = trainer.precision_plugin
        if trainer.datamodule is not None:
            parts["datamodule"] = trainer.datamodule
        return parts


def _check_supported(trainer: Trainer, module: LightningModule) -> None:
    """Raise ConfigError for what would come back wrong, or not at all."""
    name = type(trainer.strategy).__name__
    if type(trainer.strategy) not in _STRATEGIES:
        known = ", ".join(strategy.__name__ for strategy in _STRATEGIES)
        raise ConfigError(f"the strategy {name} is not supported by ckptd; use one of {known}")
    for callback in trainer.callbacks:
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ConfigError(
                f"the callback {type(callback).__name__} keeps weights that ckptd would lose; keep "
                "the average in the module (a submodule or buffers), or train without ckptd"
            )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ConfigError(
            "training_step(dataloader_iter) fetches batches by itself, so that their position is "
            "not known; take (batch, batch_idx), or train without ckptd"
        )


def _named(optimizers: list[Any]) -> dict[str, Any]:
    if len(optimizers) == 1:
        return {"optimizer": optimizers[0]}
    return {f"optimizer{number}": optimizer for number, optimizer in enumerate(optimizers)}


def _loaders(trainer: Trainer) -> list[Any]:
    loaders: list[Any] = trainer.fit_loop._data_fetcher.combined_loader.flattened
    return loaders


def _with_first(first: Any, others: Iterator[Any]) -> Iterator[Any]:
    """`first`, then `others`, on which iter() is not called: that would begin them anew."""
    yield first
    while True:
        try:
            other = next(others)
        except StopIteration:
            return
        yield other


def _set_epoch(loader: Any, epoch: int) -> None:
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        sampler: Any = getattr(owner, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
