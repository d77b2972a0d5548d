"""`ckptd bench erasure`."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter

import click
from rich.console import Console
from rich.table import Table

from ckptd.cli import options
from ckptd.cli.bench_numbers import Spread
from ckptd.erasure import open_codec

_WARM_UP = 2


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
    """The codec: through ckptd's interface, raw zfec, and a plain copy of the same bytes.

    All are measured in one run, taking turns, so that noise hits them alike.
    """
    results = {code: _measure(*_parse(code), cell_size, repeats) for code in codes}
    if as_json:
        click.echo(
            json.dumps(
                {c: {n: asdict(r) for n, r in rates.items()} for c, rates in results.items()}
            )
        )
        return
    table = Table(title="GB of source data per second, one thread: median (quartiles)")
    table.add_column("k+m")
    for name in ("encode", "raw zfec", "encode / raw", "decode m lost", "copy"):
        table.add_column(name, justify="right")
    for code, rates in results.items():
        ratio = rates["encode"].median / rates["raw"].median
        table.add_row(
            code,
            str(rates["encode"]),
            str(rates["raw"]),
            f"{ratio:.2f}",
            str(rates["decode"]),
            str(rates["copy"]),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _parse(code: str) -> tuple[int, int]:
    data, plus, parity = code.partition("+")
    if not plus or not data.isdigit() or not parity.isdigit() or not int(data) * int(parity):
        raise click.UsageError(f"--code {code}: write k+m, such as 4+2")
    return int(data), int(parity)


def _measure(
    data_shards: int, parity_shards: int, cell_bytes: int, repeats: int
) -> dict[str, Spread]:
    """GB of source data per second on one thread."""
    import numpy as np
    import zfec

    random = np.random.default_rng(0)
    cells = [random.bytes(cell_bytes) for _ in range(data_shards)]
    parity = [bytearray(cell_bytes) for _ in range(parity_shards)]
    codec = open_codec(data_shards, parity_shards)
    codec.encode(cells, parity)
    raw = zfec.Encoder(data_shards, data_shards + parity_shards)
    rows = list(range(data_shards, data_shards + parity_shards))
    lost = min(parity_shards, data_shards)
    shards: dict[int, bytes | bytearray] = {n: cells[n] for n in range(lost, data_shards)}
    shards |= {data_shards + row: parity[row] for row in range(lost)}
    out = {number: bytearray(cell_bytes) for number in range(lost)}
    source = np.frombuffer(b"".join(cells), dtype=np.uint8)
    target = np.empty_like(source)
    work: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(cells, parity),
        "raw": lambda: raw.encode(cells, rows),
        "decode": lambda: codec.decode(shards, out),
        "copy": lambda: np.copyto(target, source),
    }
    size_gb = data_shards * cell_bytes / 1e9
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(_WARM_UP + repeats):
        for name, call in work.items():
            began = perf_counter()
            call()
            if turn >= _WARM_UP:
                rates[name].append(size_gb / (perf_counter() - began))
    return {name: Spread.of(samples) for name, samples in rates.items()}
