"""Real ranks, for test_parallel.py: each mode trains, is captured, and goes on in fresh processes.

    python ranks.py DIRECTORY [MODE ...]

It imports torch once and forks the ranks: four for each mode, and then four others that load what
the first have saved. They meet in a FileStore. Every rank leaves a JSON file in DIRECTORY/MODE.

What a rank trains on comes from torch's own random numbers, so a loss depends on every bit that is
to come back: parameters, moments, buffers, and the random numbers themselves.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from ckptd.digest import digest
from ckptd.ids import SnapshotId
from ckptd.segment import parse_header, sidecar_path
from ckptd.trainer import capture as capturing
from ckptd.trainer.capture import Capture, LayoutChanged
from ckptd.trainer.loading import OpenSegment, SavedState, check_fits, load
from ckptd.trainer.objects import dump_objects, load_objects
from ckptd.trainer.state import LiveState

WORLD_SIZE = 4
CELL_BYTES = 4096
SAVED_STEP = 3
STEPS = 6
_DEADLINE_S = 60


class Net(nn.Module):
    """Odd sizes, so that cuts fall inside tensors; dropout, BatchNorm, tied weights, and tensors
    that are hard to cut: none, one or few rows, rows that do not lie side by side in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 37)
        self.norm = nn.BatchNorm1d(37)
        self.drop = nn.Dropout(0.2)
        self.middle = nn.Linear(37, 37, bias=False)
        self.tied = nn.Linear(37, 37)
        self.tied.weight = self.middle.weight
        self.permuted = nn.Parameter(torch.randn(23, 37).t())
        self.flat = nn.Parameter(torch.randn(1, 7, 23))
        self.one = nn.Parameter(torch.randn(1, 1))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.low = nn.Parameter(torch.randn(23, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(13, 3), requires_grad=False)
        self.nothing = nn.Parameter(torch.zeros(0, 3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.tied(self.middle(self.drop(x))) @ self.permuted
        return (x + self.low.float()) * self.scalar * self.flat.mean(1) + self.one


class Block(nn.Module):
    """What is sharded: layers with fewer rows than ranks, and buffers that every rank has."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return x + self.down(torch.relu(self.up(self.norm(x))))


def blocks(width: int = 10, hidden: int = 21) -> nn.Sequential:
    return nn.Sequential(Block(width, hidden), Block(width, hidden), nn.Linear(width, 3))


def _alone(training: "Training", number: int) -> float:
    """One step: forward and backward, `accumulate` times, then the optimizers that are due."""
    total = 0.0
    for micro in range(training.accumulate):
        with training.is_last(micro == training.accumulate - 1):
            loss = training.model(torch.randn(training.shape)).square().mean()
            loss.backward()
        total += loss.item()
    for name, optimizer in training.optimizers.items():
        if number % training.every.get(name, 1) == 0:
            optimizer.step()
        optimizer.zero_grad()
    return total


@dataclass
class Training:
    """A model in the form in which it is trained, and how."""

    model: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]
    data: int | None = None
    """Ranks with the same number see the same batches; None: each rank its own."""
    replicated_over: tuple[int, ...] = ()
    shape: tuple[int, ...] = (4, 10)
    every: Mapping[str, int] = field(default_factory=dict)
    """Optimizers that do not step each time."""
    accumulate: int = 1
    is_last: Callable[[bool], Any] = contextlib.nullcontext
    step: Callable[["Training", int], float] = _alone
    look: bool = False
    """Whether to evaluate after each step, without a backward."""

    def __post_init__(self) -> None:
        self.state = LiveState(self.model, self.optimizers, {}, self.replicated_over)

    def train(self, first: int, last: int) -> Iterator[tuple[int, float]]:
        for number in range(first, last + 1):
            loss = self.step(self, number)
            if self.look:
                self.evaluate()
            yield number, loss

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(torch.ones(self.shape))
        self.model.train()

    def bits(self) -> dict[str, int]:
        """A digest of every tensor that is captured, and of all else."""
        self.state.reshard()
        found = {
            item.spec.key: digest(
                item.local.clone(memory_format=torch.contiguous_format)
                .reshape(-1).view(torch.uint8).numpy().tobytes()
            )
            for item in self.state.items()
        }  # fmt: skip
        return {**found, "objects": digest(dump_objects(self.state.objects(0)))}


def _adam(model: nn.Module, **options: Any) -> dict[str, torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return {"adam": torch.optim.AdamW(trained, lr=0.01, **options)}


def _ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


def plain() -> Training:
    """Every rank its own model, unknown to the others."""
    torch.manual_seed(torch.initial_seed() + dist.get_rank())
    model = Net()
    return Training(model, _adam(model))


def ddp() -> Training:
    model = _ddp(Net())
    return Training(model, _adam(model))


def ddp_ignored() -> Training:
    """Some parameters are each rank's own: of the root, and of a layer."""
    model = Net()
    own = [*(f"first.{n}" for n, _ in model.first.named_parameters()), "one", ".one"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    with torch.no_grad():
        for parameter in (*model.first.parameters(), model.one):
            parameter.add_(dist.get_rank())
    wrapped = _ddp(model)
    return Training(wrapped, _adam(wrapped))


def ddp_several() -> Training:
    """One optimizer steps each time, one every second, one only once."""
    model = Net()
    ids = {id(p) for p in model.first.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    wrapped = _ddp(model)
    optimizers = {
        "sgd": torch.optim.SGD([model.first.weight], lr=0.01, momentum=0.9),
        "late": torch.optim.Adam([model.first.bias], lr=0.01),
        "rest": torch.optim.AdamW(rest, lr=0.01, amsgrad=True),
    }
    return Training(wrapped, optimizers, every={"rest": 2, "late": 4})


def ddp_accumulated() -> Training:
    model = _ddp(Net())

    def is_last(last: bool) -> Any:
        return contextlib.nullcontext() if last else model.no_sync()

    return Training(model, _adam(model), accumulate=3, is_last=is_last)


def ddp_compiled() -> Training:
    """Wrapped once more below DDP, with another name for each parameter."""
    model = Net()
    inner = torch.compile(model, backend="eager")
    own = ["_orig_mod.first.bias"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, own)
    with torch.no_grad():
        model.first.bias.add_(dist.get_rank())
    wrapped = _ddp(inner)
    training = Training(wrapped, _adam(wrapped))
    inner.forward = model.forward  # the names are what matters here; compiling takes long
    return training


def zero() -> Training:
    model = _ddp(Net())
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float32]
    optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=0.01)
    return Training(model, {"zero": optimizer})


def replicated() -> Training:
    """Every rank trains alike, and no wrapper says so."""
    model = Net()
    return Training(model, _adam(model), data=0, replicated_over=tuple(range(WORLD_SIZE)))


def fsdp() -> Training:
    model = blocks()
    for layer in model[:2]:
        fully_shard(layer)
    fully_shard(model)
    return Training(model, _adam(model))


def fsdp_evaluated() -> Training:
    """The evaluation leaves whole parameters in the root module."""
    return dataclasses.replace(fsdp(), look=True)


def fsdp_accumulated() -> Training:
    """Mixed precision, and gradients that are reduced only in the last pass."""
    model = blocks()
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=low)

    @contextlib.contextmanager
    def is_last(last: bool) -> Iterator[None]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        yield

    return Training(model, _adam(model), accumulate=2, is_last=is_last)


class TiedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 20, bias=False)
        self.body = Block(20, 8)
        self.head = nn.Linear(12, 20)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(x)) * self.head(x)


def fsdp_tied() -> Training:
    """Tied weights, and shards of columns instead of rows."""
    model = TiedBlock()
    fully_shard(model, shard_placement_fn=lambda p: Shard(1 if p.dim() == 2 else 0))
    return Training(model, _adam(model, amsgrad=True), shape=(4, 12))


def _grid(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def hybrid() -> Training:
    """Two replicas of two shards: ranks 0 and 2 have the same rows, and 1 and 3."""
    mesh, model = _grid("replicate", "shard"), blocks()
    for layer in model[:2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Training(model, _adam(model))


def _parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Column- and row-wise; one norm is replicated, the other one stays plain."""
    plan = {
        **{f"{i}.up": ColwiseParallel() for i in (0, 1)},
        **{f"{i}.down": RowwiseParallel() for i in (0, 1)},
        "0.norm": SequenceParallel(),
    }
    parallelize_module(model, mesh, plan)
    # Called as it is, the replicated norm would want sharded activations.
    model[0].norm._forward_hooks.clear()
    model[0].norm._forward_pre_hooks.clear()


class Whole(nn.LayerNorm):
    """A norm whose parameters may be replicated DTensors, on activations that are plain."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (p.to_local() if isinstance(p, DTensor) else p
                        for p in (self.weight, self.bias))  # fmt: skip
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def _blocks_with_whole_norms() -> nn.Sequential:
    model = blocks(hidden=24)
    for layer in model[:2]:
        layer.norm = Whole(10)
    return model


def tensor() -> Training:
    model = _blocks_with_whole_norms()
    _parallelize(model, init_device_mesh("cpu", (WORLD_SIZE,)))
    return Training(model, _adam(model), data=0)


def tensor_replicated() -> Training:
    """The same, with the word that plain tensors are the same on all ranks."""
    return dataclasses.replace(tensor(), replicated_over=tuple(range(WORLD_SIZE)))


def tensor_fsdp() -> Training:
    mesh, model = _grid("data", "tensor"), _blocks_with_whole_norms()
    _parallelize(model, mesh["tensor"])
    for layer in model[:2]:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return Training(model, _adam(model), data=mesh["data"].get_local_rank())


def replicate_module() -> Training:
    """DDP as a special case of FSDP2: DTensors that are replicated over all ranks."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    model = blocks()
    for layer in model[:2]:
        replicate(layer)
    replicate(model)
    return Training(model, _adam(model))


def _pipeline_step(training: Training, number: int) -> float:
    """Ranks 0 and 1 are the first stage, 2 and 3 the second; 0 feeds 2, and 1 feeds 3."""
    rank = dist.get_rank()
    if rank < 2:
        out = training.model(torch.randn(4, 10))
        dist.send(out.detach(), rank + 2)
        gradient = torch.empty_like(out)
        dist.recv(gradient, rank + 2)
        out.backward(gradient)
        loss = gradient.sum()
    else:
        came = torch.empty(4, 12)
        dist.recv(came, rank - 2)
        came.requires_grad_()
        loss = training.model(came).square().mean()
        loss.backward()
        dist.send(came.grad, rank - 2)
    for optimizer in training.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _pipeline(names: tuple[str, str]) -> Training:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stage = dist.get_rank() // 2
    torch.manual_seed(torch.initial_seed() + stage)
    layer = nn.Linear(10, 12) if stage == 0 else nn.Linear(12, 11)
    module = nn.ModuleDict({names[stage]: layer, "norm" + names[stage]: nn.LayerNorm(12)})
    wide, norm = module.values()
    module.forward = lambda x: norm(wide(x)) if stage == 0 else wide(norm(x))
    model = _ddp(module, process_group=groups[stage])
    return Training(model, _adam(model), shape=(4, 10 + 2 * stage), step=_pipeline_step)


def pipeline() -> Training:
    return _pipeline(("0", "1"))


def pipeline_same_names() -> Training:
    """As stages are that number their layers from 0 each: same names, other tensors."""
    return _pipeline(("0", "0"))


@dataclass(frozen=True)
class Mode:
    make: Callable[[], Training]
    once: bool = True
    """How to capture: what ranks hold alike once, or on all."""
    warm: bool = True
    """Whether the fresh ranks train a step of their own before they load. DDP orders gradients
    in the first backward pass, and four ranks add them up in another order until then."""
    compare: bool = True
    """Whether torch.distributed.checkpoint knows what these ranks have."""


MODES = {
    "plain": Mode(plain, warm=False),
    "ddp": Mode(ddp),
    "ddp-all": Mode(ddp, once=False),
    "ddp-ignored": Mode(ddp_ignored),
    "ddp-several": Mode(ddp_several),
    "ddp-accumulated": Mode(ddp_accumulated),
    "ddp-compiled": Mode(ddp_compiled),
    "zero": Mode(zero, compare=False),
    "replicated": Mode(replicated, warm=False),
    "fsdp": Mode(fsdp, warm=False),
    "fsdp-evaluated": Mode(fsdp_evaluated),
    "fsdp-accumulated": Mode(fsdp_accumulated),
    "fsdp-tied": Mode(fsdp_tied),
    "hybrid": Mode(hybrid, warm=False),
    "tensor": Mode(tensor),
    "tensor-replicated": Mode(tensor_replicated, warm=False),
    "tensor-fsdp": Mode(tensor_fsdp),
    "replicate-module": Mode(replicate_module),
    "pipeline": Mode(pipeline),
    "pipeline-same-names": Mode(pipeline_same_names, compare=False),
}


def built(mode: Mode, seed: int) -> Training:
    torch.manual_seed(seed)
    training = mode.make()
    data = dist.get_rank() if training.data is None else training.data
    torch.manual_seed(1000 * seed + data)
    return training


class Captured:
    """A training that is captured after every step, as `Checkpointer` does it."""

    def __init__(self, training: Training, once: bool, directory: Path) -> None:
        self.state, self.rank, self.directory = training.state, dist.get_rank(), directory
        self.sealed: list[int] = []
        self.failed: list[str] = []
        self.engine = Capture(
            self.state,
            self.rank,
            WORLD_SIZE,
            lambda id: self.sealed.append(id.step),
            lambda id, outcome, reason: self.failed.append(f"{id} {outcome}: {reason}"),
            once=once,
        )
        for optimizer in training.optimizers.values():
            optimizer.register_step_pre_hook(lambda *_: self.engine.gate())
        self._layouts = 0

    def take(self, step: int) -> None:
        """Capture; the copy goes on when this returns."""
        if self._layouts == 0:
            self._lay_out(step)
        try:
            self._begin(step)
        except LayoutChanged:
            self._lay_out(step)
            self._begin(step)

    def keep(self, step: int) -> None:
        """Put the segment aside that was taken last, after `step`."""
        self.engine.wait_sealed()
        there, kept = self._slot(step), segment_of(self.directory, step, self.rank)
        shutil.copy(there, kept)
        shutil.copy(sidecar_path(there), sidecar_path(kept))

    def _slot(self, step: int) -> Path:
        return self.directory / f"slot-{self.rank}-{self._layouts}-{step % 2}"

    def _lay_out(self, step: int) -> None:
        plan = self.engine.lay_out(step)
        self._layouts += 1
        slots = [self._slot(number) for number in (0, 1)]
        for slot in slots:
            slot.write_bytes(bytes(plan.layout.size_bytes))
        self.engine.prepare([str(slot) for slot in slots])

    def _begin(self, step: int) -> None:
        self.engine.begin(SnapshotId("job", 1, step), str(self._slot(step)), CELL_BYTES)


def segment_of(directory: Path, step: int, rank: int) -> Path:
    return directory / f"step{step}-rank{rank}.safetensors"


def open_segment(directory: Path, step: int, rank: int) -> OpenSegment:
    path = segment_of(directory, step, rank)
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    return OpenSegment(parse_header(data, path.name), data)


def resume(training: Training, directory: Path, step: int) -> None:
    """What `Checkpointer` does to load a snapshot."""
    own = open_segment(directory, step, dist.get_rank())
    ranks = {rank for share in own.header.shares for rank in share} - {dist.get_rank()}
    others = [open_segment(directory, step, rank) for rank in sorted(ranks)]
    end = own.header.objects_begin + own.header.objects_bytes
    objects = load_objects(bytes(own.data[own.header.objects_begin : end]))
    saved = SavedState(own, others, objects)
    check_fits(training.state, saved, "the snapshot")
    load(training.state, saved)


Box = tuple[list[int], list[int]]
"""Offsets and sizes."""


def saved_by_torch(training: Training) -> dict[str, list[Box]]:
    """The boxes of each tensor that torch would save, on all ranks together, each once."""
    state = {
        "model": get_model_state_dict(training.model),
        "optim": get_optimizer_state_dict(training.model, list(training.optimizers.values())),
    }
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
    plans: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(plans, planner.create_local_plan())
    deduplicated, _ = planner.create_global_plan(plans)
    found: dict[str, list[Box]] = {}
    for plan in deduplicated:
        for item in plan.items:
            if item.tensor_data is not None:
                box = item.tensor_data.chunk
                found.setdefault(item.index.fqn, []).append((list(box.offsets), list(box.sizes)))
    return found


def first_life(mode: Mode, directory: Path) -> dict[str, Any]:
    """Train without captures, and again with; leave the segments of `SAVED_STEP` and the last."""
    told: dict[str, Any] = {"losses": [], "captured_losses": []}
    training = built(mode, 1)
    for number, loss in training.train(1, STEPS):
        told["losses"].append(loss)
        if number == SAVED_STEP:
            told["saved_bits"] = training.bits()
    told["bits"] = training.bits()

    capturing.AUDITED_FIRST = 1  # all but the first are copied while training goes on
    training = built(mode, 1)
    captured = Captured(training, mode.once, directory)
    for number, loss in training.train(1, STEPS):
        told["captured_losses"].append(loss)
        if number == SAVED_STEP + 1:
            captured.keep(SAVED_STEP)
        captured.engine.wait_sealed()
        captured.take(number)
    captured.engine.gate()
    captured.keep(STEPS)
    told["captured_bits"] = training.bits()
    told["sealed"], told["failed"] = captured.sealed, captured.failed
    told["eager_because"] = captured.engine.stats.eager_because
    plan = captured.engine.plan
    assert plan is not None
    told["shares"] = [[share.group, share.ranks, share.tape] for share in plan.shares]
    told["items"] = [
        {**dataclasses.asdict(item.spec), "volatile": item.volatile, "ranks": item.ranks}
        for item in training.state.items()
    ]
    if mode.compare:
        told["torch"] = saved_by_torch(training)
    return told


def second_life(mode: Mode, directory: Path) -> dict[str, Any]:
    """Load what the first has left, and go on."""
    training = built(mode, 2)
    if mode.warm:
        for _ in training.train(4, 4):
            training.evaluate()
    resume(training, directory, SAVED_STEP)
    told: dict[str, Any] = {"saved_bits": training.bits()}
    told["losses"] = [loss for _, loss in training.train(SAVED_STEP + 1, STEPS)]
    told["bits"] = training.bits()
    return told


LIVES = {"first": first_life, "second": second_life}


def be_rank(rank: int, name: str, life: str, directory: Path) -> None:
    """A rank, from its start to its end: never returns."""
    signal.alarm(_DEADLINE_S)  # whatever hangs
    try:
        store = dist.FileStore(str(directory / f"{life}-store"), WORLD_SIZE)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
        told = LIVES[life](MODES[name], directory)
        (directory / f"{life}-{rank}.json").write_text(json.dumps(told))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (directory / f"{life}-{rank}.failed").write_text(traceback.format_exc())
        os._exit(1)
    finally:
        os._exit(0)  # Python must not finalise while gloo's threads still have tensors


def live(name: str, life: str, directory: Path) -> bool:
    """Fork the ranks, and wait for them; returns whether all ended well."""
    pids = set()
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if not pid:
            be_rank(rank, name, life, directory)
        pids.add(pid)
    well = True
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and well:  # the others would wait for it
            well = False
            for other in pids:
                os.kill(other, signal.SIGTERM)
    return well


def main(directory: Path, names: Sequence[str]) -> None:
    import numpy.random  # noqa: F401
    import torch._dynamo  # noqa: F401 (DDP and FSDP2 do, and it takes seconds: once, not per rank)

    for name in names or MODES:
        (directory / name).mkdir()
        if live(name, "first", directory / name):
            live(name, "second", directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
