"""From segments back into the live objects of a rank."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckptd.digest import cell_span, digest, pack
from ckptd.errors import CorruptData, StateMismatch
from ckptd.segment import Header, Placed, Sidecar, TensorSpec
from ckptd.trainer.state import (
    TORCH_DTYPES,
    LiveState,
    local_of,
    set_rng_state,
    spec_of,
    state_of,
)


@dataclass(frozen=True)
class OpenSegment:
    """A segment in memory; `data` is the whole file."""

    header: Header
    data: memoryview

    def view(self, placed: Placed) -> torch.Tensor:
        """A tensor in the segment, not copied (the caller only reads)."""
        dtype = TORCH_DTYPES[placed.spec.dtype]
        if placed.begin == placed.end:
            return torch.empty(placed.spec.shape, dtype=dtype)
        raw = torch.frombuffer(
            self.data, dtype=torch.uint8, offset=placed.begin, count=placed.end - placed.begin
        )
        return raw.view(dtype).reshape(placed.spec.shape)

    def verify(self, sidecar: Sidecar) -> None:
        """Raises CorruptData if a cell does not have the digest that it had when it was captured.

        The agent has looked before; what has happened since is found after loading.
        """
        said = (sidecar.id, sidecar.rank, sidecar.size_bytes)
        if said != (self.header.id, self.header.rank, self.header.size_bytes):
            raise CorruptData(f"the digests of {sidecar.id}, rank {sidecar.rank}, are of another")
        spans = (
            cell_span(index, sidecar.size_bytes, sidecar.cell_bytes)
            for index in range(sidecar.cells)
        )
        found = pack(digest(self.data[offset : offset + length]) for offset, length in spans)
        if found != sidecar.digests:
            what = f"rank {sidecar.rank}'s segment of {sidecar.id}"
            raise CorruptData(f"{what} was damaged after its agent had looked at it")


class SavedState:
    """A snapshot as one rank sees it: its own segment, and those of the ranks it shares with."""

    def __init__(self, own: OpenSegment, others: Sequence[OpenSegment], objects: Any) -> None:
        """Raises CorruptData if the segments do not have the whole of every tensor."""
        self.objects = objects
        self.structure: dict[str, Any] = json.loads(own.header.structure)
        self.specs: dict[str, TensorSpec] = {}
        """What this rank had of each tensor, by all its names."""
        self._sources: dict[str, list[tuple[OpenSegment, Placed]]] = {}
        shared = {spec.name for spec, _ in own.header.elsewhere}
        for placed in own.header.tensors.values():
            if placed.spec.name not in shared:
                self._add(placed.spec, [(own, placed)])
        segments = {segment.header.rank: segment for segment in (own, *others)}
        chunks = {rank: segment.header.by_name() for rank, segment in segments.items()}
        for spec, share in own.header.elsewhere:
            found = [
                (segments[rank], placed)
                for rank in own.header.shares[share]
                if rank in segments
                for placed in chunks[rank].get(spec.name, ())
                if _contains(spec, placed.spec)
            ]
            if sum(placed.spec.size_bytes for _, placed in found) != spec.size_bytes:
                ranks = sorted(segments)
                raise CorruptData(f"the segments of ranks {ranks} do not have all of {spec.name}")
            self._add(spec, found)

    def _add(self, spec: TensorSpec, sources: list[tuple[OpenSegment, Placed]]) -> None:
        for name in (spec.name, *spec.aliases):
            self.specs[name] = spec
            self._sources[name] = sources

    def tensor(self, name: str) -> torch.Tensor:
        """What this rank had of the tensor; the caller only reads."""
        spec, sources = self.specs[name], self._sources[name]
        if len(sources) == 1:
            segment, placed = sources[0]
            return segment.view(placed).reshape(spec.shape)
        whole = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        base = spec.offset or (0,) * len(spec.shape)
        for segment, placed in sources:
            part = placed.spec
            begin = [o - b for o, b in zip(part.offset or base, base, strict=True)]
            place = tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))
            whole[place].copy_(segment.view(placed))
        return whole


def check_fits(state: LiveState, saved: SavedState, what: str) -> None:
    """Raise StateMismatch, naming the first tensors that differ, before anything is changed."""
    state.reshard()
    wrong = []
    live_names = set()
    for names, tensor, _ in state.model_tensors():
        for name in names:
            full = "model." + name
            live_names.add(full)
            there = saved.specs.get(full)
            if difference := _difference(there, spec_of(full, tensor)):
                wrong.append(f"{full} {difference}")
            elif there is not saved.specs.get("model." + names[0], there):
                wrong.append(f"{full} is tied to {names[0]}, but was not in the snapshot")
    wrong += [
        f"{name} is in the snapshot but not in the model"
        for name in sorted(saved.specs)
        if name.startswith("model.") and name not in live_names
    ]
    wrong += [
        f"model.{name} has {'no ' if name in live else ''}extra state in the snapshot"
        for live in [state.extra_modules()]
        for name in sorted(live.keys() ^ saved.objects["model_extra"].keys())
    ]
    for prefix, optimizer in state.optimizers.items():
        wrong += _optimizer_differences(state, prefix, optimizer, saved)
    wrong += [
        f"{prefix} is in the snapshot but not in the script"
        for prefix in saved.structure
        if prefix not in state.optimizers
    ]
    wrong += [
        f"extra[{name!r}] is not in the snapshot"
        for name in state.extra
        if name not in saved.objects["extra"]
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise StateMismatch(
            f"{what} does not fit this training script: {'; '.join(wrong[:5])}{more}; run it "
            "with the model and optimizer of the snapshot, or give the job another name"
        )


def load(state: LiveState, saved: SavedState) -> None:
    """Copy everything into the live objects. `check_fits` must have passed."""
    state.reshard()
    with torch.no_grad():
        for names, tensor, _ in state.model_tensors():
            local_of(tensor).copy_(saved.tensor("model." + names[0]))
        for prefix, optimizer in state.optimizers.items():
            _load_optimizer(state, prefix, optimizer, saved)
    modules = state.extra_modules()
    for name, value in saved.objects["model_extra"].items():
        modules[name].set_extra_state(value)
    for name, thing in state.extra.items():
        thing.load_state_dict(saved.objects["extra"][name])
    set_rng_state(saved.objects["rng"])


def _optimizer_differences(
    state: LiveState, prefix: str, optimizer: torch.optim.Optimizer, saved: SavedState
) -> list[str]:
    if prefix not in saved.structure:
        return [f"{prefix} is not in the snapshot"]
    names = state.parameter_names(optimizer)
    live = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    there = saved.structure[prefix]["groups"]
    if live != there:
        return [
            f"{prefix} has parameter groups of {[len(g) for g in live]} parameters, the "
            f"snapshot of {[len(g) for g in there]}, or in another order"
        ]
    past_groups = saved.objects["optimizers"][prefix]["groups"]
    for group, past in zip(optimizer.param_groups, past_groups, strict=True):
        # A scheduler may have added keys on one side, a newer torch on the other: not both.
        here = sorted(group.keys() - past.keys() - {"params"})
        then = sorted(past.keys() - group.keys())
        if here and then:
            return [
                f"{prefix} is a {type(optimizer).__name__}, which has {', '.join(here)}; the "
                f"snapshot's optimizer has {', '.join(then)}"
            ]
    return [
        f"{full} {difference}"
        for name, parameter in state.strangers(optimizer).items()
        for full in [f"{prefix}.{name}"]
        if (difference := _difference(saved.specs.get(full), spec_of(full, parameter)))
    ]


def _load_optimizer(
    state: LiveState, prefix: str, optimizer: torch.optim.Optimizer, saved: SavedState
) -> None:
    # Not through optimizer.load_state_dict: it needs a state_dict in its own numbering, and
    # would step an optimizer that has no state yet to make some.
    parameters = {name: p for p, name in state.parameter_names(optimizer).items()}
    objects = saved.objects["optimizers"][prefix]
    for name, parameter in state.strangers(optimizer).items():
        local_of(parameter).copy_(saved.tensor(f"{prefix}.{name}"))
    held = state_of(optimizer)
    held.clear()
    for name, keys in saved.structure[prefix]["state"].items():
        parameter = parameters[name]
        values: dict[str, Any] = {}
        for key, device in keys.items():
            if device is None:
                values[key] = objects["values"][name][key]
            else:
                full = f"{prefix}.{name}.{key}"
                values[key] = _like(parameter, saved.specs[full], saved.tensor(full), device)
        held[parameter] = values
    for group, past in zip(optimizer.param_groups, objects["groups"], strict=True):
        for key, value in past.items():
            if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                group[key].copy_(value)
            else:
                group[key] = value


def _contains(whole: TensorSpec, part: TensorSpec) -> bool:
    if part.dtype != whole.dtype or len(part.shape) != len(whole.shape):
        return False
    base = whole.offset or (0,) * len(whole.shape)
    begin = part.offset or base
    return all(
        b <= p and p + n <= b + extent
        for b, extent, p, n in zip(base, whole.shape, begin, part.shape, strict=True)
    )


def _difference(saved: TensorSpec | None, live: TensorSpec) -> str:
    if saved is None:
        return "is not in the snapshot"
    if saved.dtype != live.dtype:
        return f"has dtype {live.dtype}, the snapshot {saved.dtype}"
    if (saved.global_shape or saved.shape) != (live.global_shape or live.shape):
        return (
            f"has shape {list(live.global_shape or live.shape)}, the snapshot "
            f"{list(saved.global_shape or saved.shape)}"
        )
    if (saved.shape, saved.offset) != (live.shape, live.offset):
        return (
            f"is sharded differently: this rank has {list(live.shape)} at {live.offset}, the "
            f"snapshot {list(saved.shape)} at {saved.offset}"
        )
    return ""


def _like(
    parameter: torch.Tensor, spec: TensorSpec, local: torch.Tensor, device_type: str
) -> torch.Tensor:
    """Optimizer state for `parameter`: sharded as it is, where the snapshot's was sharded.

    `device_type` is the kind of device it was on: Adam keeps its step on the CPU, or not.
    """
    if spec.offset is not None and isinstance(parameter, DTensor):
        return DTensor.from_local(
            local.to(parameter.device, copy=True),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    device = torch.device("cpu") if device_type == "cpu" else parameter.device
    if local.shape != parameter.shape or isinstance(parameter, DTensor):
        return local.to(device, copy=True)
    # In memory as the parameter is: fused kernels go over both side by side (channels_last).
    return torch.empty_like(parameter, dtype=local.dtype, device=device).copy_(local)
