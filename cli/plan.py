"""`ckptd plan`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil, log10
from typing import Any

import click
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ckptd.cli import options, show
from ckptd.cli.planning import USUAL_CODES, Chance, Cluster, Code, Estimate, estimate

_HEAD_WIDTH = 27
_MOST_DIGITS = 4
_SAFE, _DOUBTFUL = 0.999, 0.9


@click.command(cls=options.Command)
@click.option("--nodes", type=click.IntRange(2), required=True, help="Nodes of the job.")
@click.option(
    "--state",
    "state_bytes",
    type=options.Size(),
    required=True,
    help="Bytes of the whole job's state: model and optimizer, what ranks hold alike counted once.",
)
@click.option(
    "--link",
    "link_bytes_per_s",
    type=options.Rate(),
    required=True,
    help="Network of one node, as 25Gbit/s or 1GB/s, in powers of 1000.",
)
@click.option(
    "--node-mtbf",
    "node_mtbf_s",
    type=options.Duration(),
    required=True,
    help="Mean time between losses of one node, as 250d or 1000h.",
)
@click.option(
    "--repair",
    "repair_s",
    type=options.Duration(),
    default="15min",
    show_default=True,
    help="From the loss of a node until another has taken its place.",
)
@click.option(
    "--code",
    "codes",
    multiple=True,
    help="k+m: k data and m parity shards; may be given several times. Default: usual ones.",
)
@click.option(
    "--keep",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Protected snapshots that are kept, to roll back to.",
)
@click.option(
    "--slots",
    type=click.IntRange(2),
    help="Slots of each rank; with more than keep+1, which is the default, capture and protection "
    "overlap.",
)
@click.option(
    "--copy",
    "copy_bytes_per_s",
    type=options.Rate(),
    help="What a node captures, as 20GB/s. Default: capture takes no time.",
)
@click.option(
    "--domains",
    type=click.IntRange(1),
    help="Racks, or other failure domains, over which the nodes are spread evenly.",
)
@options.as_json
def command(codes: tuple[str, ...], as_json: bool, **known: Any) -> None:
    """Say what a code costs and what it survives, before anyone starts.

    Compares codes k+m for a job: memory, traffic, the least time between snapshots, and the chance
    that no more nodes of a group are lost than its parity covers. Nothing is asked of a cluster.
    """
    for flag, name in (("--state", "state_bytes"), ("--node-mtbf", "node_mtbf_s")):
        if not known[name]:
            raise click.UsageError(f"{flag} is 0; it must be more")
    if known["domains"] is not None and known["domains"] > known["nodes"]:
        raise click.UsageError(f"--domains {known['domains']}: more than --nodes {known['nodes']}")
    least = known["keep"] + 1
    known["slots"] = least if known["slots"] is None else known["slots"]
    if known["slots"] < least:
        raise click.UsageError(f"--slots {known['slots']}: at least {least}, one more than --keep")
    cluster = Cluster(**known)
    found = [estimate(cluster, code) for code in _choose(codes, cluster.nodes)]
    if as_json:
        click.echo(json.dumps(document(cluster, found), indent=2))
    else:
        show.console().print(render(cluster, found))


def _choose(codes: Sequence[str], nodes: int) -> list[Code]:
    """The codes that were asked for, or the usual ones that fit. Raises click.UsageError."""
    if not codes:
        return [code for code in USUAL_CODES if code.nodes <= nodes]
    chosen = []
    for text in dict.fromkeys(codes):
        code = Code(*options.parse_code(text))
        if code.nodes > min(nodes, options.MAX_GROUP_NODES):
            limit = (
                f"--nodes is {nodes}"
                if nodes < options.MAX_GROUP_NODES
                else f"a group has at most {options.MAX_GROUP_NODES}"
            )
            raise click.UsageError(f"--code {text} needs groups of {code.nodes} nodes; {limit}")
        chosen.append(code)
    return chosen


def document(cluster: Cluster, found: Sequence[Estimate]) -> dict[str, Any]:
    """JSON-ready: bytes, seconds, and chances from 0 to 1.

    Chances of loss stand beside those of survival, which cannot show less than 1e-16.
    """

    def chance(of: Chance) -> dict[str, float]:
        return {"survived": of.survived, "lost": of.lost}

    return {
        "cluster": {
            **asdict(cluster),
            "image_bytes": cluster.image_bytes,
            "between_losses_s": cluster.between_losses_s,
        },
        "codes": [
            {
                "code": str(one.code),
                "groups": [{"code": str(g), "count": n} for g, n in Counter(one.groups).items()],
                "memory_bytes": one.memory_bytes,
                "sent_bytes": one.sent_bytes,
                "protect_s": one.protect_s,
                "interval_s": one.interval_s,
                "image_back_s": one.image_back_s,
                "protected_again_s": one.protected_again_s,
                "fatal_domains": len(one.fatal_domains) if cluster.domains else None,
                "at_once": [{"nodes": n, **chance(of)} for n, of in one.at_once.items()],
                "incident": chance(one.incident),
                "month": chance(one.month),
                "year": chance(one.year),
            }
            for one in found
        ],
    }


def render(cluster: Cluster, found: Sequence[Estimate]) -> RenderableType:
    """What is alike for all codes, a table with a column for each, and what it rests on."""
    image = cluster.image_bytes
    losses = f"a node is lost, and must be rebuilt, every {_time(cluster.between_losses_s)}"
    back = f"its image is back {_time(found[0].image_back_s)} after another has taken its place"
    parts: list[RenderableType] = [
        Text.assemble(
            (show.count(cluster.nodes, "node"), "bold"),
            f" · {show.size(cluster.state_bytes)} of state, {show.size(image)} on each node",
        ),
        Text(losses),
        Text(back),
        Text(),
        _Columns(_head(cluster, found[0]), [_column(cluster, one) for one in found]),
        _said("An incident is the loss of a node, until it is replaced and protected again."),
        _said("It is survived if no more nodes of its group are lost than its parity covers."),
        _said("Chances hold for nodes that fail independently of one another."),
    ]
    if cluster.copy_bytes_per_s is None:
        parts.append(_said("The time to capture is not counted; --copy says what a node captures."))
    code = found[0].code
    start = f"ckptd coordinator --parity-shards {code.parity_shards} --group-nodes {code.nodes}"
    parts.append(_said(f"To have {code}: {start}"))
    return Group(*parts)


def _said(text: str) -> Text:
    return Text(text, show.PAST)


def _head(cluster: Cluster, one: Estimate) -> list[str]:
    """What each row of a column is."""
    return [
        "k+m",
        "groups",
        "memory on a node",
        "sent by a node",
        "protected after",
        "least snapshot interval",
        "a lost node protected again",
        *(["any domain may be lost"] if cluster.domains else []),
        *(f"{lost} nodes lost at once" for lost in one.at_once),
        "an incident is survived",
        "a month",
        "a year",
    ]


def _column(cluster: Cluster, one: Estimate) -> list[Text]:
    fatal = len(one.fatal_domains)
    domains = Text(f"{fatal} may not", show.BAD) if fatal else Text("yes", show.GOOD)
    return [
        Text(str(one.code), "bold"),
        Text("\n".join(f"{n} × {group}" for group, n in Counter(one.groups).items())),
        Text(show.size(one.memory_bytes)),
        Text(show.size(one.sent_bytes)),
        Text(_time(one.protect_s)),
        Text(_time(one.interval_s)),
        Text(_time(one.protected_again_s)),
        *([domains] if cluster.domains else []),
        *(_chance(of) for of in one.at_once.values()),
        _chance(one.incident),
        _chance(one.month),
        _chance(one.year),
    ]


class _Columns:
    """A table with a heading before each row; columns that do not fit go into another below."""

    def __init__(self, head: Sequence[str], columns: Sequence[Sequence[Text]]) -> None:
        self._head, self._columns = head, columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(
            len(line) for c in self._columns for cell in c for line in cell.plain.split("\n")
        )
        fit = max(1, (options.max_width - _HEAD_WIDTH) // (width + 2))
        tables = ceil(len(self._columns) / fit)
        for number in range(tables):
            size = ceil(len(self._columns) / tables)
            yield self._table(self._columns[number * size : (number + 1) * size])
            yield Text()

    def _table(self, columns: Sequence[Sequence[Text]]) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style=show.PAST, width=_HEAD_WIDTH)
        for _ in columns:
            table.add_column(justify="right")
        for title, *cells in zip(self._head, *columns, strict=True):
            table.add_row(title, *cells)
        return table


def _time(seconds: float) -> str:
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.001 else "< 1 ms"
    return show.age(seconds) if seconds < 730 * 86400 else f"{seconds / (365 * 86400):.1f} years"


def _chance(of: Chance) -> Text:
    """Of survival: two digits of what is missing, as far as they are worth the room."""
    style = (
        show.GOOD if of.survived >= _SAFE else show.WARN if of.survived >= _DOUBTFUL else show.BAD
    )
    if of.lost == 0:
        return Text("always", show.GOOD)
    if of.lost < 10 ** -(_MOST_DIGITS + 2):
        return Text(f"> {100 - 10**-_MOST_DIGITS} %", style)
    if of.survived < 1e-4:
        return Text("< 0.01 %" if of.survived else "never", style)
    small = min(of.lost, of.survived)
    digits = min(_MOST_DIGITS, max(0, ceil(-log10(100 * small)) + 1))
    return Text(f"{100 * of.survived:.{digits}f} %", style)
