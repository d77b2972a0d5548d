"""Random number states beyond what a Checkpointer keeps: those that an epoch's order comes from.

Going on in the middle of an epoch takes two states. The order of the batches was drawn at the
epoch's start, so that state comes first, and the batches before the snapshot are passed over. What
a training step then draws, dropout for one, goes on from the state of the snapshot itself.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch


def random_state(loaders: Iterable[object] = ()) -> dict[str, Any]:
    """States of Python, NumPy, torch, and of the generators that these data loaders draw from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "loaders": {path: generator.get_state() for path, generator in _generators(loaders)},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], loaders: Iterable[object] = ()) -> None:
    """Undo `random_state`; a generator that the state does not know is left alone."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for path, generator in _generators(loaders):
        if path in state["loaders"]:
            generator.set_state(state["loaders"][path])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _generators(loaders: Iterable[object]) -> Iterator[tuple[str, torch.Generator]]:
    for number, loader in enumerate(loaders):
        yield from _of(loader, str(number))


def _of(thing: object, path: str) -> Iterator[tuple[str, torch.Generator]]:
    if isinstance(thing, torch.Generator):
        yield path, thing
    elif thing is not None:
        for name in ("generator", "sampler", "batch_sampler"):
            yield from _of(getattr(thing, name, None), f"{path}.{name}")
