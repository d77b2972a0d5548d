"""The live state of a rank: tensors by name, and everything else as plain values.

Names follow PyTorch's canonical ones: `model.<parameter>` and `<optimizer>.<parameter>.<key>`,
without the prefixes that wrappers (DDP, compile, activation checkpointing) add. A parameter that
the model does not have is called after its place in the optimizer, `<optimizer>.group0.0`, and is
this rank's own.
"""

import json
import operator
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from ckptd.errors import ConfigError, UnsavableState
from ckptd.segment import TensorSpec

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
    """One live tensor to capture; `volatile` ones may change before the next optimizer step.

    `ranks` hold it alike, this one included; empty for a tensor that is this rank's own.
    """

    spec: TensorSpec
    local: torch.Tensor
    volatile: bool
    ranks: tuple[int, ...] = ()


class LiveState:
    """Model, optimizers and extra objects of one rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        extra: Mapping[str, Stateful],
        replicated_over: Sequence[int] = (),
    ) -> None:
        """`replicated_over`: ranks that hold the same plain tensors, where DDP does not say so."""
        self.model = model
        self._alike: tuple[int, ...] = tuple(sorted(replicated_over))
        self._not_alike: set[str] = set()
        model = getattr(model, "_orig_mod", model)  # torch.compile's
        if isinstance(model, DistributedDataParallel):
            self.model = model.module
            self._alike = self._alike or _ranks_of(model.process_group)
            # DDP's reducer knows a parameter of the root module as ".name".
            self._not_alike = {_canonical(n).lstrip(".") for n in model.parameters_to_ignore}
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

    def items(self) -> list[Item]:
        """Every tensor of the model and the optimizers, as it is now."""
        found = [
            Item(_spec("model." + names[0], tensor, tuple("model." + n for n in names[1:])),
                 local_of(tensor), volatile,
                 () if volatile else self._ranks(tensor, names[0]))
            for names, tensor, volatile in self.model_tensors()
        ]  # fmt: skip
        for prefix, optimizer in self.optimizers.items():
            names, strangers = self.parameter_names(optimizer), self.strangers(optimizer)
            found += [
                Item(_spec(f"{prefix}.{name}", parameter, ()), local_of(parameter), False)
                for name, parameter in strangers.items()
            ]
            own = _is_zero(optimizer)  # each rank has other state
            for parameter, state in state_of(optimizer).items():
                name = names[parameter]
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        scalar = value.dim() == 0 and not value.is_cuda
                        spec = _spec(f"{prefix}.{name}.{key}", value, ())
                        alike = not own and value.dim() > 0 and name not in strangers
                        ranks = self._ranks(value, name) if alike else ()
                        found.append(Item(spec, local_of(value), scalar, ranks))
        return found

    def structure(self) -> str:
        """What of the optimizers stays as it is from step to step, as JSON.

        For each optimizer the parameters of each group, and for each parameter the kind of device
        of each tensor in its state (null for a value that is no tensor).
        """
        return json.dumps(
            {
                prefix: {
                    "groups": [
                        [names[parameter] for parameter in group["params"]]
                        for group in optimizer.param_groups
                    ],
                    "state": {
                        names[parameter]: {
                            key: value.device.type if isinstance(value, torch.Tensor) else None
                            for key, value in state.items()
                        }
                        for parameter, state in state_of(optimizer).items()
                    },
                }
                for prefix, optimizer in self.optimizers.items()
                for names in [self.parameter_names(optimizer)]
            },
            separators=(",", ":"),
        )

    def objects(self, step: int, census: "Census | None" = None) -> dict[str, Any]:
        """Everything that is not a tensor of the model or of an optimizer's state.

        `census`, if it still holds, spares a walk over the whole state.
        """
        census = census or self.census()
        return {
            "step": step,
            "model_extra": {
                name: module.get_extra_state() for name, module in census.extra_modules.items()
            },
            "optimizers": {
                prefix: {
                    "groups": [
                        {key: value for key, value in group.items() if key != "params"}
                        for group in optimizer.param_groups
                    ],
                    "values": {
                        name: {key: held[key] for key in keys}
                        for name, held, keys in census.values[prefix]
                    },
                }
                for prefix, optimizer in self.optimizers.items()
            },
            "extra": {name: thing.state_dict() for name, thing in self.extra.items()},
            "rng": _rng_state(),
        }

    def census(self) -> "Census":
        """What the state consists of now."""
        return Census(self)

    def model_tensors(self) -> list[tuple[list[str], torch.Tensor, bool]]:
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

    def extra_modules(self) -> dict[str, nn.Module]:
        """Modules that have more to save than tensors."""
        return {
            _canonical(name): module
            for name, module in self.model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def parameter_names(self, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
        """The name of each parameter that the optimizer may have."""
        named: dict[torch.Tensor, str] = {}
        for name, parameter in self.model.named_parameters():
            named[parameter] = _canonical(name)
        for number, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                named.setdefault(parameter, f"group{number}.{index}")
        return named

    def strangers(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Parameters of the optimizer that the model does not have, by name."""
        known = set(self.model.parameters())
        names = self.parameter_names(optimizer)
        return {name: parameter for parameter, name in names.items() if parameter not in known}

    def reshard(self) -> bool:
        """Put FSDP2's own shards back where a forward pass has left whole parameters.

        Returns whether there is any such module. A pass without a backward leaves them whole.
        """
        found = False
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
                found = True
        return found

    def _ranks(self, tensor: torch.Tensor, name: str) -> tuple[int, ...]:
        if isinstance(tensor, DTensor):
            return _replicas(tensor)
        return () if name in self._not_alike else self._alike


class Census:
    """What a state consisted of at one moment; `holds()` says, quickly, whether it still does.

    It compares identities and addresses, so that a tensor that was replaced by one that looks the
    same is noticed (`optimizer.load_state_dict` in mid-run does that).
    """

    def __init__(self, state: LiveState) -> None:
        modules = list(state.model.modules())
        self._dicts: list[tuple[dict[str, Any], list[Any]]] = [
            (held, list(held.values()))
            for module in modules
            for held in (module._parameters, module._buffers, module._modules)
            if held
        ]
        self._empty = [
            held
            for module in modules
            for held in (module._parameters, module._buffers, module._modules)
            if not held
        ]
        self.extra_modules = state.extra_modules()
        """Modules that have more to save than tensors, by name."""
        self.values = {
            prefix: [
                (names[parameter], held, keys)
                for parameter, held in state_of(optimizer).items()
                if (keys := [k for k, v in held.items() if not isinstance(v, torch.Tensor)])
            ]
            for prefix, optimizer in state.optimizers.items()
            for names in [state.parameter_names(optimizer)]
        }
        """Of each optimizer: a parameter's name, its state, and what of it is no tensor."""
        self._optimizers = list(state.optimizers.values())
        self._groups = [[list(g["params"]) for g in o.param_groups] for o in self._optimizers]
        self._states = [
            [(held, list(held), list(held.values())) for held in state_of(optimizer).values()]
            for optimizer in self._optimizers
        ]
        tensors = [
            value
            for values in [
                *(values for _, values in self._dicts),
                *(values for states in self._states for _, _, values in states),
                *(state.strangers(optimizer).values() for optimizer in self._optimizers),
            ]
            for value in values
            if isinstance(value, torch.Tensor)
        ]
        self._sharded = [(t, t._local_tensor) for t in tensors if isinstance(t, DTensor)]
        self._locals = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
        self._addresses = [local.data_ptr() for local in self._locals]

    def holds(self) -> bool:
        """Whether every tensor is the same object at the same address, and none came or went."""
        return (
            not any(self._empty)
            and all(_same(held.values(), past) for held, past in self._dicts)
            and all(map(self._optimizer_holds, self._optimizers, self._groups, self._states))
            and all(tensor._local_tensor is local for tensor, local in self._sharded)
            and [local.data_ptr() for local in self._locals] == self._addresses
        )

    def _optimizer_holds(
        self,
        optimizer: torch.optim.Optimizer,
        groups: list[list[torch.Tensor]],
        states: list[tuple[dict[str, Any], list[str], list[Any]]],
    ) -> bool:
        now = state_of(optimizer)
        if len(optimizer.param_groups) != len(groups) or len(now) != len(states):
            return False
        for group, past in zip(optimizer.param_groups, groups, strict=True):
            if not _same(group["params"], past):
                return False
        for held, (known, keys, values) in zip(now.values(), states, strict=True):
            if held is not known or (
                not _same(held.values(), values) and _differ(held, keys, values)
            ):
                return False
        return True


def _differ(held: dict[str, Any], keys: list[str], values: list[Any]) -> bool:
    """Whether more has changed than values that are no tensors, and stay none."""
    return list(held) != keys or any(
        now is not past and (isinstance(now, torch.Tensor) or isinstance(past, torch.Tensor))
        for now, past in zip(held.values(), values, strict=True)
    )


def state_of(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """Where the optimizer has its state: ZeroRedundancyOptimizer's is in another one inside."""
    if _is_zero(optimizer) and hasattr(optimizer, "optim"):
        optimizer = optimizer.optim
    return optimizer.state


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that this rank has, without autograd."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor.detach()
    return tensor.detach()


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """What this rank has of `tensor`. Raises UnsavableState for a dtype that cannot be saved."""
    return _spec(name, tensor, ())


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Undo what `LiveState.objects` took down of the random number generators."""
    words = state["python"]["words"]
    random.setstate((state["python"]["version"], tuple(words.tolist()), state["python"]["gauss"]))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _same(values: Any, past: list[Any]) -> bool:
    return len(values) == len(past) and all(map(operator.is_, values, past))


def _ranks_of(group: Any) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _is_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Looked up, not imported: that takes 0.2 s at each restart, and who has one has it there."""
    module = sys.modules.get("torch.distributed.optim")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def _replicas(tensor: DTensor) -> tuple[int, ...]:
    """Ranks with the same part of `tensor`: those that differ in its Replicate dimensions only."""
    mesh = tensor.device_mesh
    here = mesh.get_coordinate()
    if here is None or not any(isinstance(p, Replicate) for p in tensor.placements):
        return ()
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else coordinate
        for placement, coordinate in zip(tensor.placements, here, strict=True)
    )
    return tuple(sorted(mesh.mesh[index].flatten().tolist()))


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


def _canonical(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _rng_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
