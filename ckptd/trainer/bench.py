"""The training process of `ckptd bench`: `python -m ckptd.trainer.bench SOCKET`.

It builds a GPT-like model and an AdamW, and trains blocks of steps as it is told, each with one
method to keep the state safe. All methods work on the same model in the same process: they share
its memory pages and its threads, so that what differs between two blocks is the method.
"""

import ctypes
import math
import mmap
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
)

from ckptd.errors import ConfigError
from ckptd.trainer import bench_messages as messages
from ckptd.trainer.checkpointer import Checkpointer

_VOCABULARY = 256
_CONTEXT = 128
_HEAD_WIDTH = 32
_ADAM_BYTES = 3 * 4  # a parameter and its two moments, in float32
_CALIBRATIONS = 8
_TRIES = 5  # the fastest counts: others may be slow for another reason than the batch
_GROWTH = 8  # at most, of the batch from one calibration to the next
_UPLOAD_S = 600.0
_SEALED_S = 120.0


class Gpt(nn.Module):
    """A decoder-only transformer over bytes."""

    mask: Tensor

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(_CONTEXT, width))
        block = nn.TransformerEncoderLayer(
            width,
            width // _HEAD_WIDTH,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(_CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        logits: Tensor = self.head(self.blocks(x, self.mask, is_causal=True))
        return logits


def shape_for(parameters: int) -> tuple[int, int]:
    """Width and layers of a `Gpt` of about so many parameters, some 64 times as wide as deep."""

    def layers(width: int) -> int:
        rest = parameters - (2 * _VOCABULARY + _CONTEXT) * width
        return max(1, round(rest / (12 * width * width + 13 * width)))

    widths = range(_HEAD_WIDTH, 16384, _HEAD_WIDTH)
    width = min(widths, key=lambda width: abs(math.log(width / (64 * layers(width)))))
    return width, layers(width)


class Training:
    """The model, its optimizer and one batch, and a step of them with a clock."""

    def __init__(self, setup: messages.Setup) -> None:
        cuda = setup.device == "cuda" or (setup.device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here")
        self.device = torch.device("cuda" if cuda else "cpu")
        torch.manual_seed(0)
        width, layers = shape_for(setup.state_bytes // _ADAM_BYTES)
        with self.device:
            self.model = Gpt(width, layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._tokens = torch.empty(0)
        self.step_s = self._calibrate(setup.step_s)

    @property
    def batch(self) -> int:
        return len(self._tokens)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[Tensor]:
        """All that a snapshot must hold."""
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return [*(each.detach() for each in self.model.parameters()), *moments]

    def step(self, method: "Method") -> messages.Step:
        """Train one step, the method's gate before the optimizer and its save behind it.

        On CUDA the gate's time is how long the training stream stood still there, and the save
        begins and ends when that stream is done: what the processor waits for elsewhere is
        training itself.
        """
        began = perf_counter()
        logits = self.model(self._tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        gate_s = self._clocked(method.gate)
        audits = method.audits()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        trained = perf_counter()
        captured = method.save()
        self._wait()
        ended = perf_counter()
        return messages.Step(ended - began, gate_s(), ended - trained, captured, audits)

    def _clocked(self, call: Callable[[], None]) -> Callable[[], float]:
        """Call it; the result tells, once the stream is done, the seconds that it took."""
        if self.device.type == "cuda":
            before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's own
            after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's own
            before.record()
            call()
            after.record()
            return lambda: float(before.elapsed_time(after)) / 1e3
        began = perf_counter()
        call()
        elapsed = perf_counter() - began
        return lambda: elapsed

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _calibrate(self, least_s: float) -> float:
        """Choose the batch so that a step takes `least_s` or more; returns what it takes."""
        batch, plain, taken = 1, Method(), 0.0
        for _ in range(_CALIBRATIONS):
            shape = (batch, _CONTEXT + 1)
            self._tokens = torch.randint(_VOCABULARY, shape, device=self.device)
            taken = min(self.step(plain).step_s for _ in range(_TRIES))
            if taken >= least_s:
                break
            batch = math.ceil(batch * min(_GROWTH, max(1.1, 1.05 * least_s / taken)))
        return taken


class Method:
    """Keeps the state safe, or, as this one, does not."""

    def gate(self) -> None:
        """Wait until the optimizer may write to the state."""

    def save(self) -> bool:
        """Begin to save the state as it is; returns False if it is not saved."""
        return False

    def drain(self) -> None:
        """Wait for all that was begun, and leave no files."""

    def audits(self) -> int:
        return 0

    def counts(self) -> messages.Counts:
        return messages.Counts()


class Ckptd(Method):
    """A snapshot at every step, as a user would have it."""

    def __init__(self, training: Training, agent: str) -> None:
        self._ckpt = Checkpointer(
            model=training.model, optimizer=training.optimizer, job="bench", agent=agent
        )
        self._step = self._ckpt.resume()

    def gate(self) -> None:
        self._ckpt.gate()

    def save(self) -> bool:
        before = self._ckpt.stats.captures
        self._step += 1
        self._ckpt.step(self._step)
        return self._ckpt.stats.captures > before

    def drain(self) -> None:
        self.gate()
        deadline = monotonic() + _SEALED_S
        while (s := self._ckpt.stats).sealed + s.torn + s.failed < s.captures:
            if monotonic() > deadline:
                raise TimeoutError(f"a capture was not sealed within {_SEALED_S:g} s")
            sleep(0.002)

    def audits(self) -> int:
        return self._ckpt.stats.audits

    def counts(self) -> messages.Counts:
        stats = self._ckpt.stats
        return messages.Counts(
            stats.captures,
            stats.sealed,
            stats.torn,
            stats.failed,
            stats.copied_bytes,
            stats.copy_s,
            stats.eager_because,
        )


class AsyncSave(Method):
    """torch.distributed.checkpoint.async_save, each waiting for the one before, as it demands."""

    def __init__(self, training: Training, folder: Path, mode: messages.Mode) -> None:
        self._training, self._folder = training, folder
        self._type = AsyncCheckpointerType.THREAD
        self._stager: AsyncStager | None = None
        if mode == "process":
            if not dist.is_initialized():
                # Its process makes a group of its own from what the trainer's group tells it.
                raise RuntimeError("process mode needs a process group, and gloo did not start")
            self._type = AsyncCheckpointerType.PROCESS
        if mode == "staged":
            cuda = training.device.type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=False,
                    use_async_staging=True,
                    use_non_blocking_copy=cuda,
                )
            )
        self._staged: Callable[[], object] = _nothing
        self._uploaded: Callable[[], object] = _nothing

    def gate(self) -> None:
        self._staged()
        self._staged = _nothing

    def save(self) -> bool:
        self._uploaded()
        begun = async_save(
            self._training.state(),
            checkpoint_id=self._folder,
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        if isinstance(begun, AsyncSaveResponse):
            staging, upload = begun.staging_completion, begun.upload_completion
            self._staged = lambda: staging.result(_UPLOAD_S)
        else:
            upload = begun
        self._uploaded = lambda: upload.result(_UPLOAD_S)
        return True

    def drain(self) -> None:
        self.gate()
        self._uploaded()
        self._uploaded = _nothing
        shutil.rmtree(self._folder, ignore_errors=True)


class TorchSave(Method):
    """torch.save to one file, again and again; training waits for it."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._file = training, folder / "state.pt"
        folder.mkdir(parents=True)

    def save(self) -> bool:
        torch.save(self._training.state(), self._file)
        return True

    def drain(self) -> None:
        self._file.unlink(missing_ok=True)


class Copy(Method):
    """The machine's limit: the same bytes, to memory that was written to before, and waited for.

    On the CPU one thread's memmove, tensor by tensor, to shared memory; from CUDA one copy of one
    piece to pinned memory.
    """

    def __init__(self, training: Training) -> None:
        self._cuda = training.device.type == "cuda"
        self._tensors = training.tensors()
        self._bytes = sum(each.nbytes for each in self._tensors)
        if self._cuda:
            self._source = torch.empty(self._bytes, dtype=torch.uint8, device=training.device)
            self._target = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=True)
        else:
            self._shared = mmap.mmap(-1, self._bytes)
        self._copied_bytes, self._copy_s = 0, 0.0

    def save(self) -> bool:
        began = perf_counter()
        if self._cuda:
            self._target.copy_(self._source, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        else:
            target = ctypes.addressof(ctypes.c_char.from_buffer(self._shared))
            for each in self._tensors:
                ctypes.memmove(target, each.data_ptr(), each.nbytes)
                target += each.nbytes
        self._copy_s += perf_counter() - began
        self._copied_bytes += self._bytes
        return True

    def counts(self) -> messages.Counts:
        return messages.Counts(copied_bytes=self._copied_bytes, copy_s=self._copy_s)


def _nothing() -> None:
    pass


class Trainer:
    """Carries out what the command line asks for; a method is made when it is first needed."""

    def __init__(self, setup: messages.Setup) -> None:
        self._agent = setup.agent
        self._training = Training(setup)
        self._methods: dict[messages.Method, Method] = {}

    def ready(self) -> messages.Ready:
        return messages.Ready(
            device=torch.cuda.get_device_name() if self._training.device.type == "cuda" else "cpu",
            torch=str(torch.__version__),
            threads=torch.get_num_threads(),
            parameters=sum(each.numel() for each in self._training.model.parameters()),
            state_bytes=sum(each.nbytes for each in self._training.tensors()),
            batch=self._training.batch,
            step_s=self._training.step_s,
        )

    def run(self, block: messages.Block) -> messages.Done:
        try:
            method = self._methods.get(block.method)
            if method is None:
                method = self._methods[block.method] = self._make(block.method)
            steps = tuple(self._training.step(method) for _ in range(block.steps))
            method.drain()
            return messages.Done(steps, method.counts())
        except Exception as error:  # the other methods go on without this one
            return messages.Done(error=f"{type(error).__name__}: {error}"[:500])

    def _make(self, wanted: messages.Method) -> Method:
        match wanted.kind:
            case "plain":
                return Method()
            case "ckptd":
                return Ckptd(self._training, self._agent)
            case "async_save":
                return AsyncSave(self._training, Path(wanted.folder), wanted.mode)
            case "torch.save":
                return TorchSave(self._training, Path(wanted.folder))
            case "copy":
                return Copy(self._training)


def _start_process_group(file: str) -> None:
    """One process is no group, but async_save's process mode asks for one.

    The address is for the group that its own process makes: by default it takes this host's full
    name, which need not resolve.
    """
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    except Exception as error:
        print(f"no process group: {error}", file=sys.stderr)


def _lines(connection: socket.socket) -> Iterator[bytes]:
    with connection.makefile("rb") as file:
        yield from file


def main() -> None:
    """Connect to SOCKET, take a Setup and then Blocks, one a line, until it is closed."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    lines = _lines(connection)

    def answer(message: msgspec.Struct) -> None:
        connection.sendall(msgspec.json.encode(message) + b"\n")

    setup = msgspec.json.decode(next(lines), type=messages.Setup)
    _start_process_group(sys.argv[1] + ".group")
    try:
        trainer = Trainer(setup)
    except Exception as error:
        answer(messages.Ready(error=str(error)))
        raise
    answer(trainer.ready())
    for line in lines:
        answer(trainer.run(msgspec.json.decode(line, type=messages.Block)))


if __name__ == "__main__":
    main()
