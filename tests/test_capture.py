"""Captures of real models and optimizers into a slot file, and back: bit for bit, or not at all."""

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptd.agent.store import read_segment_sidecar, verify_cells
from ckptd.errors import CorruptData, StateMismatch, UnsavableState
from ckptd.ids import SnapshotId
from ckptd.segment import LENGTH_BYTES, parse_header, sidecar_path
from ckptd.trainer import capture as capturing
from ckptd.trainer import loading
from ckptd.trainer.capture import Capture, CaptureError, LayoutChanged
from ckptd.trainer.cpu import CpuCopies
from ckptd.trainer.objects import load_objects
from ckptd.trainer.state import LiveState

CELL_BYTES = 4096
DEADLINE_S = 30.0


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, tied weights, a frozen parameter, buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.hidden = nn.Linear(4 * 16, 6, bias=False)
        self.tied = nn.Linear(4 * 16, 6)
        self.tied.weight = self.hidden.weight
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.low = nn.Parameter(torch.randn(6, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("spiral", torch.tensor([1 + 2j]).conj())
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1)
        return self.hidden(x) * self.tied(x) + self.low.float()


@dataclass
class Run:
    """A training loop that can be stopped, captured and compared."""

    model: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]
    extra: dict[str, Any] = field(default_factory=dict)
    state: LiveState = field(init=False)

    def __post_init__(self) -> None:
        self.state = LiveState(self.model, self.optimizers, self.extra)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(4, 1, 6, 6)).square().mean()
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
            for thing in self.extra.values():
                if isinstance(thing, torch.optim.lr_scheduler.LRScheduler):
                    thing.step()
            losses.append(loss.item())
        return losses

    def bits(self) -> dict[str, bytes]:
        """Every captured tensor's bytes, and all else as text."""
        found = {item.spec.key: item.local.clone().contiguous().resolve_conj().reshape(-1)
                 for item in self.state.items()}  # fmt: skip
        raw = {k: v.view(torch.uint8).numpy().tobytes() for k, v in found.items()}
        raw["objects"] = repr(self.state.objects(0)).encode()
        return raw


Maker = Callable[[], Run]


def one(make: Callable[[Any], torch.optim.Optimizer]) -> Maker:
    def build() -> Run:
        model = Net()
        return Run(model, {"optimizer": make([p for p in model.parameters() if p.requires_grad])})

    return build


def several() -> Run:
    """Two optimizers by name, groups with a tensor lr, schedulers."""
    model = Net()
    adam = torch.optim.AdamW(
        [{"params": model.conv.parameters(), "lr": torch.tensor(1e-2)},
         {"params": model.norm.parameters(), "weight_decay": 0.5}]
    )  # fmt: skip
    sgd = torch.optim.SGD([*model.tied.parameters(), model.low], lr=0.1, momentum=0.9)
    return Run(
        model,
        {"body": adam, "head": sgd},
        {
            "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(adam, 10),
            "once": torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=50),
        },
    )


class Permuted(nn.Module):
    """A weight that lies in memory in another order than its shape says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 36).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


def permuted() -> Run:
    model = Permuted()
    return Run(model, {"optimizer": torch.optim.AdamW(model.parameters(), fused=True)})


class Counting(nn.Module):
    """Has extra state besides tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(36, 6)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.inner(x.flatten(1)) * self.seen

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def counting() -> Run:
    model = nn.Sequential(Counting())
    return Run(model, {"optimizer": torch.optim.Adam(model.parameters())})


MAKERS: dict[str, Maker] = {
    "adam": one(torch.optim.Adam),
    "amsgrad": one(lambda p: torch.optim.Adam(p, amsgrad=True)),
    "adamw-fused": one(lambda p: torch.optim.AdamW(p, fused=True)),
    "adamw-foreach": one(lambda p: torch.optim.AdamW(p, foreach=True)),
    "sgd": one(lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd-momentum": one(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "rmsprop": one(lambda p: torch.optim.RMSprop(p, centered=True)),
    "adagrad": one(torch.optim.Adagrad),
    "several": several,
    "permuted": permuted,
    "extra-state": counting,
}


class Slots:
    """Slot files made by hand, and a capture engine that reports into lists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealed: list[SnapshotId] = []
        self.failed: list[tuple[SnapshotId, str, str]] = []

    def engine(self, run: Run) -> Capture:
        return Capture(run.state, 0, 1, self.sealed.append, lambda *args: self.failed.append(args))

    def make(self, size_bytes: int, name: str = "slot.safetensors") -> Path:
        path = self.directory / name
        path.write_bytes(bytes(size_bytes))
        return path

    def take(self, run: Run, step: int = 7) -> Path:
        """Capture `run` as it is now."""
        capture = self.engine(run)
        path = self.make(capture.lay_out(step).layout.size_bytes)
        capture.begin(SnapshotId("job", 1, step), str(path), CELL_BYTES)
        capture.wait_sealed()
        assert self.failed == []
        verify_cells(path, read_segment_sidecar(path))
        return path


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path)


def load(run: Run, path: Path) -> int:
    """What Checkpointer does to load a segment."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    segment = memoryview(mapped)
    header = parse_header(segment, path.name)
    end = header.objects_begin + header.objects_bytes
    objects = load_objects(bytes(segment[header.objects_begin : end]))
    saved = loading.SavedState(loading.OpenSegment(header, segment), [], objects)
    loading.check_fits(run.state, saved, "the snapshot")
    loading.load(run.state, saved)
    step: int = objects["step"]
    return step


class TestThereAndBack:
    @pytest.mark.parametrize("kind", MAKERS)
    def test_every_bit_comes_back_and_training_goes_on_as_if_nothing_had_been(
        self, kind: str, slots: Slots
    ) -> None:
        torch.manual_seed(1)
        run = MAKERS[kind]()
        run.train(3)
        path = slots.take(run)
        want_bits = run.bits()
        want_losses = run.train(4)
        want_end = run.bits()

        torch.manual_seed(2)
        fresh = MAKERS[kind]()
        fresh.train(1)  # its own optimizer state, BatchNorm statistics and random numbers
        assert load(fresh, path) == 7
        assert fresh.bits() == want_bits
        assert fresh.train(4) == want_losses
        assert fresh.bits() == want_end

    def test_into_an_optimizer_that_has_made_no_step(self, slots: Slots) -> None:
        run = MAKERS["adam"]()
        run.train(2)
        path = slots.take(run)
        bits, losses = run.bits(), run.train(2)
        fresh = MAKERS["adam"]()
        load(fresh, path)
        assert fresh.bits() == bits
        assert fresh.train(2) == losses

    def test_an_optimizer_without_state_is_neither_stepped_nor_given_any(
        self, slots: Slots
    ) -> None:
        """Nor is one that would have state, before its first step."""
        for kind in ("sgd", "adam"):
            run = MAKERS[kind]()
            if kind == "sgd":
                run.train(2)
            steps: list[object] = []
            for optimizer in run.optimizers.values():
                optimizer.register_step_pre_hook(lambda *args, steps=steps: steps.append(args))
            before = run.bits()
            path = slots.take(run)
            assert [len(optimizer.state) for optimizer in run.optimizers.values()] == [0]
            assert steps == []
            assert run.bits() == before
            load(MAKERS[kind](), path)

    def test_tied_weights_are_stored_once_and_stay_tied(self, slots: Slots) -> None:
        run = MAKERS["sgd"]()
        raw = slots.take(run).read_bytes()
        header = parse_header(raw, "it")
        assert header.tensors["model.hidden.weight"].spec.aliases == ("model.tied.weight",)
        assert "model.tied.weight" not in header.tensors
        assert "model.scratch" not in header.tensors
        fresh = MAKERS["sgd"]()
        load(fresh, slots.directory / "slot.safetensors")
        assert fresh.model.tied.weight is fresh.model.hidden.weight

    def test_a_tensor_lr_is_kept_and_filled(self, slots: Slots) -> None:
        """A compiled step holds on to the tensor itself."""
        run = several()
        run.train(3)
        path = slots.take(run)
        fresh = several()
        lr = fresh.optimizers["body"].param_groups[0]["lr"]
        load(fresh, path)
        assert fresh.optimizers["body"].param_groups[0]["lr"] is lr
        assert lr.item() == run.optimizers["body"].param_groups[0]["lr"].item()

    def test_a_compiled_models_names_are_those_of_the_plain_one(self, slots: Slots) -> None:
        run = counting()
        run.train(2)
        compiled = Run(torch.compile(run.model), run.optimizers)  # never called, so never compiled
        path = slots.take(compiled)
        assert sorted(parse_header(path.read_bytes(), "it").by_name())[0] == "model.0.inner.bias"
        fresh = counting()
        load(fresh, path)
        assert fresh.model[0].seen == 2

    def test_a_slot_is_used_again_and_again(self, slots: Slots) -> None:
        run = MAKERS["adamw-foreach"]()
        run.train(1)
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        for step in range(1, 5):
            run.train(1)
            capture.begin(SnapshotId("job", 1, step), str(path), CELL_BYTES)
            capture.wait_sealed()
            verify_cells(path, read_segment_sidecar(path))
            fresh = MAKERS["adamw-foreach"]()
            load(fresh, path)
            assert fresh.bits() == run.bits()
        assert [id.step for id in slots.sealed] == [1, 2, 3, 4]

    @pytest.mark.parametrize("cell_bytes", [1000, 4096, 5000, 1 << 20])
    def test_digests_are_those_of_the_file_whatever_the_cell_size(
        self, cell_bytes: int, slots: Slots
    ) -> None:
        run = MAKERS["sgd"]()
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        capture.begin(SnapshotId("job", 1, 1), str(path), cell_bytes)
        capture.wait_sealed()
        verify_cells(path, read_segment_sidecar(path))


class TestDoesNotFit:
    def mismatch(self, fresh: Run, path: Path) -> str:
        """The message; nothing may have been changed."""
        before, rng = fresh.bits(), torch.get_rng_state()
        with pytest.raises(StateMismatch) as caught:
            load(fresh, path)
        assert fresh.bits() == before
        assert torch.equal(rng, torch.get_rng_state())
        return str(caught.value)

    @pytest.fixture
    def path(self, slots: Slots) -> Path:
        run = MAKERS["adam"]()
        run.train(1)
        return slots.take(run)

    def changed(self, change: Callable[[Any], None]) -> Run:
        model = Net()
        change(model)
        return Run(
            model,
            {"optimizer": torch.optim.Adam([p for p in model.parameters() if p.requires_grad])},
        )

    def test_another_shape(self, path: Path) -> None:
        def change(model: Any) -> None:
            model.low = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))

        text = self.mismatch(self.changed(change), path)
        assert text.startswith("the snapshot does not fit this training script: model.low has ")
        assert "has shape [7], the snapshot [6]; run it with the model" in text

    def test_another_dtype(self, path: Path) -> None:
        def change(model: Any) -> None:
            model.low = nn.Parameter(torch.zeros(6))

        assert "model.low has dtype F32, the snapshot BF16;" in self.mismatch(
            self.changed(change), path
        )

    def test_tensors_on_one_side_only(self, path: Path) -> None:
        def change(model: Any) -> None:
            del model.mask
            model.register_buffer("cover", torch.zeros(2))

        text = self.mismatch(self.changed(change), path)
        assert "script: model.cover is not in the snapshot; model.mask is in the snap" in text

    def test_many_differences_are_counted(self, path: Path) -> None:
        fresh = Run(nn.Linear(3, 3), {"optimizer": torch.optim.Adam([torch.zeros(1)])})
        assert "more); run it with" in self.mismatch(fresh, path)

    def test_weights_that_were_not_tied(self, slots: Slots) -> None:
        model = Net()
        model.tied.weight = nn.Parameter(torch.zeros(6, 64))
        path = slots.take(Run(model, {"optimizer": torch.optim.SGD(model.parameters())}))
        text = self.mismatch(MAKERS["sgd"](), path)
        assert "model.tied.weight is tied to hidden.weight, but was not in the snapshot" in text

    def test_other_parameter_groups(self, path: Path) -> None:
        model = Net()
        halves = [{"params": model.conv.parameters()}, {"params": model.norm.parameters()}]
        text = self.mismatch(Run(model, {"optimizer": torch.optim.Adam(halves)}), path)
        assert "optimizer has parameter groups of [2, 2] parameters, the snapshot of [7]" in text

    def test_another_optimizer(self, path: Path) -> None:
        text = self.mismatch(MAKERS["sgd"](), path)
        assert "optimizer is a SGD, which has dampening, momentum, nesterov; the snapshot's" in text

    def test_another_optimizer_name(self, path: Path) -> None:
        run = MAKERS["adam"]()
        text = self.mismatch(Run(run.model, {"opt": run.optimizers["optimizer"]}), path)
        assert "opt is not in the snapshot; optimizer is in the snapshot but not in the scr" in text

    def test_an_extra_object_that_is_new(self, path: Path) -> None:
        run = MAKERS["adam"]()
        scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizers["optimizer"])
        text = self.mismatch(Run(run.model, run.optimizers, {"lr": scheduler}), path)
        assert "extra['lr'] is not in the snapshot" in text

    def test_extra_state_of_a_module_on_one_side_only(self, slots: Slots) -> None:
        path = slots.take(counting())
        model = nn.Sequential(nn.ModuleDict({"inner": nn.Linear(36, 6)}))
        fresh = Run(model, {"optimizer": torch.optim.Adam(model.parameters())})
        assert "model.0 has extra state in the snapshot" in self.mismatch(fresh, path)
        other = slots.take(fresh)
        assert "model.0 has no extra state in the snapshot" in self.mismatch(counting(), other)


class TestCannotBeCaptured:
    def plan(self, run: Run, slots: Slots) -> str:
        with pytest.raises(UnsavableState) as caught:
            slots.engine(run).lay_out(1)
        return str(caught.value)

    def test_a_dtype_that_safetensors_lacks(self, slots: Slots) -> None:
        model = nn.Linear(1, 1)
        model.register_buffer("wide", torch.zeros(1, dtype=torch.complex128))
        text = self.plan(Run(model, {"sgd": torch.optim.SGD(model.parameters())}), slots)
        assert text.startswith("model.wide has dtype torch.complex128, which safetensors cannot")

    def test_a_value_deep_in_extra(self, slots: Slots) -> None:
        class Loader:
            def state_dict(self) -> Any:
                return {"workers": [{"position": 3}, {"hook": print}]}

            def load_state_dict(self, state: Any) -> None: ...

        model = nn.Linear(1, 1)
        run = Run(model, {"sgd": torch.optim.SGD(model.parameters())}, {"data": Loader()})
        assert self.plan(run, slots).startswith("['extra']['data']['workers'][1]['hook'] is a ")

    def test_two_tensors_of_one_name(self, slots: Slots) -> None:
        weight = nn.Parameter(torch.zeros(1))
        one, two = (torch.optim.Adam([weight]) for _ in range(2))
        one.state[weight]["group0.0.x"] = torch.zeros(1)
        two.state[weight]["x"] = torch.zeros(1)
        run = Run(nn.Module(), {"a": one, "a.group0.0": two})
        assert self.plan(run, slots) == "two tensors have the same name: a.group0.0.group0.0.x"

    def test_an_optimizer_called_model(self) -> None:
        """Its tensors could not be told from the model's own."""
        model = nn.Linear(1, 1)
        with pytest.raises(Exception, match="an optimizer cannot be called 'model'"):
            LiveState(model, {"model": torch.optim.SGD(model.parameters())}, {})

    def test_extra_without_the_two_methods(self) -> None:
        with pytest.raises(UnsavableState, match=r"extra\['x'\] is a int without state_dict\(\)"):
            LiveState(nn.Linear(1, 1), {}, {"x": 3})  # type: ignore[dict-item]


class TestChanges:
    @pytest.fixture
    def run(self) -> Run:
        return MAKERS["adam"]()

    def begin(self, capture: Capture, path: Path) -> None:
        capture.begin(SnapshotId("job", 1, 2), str(path), CELL_BYTES)

    def test_state_that_appears_is_a_change_of_layout(self, run: Run, slots: Slots) -> None:
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        run.train(1)
        with pytest.raises(LayoutChanged, match=r"changed: optimizer\.conv\.bias\.exp_avg is new;"):
            self.begin(capture, path)
        assert capture.lay_out(2).layout.size_bytes > path.stat().st_size
        with pytest.raises(CaptureError, match=r"slot .* has \d+ bytes, not \d+"):
            self.begin(capture, path)
        self.begin(capture, slots.make(capture.lay_out(2).layout.size_bytes, "other.safetensors"))
        capture.wait_sealed()
        assert slots.sealed == [SnapshotId("job", 1, 2)]

    def test_objects_that_outgrow_their_room(self, slots: Slots) -> None:
        class Log:
            lines: list[str] = []  # noqa: RUF012 (the test's own)

            def state_dict(self) -> Any:
                return {"lines": self.lines}

            def load_state_dict(self, state: Any) -> None: ...

        model, log = nn.Linear(1, 1), Log()
        run = Run(model, {"sgd": torch.optim.SGD(model.parameters())}, {"log": log})
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        log.lines = ["x" * 100_000]
        self.begin(capture, path)
        capture.wait_sealed()
        assert "state has grown to 1" in capture.outgrown
        assert slots.failed == [(SnapshotId("job", 1, 2), "dropped", capture.outgrown)]
        with pytest.raises(LayoutChanged, match=r"state has grown to \d+ bytes, \d+ were reserved"):
            self.begin(capture, path)
        self.begin(capture, slots.make(capture.lay_out(1).layout.size_bytes, "larger.safetensors"))
        capture.wait_sealed()
        assert slots.sealed == [SnapshotId("job", 1, 2)]

    def test_a_slot_that_is_not_there(self, run: Run, slots: Slots) -> None:
        capture = slots.engine(run)
        capture.lay_out(1)
        with pytest.raises(CaptureError, match="cannot map the slot"):
            self.begin(capture, slots.directory / "none.safetensors")

    def test_a_slot_that_the_agent_made_anew(self, run: Run, slots: Slots) -> None:
        """It is mapped anew, and the old one is let go: a mapping keeps its memory."""
        capture = slots.engine(run)
        size_bytes = capture.lay_out(1).layout.size_bytes
        first = slots.make(size_bytes)
        self.begin(capture, first)
        capture.wait_sealed()
        first.unlink()
        sidecar_path(first).unlink()
        second = slots.make(size_bytes, "second.safetensors")
        self.begin(capture, second)
        capture.wait_sealed()
        verify_cells(second, read_segment_sidecar(second))
        maps = Path("/proc/self/maps").read_text()
        assert str(second) in maps
        assert str(first) not in maps

    def test_a_slot_of_which_another_segment_has_the_name_by_now(
        self, run: Run, slots: Slots
    ) -> None:
        """This process was stopped in a capture, and its agent was restarted meanwhile."""
        theirs = slots.take(run)
        sidecar = sidecar_path(theirs).read_bytes()
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes, "same.safetensors")
        sidecar_path(path).write_bytes(sidecar)
        capture.at_point = lambda at: theirs.replace(path) if at == "copied" else None
        self.begin(capture, path)
        capture.wait_sealed()
        assert [outcome for _, outcome, _ in slots.failed] == ["dropped"]
        assert sidecar_path(path).read_bytes() == sidecar
        verify_cells(path, read_segment_sidecar(path))


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """No capture is audited: all are copied in the background, from the first."""
    monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)


class SlowCopier:
    """Holds up the copy of the first cell in the background until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self._copy = CpuCopies._copy
        monkeypatch.setattr(CpuCopies, "_copy", lambda *args: self.copy(*args))

    def copy(self, copies: CpuCopies, cell: int, *rest: Any) -> None:
        if threading.current_thread().name == "ckptd-capture":
            self.begun.set()
            assert self.go.wait(DEADLINE_S)
        self._copy(copies, cell, *rest)


@pytest.mark.usefixtures("lazily")
class TestTheGate:
    @pytest.fixture
    def slow(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCopier]:
        slow = SlowCopier(monkeypatch)
        yield slow
        slow.go.set()

    def test_an_optimizer_step_waits_for_the_copy(self, slow: SlowCopier, slots: Slots) -> None:
        run = MAKERS["adamw-foreach"]()
        run.train(2)
        capture = slots.engine(run)
        at_gate, stepped = threading.Event(), threading.Event()

        def gate(*_: object) -> None:
            at_gate.set()
            capture.gate()

        run.optimizers["optimizer"].register_step_pre_hook(gate)
        path = slots.make(capture.lay_out(2).layout.size_bytes)
        before = run.bits()
        capture.begin(SnapshotId("job", 1, 2), str(path), CELL_BYTES)
        assert slow.begun.wait(DEADLINE_S)
        # BatchNorm and the random numbers go on during the copy: they were captured before.
        loss = run.model(torch.randn(4, 1, 6, 6)).sum()
        loss.backward()

        def step() -> None:
            run.optimizers["optimizer"].step()
            stepped.set()

        training = threading.Thread(target=step)
        training.start()
        assert at_gate.wait(DEADLINE_S)
        assert not stepped.is_set()
        slow.go.set()
        assert stepped.wait(DEADLINE_S)
        training.join()
        capture.wait_sealed()
        assert run.bits() != before
        fresh = MAKERS["adamw-foreach"]()
        load(fresh, path)
        assert fresh.bits() == before

    def test_is_open_when_nothing_is_captured(self, slots: Slots) -> None:
        slots.engine(MAKERS["sgd"]()).gate()

    def test_opens_when_the_copy_fails(self, monkeypatch: pytest.MonkeyPatch, slots: Slots) -> None:
        def fail(copies: CpuCopies, cell: int, reached: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(CpuCopies, "land", fail)
        run = MAKERS["sgd"]()
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        capture.begin(SnapshotId("job", 1, 1), str(path), CELL_BYTES)
        capture.gate()
        capture.wait_sealed()
        assert slots.failed == [(SnapshotId("job", 1, 1), "dropped", "the device is gone")]
        with pytest.raises(CorruptData, match="was not sealed"):
            read_segment_sidecar(path)

    def test_opens_when_no_thread_can_be_had(
        self, monkeypatch: pytest.MonkeyPatch, slots: Slots
    ) -> None:
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        run = MAKERS["sgd"]()
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(CaptureError, match="cannot start the thread"):
            capture.begin(SnapshotId("job", 1, 1), str(path), CELL_BYTES)
        capture.gate()
        capture.wait_sealed()


POINTS = ["begun", "volatile copied", "copied", "sidecar written", "header written", "sealed"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestDeathInTheMiddle:
    @pytest.mark.parametrize("before", ["fresh slot", "sealed slot"])
    @pytest.mark.parametrize("point", POINTS)
    def test_leaves_no_segment_or_a_whole_one(self, point: str, before: str, slots: Slots) -> None:
        """The slot may hold an older segment, of the same layout, that is overwritten."""
        model = nn.Linear(40, 40)
        run = Run(model, {"sgd": torch.optim.SGD(model.parameters(), lr=0.1)})
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        if before == "sealed slot":
            capture.begin(SnapshotId("job", 1, 1), str(path), CELL_BYTES)
            capture.wait_sealed()
            with torch.no_grad():
                model.weight.add_(1)
        child = os.fork()
        if not child:
            capture.at_point = lambda at: os._exit(9) if at == point else None
            capture.begin(SnapshotId("job", 1, 2), str(path), CELL_BYTES)
            capture.wait_sealed()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 9
        if point == "sealed":
            sidecar = read_segment_sidecar(path)
            verify_cells(path, sidecar)
            assert sidecar.id == SnapshotId("job", 1, 2)
            other = nn.Linear(40, 40)
            load(Run(other, {"sgd": torch.optim.SGD(other.parameters(), lr=0.1)}), path)
            assert torch.equal(other.weight, model.weight)
        else:
            assert path.read_bytes()[:LENGTH_BYTES] == bytes(LENGTH_BYTES)
            with pytest.raises(CorruptData, match="was not sealed"):
                read_segment_sidecar(path)

    def test_the_points_are_all_there_are(self, slots: Slots) -> None:
        run, seen = MAKERS["sgd"](), []
        capture = slots.engine(run)
        path = slots.make(capture.lay_out(1).layout.size_bytes)
        capture.at_point = seen.append
        capture.begin(SnapshotId("job", 1, 1), str(path), CELL_BYTES)
        capture.wait_sealed()
        assert seen == POINTS
