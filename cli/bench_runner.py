"""Runs a training process beside a real coordinator and agent; methods take turns in it."""

import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from time import monotonic
from typing import TypeVar

import msgspec

from ckptd.cli.bench_numbers import Snapshot, order_of_turn, snapshots
from ckptd.cli.local_cluster import ClusterError, LocalCluster
from ckptd.errors import ConfigError
from ckptd.trainer.bench_messages import Block, Counts, Done, Method, Ready, Setup

NODE = "here"
_START_S = 300.0  # to import torch, build the model and choose the batch
_BLOCK_S = 1800.0
_WARM_UP_STEPS = 2
_AUDIT_STEPS = 8
_AUDITED_CAPTURES = 3
_AUDIT_BLOCKS = 4
_Answer = TypeVar("_Answer", Ready, Done)


class Trainer:
    """The training process, and the socket to talk to it."""

    def __init__(self, cluster: LocalCluster, setup: Setup) -> None:
        self._cluster = cluster
        path = cluster.directory / "bench.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(1.0)
            module = "ckptd.trainer.bench"
            self._process = cluster.spawn("trainer", [sys.executable, "-m", module, str(path)])
            self._connection = self._accept(listener)
        self._file = self._connection.makefile("rb")
        self.ready = self._ask(setup, Ready, _START_S)
        if self.ready.error:
            raise ConfigError(self.ready.error)

    def run(self, method: Method, steps: int) -> Done:
        return self._ask(Block(method, steps), Done, _BLOCK_S)

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = monotonic() + _START_S
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if self._process.poll() is not None or monotonic() > deadline:
                    raise self._error("did not start") from None

    def _ask(self, message: msgspec.Struct, kind: type[_Answer], timeout_s: float) -> _Answer:
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(msgspec.json.encode(message) + b"\n")
            line = self._file.readline()
        except TimeoutError:
            raise self._error(f"has not answered for {timeout_s:g} s") from None
        except OSError as error:
            raise self._error(f"is gone: {error}") from error
        if not line:
            raise self._error("has ended")
        return msgspec.json.decode(line, type=kind)

    def _error(self, what: str) -> ClusterError:
        return ClusterError(f"the training process {what}\n{self._cluster.log_ends()}")


@dataclass
class Samples:
    """What one method measured. By turn: the median step, and the copies' bytes per second."""

    steps: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    trained: int = 0
    captured: int = 0
    counts: Counts = field(default_factory=Counts)
    error: str = ""

    def add(self, turn: int, done: Done) -> None:
        """Take in a block; its first step only warms it up."""
        measured = done.steps[1:]
        self.steps[turn] = median(step.step_s for step in measured)
        self.snapshots += snapshots(measured)
        self.trained += len(measured)
        self.captured += sum(step.captured for step in measured)
        copied_bytes = done.counts.copied_bytes - self.counts.copied_bytes
        copy_s = done.counts.copy_s - self.counts.copy_s
        if copied_bytes and copy_s:
            self.rates[turn] = copied_bytes / copy_s
        self.counts = done.counts


@dataclass(frozen=True)
class Measured:
    """What all methods measured, and ckptd's first captures, which compare every byte."""

    samples: dict[str, Samples]
    audited_s: list[float]


def measure(
    trainer: Trainer,
    methods: Mapping[str, Method],
    repeats: int,
    steps: int,
    tell: Callable[[str], None],
) -> Measured:
    """Warm every method up, then let them take turns, in blocks of `steps` measured steps.

    `tell` hears of each block before it runs, of `(1 + repeats) * len(methods)`. A method that
    fails is left out from then on.
    """
    samples = {name: Samples() for name in methods}
    audited_s: list[float] = []

    def run(name: str, steps: int) -> Done:
        done = trainer.run(methods[name], steps)
        samples[name].error = done.error
        return done

    for name, method in methods.items():
        tell(f"warming up: {name}")
        if method.kind != "ckptd":
            samples[name].counts = run(name, _WARM_UP_STEPS).counts
            continue
        for _ in range(_AUDIT_BLOCKS):
            done = run(name, _AUDIT_STEPS)
            audited_s += [each.blocked_s for each in snapshots(done.steps) if each.audited]
            samples[name].counts = done.counts
            if done.error or len(audited_s) >= _AUDITED_CAPTURES:
                break
    for turn in range(repeats):
        for name in order_of_turn(list(methods), turn):
            tell(f"turn {turn + 1} of {repeats}: {name}")
            if not samples[name].error:
                done = run(name, 1 + steps)
                if not done.error:
                    samples[name].add(turn, done)
    return Measured(samples, audited_s)
