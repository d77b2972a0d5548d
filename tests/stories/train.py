"""A trainer for the stories: tiny, deterministic, and it says what it does, one JSON line a step.

The state after a step depends on every bit of the state before it (weights, Adam's moments, the
learning rate, dropout's random numbers, the data's own), so a wrong byte anywhere shows in the
digest of all later steps.
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckptd


class Data:
    """Batches from a random number generator of its own."""

    def __init__(self, seed: int, ballast: object) -> None:
        self.random = random.Random(seed)
        self.ballast = ballast

    def next(self) -> torch.Tensor:
        return torch.tensor([[self.random.random() for _ in range(16)] for _ in range(4)])

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.getstate(), "ballast": self.ballast}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.setstate(state["random"])


def waits_for_ever(ckpt: ckptd.Checkpointer) -> None:
    """A deadlock."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def waits_in_a_pause(ckpt: ckptd.Checkpointer) -> None:
    """A deadlock that looks like an evaluation, but not for ever."""
    with ckpt.pause("evaluation", at_most_s=5.0):
        waits_for_ever(ckpt)


def evaluates(ckpt: ckptd.Checkpointer) -> None:
    """Busy, for as long as the test likes."""
    while os.path.exists(f"{os.environ['FAULTS']}/evaluates"):
        sum(range(10_000))


def dawdles(ckpt: ckptd.Checkpointer) -> None:
    """A bit slower than the others, at each step."""
    time.sleep(0.05)


FAULTS = (waits_in_a_pause, evaluates, dawdles)
"""What a rank does while there is a file of that name in the directory FAULTS, in life 1."""


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
        for value in optimizer.state.get(parameter, {}).values():
            found.update(value.numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--step-s", type=float, default=0.03)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--keep", type=int, default=None)
    parser.add_argument("--unsavable", action="store_true", help="a date among the data's state")
    parser.add_argument("--finish", action="store_true")
    parser.add_argument("--plain", type=int, default=0, help="these ranks, without ckptd")
    parser.add_argument("--ddp", action="store_true", help="the ranks train one model together")
    parser.add_argument("--without", action="store_true", help="without ckptd")
    parser.add_argument("--until", help="all ranks end once this file is there")
    parser.add_argument("--faulty", type=int, default=-1, help="this rank does what FAULTS says")
    parser.add_argument("--every", type=int, default=1, help="steps between snapshots")
    parser.add_argument("--stops-at", type=int, default=0, help="this step stops rank 0, each time")
    parser.add_argument("--unfreeze", type=int, default=0, help="at this step, on rank 1 only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.plain:
        for rank in range(args.plain):
            train(args, rank, 1)
        return
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        init = os.environ.get("INIT", "env://")
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    train(args, rank, world_size)


def train(args: argparse.Namespace, rank: int, world_size: int) -> None:
    torch.manual_seed(0 if args.ddp else rank)
    model: nn.Module = nn.Sequential(
        nn.Linear(16, args.width), nn.BatchNorm1d(args.width), nn.Dropout(0.2),
        nn.Linear(args.width, 1),
    )  # fmt: skip
    last: nn.Parameter = model[3].bias
    if args.ddp:
        torch.manual_seed(rank)
        last.requires_grad_(not args.unfreeze)
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    data = Data(rank, datetime.date.today() if args.unsavable else "x" * 100)

    def say(**fields: Any) -> None:
        print(json.dumps({"rank": rank, **fields}), flush=True)

    start, ckpt = 0, None
    if not args.plain and not args.without:
        extra = {"data": data, "schedule": schedule}
        ckpt = ckptd.Checkpointer(
            model=model,
            optimizer=optimizer,
            extra=extra,
            every=args.every,
            slots=args.slots,
            keep=args.keep,
            resume_timeout_s=args.timeout,
        )
        try:
            start = ckpt.resume()
        except ckptd.errors.CkptdError as error:
            say(event="refused", kind=type(error).__name__, text=str(error))
            sys.exit(3)
    say(event="start", step=start, life=ckpt.life if ckpt else 0, pid=os.getpid())
    for step in range(start, args.steps):
        if args.unfreeze and rank == 1 and step >= args.unfreeze:
            last.requires_grad_()
        if rank == args.faulty and ckpt is not None and ckpt.life == 1:
            for fault in FAULTS:
                if os.path.exists(f"{os.environ['FAULTS']}/{fault.__name__}"):
                    fault(ckpt)
        if rank == 0 and step + 1 == args.stops_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        loss = model(data.next()).square().mean()
        over = torch.tensor(float(bool(args.until) and os.path.exists(args.until)))
        if world_size > 1:
            dist.all_reduce(over)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if ckpt is not None:
            try:
                ckpt.step(step + 1)
            except ckptd.errors.CkptdError as error:
                say(event="refused", kind=type(error).__name__, text=str(error))
                sys.exit(3)
        say(step=step + 1, digest=digest(model, optimizer))
        if over:
            break
        time.sleep(args.step_s)
    if ckpt is not None:
        ckpt.close(finished=args.finish)
    say(event="end")


if __name__ == "__main__":
    main()
