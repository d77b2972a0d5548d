"""`ckptd bench network | protect | rebuild`: cells between nodes, over links of a known rate."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from ckptd.agent import bench as node_side
from ckptd.agent.bench import Answer, Command, Ready
from ckptd.cli import netns, options, show
from ckptd.cli.bench_numbers import Spread
from ckptd.digest import cell_count
from ckptd.errors import CkptdError
from ckptd.ids import SnapshotId
from ckptd.manifest import Extent, Group, JobManifest, Member
from ckptd.wire import Source

_MEMORY = Path("/dev/shm")
_EXIT_S = 10.0
_CONNECTIONS = 4
_MEASURED = {"seconds", "limit_s", "ratio", "received_ratio", "cpu_s", "own_bytes"}
_T = TypeVar("_T")


class NodeFailed(CkptdError):
    """A node of the measurement could not do what it was told."""


@dataclass(frozen=True)
class Link:
    """What connects the nodes."""

    kind: str
    bytes_per_s: float | None
    """Of each direction of each node's link; None where nothing limits it."""


class Node:
    """A process with the data plane of an agent."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ready = self._read(Ready)

    def tell(self, request: Command) -> None:
        """Send a request; `answer` has what it came to."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        """Raises NodeFailed."""
        found = self._read(Answer)
        if found.error:
            raise NodeFailed(f"{self.name}: {found.error}")
        return found

    def do(self, request: Command) -> Answer:
        """`tell` and `answer`."""
        self.tell(request)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, kind: type[_T]) -> _T:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NodeFailed(f"{self.name} ended with exit code {self._process.wait()}")
        return msgspec.json.decode(line, type=kind)


class Town:
    """Nodes that hold one image each of one snapshot, and one more that holds nothing."""

    def __init__(
        self,
        data: int,
        parity: int,
        image_bytes: int,
        cell_bytes: int,
        link: Link,
        nodes: list[Node],
    ) -> None:
        self.link, self.cell_bytes = link, cell_bytes
        self.members, self.newcomer = nodes[:-1], nodes[-1]
        self.cells = {node.name: node.ready.cells for node in self.members}
        self.id = SnapshotId("bench", 1, 1)
        count = data + parity
        for rank, node in enumerate(self.members):
            node.tell(node_side.Seal(self.id, rank, count, image_bytes, cell_bytes))
        self.sizes = [node.answer().size_bytes for node in self.members]
        members = tuple(
            Member(node.name, (Extent(rank, size),))
            for rank, (node, size) in enumerate(zip(self.members, self.sizes, strict=True))
        )
        group = Group(members, parity)
        self.manifest = JobManifest(self.id, count, (group,), "zfec", cell_bytes, ())

    @property
    def image_bytes(self) -> int:
        """Bytes of the largest image, with its header."""
        return max(self.sizes)

    def all_do(self, request: Command) -> list[Answer]:
        """Have all members do it at once."""
        for node in self.members:
            node.tell(request)
        return [node.answer() for node in self.members]

    def protect(self) -> list[Answer]:
        """Encode the snapshot anew, on all members."""
        self.all_do(node_side.Prepare(self.manifest))
        return self.all_do(node_side.Encode(self.manifest, self.cells))

    def rebuild(self, lost: int) -> tuple[Answer, Answer]:
        """Have the newcomer take the place of a member as if that were gone.

        What bringing the image back has come to, and what making the parity anew.
        """
        manifest = self.manifest.with_nodes({(0, lost): self.newcomer.name})
        self.newcomer.do(node_side.Prepare(manifest))
        there = [node.name for number, node in enumerate(self.members) if number != lost]
        source = Source(
            self.manifest,
            {rank: (node.name,) for rank, node in enumerate(self.members) if rank != lost},
            dict(enumerate(self.sizes)),
            tuple(there),
            {name: self.cells[name] for name in there},
        )
        image = self.newcomer.do(node_side.Fetch(self.id, lost, source))
        ranks = {**source.ranks, lost: (self.newcomer.name,)}
        return image, self.newcomer.do(node_side.Encode(manifest, source.cells, ranks))

    def plain(self, size_bytes: int, connections: int) -> Answer:
        """The same bytes over plain sockets, from one member to the newcomer: the limit."""
        address = self.members[0].ready.plain
        return self.newcomer.do(node_side.PullPlain(address, size_bytes, connections))

    def pull(self, connections: int) -> Answer:
        """One member's image, cell by cell, to the newcomer."""
        cells = cell_count(self.sizes[0], self.cell_bytes)
        address = self.cells[self.members[0].name]
        return self.newcomer.do(
            node_side.PullCells(self.id, 0, cells, self.cell_bytes, address, connections)
        )


@contextmanager
def _town(
    data: int, parity: int, image: int, cell_size: int, rate: float, loopback: bool
) -> Iterator[Town]:
    """Nodes as the flags want them: over links of a rate in bytes per second, or over loopback."""
    count = data + parity + 1
    bytes_per_s = _link_rate(loopback, rate)
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=_MEMORY))
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        network = None
        if bytes_per_s is not None:
            network = stack.enter_context(netns.Network(count, 8 * bytes_per_s))
        nodes = []
        for number in range(count):
            host = network.host(number) if network is not None else "127.0.0.1"
            before = network.inside(number) if network is not None else []
            name = f"n{number}"
            command = [sys.executable, "-m", "ckptd.agent.bench", name, str(root / name), host]
            nodes.append(Node(name, [*before, *command]))
            stack.callback(nodes[-1].close)
        link = Link("loopback" if network is None else "namespaces", bytes_per_s)
        yield Town(data, parity, image, cell_size, link, nodes)


def _link_rate(loopback: bool, rate: float) -> float | None:
    if loopback:
        return None
    if reason := netns.why_not():
        click.echo(f"over loopback, because {reason}: no known rate to compare with", err=True)
        return None
    return rate


_image = click.option(
    "--image",
    type=options.Size(),
    default="64MiB",
    show_default=True,
    help="Bytes that each node has to protect.",
)
_cell_size = click.option(
    "--cell-size", type=options.Size(), default="4MiB", show_default=True, help="Bytes in a cell."
)
_rate = click.option(
    "--rate",
    type=options.Rate(),
    default="400Mbit/s",
    show_default=True,
    help="Of each direction of each node's link, shaped with tc; needs root.",
)
_loopback = click.option(
    "--loopback", is_flag=True, help="All nodes on the loopback device, at whatever rate it has."
)
_repeats = click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
_code = click.option("--code", default="4+2", show_default=True, help="k+m.")


def _flags(*flags: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return add


@click.command(cls=options.Command)
@_flags(_image, _cell_size, _rate, _loopback, _repeats, options.as_json)
def network(repeats: int, as_json: bool, **town_flags: Any) -> None:
    """Cells from one node to another, beside plain sockets.

    The cells go the way that they go between agents: over authenticated connections, from tmpfs by
    sendfile, digests verified. The plain sockets carry as many bytes, from tmpfs by sendfile, too.
    """
    samples: dict[tuple[str, int], list[float]] = {}
    with _town(1, 1, **town_flags) as town:
        size = town.sizes[0]
        for _ in range(repeats):
            for connections in (1, _CONNECTIONS):
                for what, answer in (
                    ("plain", town.plain(size, connections)),
                    ("cells", town.pull(connections)),
                ):
                    samples.setdefault((what, connections), []).append(size / answer.seconds)
        link = town.link
    rows = []
    for connections in (1, _CONNECTIONS):
        plain, cells = samples["plain", connections], samples["cells", connections]
        ratios = [one / other for one, other in zip(cells, plain, strict=True)]
        rows.append((connections, Spread.of(cells), Spread.of(plain), Spread.of(ratios)))
    if as_json:
        names = ("connections", "cells_bytes_per_s", "plain_bytes_per_s", "ratio")
        found = [dict(zip(names, [row[0], *map(asdict, row[1:])], strict=True)) for row in rows]
        click.echo(json.dumps({"link": asdict(link), "image_bytes": size, "rows": found}))
        return
    table = _table("connections", "cells, MB/s", "plain sockets, MB/s", "ratio")
    for number, cells_, plain_, ratio in rows:
        table.add_row(str(number), _mega(cells_), _mega(plain_), str(ratio))
    _print(link, table)


@click.command(cls=options.Command)
@_flags(_code, _image, _cell_size, _rate, _loopback, _repeats, options.as_json)
def protect(code: str, repeats: int, as_json: bool, **town_flags: Any) -> None:
    """Parity for one snapshot on a group of nodes, from sealed to stored.

    All nodes are measured. Every one must send and receive (k+m-1)/k of an image; what the
    links need for that is the limit.
    """
    data, parity = options.parse_code(code)
    with _town(data, parity, **town_flags) as town:
        runs = [town.protect() for _ in range(repeats + 1)][1:]
        link, image_bytes = town.link, town.image_bytes
        least = (data + parity - 1) / data * image_bytes
    _report(_result(code, link, image_bytes, runs, least, "sent_ratio"), as_json, link)


@click.command(cls=options.Command)
@_flags(_code, _image, _cell_size, _rate, _loopback, _repeats, options.as_json)
def rebuild(code: str, repeats: int, as_json: bool, **town_flags: Any) -> None:
    """The image of a lost node, brought to a node that holds nothing, and then its parity.

    That node is the one that is measured. The limit is what its link needs for one image, and,
    until the snapshot is protected again, for (1+m/k) images.
    """
    data, parity = options.parse_code(code)
    with _town(data, parity, **town_flags) as town:
        town.protect()
        count = len(town.members)
        runs = [town.rebuild(lost % count) for lost in range(repeats + 1)][1:]
        link, image_bytes = town.link, town.image_bytes
    result = _result(
        code, link, image_bytes, [[image] for image, _ in runs], image_bytes, "received_ratio"
    )
    both = [[_sum(image, parity)] for image, parity in runs]
    least = (1 + parity / data) * image_bytes
    again = _result(code, link, image_bytes, both, least, "received_ratio")
    result["protected_again"] = {name: again[name] for name in again.keys() & _MEASURED}
    _report(result, as_json, link)


def _sum(one: Answer, other: Answer) -> Answer:
    """Of one node's requests, one after the other."""
    return Answer(
        one.seconds + other.seconds,
        one.cpu_s + other.cpu_s,
        one.received_bytes + other.received_bytes,
        one.sent_bytes + other.sent_bytes,
        own_bytes=max(one.own_bytes, other.own_bytes),
    )


def _result(
    code: str,
    link: Link,
    image_bytes: int,
    runs: Sequence[Sequence[Answer]],
    least_bytes: float,
    traffic: str,
) -> dict[str, Any]:
    """What the runs have come to, beside the least that must go through a node's link.

    `traffic`: "sent_ratio" or "received_ratio", whichever of a node's traffic is compared.
    """
    result: dict[str, Any] = {
        "code": code,
        "link": asdict(link),
        "image_bytes": image_bytes,
        "seconds": asdict(Spread.of([max(a.seconds for a in run) for run in runs])),
        "cpu_s": asdict(Spread.of([sum(a.cpu_s for a in run) for run in runs])),
        "own_bytes": max(a.own_bytes for run in runs for a in run),
    }
    if link.bytes_per_s is not None:
        limit_s = least_bytes / link.bytes_per_s
        moved = [
            max(a.sent_bytes if traffic == "sent_ratio" else a.received_bytes for a in run)
            for run in runs
        ]
        result["limit_s"] = limit_s
        result["ratio"] = asdict(Spread.of([max(a.seconds for a in run) / limit_s for run in runs]))
        result[traffic] = asdict(Spread.of([each / least_bytes for each in moved]))
    return result


def _mega(spread: Spread) -> str:
    return f"{spread.median / 1e6:.0f} ({spread.low / 1e6:.0f} to {spread.high / 1e6:.0f})"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _report(result: dict[str, Any], as_json: bool, link: Link) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    names = {
        "seconds": "seconds",
        "limit_s": "limit, seconds",
        "ratio": "ratio",
        "sent_ratio": "sent by a node, to the least possible",
        "received_ratio": "received, to one image",
        "cpu_s": "processor seconds of the nodes that are measured",
        "own_bytes": "memory beside slots, the most of a node",
    }
    again = result.get("protected_again", {})
    rows = [(result.get(name), name, label) for name, label in names.items()]
    for name, label in names.items():
        label = "received, to (1+m/k) images" if name == "received_ratio" else label
        rows.append((again.get(name), name, f"until protected again: {label}"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for value, name, label in rows:
        if value is None:
            continue
        if isinstance(value, dict):
            text = str(Spread(**value))
        else:
            text = show.size(value) if name == "own_bytes" else f"{value:.2f}"
        table.add_row(label, text)
    click.echo(
        f"{result['code']}, images of {show.size(result['image_bytes'])}; median (quartiles)"
    )
    _print(link, table)


def _print(link: Link, table: Table) -> None:
    if link.bytes_per_s is None:
        click.echo("nodes on loopback")
    else:
        click.echo(f"nodes in network namespaces, {link.bytes_per_s * 8 / 1e6:.0f} Mbit/s a link")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
