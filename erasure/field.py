"""GF(256) and the one formula of our code: how shards of a stripe follow from other shards.

The field is that of zfec and of ISA-L: polynomials over GF(2) modulo 0x11d, in which a = 2
generates every element but 0. Adding is XOR.
"""

from collections.abc import Sequence

_POLYNOMIAL = 0x11D
_ORDER = 255
"""Elements other than 0, which are the powers of a."""


def _powers() -> list[int]:
    """a⁰, a¹, … a²⁵⁴."""
    powers = [1]
    while len(powers) < _ORDER:
        doubled = powers[-1] << 1
        powers.append(doubled ^ _POLYNOMIAL if doubled > _ORDER else doubled)
    return powers


_POWERS = _powers()
_LOGARITHMS = {power: exponent for exponent, power in enumerate(_POWERS)}
_POINTS = (0, *_POWERS)
"""The point of each shard by its number: 0, 1, a, a², …"""


def coefficients(given: Sequence[int], wanted: Sequence[int]) -> bytes:
    """What each shard of `given` counts for in each shard of `wanted`.

    Both are shard numbers from 0 to 255, each at most once; `given` are as many as the code has
    data shards. The answer has one row of `len(given)` coefficients for each of `wanted`, one row
    after the other: a wanted shard is the sum of the given ones, each times its coefficient.

    The bytes of a stripe at one place are the values, at the points 0, 1, a, a², …, of a polynomial
    with fewer terms than there are data shards or just as many. So a Vandermonde matrix times the
    inverse of its top square (L. Rizzo, CCR 27(2), 1997, section 3) is Lagrange's interpolation
    from the data shards' points, and decoding is the same from the points of the shards that are
    left: no matrix is inverted.
    """
    points = [_POINTS[number] for number in given]
    # Lagrange's denominator of each given point: the product of its distances to the others.
    scales = [
        sum(_LOGARITHMS[point ^ other] for other in points if other != point) for point in points
    ]
    rows = bytearray()
    for number in wanted:
        target = _POINTS[number]
        if number in given:
            rows += bytes(point == target for point in points)
            continue
        distances = [_LOGARITHMS[target ^ point] for point in points]
        product = sum(distances)
        rows += bytes(
            _POWERS[(product - distance - scale) % _ORDER]
            for distance, scale in zip(distances, scales, strict=True)
        )
    return bytes(rows)
