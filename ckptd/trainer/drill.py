"""The training processes of `ckptd drill`: `python -m ckptd.trainer.drill`, told on its input.

It imports torch once, and forks the ranks of each job. They train small models over gloo, really,
with collectives, a Checkpointer and an agent; only the computing that takes time on a GPU is sleep
if not told otherwise, so that many ranks fit on few processors.
"""

import contextlib
import ctypes
import math
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from ckptd.config import (
    ENV_AGENT,
    ENV_JOB,
    ENV_TIMING,
    FLIGHT_RECORDER_ENTRIES,
    FLIGHT_RECORDER_SIZES,
    watch_config,
)
from ckptd.trainer import timing, worker_server
from ckptd.trainer.checkpointer import Checkpointer
from ckptd.trainer.drill_messages import (
    DDP,
    FSDP2,
    HSDP,
    PIPELINE,
    STRIKE,
    End,
    Setup,
    Start,
    Strike,
    ended_path,
    log_path,
    pid_path,
    steps_path,
    struck_path,
    write,
)

_ROWS = 8
_MICROBATCHES = 2
_NOISE = 0.03
_SNAPSHOT_EVERY = 25
_ODD_EVERY = 25
_ODD_S = 3.0
_FIRST_STEP_S = 12.0
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

Train = Callable[[Tensor], Tensor]
"""Forward and backward of one batch; returns the loss."""


class Rank:
    """One rank of a job, from its fork on."""

    def __init__(self, setup: Setup, number: int) -> None:
        self.setup, self.number, self.ranks = setup, number, len(setup.sockets)
        self.directory = Path(setup.directory)
        self.strike: Strike | None = None
        self._random = random.Random(f"{setup.job} {number}")
        self._was_struck = False

    def run(self) -> None:
        """Train until killed, or until the fault ends it."""
        self._enter()
        config = watch_config()
        shown = worker_server.start(config)
        if shown is not None and config.timing:
            timing.start(shown)
        init = f"file://{self.directory}/store"
        dist.init_process_group("gloo", init_method=init, rank=self.number, world_size=self.ranks)
        torch.manual_seed(self.number)
        width = max(16, math.isqrt(self.setup.payload_bytes // 8))
        train, model = _BUILDERS[self.setup.kind](self, width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ckpt = Checkpointer(model=model, optimizer=optimizer, every=_SNAPSHOT_EVERY)
        batches = self._batches(width)
        for step in count(ckpt.resume() + 1):
            self._look(step)
            loss = train(next(batches))
            optimizer.step()
            optimizer.zero_grad()
            self._agree(loss)
            ckpt.step(step)
            if self.number == 0:
                with steps_path(self.directory).open("a") as steps:
                    steps.write(f"{time.time():.6f}\n")

    def work(self, share: float) -> None:
        """What computes, in a real job, for this share of a step. Faults begin here."""
        seconds = share * self.setup.step_s * (1 + self._random.gauss(0, _NOISE))
        if self.setup.oddity == "uneven":
            seconds *= self._random.uniform(0.7, 1.3)
        if self.strike is not None and self.strike.factor:
            self._say_struck()
            seconds *= 1 + self.strike.factor
        if self.setup.computes:
            _compute(seconds)
        else:
            time.sleep(max(0.0, seconds))
        if self.strike is not None and self.strike.what in _STRIKES:
            strike, self.strike = self.strike, None
            if not self._was_struck:
                self._say_struck()
                _STRIKES[strike.what](strike)

    def _enter(self) -> None:
        setup = self.setup
        if setup.namespaces:
            _join_network(setup.namespaces[self.number])
            os.environ["GLOO_SOCKET_IFNAME"] = setup.device
        os.environ.update({"RANK": str(self.number), "WORLD_SIZE": str(self.ranks)})
        os.environ.update({ENV_JOB: setup.job, ENV_AGENT: setup.sockets[self.number]})
        os.environ[ENV_TIMING] = str(int(setup.timing))
        os.environ[FLIGHT_RECORDER_SIZES[0]] = str(FLIGHT_RECORDER_ENTRIES)
        write(pid_path(self.directory, self.number), str(os.getpid()))

    def _look(self, step: int) -> None:
        """Learn of a strike, and be odd."""
        oddity = _ODDITIES.get(self.setup.oddity)
        if oddity is not None:
            oddity(self, step)
        if self.strike is None and not self._was_struck:
            with contextlib.suppress(FileNotFoundError):
                strike = msgspec.json.decode((self.directory / STRIKE).read_bytes(), type=Strike)
                self.strike = strike if strike.rank == self.number else None

    def _say_struck(self) -> None:
        if not self._was_struck:
            self._was_struck = True
            write(struck_path(self.directory, self.number), f"{time.time():.6f}")

    def _batches(self, width: int) -> Iterator[Tensor]:
        if not self.setup.loader:
            yield from cycle([torch.randn(_ROWS, width)])
        source = _Source(self.directory / STRIKE, self.number, width)
        batches = iter(DataLoader(source, batch_size=None, num_workers=1, prefetch_factor=1))
        while True:
            if self.strike is not None and self.strike.what == _LOADER:
                # Each try is noted, for the last one gets no data.
                write(struck_path(self.directory, self.number), f"{time.time():.6f}")
            yield next(batches)

    def _agree(self, loss: Tensor) -> None:
        """The mean loss, as one logs it; the struck rank may call another operation."""
        if self.strike is not None and self.strike.what == "mismatch":
            self._say_struck()
            dist.all_gather([torch.empty(1) for _ in range(self.ranks)], loss.reshape(1))
        else:
            dist.all_reduce(loss)


# The jobs. Each returns what trains, and the model.


def _ddp(rank: Rank, width: int) -> tuple[Train, nn.Module]:
    inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    model = DistributedDataParallel(inner, bucket_cap_mb=4 * width * width / (1 << 20))

    def train(x: Tensor) -> Tensor:
        rank.work(0.5)
        loss = model(x).square().mean()
        rank.work(0.5)
        loss.backward()
        mean: Tensor = loss.detach()
        return mean

    return train, model


def _fsdp2(rank: Rank, width: int) -> tuple[Train, nn.Module]:
    width = -(-width // rank.ranks) * rank.ranks
    layers = [nn.Linear(width, width) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    mesh = None
    if rank.setup.kind == HSDP:
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (2, rank.ranks // 2), mesh_dim_names=names)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
        layer.register_forward_hook(lambda *_: rank.work(0.5))
    fully_shard(model, mesh=mesh)

    def train(x: Tensor) -> Tensor:
        loss = model(nn.functional.pad(x, (0, width - x.shape[1]))).square().mean()
        loss.backward()
        mean: Tensor = loss.detach()
        return mean

    return train, model


def _pipeline(rank: Rank, width: int) -> tuple[Train, nn.Module]:
    replicas = rank.ranks // 2
    groups = [
        dist.new_group(list(range(s * replicas, (s + 1) * replicas)), group_desc="dp")
        for s in (0, 1)
    ]
    stage = rank.number // replicas
    other = (rank.number + replicas) % rank.ranks
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU())
    share = 0.5 / (_MICROBATCHES + 0.5)

    sends: list[tuple[dist.Work, Tensor]] = []

    def send(activations: Tensor) -> None:
        """Whoever sends must not wait for one that sends to it."""
        whole = nn.functional.pad(activations, (0, 0, 0, width - _ROWS)).contiguous()
        work = dist.isend(whole, other)
        assert work is not None
        sends.append((work, whole))

    def receive() -> Tensor:
        got = torch.empty(width, width)
        dist.recv(got, other)
        return got[:_ROWS].clone()

    def first(x: Tensor) -> Tensor:
        made = []
        for _ in range(_MICROBATCHES):
            rank.work(share)
            made.append(model(x))
            send(made[-1].detach())
        for each in made:
            each.backward(receive())
        return torch.zeros(())

    def second(x: Tensor) -> Tensor:
        loss = torch.zeros(())
        for _ in range(_MICROBATCHES):
            given = receive().requires_grad_()
            rank.work(2 * share)
            loss = model(given).square().mean()
            loss.backward()
            assert given.grad is not None
            send(given.grad)
        return loss.detach()

    def train(x: Tensor) -> Tensor:
        loss = (first, second)[stage](x)
        for work, _ in sends:
            work.wait()
        sends.clear()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=groups[stage])
        return loss

    return train, model


_BUILDERS = {DDP: _ddp, FSDP2: _fsdp2, HSDP: _fsdp2, PIPELINE: _pipeline}


def _compute(seconds: float) -> None:
    """Use so much of a processor, however long it takes to be given that."""
    matrix = torch.ones(64, 64)
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        torch.mm(matrix, matrix)


# The faults that a rank brings upon itself.

_LOADER = "loader"


def sleeps(strike: Strike) -> None:
    """For so long, or for ever."""
    until = time.monotonic() + strike.seconds
    while not strike.seconds or time.monotonic() < until:
        time.sleep(until - time.monotonic() if strike.seconds else 3600.0)


def spins(strike: Strike) -> None:
    """With the lock of the interpreter held: a regular expression that never ends."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def deadlocks(strike: Strike) -> None:
    lock = threading.Lock()
    with lock, lock:
        pass


def raises(strike: Strike) -> None:
    raise RuntimeError("drill: an exception that nobody catches")


def eats(strike: Strike) -> None:
    """Memory, for ever."""
    eaten = []
    while True:
        eaten.append(bytes(os.urandom(1 << 20)))


_STRIKES: dict[str, Callable[[Strike], None]] = {
    "sleep": sleeps,
    "spin": spins,
    "deadlock": deadlocks,
    "exception": raises,
    "oom": eats,
}


class _Source(IterableDataset[Tensor]):
    """Batches, until its rank is struck."""

    def __init__(self, strike: Path, rank: int, width: int) -> None:
        self._strike, self._rank, self._width = strike, rank, width

    def __iter__(self) -> Iterator[Tensor]:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        while True:
            if self._strike.exists():
                strike = msgspec.json.decode(self._strike.read_bytes(), type=Strike)
                if strike.rank == self._rank:
                    time.sleep(3600.0)
            yield torch.randn(_ROWS, self._width)


# What healthy jobs do that looks odd.


def _evaluates(rank: Rank, step: int) -> None:
    """Rank 0, alone, now and then; it computes, and so makes progress."""
    if rank.number or step % _ODD_EVERY:
        return
    until = time.monotonic() + _ODD_S
    a = torch.randn(256, 256)
    while time.monotonic() < until:
        a = (a @ a).tanh()
        time.sleep(0.01)


def _checkpoints(rank: Rank, step: int) -> None:
    """Rank 0 writes a file, slowly, while the others wait."""
    if rank.number or step % _ODD_EVERY:
        return
    until = time.monotonic() + _ODD_S
    with (rank.directory / "checkpoint").open("wb") as file:
        while time.monotonic() < until:
            file.write(bytes(1 << 20))
            time.sleep(0.1)


def _compiles(rank: Rank, step: int) -> None:
    """The first step takes long, and not as long on all ranks."""
    if step == 1:
        time.sleep(_FIRST_STEP_S * (1 + 0.3 * rank.number / rank.ranks))


_ODDITIES: dict[str, Callable[[Rank, int], None]] = {
    "evaluates": _evaluates,
    "checkpoints": _checkpoints,
    "compiles": _compiles,
}


# The process that forks them.


class Nursery:
    """Forks ranks, and notes when they end. Its process has one thread, and stays without gloo."""

    def __init__(self) -> None:
        self._ranks: dict[int, tuple[Setup, int]] = {}

    def start(self, setup: Setup) -> None:
        """Returns in the parent, and in no child."""
        sys.stdout.flush()
        for number in range(len(setup.sockets)):
            pid = os.fork()
            if pid == 0:
                _become(Rank(setup, number))
            self._ranks[pid] = (setup, number)

    def end(self, job: str) -> None:
        """Kill all that are left of a job."""
        for pid, (setup, _) in list(self._ranks.items()):
            if setup.job == job:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Note who has ended."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                known = self._ranks.pop(found[0], None)
                for ring in Path("/dev/shm").glob(f"ckptd-{os.getuid()}-{found[0]}-*.ring"):
                    ring.unlink(missing_ok=True)  # of a rank that nobody had seen yet, perhaps
                if known is not None:
                    path = ended_path(Path(known[0].directory), known[1])
                    with contextlib.suppress(FileNotFoundError):
                        write(path, f"{time.time():.6f}")


def _become(rank: Rank) -> None:
    """In the child: run the rank, and end as a script does."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(log_path(rank.directory, rank.number), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        rank.run()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _join_network(name: str) -> None:
    namespace = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if _libc.setns(namespace, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"cannot enter network namespace {name}: {os.strerror(error)}")
    os.close(namespace)


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # imports much, once for all ranks
    nursery = Nursery()
    signal.signal(signal.SIGCHLD, lambda *_: nursery.reap())
    print("ready", flush=True)
    for line in sys.stdin:
        match msgspec.json.decode(line, type=Start | End):
            case Start(setup):
                nursery.start(setup)
            case End(job):
                nursery.end(job)


if __name__ == "__main__":
    main()
