"""Snapshots of a training loop written with `accelerate`.

::

    from ckptd.integrations.accelerate import checkpointer

    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    ckpt = checkpointer(accelerator, model, optimizer, scheduler=scheduler, dataloader=loader)
    step = ckpt.resume()
    for epoch in range(ckpt.epoch, epochs):
        for batch in ckpt.batches():  # instead of: in loader
            with accelerator.accumulate(model):
                ...
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                ckpt.step(step)
    ckpt.close(finished=True)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ckptd.errors import ConfigError

try:
    from accelerate import Accelerator, skip_first_batches
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise ImportError(
        "ckptd.integrations.accelerate needs accelerate: pip install accelerate"
    ) from error

import torch

from ckptd.integrations.randomness import random_state, set_random_state
from ckptd.trainer.checkpointer import Checkpointer


def checkpointer(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    *,
    scheduler: Any = None,
    dataloader: Any = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> "AcceleratedCheckpointer":
    """A Checkpointer for what `accelerator.prepare` has returned.

    `optimizer` and `scheduler`: one, or several by name. `dataloader`: the one whose position is
    kept; iterate over `batches()` then. `extra` and `options` are those of `ckptd.Checkpointer`;
    objects given to `accelerator.register_for_checkpointing` belong into `extra`. A gradient scaler
    is captured, too.
    """
    more = dict(extra or {})
    schedulers = scheduler if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
    more |= {name: each for name, each in schedulers.items() if each is not None}
    if accelerator.scaler is not None:
        more["scaler"] = accelerator.scaler
    optimizers = optimizer if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
    return AcceleratedCheckpointer(
        accelerator,
        dataloader,
        model=getattr(model, "_orig_mod", model),  # DDP around it says what ranks hold alike
        optimizer={name: unwrapped(each) for name, each in optimizers.items()},
        extra=more,
        **options,
    )


class AcceleratedCheckpointer(Checkpointer):
    """A Checkpointer that keeps the position in the data; made by `checkpointer`."""

    def __init__(
        self, accelerator: Accelerator, dataloader: Any, *, extra: Mapping[str, Any], **options: Any
    ) -> None:
        self._accelerator = accelerator
        self._position = _Position(dataloader)
        super().__init__(extra={**extra, "position": self._position}, **options)

    @property
    def epoch(self) -> int:
        """The epoch whose batches come next, from 0."""
        return self._position.epoch

    def batches(self) -> Iterator[Any]:
        """The batches of this epoch, after a resume those that remain; the next epoch follows."""
        return self._position.batches()

    def resume(self) -> int:
        """Like `Checkpointer.resume`; the position is that of the snapshot, too."""
        step = super().resume()
        if step:
            self._position.resume()
        return step

    def step(self, step: int) -> None:
        """Like `Checkpointer.step`; raises ConfigError amid the accumulation of gradients."""
        if not self._accelerator.sync_gradients:
            raise ConfigError(
                "step() was called while gradients accumulate, and they are in no snapshot: call "
                "it, and count, only where accelerator.sync_gradients is true"
            )
        super().step(step)


class _Position:
    """How many batches of which epoch have been given out, and the randomness they came from."""

    def __init__(self, dataloader: Any) -> None:
        self._loader = dataloader
        self.epoch = 0
        self._given = 0
        self._epoch_random: dict[str, Any] = {}
        self._at_first_step: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "given": self._given, "epoch_random": self._epoch_random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._given = state["epoch"], state["given"]
        self._epoch_random = state["epoch_random"]

    def resume(self) -> None:
        """The random numbers are now those of the snapshot; they count once the place is found."""
        self._at_first_step = random_state()

    def batches(self) -> Iterator[Any]:
        if self._loader is None:
            raise ConfigError("batches() needs the data loader: checkpointer(..., dataloader=...)")
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self.epoch)
        loader = self._loader
        if self._at_first_step is not None and self._epoch_random:
            set_random_state(self._epoch_random, [loader])
            loader = skip_first_batches(loader, self._given)
        else:
            self._given, self._epoch_random = 0, random_state([loader])
        for batch in loader:
            self._found()
            self._given += 1
            yield batch
        self._found()
        self.epoch, self._given = self.epoch + 1, 0

    def _found(self) -> None:
        if self._at_first_step is not None:
            set_random_state(self._at_first_step)
            self._at_first_step = None


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps. Raises ConfigError for one that is not torch's."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise ConfigError(
            f"the optimizer is of class {type(inner).__name__}, not a torch.optim.Optimizer: "
            "DeepSpeed and others that keep a state of their own are not supported; use DDP"
        )
    return inner
