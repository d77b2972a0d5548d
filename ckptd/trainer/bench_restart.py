"""A rank of `ckptd bench restart`: trains until it is killed, and says when it had come how far.

With `--file` it saves to disk and loads from there with `torch.save` and `torch.load`; otherwise it
has a Checkpointer. Each line is JSON, written whole: ranks share their launcher's output.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def say(**fields: Any) -> None:
    line = {"rank": int(os.environ["RANK"]), "pid": os.getpid(), "at": time.time(), **fields}
    os.write(1, json.dumps(line).encode() + b"\n")


def process_began_at() -> float:
    """To a hundredth of a second, which psutil's is not."""
    ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--step-seconds", type=float, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()

    # Here, not above: what importing takes is a part of what is measured.
    import torch
    import torch.distributed as dist
    from torch import nn

    if args.file is None:
        from ckptd import Checkpointer
    torch.set_num_threads(1)
    layers = [nn.Linear(args.width, args.width) for _ in range(args.layers)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    imported_at = time.time()
    dist.init_process_group("gloo")
    grouped_at = time.time()

    start = 0
    if args.file is None:
        checkpointer = Checkpointer(model=model, optimizer=optimizer, every=args.every)
        start = checkpointer.resume()
    elif args.file.exists():
        saved = torch.load(args.file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    restored_at = time.time()

    batch = torch.ones(4, args.width)
    for step in range(start + 1, 1_000_000):
        model(batch).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        if args.file is None:
            checkpointer.step(step)
        elif dist.get_rank() == 0 and step % args.every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            fresh = args.file.with_suffix(".new")
            with fresh.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(args.file)
        if step == start + 1:
            say(
                event="start",
                step=step,
                process_began_at=process_began_at(),
                imported_at=imported_at,
                grouped_at=grouped_at,
                restored_at=restored_at,
            )
        elif dist.get_rank() == 0:
            say(step=step)
        time.sleep(args.step_seconds)


if __name__ == "__main__":
    main()
