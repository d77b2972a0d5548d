"""What a rank's live state consists of: names, what may change early, chunks of sharded tensors."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ckptd.errors import StateMismatch
from ckptd.ids import SnapshotId
from ckptd.segment import parse_header
from ckptd.trainer.capture import Capture
from ckptd.trainer.loading import OpenSegment, SavedState, check_fits, load
from ckptd.trainer.objects import load_objects
from ckptd.trainer.state import LiveState


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def names(state: LiveState, volatile: bool | None = None) -> list[str]:
    return [i.spec.name for i in state.items() if volatile is None or i.volatile == volatile]


def there_and_back(state: LiveState, fresh: LiveState, directory: Path) -> None:
    """Capture `state`, then load it into `fresh`."""
    failures: list[object] = []
    capture = Capture(state, 0, 1, lambda _: None, lambda *why: failures.append(why))
    path = directory / "slot.safetensors"
    path.write_bytes(bytes(capture.lay_out(1).layout.size_bytes))
    capture.begin(SnapshotId("job", 1, 1), str(path), 4096)
    capture.wait_sealed()
    assert failures == []
    with path.open("rb") as file:
        segment = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    header = parse_header(segment, "it")
    end = header.objects_begin + header.objects_bytes
    objects = load_objects(bytes(segment[header.objects_begin : end]))
    saved = SavedState(OpenSegment(header, segment), [], objects)
    check_fits(fresh, saved, "the snapshot")
    load(fresh, saved)


class TestItems:
    def test_names_and_what_may_change_before_the_next_optimizer_step(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.Adam(model.parameters())
        state = LiveState(model, {"adam": optimizer}, {})
        stepped(model, optimizer)
        parameters = ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert names(state, volatile=True) == [
            "model.1.running_mean",
            "model.1.running_var",
            "model.1.num_batches_tracked",
            *(f"adam.{name}.step" for name in parameters),
        ]
        assert names(state, volatile=False) == [
            *(f"model.{name}" for name in parameters),
            *(f"adam.{p}.{key}" for p in parameters for key in ("exp_avg", "exp_avg_sq")),
        ]

    def test_the_tensors_are_the_live_ones(self) -> None:
        model = nn.Linear(4, 3)
        state = LiveState(model, {}, {})
        assert [i.local.data_ptr() for i in state.items()] == [
            model.weight.data_ptr(),
            model.bias.data_ptr(),
        ]
        assert not any(i.local.requires_grad for i in state.items())

    def test_looking_changes_nothing(self) -> None:
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        state = LiveState(model, {"sgd": optimizer}, {})
        state.items()
        state.objects(0)
        assert len(optimizer.state) == 0

    def test_parameters_that_the_model_does_not_have(self) -> None:
        free = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([free], momentum=0.9)
        state = LiveState(nn.Linear(1, 1), {"sgd": optimizer}, {})
        free.sum().backward()
        optimizer.step()
        assert names(state)[2:] == ["sgd.group0.0", "sgd.group0.0.momentum_buffer"]

    def test_their_values_come_back_too(self, tmp_path: Path) -> None:
        def make(value: float) -> tuple[LiveState, nn.Parameter]:
            torch.manual_seed(1)
            free = nn.Parameter(torch.full((3,), value))
            optimizer = torch.optim.SGD([free], lr=1.0)
            return LiveState(nn.Linear(1, 1), {"sgd": optimizer}, {}), free

        (state, free), (fresh, there) = make(1.0), make(2.0)
        there_and_back(state, fresh, tmp_path)
        assert torch.equal(free, there)

    def test_their_shapes_are_checked(self, tmp_path: Path) -> None:
        def make(extent: int) -> LiveState:
            free = nn.Parameter(torch.ones(extent))
            return LiveState(nn.Linear(1, 1), {"sgd": torch.optim.SGD([free], lr=1.0)}, {})

        with pytest.raises(
            StateMismatch, match=r"sgd\.group0\.0 has shape \[4\], the snapshot \[3\]"
        ):
            there_and_back(make(3), make(4), tmp_path)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A world of one rank, without a network."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
class TestDistributed:
    def test_ddp_has_the_names_of_the_model(self) -> None:
        """Whether it is compiled inside, outside, or not at all."""
        model = nn.Linear(4, 3)
        for wrapped in (
            DistributedDataParallel(model),
            torch.compile(DistributedDataParallel(model)),
            DistributedDataParallel(torch.compile(model)),
        ):
            items = LiveState(wrapped, {}, {}).items()
            assert [(i.spec.name, i.ranks) for i in items] == [
                ("model.weight", (0,)),
                ("model.bias", (0,)),
            ]

    def test_sharded_tensors_come_back_as_chunks(self, tmp_path: Path) -> None:
        """With FSDP2, parameters and optimizer state are DTensors; in DDP's names."""

        def make() -> tuple[nn.Module, torch.optim.Optimizer]:
            model = fully_shard(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
            optimizer = torch.optim.AdamW(model.parameters())
            stepped(model, optimizer)
            return model, optimizer

        (model, optimizer), (other, fresh) = make(), make()
        state = LiveState(model, {"adam": optimizer}, {})
        spec = next(i.spec for i in state.items() if i.spec.name == "adam.0.weight.exp_avg")
        assert (spec.shape, spec.global_shape, spec.offset) == ((3, 4), (3, 4), (0, 0))
        there_and_back(state, LiveState(other, {"adam": fresh}, {}), tmp_path)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert isinstance(two, DTensor)
            assert torch.equal(one.to_local(), two.to_local())
            moment = fresh.state[two]["exp_avg"]
            assert isinstance(moment, DTensor)
            assert torch.equal(moment.to_local(), optimizer.state[one]["exp_avg"].to_local())
        stepped(model, optimizer)
        stepped(other, fresh)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.to_local(), two.to_local())

    def test_another_sharding_does_not_fit(self, tmp_path: Path) -> None:
        mesh = init_device_mesh("cpu", (1,))

        def make(sharded: bool) -> LiveState:
            model = nn.Linear(4, 3, bias=False)
            if sharded:
                shard = DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)])
                model.weight = nn.Parameter(shard)
            return LiveState(model, {}, {})

        with pytest.raises(StateMismatch, match=r"model\.weight is sharded differently: this rank"):
            there_and_back(make(sharded=True), make(sharded=False), tmp_path)
