"""`ckptd bench erasure`."""

import ctypes
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from time import perf_counter

import click
import numpy as np
import zfec
from rich.console import Console
from rich.table import Table

from ckptd.cli import options
from ckptd.cli.bench_numbers import Spread, paired
from ckptd.config import erasure_engine
from ckptd.erasure import CodecError, isal, open_codec
from ckptd.erasure.field import coefficients
from ckptd.errors import ConfigError

_WARM_UP = 2

_OURS, _ISAL, _ZFEC = "ckptd", "raw isa-l", "raw zfec"
_COPY = "copy"


@dataclass(frozen=True)
class Results:
    """Of one code: GB of source data per second on one thread."""

    engine: str
    """What computes through ckptd's interface."""
    raw_isal: str
    """The library that is measured alone, or why there is none."""
    rates: Mapping[str, Spread]
    """By what is done, such as "encode ckptd" or "decode raw zfec"; and "copy"."""
    ratios: Mapping[str, Spread]
    """Of two rates of the same turn, such as "encode ckptd / raw zfec"."""


@click.command(cls=options.Command)
@click.option(
    "--code",
    "codes",
    multiple=True,
    default=["2+2", "4+2", "6+2", "8+2"],
    show_default=True,
    help="k+m; may be given several times.",
)
@click.option(
    "--cell-size",
    type=options.Size(),
    default="4MiB",
    show_default=True,
    help="Bytes in a cell.",
)
@click.option(
    "--repeats",
    type=click.IntRange(3),
    default=9,
    show_default=True,
    help="How many times they take turns.",
)
@options.as_json
def command(codes: tuple[str, ...], cell_size: int, repeats: int, as_json: bool) -> None:
    """The codec: through ckptd's interface, raw ISA-L, raw zfec, and a plain copy of the bytes.

    All are measured in one run on the same cells, taking turns, so that noise hits them alike. The
    raw ones are bare calls: nothing is checked, and tables are prepared. Decoding is of m lost data
    cells.
    """
    results = {code: _measure(*options.parse_code(code), cell_size, repeats) for code in codes}
    if as_json:
        click.echo(json.dumps({code: asdict(result) for code, result in results.items()}))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for work in ("encode", "decode"):
        console.print(_table(work, results))
    console.print("GB of source data per second, one thread: median (quartiles).")
    for engine in dict.fromkeys(result.engine for result in results.values()):
        console.print(f"ckptd computes with {engine}.")
    for library in dict.fromkeys(result.raw_isal for result in results.values()):
        console.print(f"Raw ISA-L: {library}.")


def _table(work: str, results: Mapping[str, Results]) -> Table:
    table = Table(title=work if work == "encode" else "decode, m lost")
    table.add_column("k+m")
    for name in (_OURS, _ISAL, _ZFEC, _COPY, "of raw isa-l", "× raw zfec"):
        table.add_column(name, justify="right")
    for code, result in results.items():
        rates = [result.rates.get(f"{work} {name}") for name in (_OURS, _ISAL, _ZFEC)]
        of_isal = result.ratios.get(f"{work} {_OURS} / {_ISAL}")
        table.add_row(
            code,
            *(str(rate) if rate else "–" for rate in rates),
            str(result.rates[_COPY]),
            f"{of_isal.median:.0%}" if of_isal else "–",
            f"{result.ratios[f'{work} {_OURS} / {_ZFEC}'].median:.1f}",
        )
    return table


def _measure(data_shards: int, parity_shards: int, cell_bytes: int, repeats: int) -> Results:
    """Raises ConfigError if the code is impossible, or the chosen engine is unusable."""
    try:
        codec = open_codec(data_shards, parity_shards, erasure_engine())
    except CodecError as error:
        raise ConfigError(str(error)) from error
    random = np.random.default_rng(0)
    cells = [memoryview(bytearray(random.bytes(cell_bytes))) for _ in range(data_shards)]
    parity = [memoryview(bytearray(cell_bytes)) for _ in range(parity_shards)]
    codec.encode(cells, parity)
    lost = range(min(parity_shards, data_shards))
    every = [*cells, *parity]
    left = {number: every[number] for number in range(len(lost), data_shards + len(lost))}
    out = {number: memoryview(bytearray(cell_bytes)) for number in lost}
    copies = [memoryview(bytearray(cell_bytes)) for _ in cells]
    work: dict[str, Callable[[], object]] = {
        f"encode {_OURS}": lambda: codec.encode(cells, parity),
        f"decode {_OURS}": lambda: codec.decode(left, out),
        _COPY: lambda: _copy(cells, copies),
        **_raw_zfec(data_shards, parity_shards, cells, left),
    }
    try:
        library = isal.load_any()
        raw_isal = library.name
        rows = range(data_shards, data_shards + parity_shards)
        everything = range(data_shards)
        encode = _raw_isal(library, coefficients(everything, rows), cells, parity)
        inverse = coefficients(tuple(left), lost)
        decode = _raw_isal(library, inverse, list(left.values()), list(out.values()))
        work |= {f"encode {_ISAL}": encode, f"decode {_ISAL}": decode}
    except CodecError as error:
        raw_isal = f"not measured: {error}"
    samples = _take_turns(work, data_shards * cell_bytes / 1e9, repeats)
    pairs = [
        (f"{doing} {_OURS}", f"{doing} {raw}", f"{doing} {_OURS} / {raw}")
        for doing in ("encode", "decode")
        for raw in (_ISAL, _ZFEC)
        if f"{doing} {raw}" in samples
    ]
    ratios = {name: paired(samples[ours], samples[raw]) for ours, raw, name in pairs}
    return Results(
        codec.engine,
        raw_isal,
        {name: Spread.of(list(rates.values())) for name, rates in samples.items()},
        {name: ratio for name, ratio in ratios.items() if ratio is not None},
    )


def _take_turns(
    work: Mapping[str, Callable[[], object]], size_gb: float, repeats: int
) -> dict[str, dict[int, float]]:
    """GB per second by name and turn.

    What runs after zfec, which fills fresh memory, is slower. So each call is made once before its
    time is taken, and the order is drawn anew for each turn: nothing has a neighbour of its own.
    """
    shuffle = Random(0)
    rates: dict[str, dict[int, float]] = {name: {} for name in work}
    for turn in range(_WARM_UP + repeats):
        for name in shuffle.sample(list(work), len(work)):
            work[name]()
            began = perf_counter()
            work[name]()
            took_s = perf_counter() - began
            if turn >= _WARM_UP:
                rates[name][turn] = size_gb / took_s
    return rates


def _copy(sources: Sequence[memoryview], targets: Sequence[memoryview]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target[:] = source


def _raw_zfec(
    data_shards: int,
    parity_shards: int,
    cells: Sequence[memoryview],
    left: Mapping[int, memoryview],
) -> dict[str, Callable[[], object]]:
    """zfec alone, with whole cells."""
    total = data_shards + parity_shards
    encoder, decoder = zfec.Encoder(data_shards, total), zfec.Decoder(data_shards, total)
    rows = tuple(range(data_shards, total))
    # It wants data cell i at position i; the parity fills the holes.
    order = sorted(left, key=lambda number: number % data_shards)
    return {
        f"encode {_ZFEC}": lambda: encoder.encode(list(cells), rows),
        f"decode {_ZFEC}": lambda: decoder.decode([left[n] for n in order], tuple(order)),
    }


def _raw_isal(
    library: isal.Library,
    matrix: bytes,
    sources: Sequence[memoryview],
    targets: Sequence[memoryview],
) -> Callable[[], object]:
    """ISA-L alone: one call, with tables and addresses made beforehand."""
    tables = ctypes.create_string_buffer(isal.TABLE_BYTES * len(matrix))
    library.init_tables(len(sources), len(targets), matrix, tables)
    from_, to = (
        (ctypes.c_void_p * len(views))(*(isal.address_of(view) for view in views))
        for views in (sources, targets)
    )
    size_bytes = sources[0].nbytes
    return lambda: library.encode_data(size_bytes, len(sources), len(targets), tables, from_, to)
