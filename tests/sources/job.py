"""Real gloo ranks for the tests of the sources: imports torch once, and forks the ranks.

    python job.py MODE RANKS DIRECTORY

Each rank writes what it has to say to DIRECTORY/RANK.json, and goes on until DIRECTORY/stop is
there. CKPTD_AGENT says where the watcher of the test looks.
"""

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ckptd.config import watch_config
from ckptd.trainer import timing, worker_server

STEPS = 5


class Rank:
    """What a rank knows."""

    def __init__(self, number: int, ranks: int, directory: Path) -> None:
        self.number, self.ranks, self.directory = number, ranks, directory

    def say(self, **fields: Any) -> None:
        path = self.directory / f"{self.number}.json"
        path.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), **fields}))
        path.with_suffix(".new").rename(path)

    def is_over(self) -> bool:
        return (self.directory / "stop").exists()

    def agreed_over(self) -> bool:
        """All ranks leave the loop together."""
        flag = torch.tensor(int(self.is_over()))
        dist.all_reduce(flag)
        return bool(flag)


def mixed(rank: Rank) -> None:
    """All kinds of collectives, over the world and over a pair of ranks, again and again."""
    pair = dist.new_group([0, 1], group_desc="tp")
    data, out = torch.ones(300), torch.empty(300 * rank.ranks)
    while not rank.agreed_over():
        dist.all_reduce(data)
        dist.broadcast(data, 0)
        dist.all_gather_single(out, data)
        dist.reduce_scatter_single(data, out)
        dist.barrier()
        if rank.number < 2:
            dist.all_reduce(torch.ones(5), group=pair)
        time.sleep(0.02)


def late(rank: Rank) -> None:
    """Rank 1 comes last, each time."""
    while not rank.agreed_over():
        time.sleep(0.05 * rank.number)
        dist.all_reduce(torch.ones(3))


def overlaps(rank: Rank) -> None:
    """Rank 1 waits for what rank 0 sends, which waits only when it has done something else."""
    while not rank.agreed_over():
        if rank.number == 0:
            time.sleep(0.05)
            work = dist.isend(torch.ones(3), 1)
            time.sleep(0.05)
            work.wait()
        else:
            dist.recv(torch.empty(3), 0)


def falls_asleep(rank: Rank) -> None:
    while not rank.is_over():
        time.sleep(0.05)


def asleep(rank: Rank) -> None:
    """The last rank sleeps, after a few steps, and the others wait for it."""
    for _ in range(STEPS):
        dist.all_reduce(torch.ones(3))
    if rank.number == rank.ranks - 1:
        falls_asleep(rank)
    dist.all_reduce(torch.ones(3))


def deadlocks_here() -> None:
    import threading

    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def deadlock(rank: Rank) -> None:
    """Rank 0 deadlocks with itself."""
    dist.all_reduce(torch.ones(3))
    if rank.number == 0:
        deadlocks_here()
    dist.all_reduce(torch.ones(3))


def computes(rank: Rank) -> None:
    """Rank 0 evaluates, or the like, for long; the others wait for it."""
    dist.all_reduce(torch.ones(3))
    if rank.number == 0:
        while not rank.is_over():
            sum(range(1000))
    dist.all_reduce(torch.ones(3))


def holds_the_lock(rank: Rank) -> None:
    """Rank 0 is in C code that holds the interpreter lock; the others wait for it."""
    for _ in range(STEPS):
        dist.all_reduce(torch.ones(3))
    time.sleep(1.0)  # its groups are published
    if rank.number == 0:
        os.mkfifo(rank.directory / "pipe")
        rank.say(holds=True)
        # Until somebody opens it to write. PyDLL, unlike CDLL, keeps the lock.
        ctypes.PyDLL(None).open(str(rank.directory / "pipe").encode(), os.O_RDONLY)
    dist.all_reduce(torch.ones(3))


def hurries(rank: Rank) -> None:
    """More collectives than a small recorder can hold."""
    while not rank.agreed_over():
        for _ in range(200):
            dist.all_reduce(torch.ones(3))


def again(rank: Rank) -> None:
    """The process group is destroyed, and made anew under the same name."""
    for _ in range(20):
        dist.all_reduce(torch.ones(3))
    time.sleep(1.0)
    dist.destroy_process_group()
    _init(rank, "again")
    for _ in range(5):
        dist.all_reduce(torch.ones(7))


def trains(rank: Rank) -> None:
    """DDP, FSDP2 and point-to-point; says a digest of what came out, to the last bit."""
    torch.manual_seed(0)
    replicated = nn.Sequential(nn.Linear(10, 37), nn.ReLU(), nn.Linear(37, 3))
    sharded = nn.Sequential(nn.Linear(10, 37), nn.ReLU(), nn.Linear(37, 4))
    ddp = DistributedDataParallel(replicated)
    fully_shard(sharded[0])
    fully_shard(sharded[2])
    fully_shard(sharded)
    found = hashlib.sha256()
    optimizer = torch.optim.AdamW([*ddp.parameters(), *sharded.parameters()], foreach=False)
    torch.manual_seed(rank.number)
    for _ in range(STEPS):
        x = torch.randn(6, 10)
        (ddp(x).square().mean() + sharded(x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        message = torch.full((50,), float(rank.number))
        if rank.number == 0:
            dist.send(x.flatten(), 1)
        elif rank.number == 1:
            got = torch.empty(60)
            dist.recv(got, 0)
            found.update(got.numpy().tobytes())
        right, left = (rank.number + 1) % rank.ranks, (rank.number - 1) % rank.ranks
        taken = torch.empty(50)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, message, right), dist.P2POp(dist.irecv, taken, left)]
        )
        for work in works:
            work.wait()
        found.update(taken.numpy().tobytes())
    for parameter in ddp.parameters():
        found.update(parameter.detach().numpy().tobytes())
    for parameter in sharded.parameters():
        found.update(parameter.to_local().detach().numpy().tobytes())
    rank.say(digest=found.hexdigest())


def _init(rank: Rank, name: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rank.directory}/{name}",
        rank=rank.number,
        world_size=rank.ranks,
    )


def run(mode: Callable[[Rank], None], rank: Rank) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank.number), str(rank.ranks)
    config = watch_config()
    shown = worker_server.start(config)
    if os.environ.get("CKPTD_TEST_NO_RING") and shown is not None:
        shown.ring_path = lambda: Path("/nowhere/ring")  # type: ignore[method-assign]
    if shown is not None and config.timing:
        timing.start(shown)
    _init(rank, "store")
    rank.say()
    mode(rank)
    while not rank.is_over():
        time.sleep(0.02)
    dist.destroy_process_group()
    if shown is not None:
        shown.close()


def main() -> None:
    mode, ranks, directory = globals()[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])
    children = []
    for number in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(mode, Rank(number, ranks, directory))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(child, signal.SIGKILL) for child in children])
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(int(any(codes)))


if __name__ == "__main__":
    main()
