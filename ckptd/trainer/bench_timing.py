"""A rank of `ckptd bench timing`: `python -m ckptd.trainer.bench_timing WIDTH LAYERS STORE`.

Rank 0 is told, a line of JSON at a time, what source to have and how many steps to train, and
answers with how long each took. All ranks switch together, in one process: what differs between
two blocks is the source.
"""

import json
import sys
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckptd.config import watch_config
from ckptd.trainer.timing import Timing
from ckptd.trainer.worker_server import Shown, start

_BATCH = 64
_BUCKET_MIB = 1.0
"""Small, so that a step has several collectives, as that of a large model has."""


class _Training:
    def __init__(self, width: int, layers: int) -> None:
        torch.manual_seed(0)
        made: list[nn.Module] = []
        for _ in range(layers):
            made += [nn.Linear(width, width), nn.ReLU()]
        self.model = DistributedDataParallel(nn.Sequential(*made), bucket_cap_mb=_BUCKET_MIB)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._batch = torch.randn(_BATCH, width)

    def step_s(self) -> float:
        began = perf_counter()
        loss = self.model(self._batch).square().mean()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return perf_counter() - began


def main(arguments: Sequence[str]) -> None:
    """Train what rank 0 is told to, until it is told nothing more."""
    torch.set_num_threads(1)
    config = watch_config()
    shown = start(config)
    if shown is None:
        raise SystemExit("this trainer cannot show itself")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments[2]}",
        rank=config.rank,
        world_size=config.world_size,
    )
    training = _Training(int(arguments[0]), int(arguments[1]))
    while True:
        timed, steps = _agree(config.rank)
        if not steps:
            break
        told = _block(training, shown, timed, steps)
        if config.rank == 0:
            print(json.dumps(told), flush=True)
    dist.destroy_process_group()
    shown.close()


def _agree(rank: int) -> tuple[bool, int]:
    """Whether to time, and how many steps; 0: the end."""
    order = torch.zeros(2, dtype=torch.int64)
    if rank == 0:
        line = sys.stdin.readline()
        told = json.loads(line) if line else {"timed": False, "steps": 0}
        order[0], order[1] = int(told["timed"]), told["steps"]
    dist.broadcast(order, 0)
    return bool(order[0]), int(order[1])


def _block(
    training: _Training, shown: Shown, timed: bool, steps: int
) -> dict[str, float | list[float]]:
    timing = Timing(shown) if timed else None
    if timing is not None:
        shown.introduce(ring=str(shown.ring_path()))
    training.step_s()
    before = _collectives()
    cpu_s = process_time()
    taken = [training.step_s() for _ in range(steps)]
    cpu_s = process_time() - cpu_s
    after = _collectives()
    if timing is not None:
        timing.stop()
        shown.introduce(ring="")
    return {"steps_s": taken, "cpu_s": cpu_s / steps, "collectives": (after - before) / steps}


def _collectives() -> int:
    """How many there have been so far."""
    world: Any = dist.group.WORLD
    return int(world._get_sequence_number_for_group())


if __name__ == "__main__":
    main(sys.argv[1:])
