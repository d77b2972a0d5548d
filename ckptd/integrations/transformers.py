"""Snapshots of a `transformers.Trainer`.

::

    from ckptd.integrations.transformers import CkptdCallback, train

    trainer = Trainer(..., callbacks=[CkptdCallback(every=1)])
    train(trainer)  # instead of trainer.train()

The callback takes the snapshots. Going on from one needs `train`: the Trainer decides in which
epoch and at which batch it begins before it calls any callback, and no callback can change that
afterwards. `train` lets the callback find out where the newest snapshot stands; if that is not
where the Trainer is about to begin, it calls `Trainer.train` again, with a `resume_from_checkpoint`
that says no more than this position. All else comes from memory.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ckptd
from ckptd.errors import ConfigError

try:
    from accelerate.state import AcceleratorState, DistributedType
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import TrainOutput
except ImportError as error:
    raise ImportError(
        "ckptd.integrations.transformers needs transformers and accelerate: "
        "pip install 'transformers[torch]'"
    ) from error

from ckptd.integrations.accelerate import unwrapped
from ckptd.integrations.randomness import random_state, set_random_state

_DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
_ATTEMPTS = 3  # one is enough, unless the snapshot is lost meanwhile, and an older one taken


class CkptdCallback(TrainerCallback):
    """Takes a snapshot of what the Trainer trains, at its optimizer steps.

    `every`, `job`, `agent` and `options` are those of `ckptd.Checkpointer`; `extra` adds objects to
    what it captures. A snapshot of step N is taken just before step N + 1 begins, so that the
    evaluation and the log of step N are in it.
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
        self._position = _Position()
        self._loader: Any = None
        self._at_first_step: dict[str, Any] | None = None
        self._resuming = False

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ckpt is not None:  # left over from a training that ended with an error
            self._ckpt.close()
        optimizer = kwargs["optimizer"]
        extra = {
            **self._extra,
            "trainer": self._position,
            "scheduler": kwargs["lr_scheduler"],
        }
        if getattr(optimizer, "scaler", None) is not None:
            extra["scaler"] = optimizer.scaler
        self._loader = kwargs["train_dataloader"]
        self._position.state = state
        options = self._options
        if AcceleratorState().distributed_type in _DDP:  # the wrapper is not among the arguments
            options = {"replicated_over": range(args.world_size), **options}
        self._ckpt = ckptd.Checkpointer(
            model=kwargs["model"], optimizer=unwrapped(optimizer), extra=extra, **options
        )
        step = self._ckpt.resume()
        if step != state.global_step and self._position.loaded:
            self._ckpt.close()
            found = TrainerState(**self._position.loaded["state"])
            raise SnapshotElsewhere(self._ckpt.job, step, found, state.global_step)
        self._resuming = step > 0
        if self._resuming:
            self._at_first_step = random_state()

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._resuming:
            self._position.epoch_random = self._position.loaded["epoch_random"]
            set_random_state(self._position.epoch_random, [self._loader])
            self._resuming = False
        else:
            self._position.epoch_random = random_state([self._loader])

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._at_first_step is not None:
            set_random_state(self._at_first_step)
            self._at_first_step = None
        elif state.global_step and self._ckpt is not None:
            self._position.state = state
            self._ckpt.step(state.global_step)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ckpt is not None:
            self._ckpt.close(finished=state.global_step >= state.max_steps)
            self._ckpt, self._position = None, _Position()


def train(
    trainer: Trainer, resume_from_checkpoint: str | bool | None = None, **options: Any
) -> TrainOutput:
    """`trainer.train()`, from the job's newest snapshot where there is one.

    A `resume_from_checkpoint` of yours counts only as long as the job has no snapshot; a
    `CkptdCallback` must be among the Trainer's callbacks.
    """
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, CkptdCallback)]
    if len(callbacks) != 1:
        raise ConfigError(
            f"the Trainer has {len(callbacks)} callbacks of class CkptdCallback, and needs one: "
            "Trainer(callbacks=[CkptdCallback()])"
        )
    try:
        return trainer.train(resume_from_checkpoint=resume_from_checkpoint, **options)
    except SnapshotElsewhere as found:
        snapshot = found
    for _ in range(_ATTEMPTS):
        with _beginning_at(trainer, snapshot.state) as directory:
            try:
                return trainer.train(resume_from_checkpoint=directory, **options)
            except SnapshotElsewhere as found:
                snapshot = found
    raise snapshot


class SnapshotElsewhere(ConfigError):
    """The snapshot is not of the step from which the Trainer begins."""

    def __init__(self, job: str, step: int, state: TrainerState, begins: int) -> None:
        super().__init__(
            f"job {job} has a snapshot of step {step}, and the Trainer begins after step {begins}, "
            "which a callback cannot change: call ckptd.integrations.transformers.train(trainer) "
            f"instead of trainer.train(), or give the snapshot up with `ckptd rm {job}`"
        )
        self.state = state


class _Position:
    """Where the Trainer stands; what of the snapshot only it can put back stays in `loaded`."""

    def __init__(self) -> None:
        self.state = TrainerState()
        self.epoch_random: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"state": dataclasses.asdict(self.state), "epoch_random": self.epoch_random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


@contextmanager
def _beginning_at(trainer: Trainer, state: TrainerState) -> Iterator[str]:
    """A checkpoint directory with a position and no weights, and a Trainer that is content with it.

    The Trainer's one method that reads weights, and fails where there are none, does nothing
    meanwhile; the optimizer, the scheduler and the random numbers it takes as optional.
    """
    with tempfile.TemporaryDirectory(prefix="ckptd-") as directory:
        state.save_to_json(str(Path(directory) / TRAINER_STATE_NAME))
        trainer._load_from_checkpoint = lambda *_, **__: None
        try:
            yield directory
        finally:
            del trainer._load_from_checkpoint
