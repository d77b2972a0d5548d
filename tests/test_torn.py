"""Writes to captured tensors that pass no gate: found, named, and in no snapshot that is kept."""

import logging
import mmap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckptd.agent.store import read_segment_sidecar, verify_cells
from ckptd.ids import SnapshotId
from ckptd.segment import parse_header
from ckptd.trainer import capture as capturing
from ckptd.trainer.capture import Capture
from ckptd.trainer.cpu import WINDOW_BYTES, CpuCopies, window_offsets
from ckptd.trainer.loading import OpenSegment
from ckptd.trainer.pace import Pace
from ckptd.trainer.plan import Piece
from ckptd.trainer.state import LiveState

CELL_BYTES = 1 << 16
DEADLINE_S = 30.0
ROWS = 40_000


class Net(nn.Module):
    """A large embedding, a layer, and an average of its weights beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, 8)
        self.linear = nn.Linear(8, 64)
        self.average = nn.Parameter(self.linear.weight.detach().clone(), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(rows))


class Training:
    """One rank that captures at each step into two slots, as a Checkpointer would."""

    def __init__(self, directory: Path, audit_every: int = 0, sharded: bool = False) -> None:
        torch.manual_seed(3)
        self.model = Net()
        if sharded:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (1,)))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)
        self.state = LiveState(self.model, {"adam": self.optimizer}, {})
        self.sealed: list[int] = []
        self.failed: list[tuple[int, str, str]] = []
        self.capture = Capture(
            self.state,
            0,
            1,
            lambda id: self.sealed.append(id.step),
            lambda id, outcome, reason: self.failed.append((id.step, outcome, reason)),
            audit_every=audit_every,
        )
        self.optimizer.register_step_pre_hook(lambda *_: self.capture.gate())
        self.step_by_optimizer()
        size_bytes = self.capture.lay_out(0).layout.size_bytes
        self.slots = [directory / f"slot-{number}" for number in range(2)]
        for slot in self.slots:
            slot.write_bytes(bytes(size_bytes))
        self.step = 0

    def step_by_optimizer(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.arange(0, ROWS, 7)).square().mean().backward()
        self.optimizer.step()

    def begin(self) -> dict[str, torch.Tensor]:
        """Begin the capture of the next step; returns the state as it must come back."""
        self.step += 1
        expected = {item.spec.key: item.local.clone() for item in self.state.items()}
        slot = self.slots[self.step % 2]
        self.capture.begin(SnapshotId("job", 1, self.step), str(slot), CELL_BYTES)
        return expected

    def train(self, steps: int) -> dict[str, torch.Tensor]:
        """Optimizer step, capture, over and over; returns what the last capture must hold."""
        expected: dict[str, torch.Tensor] = {}
        for _ in range(steps):
            self.step_by_optimizer()
            expected = self.begin()
            self.capture.wait_sealed()
        return expected

    def check(self, expected: dict[str, torch.Tensor]) -> None:
        """The snapshot of the newest step is exactly `expected`."""
        path = self.slots[self.step % 2]
        verify_cells(path, read_segment_sidecar(path))
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        header = parse_header(data, "it")
        assert header.id.step == self.step
        segment = OpenSegment(header, data)
        for key, placed in header.tensors.items():
            assert torch.equal(segment.view(placed), expected[key]), key

    @torch.no_grad()
    def update_average(self) -> None:
        self.model.average.lerp_(self.model.linear.weight, 0.1)

    @torch.no_grad()
    def edit_by_hand(self) -> None:
        self.model.linear.weight.mul_(1.01)

    @torch.no_grad()
    def edit_eight_rows(self) -> None:
        self.model.embedding.weight[20_000:20_008] += 1

    def step_without_hooks(self) -> None:
        """What a step replayed as a CUDA graph, or compiled, looks like from outside."""
        self.optimizer.zero_grad()
        self.model(torch.arange(0, ROWS, 7)).square().mean().backward()
        hooks, self.optimizer._optimizer_step_pre_hooks = (
            self.optimizer._optimizer_step_pre_hooks,
            type(self.optimizer._optimizer_step_pre_hooks)(),
        )
        self.optimizer.step()
        self.optimizer._optimizer_step_pre_hooks = hooks


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


@pytest.fixture
def one_rank_group(tmp_path: Path) -> Iterator[None]:
    init = f"file://{tmp_path}/group"
    dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Held:
    """Holds up copies in the background until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        land = CpuCopies.land

        def held(copies: CpuCopies, cell: int, reached: Callable[[int], None] | None) -> None:
            assert self.go.wait(DEADLINE_S)
            land(copies, cell, reached)

        monkeypatch.setattr(CpuCopies, "land", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    held.go.set()
    yield held
    held.go.set()


WRITERS: dict[str, tuple[Callable[[Training], None], str]] = {
    "an average": (Training.update_average, "model.average"),
    "an edit by hand": (Training.edit_by_hand, "model.linear.weight"),
    "eight rows": (Training.edit_eight_rows, "model.embedding.weight"),
}


class TestFromTheBeginning:
    @pytest.mark.parametrize("writer", WRITERS)
    def test_the_first_captures_find_who_writes_and_nothing_is_lost(
        self, writer: str, training: Training, caplog: pytest.LogCaptureFixture
    ) -> None:
        write, name = WRITERS[writer]
        for _ in range(5):
            training.step_by_optimizer()
            expected = training.begin()
            write(training)  # forgets the gate
            training.capture.wait_sealed()
            training.check(expected)
        assert training.sealed == [1, 2, 3, 4, 5]
        assert name in training.capture.stats.eager_because
        assert training.capture.stats.torn == 0
        warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert len([text for text in warnings if "call Checkpointer.gate() before" in text]) == 1

    def test_steps_without_hooks(self, training: Training) -> None:
        for _ in range(5):
            training.step_without_hooks()
            expected = training.begin()
            training.capture.wait_sealed()
            training.check(expected)
        assert "and the gate never ran" in training.capture.stats.eager_because

    @pytest.mark.parametrize("writer", WRITERS)
    def test_with_the_gate_all_is_well(self, writer: str, training: Training) -> None:
        write, _ = WRITERS[writer]
        for _ in range(6):
            training.step_by_optimizer()
            expected = training.begin()
            training.capture.gate()
            write(training)
            training.capture.wait_sealed()
            training.check(expected)
        assert training.capture.stats.eager_because == ""
        assert training.sealed == [1, 2, 3, 4, 5, 6]


class TestLater:
    """The three audited captures are over; now copies are lazy, and samples are compared."""

    @pytest.mark.parametrize("writer", ["an average", "an edit by hand"])
    def test_a_write_before_the_copy_tears_the_snapshot(
        self, writer: str, training: Training, held: Held
    ) -> None:
        write, name = WRITERS[writer]
        before = training.train(4)
        held.go.clear()
        training.step_by_optimizer()
        training.begin()
        write(training)  # the background has copied nothing yet
        held.go.set()
        training.capture.wait_sealed()
        reason = f"{name} was written to before it was copied"
        assert training.failed == [(5, "torn", reason)]
        assert training.capture.stats.torn == 1
        assert parse_header(training.slots[0].read_bytes(), "the one before").id.step == 4
        training.step -= 1
        training.check(before)  # the snapshot before is there, whole
        training.step += 1
        # From now on all is copied at once, and the same writes do no harm.
        training.step_by_optimizer()
        expected = training.begin()
        write(training)
        training.capture.wait_sealed()
        training.check(expected)

    def test_a_write_after_the_copy_leaves_the_snapshot_whole(self, training: Training) -> None:
        training.train(4)
        training.step_by_optimizer()
        expected = training.begin()
        training.capture.wait_sealed()
        training.update_average()
        training.check(expected)
        training.step_by_optimizer()  # the gate sees it
        assert "model.average" in training.capture.stats.eager_because

    def test_a_step_without_hooks(self, training: Training, held: Held) -> None:
        training.train(4)
        held.go.clear()
        training.step_by_optimizer()
        training.begin()
        training.step_without_hooks()
        held.go.set()
        training.capture.wait_sealed()
        assert [outcome for _, outcome, _ in training.failed] == ["torn"]
        expected = training.begin()
        training.capture.wait_sealed()
        training.check(expected)

    def test_a_fused_step_of_a_sharded_model_without_hooks(
        self, tmp_path: Path, held: Held, one_rank_group: None
    ) -> None:
        """FSDP2: version counters of the parameters' shards say nothing of such a step."""
        training = Training(tmp_path, sharded=True)
        before = training.train(4)
        held.go.clear()
        training.step_by_optimizer()
        training.begin()
        training.step_without_hooks()
        held.go.set()
        training.capture.wait_sealed()
        ((step, outcome, reason),) = training.failed
        assert (step, outcome) == (5, "torn")
        assert "was written to before it was copied" in reason
        training.step -= 1
        training.check(before)
        training.step += 1
        expected = training.begin()
        training.capture.wait_sealed()
        training.check(expected)

    def test_eight_rows_pass_the_samples_but_not_the_next_audit(self, tmp_path: Path) -> None:
        """What the docstring says: a sparse write is nearly always missed by samples."""
        training = Training(tmp_path, audit_every=8)
        for _ in range(10):
            training.step_by_optimizer()
            training.begin()
            if training.step > 3:
                training.edit_eight_rows()
            training.capture.wait_sealed()
        assert "model.embedding.weight" in training.capture.stats.eager_because
        assert training.capture.stats.audits == 4

    def test_gradient_accumulation_is_no_step_without_hooks(self, training: Training) -> None:
        """Captures with no optimizer step between them: the gate never ran, and nothing changed."""
        for _ in range(6):
            training.begin()
            training.capture.wait_sealed()
        assert training.capture.stats.eager_because == ""


class TestTheEngine:
    def test_the_gate_does_the_work_that_is_left(self, training: Training, held: Held) -> None:
        """It does not wait for a background that has not begun."""
        training.train(4)
        held.go.clear()
        training.step_by_optimizer()
        expected = training.begin()
        training.step_by_optimizer()  # would wait for ever if it waited for the background
        held.go.set()
        training.capture.wait_sealed()
        training.check(expected)
        assert training.failed == []

    def test_state_that_was_replaced_by_a_load_is_captured_anew(self, training: Training) -> None:
        training.train(4)
        training.optimizer.load_state_dict(training.optimizer.state_dict())
        training.capture.gate()
        with torch.no_grad():
            for state in training.optimizer.state.values():
                state["exp_avg"] = state["exp_avg"].clone()  # a new tensor of the same shape
        expected = training.train(1)
        training.check(expected)
        assert training.sealed == [1, 2, 3, 4, 5]

    def test_a_rate_limit_does_not_hold_up_the_gate(
        self, training: Training, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)
        waited: list[float] = []
        training.capture._pace = Pace(1e6, clock=lambda: 0.0, sleep=waited.append)
        expected = training.train(2)
        training.check(expected)
        assert sum(waited) > 1.0  # at 1 MB/s, some MB of state

    def test_volatile_state_that_is_large_is_named(
        self, training: Training, caplog: pytest.LogCaptureFixture
    ) -> None:
        training.model.register_buffer("history", torch.zeros(70 << 20, dtype=torch.uint8))
        training.capture.lay_out(1)
        assert "the largest is model.history, with 70 MiB" in caplog.text


class TestWindows:
    @pytest.mark.parametrize("size", [1, 63, 64, 65, 1 << 20, (1 << 20) + 1, 5 << 20, 1 << 26])
    def test_lie_in_the_tensor_apart_from_one_another(self, size: int) -> None:
        for shift in (0, 1, 12345):
            found = window_offsets(size, shift)
            assert 1 <= len(found) <= 16
            ends = [offset + length for offset, length in found]
            assert all(length == min(WINDOW_BYTES, size) for _, length in found)
            assert found[0][0] >= 0
            assert ends[-1] <= size
            assert all(end <= begin for end, (begin, _) in zip(ends, found[1:], strict=False))

    def test_none_for_nothing(self) -> None:
        assert window_offsets(0) == []


class TestPace:
    def test_spreads_copies(self) -> None:
        now = [10.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds

        pace = Pace(100.0, clock=lambda: now[0], sleep=sleep)
        for _ in range(5):
            pace.wait(100)
        assert now[0] == 14.0
        now[0] = 100.0  # a pause is not made up for
        pace.wait(100)
        pace.wait(100)
        assert now[0] == 101.0


def test_what_is_copied_is_told_bit_by_bit_so_that_it_can_be_digested_in_the_cache() -> None:
    source = torch.arange(1 << 20, dtype=torch.uint8)
    slot = memoryview(bytearray(2 * source.nbytes))
    copies = CpuCopies([Piece("t", source, 4096, 4096 + source.nbytes, False)], slot, 1 << 20, None)
    copies.begin(lazily=True, audited=False, number=0)
    reached: list[int] = []
    copies.land(0, reached.append)
    copies.land(1, None)
    assert reached == sorted(reached)
    assert reached[-1] == 1 << 20
    assert len(reached) >= 4
    assert slot[4096 : 4096 + source.nbytes] == memoryview(source.numpy())
