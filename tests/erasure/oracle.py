"""The code again, slow and plain, from its definition: a second opinion for every engine.

GF(256) with the polynomial 0x11d and a = 2. The generator is a Vandermonde matrix at the points
0, 1, a, a², … times the inverse of its top square. Nothing here comes from the code under test.
"""

from collections.abc import Sequence
from functools import cache, reduce

POLYNOMIAL = 0x11D


def multiply(a: int, b: int) -> int:
    """Product in GF(256), by shifting and adding, as at school."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a & 0x100:
            a ^= POLYNOMIAL
        b >>= 1
    return product


PRODUCTS = [bytes(multiply(a, b) for b in range(256)) for a in range(256)]
INVERSES = [0] + [PRODUCTS[a].index(1) for a in range(1, 256)]

Matrix = list[list[int]]


def matrix_product(left: Matrix, right: Matrix) -> Matrix:
    columns = list(zip(*right, strict=True))
    return [
        [
            reduce(lambda x, y: x ^ y, (PRODUCTS[a][b] for a, b in zip(row, column, strict=True)))
            for column in columns
        ]
        for row in left
    ]


def inverse(matrix: Matrix) -> Matrix:
    """Gauss-Jordan elimination beside an identity matrix."""
    size = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        pivot = next(r for r in range(i, size) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        scale = PRODUCTS[INVERSES[rows[i][i]]]
        rows[i] = [scale[value] for value in rows[i]]
        for r in range(size):
            if r != i and rows[r][i]:
                factor = PRODUCTS[rows[r][i]]
                rows[r] = [x ^ factor[y] for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[size:] for row in rows]


@cache
def generator(data_shards: int, parity_shards: int) -> Matrix:
    """One row for each shard; the first `data_shards` rows are the identity."""
    points = [0, 1]
    while len(points) < data_shards + parity_shards:
        points.append(multiply(points[-1], 2))
    vandermonde: Matrix = []
    for point in points[: data_shards + parity_shards]:
        row = [1]
        while len(row) < data_shards:
            row.append(multiply(row[-1], point))
        vandermonde.append(row)
    return matrix_product(vandermonde, inverse(vandermonde[:data_shards]))


def encode(data: Sequence[bytes], parity_shards: int) -> list[bytes]:
    """The parity rows of `data`."""
    return _apply(generator(len(data), parity_shards)[len(data) :], data)


def _apply(rows: Matrix, shards: Sequence[bytes]) -> list[bytes]:
    """`rows` times `shards`, byte by byte: an adding up of shards, each times a coefficient."""
    results = []
    for row in rows:
        total = 0
        for coefficient, shard in zip(row, shards, strict=True):
            total ^= int.from_bytes(shard.translate(PRODUCTS[coefficient]), "little")
        results.append(total.to_bytes(len(shards[0]), "little"))
    return results


def decode(shards: dict[int, bytes], data_shards: int, parity_shards: int) -> list[bytes]:
    """All data shards, from exactly `data_shards` shards by number."""
    rows = generator(data_shards, parity_shards)
    return _apply(inverse([rows[number] for number in shards]), list(shards.values()))
