"""What the trainers beside this file have in common: they keep a diary, and die when told to."""

import argparse
import hashlib
import json
import os
import signal
import time

import torch


def parse_args(**more):
    """The flags that every trainer has, and `more`, each an integer with this default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="without ckptd")
    parser.add_argument("--die-at", type=int, default=0, help="the step after which to be killed")
    parser.add_argument("--step-s", type=float, default=0.05, help="how long to sleep in a step")
    for name, default in more.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    return parser.parse_args()


def say(**fields):
    """Write a line into the file that the test reads."""
    line = json.dumps({"rank": int(os.environ.get("LOCAL_RANK", "0")), **fields}) + "\n"
    with open(os.environ["DIARY"], "a", encoding="utf-8") as file:
        file.write(line)


def end_of_step(args, step, model, optimizers, *more):
    """Say what this step has come to, and die if it is the time."""
    found = hashlib.sha256(repr(more).encode())
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
        for optimizer in optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                found.update(value.numpy().tobytes())
    say(step=step, digest=found.hexdigest()[:16])
    if step == args.die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0 if args.plain else args.step_s)


def numbers(count, width, seed):
    """Random rows, the same in each run."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
