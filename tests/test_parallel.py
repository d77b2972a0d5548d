"""Captures of real ranks, in all the ways in which models are trained on several: see ranks.py.

What each rank told of itself is in JSON files; the segments lie beside them.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.agent.store import read_segment_sidecar, verify_cells
from ckptd.segment import DTYPE_BYTES, Header, TensorSpec, parse_header

from . import ranks
from .ranks import MODES, SAVED_STEP, STEPS, WORLD_SIZE, segment_of

pytestmark = pytest.mark.timeout(300)  # the first test waits for all the ranks

ALL_RANKS = range(WORLD_SIZE)
COPIES = {
    "plain": {".*": 4},
    "ddp-all": {".*": 4},
    "ddp-ignored": {r"(model|adam)\.(first|one).*": 4},
    "ddp-compiled": {r"(model|adam)\.first\.bias.*": 4},
    # Nothing says that these plain tensors are the same on all ranks,
    "tensor": {r"(model|adam)\.(1\.norm|2)\..*": 4},
    # or that these shards of theirs are.
    "tensor-fsdp": {r"(model|adam)\.(1\.norm|2)\..*": 2},
    # Two stages have a tensor of this name and shape.
    "pipeline-same-names": {r"(model|adam)\.norm0\..*": 2},
}
"""How often settled tensors are saved, where it is not once."""
DIVIDED = {
    "ddp", "ddp-ignored", "ddp-several", "ddp-accumulated", "ddp-compiled", "zero", "replicated",
    "replicate-module", "hybrid", "tensor", "tensor-replicated", "tensor-fsdp", "pipeline",
    "pipeline-same-names",
}  # fmt: skip
"""Modes in which some ranks hold something alike and say so."""


@dataclass
class Mode:
    """What the ranks of one mode have left behind."""

    name: str
    directory: Path

    def told(self, life: str, rank: int) -> dict[str, Any]:
        path = self.directory / f"{life}-{rank}.json"
        if not path.exists():
            failures = [f.read_text() for f in sorted(self.directory.glob("*.failed"))]
            pytest.fail("\n".join(failures) or f"rank {rank} came to no end")
        return json.loads(path.read_text())

    def header(self, rank: int) -> Header:
        path = segment_of(self.directory, STEPS, rank)
        return parse_header(path.read_bytes(), path.name)

    def items(self, rank: int) -> dict[str, dict[str, Any]]:
        """What the rank had in its live state after the last step, by name."""
        return {item["name"]: item for item in self.told("first", rank)["items"]}

    def counts(self) -> dict[tuple[str, tuple[int, ...]], np.ndarray]:
        """How often the segments have each element of each tensor, by name and global shape."""
        found: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
        for rank in ALL_RANKS:
            for placed in self.header(rank).tensors.values():
                _count(found, placed.spec)
        return found


def _key(spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    return spec.name, spec.shape if spec.global_shape is None else spec.global_shape


def _count(counts: dict[tuple[str, tuple[int, ...]], np.ndarray], spec: TensorSpec) -> None:
    _, shape = _key(spec)
    whole = counts.setdefault(_key(spec), np.zeros(shape, int))
    begin = spec.offset if spec.offset is not None else (0,) * len(shape)
    # A box of no elements may lie beyond the end.
    box = tuple(slice(b, b + n) for b, n in zip(begin, spec.shape, strict=True))
    assert whole[box].size == np.prod(spec.shape, dtype=int)
    whole[box] += 1


def _spec(item: dict[str, Any]) -> TensorSpec:
    shape, offset = item["global_shape"], item["offset"]
    return TensorSpec(
        item["name"],
        item["dtype"],
        tuple(item["shape"]),
        None if shape is None else tuple(shape),
        None if offset is None else tuple(offset),
        tuple(item["aliases"]),
    )


def _copies(mode: str, name: str) -> int:
    return next((n for what, n in COPIES.get(mode, {}).items() if re.fullmatch(what, name)), 1)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All modes, in one run: to import torch takes longer than most of them."""
    directory = tmp_path_factory.mktemp("lives")
    done = subprocess.run(
        [sys.executable, ranks.__file__, str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return directory


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, lives: Path) -> Mode:
    return Mode(request.param, lives / request.param)


def test_training_that_is_captured_is_training_that_is_not(mode: Mode) -> None:
    """Loss for loss and bit for bit, while the copies go on in the background."""
    for rank in ALL_RANKS:
        told = mode.told("first", rank)
        assert told["failed"] == []
        assert told["sealed"] == list(range(1, STEPS + 1))
        assert told["eager_because"] == ""
        assert told["captured_losses"] == told["losses"]
        assert told["captured_bits"] == told["bits"]
        for step in (SAVED_STEP, STEPS):
            path = segment_of(mode.directory, step, rank)
            verify_cells(path, read_segment_sidecar(path))


def test_fresh_ranks_go_on_as_if_nothing_had_happened(mode: Mode) -> None:
    for rank in ALL_RANKS:
        first, second = mode.told("first", rank), mode.told("second", rank)
        assert second["saved_bits"] == first["saved_bits"]
        assert second["losses"] == first["losses"][SAVED_STEP:]
        assert second["bits"] == first["bits"]
        assert first["bits"] != first["saved_bits"]


def test_every_byte_is_saved_once(mode: Mode) -> None:
    """What is settled: by one rank. What is volatile: by each rank that has it."""
    want: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    volatile = set()
    for rank in ALL_RANKS:
        for item in mode.items(rank).values():
            _count(want, _spec(item))
            if item["volatile"]:
                volatile.add(item["name"])
    for (name, _), counts in want.items():
        if name not in volatile:
            assert (counts >= 1).all()
            counts[...] = _copies(mode.name, name)
    got = mode.counts()
    assert got.keys() == want.keys()
    for key, counts in want.items():
        assert np.array_equal(got[key], counts), key


def test_what_ranks_hold_alike_is_spread_evenly(mode: Mode) -> None:
    """Each share's pieces are of one size, give or take a row."""
    found = set()
    headers = [mode.header(rank) for rank in ALL_RANKS]
    for rank in ALL_RANKS:
        tapes: dict[tuple[int, ...], list[TensorSpec]] = {}
        for item in mode.items(rank).values():
            if len(item["ranks"]) > 1 and MODES[mode.name].once:
                tapes.setdefault(tuple(item["ranks"]), []).append(_spec(item))
        assert set(headers[rank].shares) == tapes.keys()
        for members, tape in tapes.items():
            assert rank in members
            found.add(members)
            names = {spec.name for spec in tape}
            sizes = [
                sum(p.spec.size_bytes for p in headers[member].tensors.values()
                    if p.spec.name in names)
                for member in members
            ]  # fmt: skip
            total = sum(spec.size_bytes for spec in tape)
            assert sum(sizes) == total
            row = max(map(_row_bytes, tape))
            assert all(abs(size - total / len(members)) <= row for size in sizes), sizes
            assert row < total / len(members) / 3, "this would prove nothing"
    assert bool(found) == (mode.name in DIVIDED)


def test_ranks_that_share_say_so_alike(mode: Mode) -> None:
    """All that name a share name as many ranks as do, and the same tape."""
    said = [tuple(s) for rank in ALL_RANKS for s in mode.told("first", rank)["shares"]]
    for (_, members, _), times in Counter(said).items():
        assert times == members
    assert len({group for group, _, _ in said}) == len(set(said))
    assert bool(said) == (mode.name in DIVIDED)


@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.compare])
def test_nothing_is_left_out_that_torch_would_save(name: str, lives: Path) -> None:
    """The same names, and the same elements of each, whoever saves them."""
    mode = Mode(name, lives / name)
    boxes, saved = mode.told("first", 0)["torch"], mode.counts()
    ours: dict[str, np.ndarray] = {}
    for rank in ALL_RANKS:
        for item in mode.items(rank).values():
            spec = _spec(item)
            for each in (spec.name, *spec.aliases):
                ours[_as_torch_says(each)] = saved[_key(spec)]
    assert ours.keys() == boxes.keys()
    for fqn, counts in ours.items():
        theirs = np.zeros(counts.shape, int)
        for offsets, sizes in boxes[fqn]:
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            assert theirs[box].shape == tuple(sizes)
            theirs[box] += 1
        assert (theirs == 1).all(), fqn
        assert np.array_equal(theirs > 0, counts > 0), fqn


def _as_torch_says(name: str) -> str:
    optimizer, _, rest = name.partition(".")
    return name if optimizer == "model" else f"optim.state.{rest}"


def _row_bytes(spec: TensorSpec) -> int:
    rest = list(itertools.dropwhile(lambda extent: extent == 1, spec.shape))[1:]
    return DTYPE_BYTES[spec.dtype] * int(np.prod(rest, dtype=int))
