"""How verbs show what the coordinator says: one look for states, sizes, ages and tables."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ckptd.errors import Refused

GOOD, BUSY, WARN, BAD, PAST = "green", "cyan", "yellow", "bold red", "dim"

_STATES = {
    "live": GOOD,
    "suspect": WARN,
    "ticketed": BUSY,
    "capturing": BUSY,
    "sealed": BUSY,
    "protected": GOOD,
    "durable": GOOD,
    "retired": PAST,
    "skipped": WARN,
    "torn": WARN,
    "dropped": WARN,
    "lost": BAD,
}
NOWHERE: Mapping[str, Any] = {
    "size_bytes": None,
    "ranks": None,
    "restorable": False,
    "tiers": [],
    "ranks_on": {},
    "parity_on": [],
    "protected_again": None,
}
"""What an ended snapshot lacks beside one that is there."""

SNAPSHOT_HEAD = ("snapshot", "state", "step", "size", "age", "restorable from")
_RIGHT = frozenset({"memory", "seen", "step", "size", "age"})
_HANG = 4


def console() -> Console:
    """Standard output; rich's own colouring of numbers and paths would hide ours."""
    return Console(highlight=False)


def state(word: str) -> Text:
    """A node's or snapshot's state in its colour."""
    return Text(word, _STATES.get(word, WARN))


def note(reason: str, style: str = WARN) -> Text:
    """A reason for what is not as it should be; the mark is for terminals without colour."""
    return Text(f"! {reason}", style)


def size(size_bytes: float | None) -> str:
    """Three digits and a unit."""
    if not size_bytes:
        return "–" if size_bytes is None else "0 MiB"
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    value, unit = size_bytes, "B"
    while value >= 999.5 and (larger := next(units, None)):
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def age(age_s: float) -> str:
    """As a person would say it."""
    if age_s < 120:
        return f"{age_s:.1f} s" if age_s < 9.95 else f"{age_s:.0f} s"
    if age_s < 7200:
        return f"{age_s / 60:.0f} min"
    return f"{age_s / 3600:.1f} h" if age_s < 48 * 3600 else f"{age_s / 86400:.1f} days"


def count(number: int, thing: str, things: str = "") -> str:
    """1 step, 2 steps."""
    return f"{number} {thing}" if number == 1 else f"{number} {things or thing + 's'}"


def spans(numbers: Iterable[int]) -> str:
    """0-3, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def choose_jobs(document: Mapping[str, Any], job: str | None) -> list[dict[str, Any]]:
    """All jobs, or the one of this name. Raises Refused, with the known names."""
    jobs: list[dict[str, Any]] = document["jobs"]
    if job is None:
        return jobs
    chosen = [one for one in jobs if one["job"] == job]
    if not chosen:
        known = ", ".join(one["job"] for one in jobs)
        raise Refused(
            f"the coordinator knows no job {job!r}; "
            + (f"it knows {known}" if known else "it knows none yet")
        )
    return chosen


def snapshot_cells(snapshot: Mapping[str, Any]) -> list[Text | str]:
    """A row under SNAPSHOT_HEAD."""
    return [
        f"{snapshot['life']}.{snapshot['step']}",
        state(snapshot["state"]),
        str(snapshot["step"]),
        size(snapshot["size_bytes"] or None),
        age(snapshot["age_s"]),
        _restorable_from(snapshot),
    ]


def _restorable_from(snapshot: Mapping[str, Any]) -> Text:
    """Its tiers, or no."""
    if snapshot["restorable"]:
        less = WARN if snapshot["state"] == "protected" else BUSY
        return Text(", ".join(snapshot["tiers"]), GOOD if "group" in snapshot["tiers"] else less)
    expected = snapshot["state"] in ("ticketed", "capturing", "retired")
    return Text("no", PAST if expected else BAD)


def reason_of(snapshot: Mapping[str, Any]) -> list[Text]:
    """Why it is not as it should be, if so."""
    grave = snapshot["state"] == "lost" or (
        not snapshot["restorable"] and snapshot["state"] in ("sealed", "protected")
    )
    found = [note(snapshot["reason"], BAD if grave else WARN)] if snapshot["reason"] else []
    again = snapshot["protected_again"]
    if again and again["making"]:
        whole = again["nodes"] - len(again["without"])
        where = "; ".join(
            f"on {one['node']}, {one['done']:.0%}"
            + (f", {age(one['left_s'])} left" if one["left_s"] is not None else "")
            for one in again["making"]
        )
        text = f"{whole} of {count(again['nodes'], 'node')} hold parity: "
        found.append(Text(f"{text}is being protected again {where}", BUSY))
    return found


@dataclass(frozen=True)
class Listing:
    """A table whose rows have lines of their own below them, over the whole width.

    A column for reasons would be a few letters wide on a terminal of 80 columns.
    """

    head: Sequence[str]
    rows: Sequence[tuple[Sequence[Text | str], Sequence[Text]]]
    optional: Collection[str] = ()
    """Columns that are left out when no row has anything in them."""
    indent: int = 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [[_text(cell) for cell in cells] for cells, _ in self.rows]
        table = [[Text(title, PAST) for title in self.head], *rows]
        shown = [
            column
            for column, title in enumerate(self.head)
            if title not in self.optional or any(row[column].plain for row in rows)
        ]
        widths = [max(row[column].cell_len for row in table) for column in shown]
        notes: chain[Sequence[Text]] = chain([()], (notes for _, notes in self.rows))
        for cells, below in zip_longest(table, notes, fillvalue=()):
            line = Text()
            for column, width in zip(shown, widths, strict=True):
                cell = _text(cells[column]).copy()
                cell.align("right" if self.head[column] in _RIGHT else "left", width)
                line.append_text(cell).append("  ")
            line.rstrip()
            yield from _hang(line, self.indent, console, options)
            for text in below:
                yield from _hang(text, self.indent + _HANG, console, options)


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _hang(text: Text, indent: int, console: Console, options: ConsoleOptions) -> Iterator[Text]:
    """`text` in lines that fit; those after the first are indented further."""
    width = max(20, options.max_width - indent - _HANG)
    for number, line in enumerate(text.wrap(console, width)):
        yield Text(" " * (indent + _HANG * (number > 0))) + line
