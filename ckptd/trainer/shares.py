"""Who saves what of the state that several ranks hold alike: each byte once, spread evenly.

No rank asks another. Tensors that the same ranks hold alike are thought of as one tape, in the
order of their names; the tape is cut into as many equal pieces as there are such ranks, at the
nearest rows, and each rank saves its piece (sharded snapshots of replicated state: REFT, §4). Every
rank computes the same cuts, because it has the same tensors; `fingerprint` lets others check that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptd.digest import digest
from ckptd.segment import TensorSpec


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `first` to `stop` (exclusive) of dimension `dim`; None for a tensor that is one row."""

    dim: int | None
    first: int
    stop: int

    @property
    def empty(self) -> bool:
        return self.first >= self.stop


def cut(tape: Sequence[TensorSpec], ways: int) -> list[list[Rows]]:
    """For each of `ways` pieces, the rows of each tensor of `tape` that are in it.

    A row belongs to the piece in which its first byte lies, so pieces differ by at most one row.
    Tensors of no bytes belong to the first piece.
    """
    total = sum(spec.size_bytes for spec in tape)
    starts = [-(-piece * total // ways) for piece in range(ways + 1)]
    pieces: list[list[Rows]] = [[] for _ in range(ways)]
    begin = 0
    for spec in tape:
        dim, count = _rows(spec)
        row_bytes = spec.size_bytes // count if count else 0
        if row_bytes:
            edges = [min(count, max(0, -(-(start - begin) // row_bytes))) for start in starts]
        else:
            edges = [0] + [max(count, 1)] * ways
        for piece in range(ways):
            pieces[piece].append(Rows(dim, edges[piece], edges[piece + 1]))
        begin += spec.size_bytes
    return pieces


def is_whole(spec: TensorSpec, rows: Rows) -> bool:
    """Whether `rows` are all of the tensor."""
    return (rows.first, rows.stop) == (0, max(1, _rows(spec)[1]))


def chunk(spec: TensorSpec, rows: Rows) -> TensorSpec:
    """The spec of these rows of `spec`, as a chunk of the global tensor."""
    if is_whole(spec, rows) or rows.dim is None:
        return spec
    shape = list(spec.shape)
    offset = list(spec.offset or (0,) * len(shape))
    shape[rows.dim] = rows.stop - rows.first
    offset[rows.dim] += rows.first
    return replace(
        spec,
        shape=tuple(shape),
        global_shape=spec.global_shape or spec.shape,
        offset=tuple(offset),
    )


def fingerprint(tape: Sequence[TensorSpec]) -> int:
    """The same on two ranks if, and only if, they cut the tape alike.

    Offsets are left out: ranks that hold different shards of one tensor are on different tapes.
    """
    text = ";".join(f"{s.name} {s.dtype} {s.shape} {s.aliases}" for s in tape)
    return digest(text.encode())


def _rows(spec: TensorSpec) -> tuple[int | None, int]:
    """The dimension along which cuts leave contiguous pieces, and its extent."""
    for dim, extent in enumerate(spec.shape):
        if extent != 1:
            return dim, extent
    return None, 1
