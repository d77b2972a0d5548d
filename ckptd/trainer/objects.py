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


def dump_objects(value: Any) -> bytes:
    """Serialise `value`. Raises UnsavableState, which names the path of what cannot be saved."""
    try:
        plain = _to_plain(value, "")
    except RecursionError:
        raise UnsavableState(
            "the state contains itself, or is nested too deeply to be saved"
        ) from None
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def load_objects(raw: bytes) -> Any:
    """Undo `dump_objects`, never running code from `raw`. Raises CorruptData."""
    try:
        plain = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        return _from_plain(plain)
    except Exception as error:  # torch raises whatever its zip reader or unpickler does
        raise CorruptData(f"the objects of the segment cannot be read: {error}") from error


def _to_plain(value: Any, path: str) -> Any:
    if type(value) is int and value.bit_length() > _INT_BITS:
        return {_INT: hex(value)}
    if type(value) is bytes and not value:
        return {_BYTES: ""}  # torch's unpickler refuses what pickle makes of it
    if type(value) in _ATOMS:
        return value
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, path)
    if type(value) in (np.ndarray, np.memmap):
        return _plain_array(value, path)
    if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":
        item = value.item()
        if not isinstance(item, np.generic):  # a longdouble stays what it is
            return _to_plain(item, path)
    if isinstance(value, dict):
        if marker := next((m for m in _MARKERS if m in value), None):
            raise UnsavableState(f"{path or 'the state'} has the key {marker!r}, which is ours")
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind(
            (_plain_key(key, path), _to_plain(item, f"{path}[{key!r}]"))
            for key, item in value.items()
        )
    if type(value) is list:
        return [_to_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if type(value) is tuple:
        return tuple(_to_plain(item, f"{path}[{index}]") for index, item in enumerate(value))
    if type(value) is set:
        return {_plain_key(item, path) for item in value}
    # Subclasses of plain numbers and strings (IntEnum, for one) would come back as another type.
    raise UnsavableState(
        f"{path or 'the state'} is a {type(value).__module__}.{type(value).__qualname__}, which "
        "cannot be saved so that it loads without running code; let the object's state_dict() give "
        "numbers, strings, tensors, NumPy arrays, or lists, tuples and dicts of them"
    )


def _plain_tensor(tensor: torch.Tensor, path: str) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise UnsavableState(
            f"{path} is a {type(tensor).__name__}, which can be saved as part of the model or the "
            "optimizer, but not among other state; give its local tensor instead"
        )
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise UnsavableState(
            f"{path} is a {tensor.layout} tensor on {tensor.device}, which cannot be saved among "
            "other state; give a dense one on the CPU"
        )
    plain = tensor.detach()
    if plain.is_cuda:
        return plain.cpu()
    # torch.save writes the whole storage of a view.
    whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if whole else plain.clone()


def _plain_array(array: "np.ndarray[Any, Any]", path: str) -> dict[str, Any]:
    if array.dtype.hasobject or np.dtype(array.dtype.str) != array.dtype:
        raise UnsavableState(
            f"{path} is a NumPy array of dtype {array.dtype}, which cannot be saved so that it "
            "comes back as it is; use a numeric dtype"
        )
    raw = bytearray(np.ascontiguousarray(array).tobytes())
    data = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return {_NDARRAY: array.dtype.str, "shape": list(array.shape), "data": data}


def _plain_key(key: Any, path: str) -> Any:
    plain = _to_plain(key, f"{path} key {key!r}")
    if isinstance(plain, dict):
        raise UnsavableState(f"{path} has a key that cannot be saved: {str(key)[:40]}")
    if isinstance(plain, float) and math.isnan(plain):
        raise UnsavableState(f"{path} has NaN as a key, which cannot be found again")
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
