"""Non-tensor state as bytes that load without unpickling code.

Values are turned into what `torch.load(weights_only=True)` accepts. NumPy arrays, which it refuses,
become tensors and come back as arrays; NumPy scalars come back as plain numbers and strings, and
subclasses of dict as dict (or OrderedDict).
"""

import io
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from ckptd.errors import CorruptData, UnsavableState

_NDARRAY = "__ckptd_ndarray__"
_BYTES = "__ckptd_bytes__"
_INT = "__ckptd_int__"
_MARKERS = (_NDARRAY, _BYTES, _INT)
_INT_BITS = 2000  # torch's unpickler knows integers of up to 255 bytes
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)

_Path = tuple[Any, ...]
"""The keys that lead to a value: (path of the parent, key), and True if it is the key itself."""


def plain_copy(value: Any) -> Any:
    """A copy of `value` that can be saved, and that later changes to `value` don't reach.

    CUDA tensors are only on their way when this returns: wait for the stream before `serialise`.
    Raises UnsavableState, which names the path of what cannot be saved.
    """
    try:
        return _to_plain(value, ())
    except RecursionError:
        raise UnsavableState(
            "the state contains itself, or is nested too deeply to be saved"
        ) from None


def serialise(plain: Any) -> bytes:
    """What `plain_copy` gave, as bytes."""
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def dump_objects(value: Any) -> bytes:
    """`plain_copy` and `serialise`, for a value on the CPU."""
    return serialise(plain_copy(value))


def load_objects(raw: bytes) -> Any:
    """Undo `plain_copy` and `serialise`, never running code from `raw`. Raises CorruptData."""
    try:
        plain = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        return _from_plain(plain)
    except Exception as error:  # torch raises whatever its zip reader or unpickler does
        raise CorruptData(f"the objects of the segment cannot be read: {error}") from error


def _to_plain(value: Any, path: _Path) -> Any:
    kind = type(value)
    if kind is int:
        return value if value.bit_length() <= _INT_BITS else {_INT: hex(value)}
    if kind is bytes and not value:
        return {_BYTES: ""}  # torch's unpickler refuses what pickle makes of it
    if kind in _ATOMS:
        return value
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, path)
    if kind in (np.ndarray, np.memmap):
        return _plain_array(value, path)
    if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":
        item = value.item()
        if not isinstance(item, np.generic):  # a longdouble stays what it is
            return _to_plain(item, path)
    if isinstance(value, dict):
        if marker := next((m for m in _MARKERS if m in value), None):
            raise UnsavableState(f"{_name(path)} has the key {marker!r}, which is ours")
        made = OrderedDict if isinstance(value, OrderedDict) else dict
        return made(
            (_plain_key(key, path), _to_plain(item, (path, key))) for key, item in value.items()
        )
    if kind is list:
        return [_to_plain(item, (path, index)) for index, item in enumerate(value)]
    if kind is tuple:
        return tuple(_to_plain(item, (path, index)) for index, item in enumerate(value))
    if kind is set:
        return {_plain_key(item, path) for item in value}
    # Subclasses of plain numbers and strings (IntEnum, for one) would come back as another type.
    raise UnsavableState(
        f"{_name(path)} is a {kind.__module__}.{kind.__qualname__}, which "
        "cannot be saved so that it loads without running code; let the object's state_dict() give "
        "numbers, strings, tensors, NumPy arrays, or lists, tuples and dicts of them"
    )


def _name(path: _Path) -> str:
    """Where in the state that is; put together only for an error."""
    keys = []
    while path:
        path, key, *is_key = path
        keys.append(f" key {key!r}" if is_key else f"[{key!r}]")
    return "".join(reversed(keys)) or "the state"


def _plain_tensor(tensor: torch.Tensor, path: _Path) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise UnsavableState(
            f"{_name(path)} is a {type(tensor).__name__}, which can be saved as part of the model "
            "or the optimizer, but not among other state; give its local tensor instead"
        )
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise UnsavableState(
            f"{_name(path)} is a {tensor.layout} tensor on {tensor.device}, which cannot be saved "
            "among other state; give a dense one on the CPU"
        )
    plain = tensor.detach()
    if plain.is_cuda:
        landing = torch.empty(plain.shape, dtype=plain.dtype, pin_memory=True)
        return landing.copy_(plain, non_blocking=True)
    return plain.clone()


def _plain_array(array: "np.ndarray[Any, Any]", path: _Path) -> dict[str, Any]:
    if array.dtype.hasobject or np.dtype(array.dtype.str) != array.dtype:
        raise UnsavableState(
            f"{_name(path)} is a NumPy array of dtype {array.dtype}, which cannot be saved so that "
            "it comes back as it is; use a numeric dtype"
        )
    raw = bytearray(np.ascontiguousarray(array).tobytes())
    data = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return {_NDARRAY: array.dtype.str, "shape": list(array.shape), "data": data}


def _plain_key(key: Any, path: _Path) -> Any:
    if type(key) is str:
        return key
    plain = _to_plain(key, (path, key, True))
    if isinstance(plain, dict):
        raise UnsavableState(f"{_name(path)} has a key that cannot be saved: {str(key)[:40]}")
    if isinstance(plain, float) and math.isnan(plain):
        raise UnsavableState(f"{_name(path)} has NaN as a key, which cannot be found again")
    return plain


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        if _NDARRAY in value:
            data = value["data"].numpy().tobytes()
            return np.frombuffer(data, np.dtype(value[_NDARRAY])).reshape(value["shape"]).copy()
        if _INT in value:
            return int(value[_INT], 16)
        if _BYTES in value:
            return b""
        return type(value)((key, _from_plain(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_from_plain(item) for item in value)
    return value
