"""The live state of a rank: tensors by name, and everything else as plain values.

Names follow PyTorch's canonical ones: `model.<parameter>` and `<optimizer>.<parameter>.<key>`,
without the prefixes that wrappers (DDP, compile, activation checkpointing) add.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from ckptd.errors import ConfigError, StateMismatch, UnsavableState
from ckptd.segment import Header, Placed, TensorSpec

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class Stateful(Protocol):
    """Anything with the two methods of PyTorch's state protocol."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One live tensor to capture; `volatile` ones may change before the next optimizer step."""

    spec: TensorSpec
    local: torch.Tensor
    volatile: bool


class LiveState:
    """Model, optimizers and extra objects of one rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        extra: Mapping[str, Stateful],
    ) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizers = dict(optimizers)
        self.extra = dict(extra)
        for name in self.optimizers:
            if name.split(".")[0] == "model":
                raise ConfigError(
                    f"an optimizer cannot be called {name!r}: its state would be taken for the "
                    "model's; give it another name"
                )
        for name, thing in self.extra.items():
            for method in ("state_dict", "load_state_dict"):
                if not callable(getattr(thing, method, None)):
                    raise UnsavableState(
                        f"extra[{name!r}] is a {type(thing).__name__} without {method}(); give an "
                        "object that has state_dict() and load_state_dict()"
                    )

    # Capturing.

    def items(self) -> list[Item]:
        """Every tensor of the model and the optimizers, as it is now."""
        found = [
            Item(_spec("model." + names[0], tensor, tuple("model." + n for n in names[1:])),
                 _local(tensor), volatile)
            for names, tensor, volatile in self._model_tensors()
        ]  # fmt: skip
        for prefix, optimizer in self.optimizers.items():
            names = self._parameter_names(optimizer)
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        scalar = value.dim() == 0 and not value.is_cuda
                        spec = _spec(f"{prefix}.{names[parameter]}.{key}", value, ())
                        found.append(Item(spec, _local(value), scalar))
        return found

    def objects(self, step: int) -> dict[str, Any]:
        """Everything that is not a tensor of the model or an optimizer."""
        return {
            "step": step,
            "model_extra": {
                name: module.get_extra_state() for name, module in self._extra_modules().items()
            },
            "optimizers": {
                prefix: self._optimizer_objects(optimizer)
                for prefix, optimizer in self.optimizers.items()
            },
            "extra": {name: thing.state_dict() for name, thing in self.extra.items()},
            "rng": _rng_state(),
        }

    def _model_tensors(self) -> list[tuple[list[str], torch.Tensor, bool]]:
        """(names, tensor, volatile), tied parameters once with all their names."""
        found: dict[int, tuple[list[str], torch.Tensor, bool]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), ([], parameter, False))[0].append(_canonical(name))
        for prefix, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    full = _canonical(f"{prefix}.{name}" if prefix else name)
                    found.setdefault(id(buffer), ([], buffer, True))[0].append(full)
        return list(found.values())

    def _extra_modules(self) -> dict[str, nn.Module]:
        """Modules that have more to save than tensors."""
        return {
            _canonical(name): module
            for name, module in self.model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def _parameter_names(self, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
        named: dict[torch.Tensor, str] = {}
        for name, parameter in self.model.named_parameters():
            named[parameter] = _canonical(name)
        for number, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                named.setdefault(parameter, f"group{number}.{index}")
        return named

    def _optimizer_objects(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        names = self._parameter_names(optimizer)
        return {
            "groups": [
                {
                    **{key: value for key, value in group.items() if key != "params"},
                    "params": [names[parameter] for parameter in group["params"]],
                }
                for group in optimizer.param_groups
            ],
            "state": {
                names[parameter]: {
                    key: None if isinstance(value, torch.Tensor) else value
                    for key, value in state.items()
                }
                for parameter, state in optimizer.state.items()
            },
            "tensors": {
                names[parameter]: {
                    key: value.device.type
                    for key, value in state.items()
                    if isinstance(value, torch.Tensor)
                }
                for parameter, state in optimizer.state.items()
            },
        }

    # Restoring.

    def check_fits(self, header: Header, objects: Mapping[str, Any], what: str) -> None:
        """Raise StateMismatch, naming the first tensors that differ, before anything is changed."""
        saved = header.by_name()
        wrong = []
        live_names = set()
        for names, tensor, _ in self._model_tensors():
            for name in names:
                full = "model." + name
                live_names.add(full)
                placed = saved.get(full)
                if placed is None:
                    wrong.append(f"{full} is not in the snapshot")
                elif (difference := _difference(placed[0].spec, _spec(full, tensor, ()))) != "":
                    wrong.append(f"{full} {difference}")
                elif placed[0] != saved.get("model." + names[0], placed)[0]:
                    wrong.append(f"{full} is tied to {names[0]}, but was not in the snapshot")
        wrong += [
            f"{name} is in the snapshot but not in the model"
            for name in sorted(saved)
            if name.startswith("model.") and name not in live_names
        ]
        wrong += [
            f"model.{name} has {'no ' if name in live else ''}extra state in the snapshot"
            for live in [self._extra_modules()]
            for name in sorted(live.keys() ^ objects["model_extra"].keys())
        ]
        for prefix, optimizer in self.optimizers.items():
            wrong += self._optimizer_differences(prefix, optimizer, objects["optimizers"])
        wrong += [
            f"{prefix} is in the snapshot but not in the script"
            for prefix in objects["optimizers"]
            if prefix not in self.optimizers
        ]
        wrong += [
            f"extra[{name!r}] is not in the snapshot"
            for name in self.extra
            if name not in objects["extra"]
        ]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise StateMismatch(
                f"{what} does not fit this training script: {'; '.join(wrong[:5])}{more}; run it "
                "with the model and optimizer of the snapshot, or give the job another name"
            )

    def load(self, header: Header, segment: memoryview, objects: Mapping[str, Any]) -> None:
        """Copy everything into the live objects. `check_fits` must have passed."""
        saved = header.by_name()
        with torch.no_grad():
            for names, tensor, _ in self._model_tensors():
                _local(tensor).copy_(_view(saved["model." + names[0]][0], segment))
            for prefix, optimizer in self.optimizers.items():
                self._load_optimizer(
                    prefix, optimizer, objects["optimizers"][prefix], saved, segment
                )
        modules = self._extra_modules()
        for name, state in objects["model_extra"].items():
            modules[name].set_extra_state(state)
        for name, thing in self.extra.items():
            thing.load_state_dict(objects["extra"][name])
        _set_rng_state(objects["rng"])

    def _optimizer_differences(
        self, prefix: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
    ) -> list[str]:
        if prefix not in saved:
            return [f"{prefix} is not in the snapshot"]
        names = self._parameter_names(optimizer)
        live = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        there = [group["params"] for group in saved[prefix]["groups"]]
        if live != there:
            return [
                f"{prefix} has parameter groups of {[len(g) for g in live]} parameters, the "
                f"snapshot of {[len(g) for g in there]}, or in another order"
            ]
        for group, past in zip(optimizer.param_groups, saved[prefix]["groups"], strict=True):
            # A scheduler may have added keys on one side, a newer torch on the other: not both.
            here, then = sorted(group.keys() - past.keys()), sorted(past.keys() - group.keys())
            if here and then:
                return [
                    f"{prefix} is a {type(optimizer).__name__}, which has {', '.join(here)}; the "
                    f"snapshot's optimizer has {', '.join(then)}"
                ]
        return []

    def _load_optimizer(
        self,
        prefix: str,
        optimizer: torch.optim.Optimizer,
        objects: Mapping[str, Any],
        saved: Mapping[str, list[Placed]],
        segment: memoryview,
    ) -> None:
        # Not through optimizer.load_state_dict: it needs a state_dict in its own numbering, and
        # would replace tensors that the capture has planned.
        parameters = {name: p for p, name in self._parameter_names(optimizer).items()}
        optimizer.state.clear()
        for name, values in objects["state"].items():
            parameter = parameters[name]
            state = dict(values)
            for key, device in objects["tensors"][name].items():
                placed = saved[f"{prefix}.{name}.{key}"][0]
                state[key] = _like(parameter, placed, _view(placed, segment), device)
            optimizer.state[parameter] = state
        for group, values in zip(optimizer.param_groups, objects["groups"], strict=True):
            for key, value in values.items():
                if key == "params":
                    continue
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value


def _spec(name: str, tensor: torch.Tensor, aliases: tuple[str, ...]) -> TensorSpec:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UnsavableState(
            f"{name} has dtype {tensor.dtype}, which safetensors cannot hold; convert it, or keep "
            "it out of the state"
        )
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return TensorSpec(name, dtype, tuple(shape), tuple(tensor.shape), tuple(offset), aliases)
    return TensorSpec(name, dtype, tuple(tensor.shape), aliases=aliases)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that this rank has, without autograd."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor.detach()
    return tensor.detach()


def _difference(saved: TensorSpec, live: TensorSpec) -> str:
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


def _view(placed: Placed, segment: memoryview) -> torch.Tensor:
    """The tensor in the segment, not copied (the caller only reads)."""
    dtype = TORCH_DTYPES[placed.spec.dtype]
    if placed.begin == placed.end:
        return torch.empty(placed.spec.shape, dtype=dtype)
    raw = torch.frombuffer(
        segment, dtype=torch.uint8, offset=placed.begin, count=placed.end - placed.begin
    )
    return raw.view(dtype).reshape(placed.spec.shape)


def _like(
    parameter: torch.Tensor, placed: Placed, local: torch.Tensor, device_type: str
) -> torch.Tensor:
    """Optimizer state for `parameter`: sharded as it is, where the snapshot's was sharded.

    `device_type` is the kind of device it was on: Adam keeps its step on the CPU, or not.
    """
    if placed.spec.offset is not None and isinstance(parameter, DTensor):
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


def _canonical(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
