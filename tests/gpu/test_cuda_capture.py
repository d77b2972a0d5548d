"""Captures of CUDA tensors on a real device: ordered by events, never waited for, bit for bit."""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptd.agent.store import read_segment_sidecar, verify_cells
from ckptd.ids import SnapshotId
from ckptd.segment import parse_header
from ckptd.trainer import capture as capturing
from ckptd.trainer import cuda
from ckptd.trainer.capture import Capture
from ckptd.trainer.loading import OpenSegment, SavedState, check_fits, load
from ckptd.trainer.objects import load_objects
from ckptd.trainer.pace import Pace
from ckptd.trainer.state import LiveState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CELL_BYTES = 1 << 20
WIDTH = 1024
LONG_CYCLES = 400_000_000  # some tenths of a second on any device


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)])
        self.norm = nn.BatchNorm1d(WIDTH)
        self.small = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(200))
        self.turned = nn.Parameter(torch.randn(64, WIDTH).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.layers(x)) @ self.turned
        return x.square().mean() + sum(p.square().sum() for p in self.small)


class Training:
    """One rank on the device, with two slots."""

    def __init__(self, directory: Path, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = Net().cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.state = LiveState(self.model, {"adam": self.optimizer}, {})
        self.failed: list[tuple[SnapshotId, str, str]] = []
        self.capture = Capture(
            self.state, 0, 1, lambda _: None, lambda *args: self.failed.append(args)
        )
        self.optimizer.register_step_pre_hook(lambda *_: self.capture.gate())
        self.train()
        size_bytes = self.capture.lay_out(0).layout.size_bytes
        self.slots = [directory / f"slot-{number}" for number in range(2)]
        for slot in self.slots:
            slot.write_bytes(bytes(size_bytes))
        self.capture.prepare([str(slot) for slot in self.slots])
        for mapped in self.capture._mapped.values():
            assert mapped.pinned is not None
            assert mapped.pinned.ready.wait(60)
            assert not mapped.pinned.failed
        self.steps = 0

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(32, WIDTH, device="cuda")).backward()
        self.optimizer.step()

    def begin(self) -> None:
        self.steps += 1
        slot = str(self.slots[self.steps % 2])
        self.capture.begin(SnapshotId("job", 1, self.steps), slot, CELL_BYTES)

    def bits(self) -> dict[str, torch.Tensor]:
        return {item.spec.key: item.local.cpu().clone() for item in self.state.items()}

    def check(self, expected: dict[str, torch.Tensor]) -> None:
        self.capture.wait_sealed()
        assert self.failed == []
        path = self.slots[self.steps % 2]
        verify_cells(path, read_segment_sidecar(path))
        segment = self.open(path)
        for key, placed in segment.header.tensors.items():
            assert torch.equal(segment.view(placed), expected[key]), key

    def open(self, path: Path) -> OpenSegment:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        return OpenSegment(parse_header(data, path.name), data)


@pytest.fixture(params=["graph", "one by one", "paced"])
def training(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Training]:
    if request.param == "one by one":
        monkeypatch.setattr(cuda.CudaCopies, "_record", lambda _: None)
    made = Training(tmp_path)
    if request.param == "paced":
        made.capture._pace = Pace(1e9)
    yield made
    made.capture.wait_sealed()


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "AUDITED_FIRST", 0)


def test_every_bit_of_every_capture(training: Training) -> None:
    """Audited ones, and lazy ones, while training goes on behind the gate."""
    for _ in range(8):
        training.train()
        expected = training.bits()
        training.begin()
        training.train()
        training.check(expected)
    assert training.capture.stats.eager_because == ""


def test_what_was_captured_loads_into_another_model(training: Training, tmp_path: Path) -> None:
    training.train()
    expected = training.bits()
    training.begin()
    training.check(expected)
    segment = training.open(training.slots[training.steps % 2])
    header = segment.header
    end = header.objects_begin + header.objects_bytes
    objects = load_objects(bytes(segment.data[header.objects_begin : end]))
    (tmp_path / "other").mkdir()
    fresh = Training(tmp_path / "other", seed=2)
    saved = SavedState(segment, [], objects)
    check_fits(fresh.state, saved, "it")
    load(fresh.state, saved)
    found = fresh.bits()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    training.train()
    fresh.train()
    one, two = training.bits(), fresh.bits()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.usefixtures("lazily")
def test_the_copy_waits_for_the_training_stream_and_the_next_step_for_the_copy(
    training: Training,
) -> None:
    """The device is kept busy, so that everything is still to come when the calls return."""
    training.train()
    expected = training.bits()
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.add_(1)
    expected = {
        key: value + 1 if key.startswith("model.") and "norm.r" not in key and "num" not in key
        else value
        for key, value in expected.items()
    }  # fmt: skip
    torch.cuda._sleep(LONG_CYCLES)
    training.begin()
    training.train()  # passes the gate; nothing of it may be in the snapshot
    training.check(expected)


@pytest.mark.usefixtures("lazily")
def test_the_training_thread_never_waits_for_the_device(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for _ in range(3):  # pinned memory is allocated, and the copies are recorded
        training.train()
        training.begin()
        training.capture.wait_sealed()
    training.train()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.begin()
        training.capture.gate()
        assert not torch.cuda.current_stream().query(), "the device should still be busy"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.capture.wait_sealed()
    assert training.failed == []


WRITES: dict[str, Callable[[Training], None]] = {
    "all of a layer": lambda t: t.model.layers[0].weight.mul_(1.5),
    "a small parameter": lambda t: t.model.small[7].add_(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_passes_no_gate_is_found(write: str, tmp_path: Path) -> None:
    """By the audits of the first captures, from the device's own fingerprints."""
    training = Training(tmp_path)
    for _ in range(3):
        training.train()
        expected = training.bits()
        training.begin()
        with torch.no_grad():
            WRITES[write](training)
        training.check(expected)
        torch.cuda.synchronize()
    assert "was written to after step()" in training.capture.stats.eager_because


@pytest.mark.usefixtures("lazily")
def test_a_write_during_a_lazy_copy_tears_it(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    with torch.cuda.stream(cuda._streams[torch.device("cuda", 0)]
                           if cuda._streams else torch.cuda.Stream()):  # fmt: skip
        torch.cuda._sleep(LONG_CYCLES)  # the copy stream is held up
    training.begin()
    with torch.no_grad():
        training.model.layers[0].weight.mul_(1.5)  # on the training stream, which is not
    training.capture.wait_sealed()
    torch.cuda.synchronize()
    if training.failed:
        ((_, outcome, reason),) = training.failed
        assert (outcome, "model.layers.0.weight" in reason) == ("torn", True)
    else:  # the copy came first: the snapshot is whole, and the gate finds the write
        training.train()
        torch.cuda.synchronize()
        training.begin()
        assert "model.layers.0.weight" in training.capture.stats.eager_because


def test_no_copy_goes_over_the_edge_of_a_registered_piece(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.begin()
    training.capture.wait_sealed()
    mapped = training.capture._mapped[str(training.slots[1])]
    (copies,) = [c for c in mapped.copies or [] if isinstance(c, cuda.CudaCopies)]
    base = copies._host.data_ptr()
    for target, source in copies._moves:
        begin = target.data_ptr() - base
        assert begin // cuda._PIN_BYTES == (begin + len(target) - 1) // cuda._PIN_BYTES
        assert len(target) == len(source)
