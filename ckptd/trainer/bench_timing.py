"""A rank of `ckptd bench timing`: `python -m ckptd.trainer.bench_timing WIDTH LAYERS RATE STORE`.

Rank 0 is told, a line of JSON at a time, what source to have and how many steps to train, and
answers with how long each took. All ranks switch together, in one process: what differs between
two blocks is the source. Between steps they rest, so that there are RATE collectives a second.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckptd.config import watch_config
from ckptd.trainer.timing import Timing
from ckptd.trainer.worker_server import Shown, start

_BATCH = 64
_BUCKET_MIB = 0.05
"""Small, so that a step has many collectives, as that of a large model has."""
_TASKS = Path("/proc/self/task")


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
    before = _threads()
    shown = start(config)
    if shown is None:
        raise SystemExit("this trainer cannot show itself")
    watching = _threads() - before
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments[3]}",
        rank=config.rank,
        world_size=config.world_size,
    )
    training = _Training(int(arguments[0]), int(arguments[1]))
    while True:
        timed, steps = _agree(config.rank)
        if not steps:
            break
        told = _block(training, shown, watching, timed, steps, float(arguments[2]))
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
    training: _Training, shown: Shown, watching: set[str], timed: bool, steps: int, rate: float
) -> dict[str, float | list[float]]:
    timing = Timing(shown) if timed else None
    if timing is not None:
        shown.introduce(ring=str(shown.ring_path()))
    training.step_s()  # buckets are arranged anew after it
    before = _collectives()
    training.step_s()
    collectives = _collectives() - before
    cpu_s, watching_s, began = process_time(), _cpu_s(watching), perf_counter()
    taken = []
    for number in range(1, steps + 1):
        taken.append(training.step_s())
        sleep(max(0.0, began + number * collectives / rate - perf_counter()))
    seconds = perf_counter() - began
    cpu_s, watching_s = process_time() - cpu_s, _cpu_s(watching) - watching_s
    if timing is not None:
        timing.stop()
        shown.introduce(ring="")
    return {
        "steps_s": taken,
        "seconds": seconds,
        "cpu_s": cpu_s / steps,
        "watching_s": watching_s,
        "collectives": collectives,
    }


def _threads() -> set[str]:
    return {path.name for path in _TASKS.iterdir()}


def _cpu_s(threads: set[str]) -> float:
    """What these threads of this process have used of a processor so far."""
    return sum(int((_TASKS / each / "schedstat").read_text().split()[0]) for each in threads) / 1e9


def _collectives() -> int:
    """How many there have been so far."""
    world: Any = dist.group.WORLD
    return int(world._get_sequence_number_for_group())


if __name__ == "__main__":
    main(sys.argv[1:])
