"""Writes the state diagrams in ARCHITECTURE.md anew from the tables in the code: `make docs`.

With --check it changes nothing, and fails where they are stale.
"""

import enum
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from ckptd.agent.state import USES
from ckptd.coordinator.state import TRANSITIONS

ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"


def diagram(table: Mapping[enum.Enum, frozenset[enum.Enum]]) -> str:
    """The table as a Mermaid state diagram; its first state is where it begins."""
    order = {state: number for number, state in enumerate(table)}
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(table)).value}"]
    for state, following in table.items():
        lines += [
            f"    {state.value} --> {after.value}"
            for after in sorted(following, key=order.__getitem__)
        ]
        if not following:
            lines.append(f"    {state.value} --> [*]")
    return "\n".join([*lines, "```"])


def rewritten(text: str) -> str:
    """`text` with each diagram between its marks made anew. Raises ValueError without marks."""
    for name, table in (("snapshot", TRANSITIONS), ("slot", USES)):
        begin, end = f"<!-- states of a {name}: begin -->", f"<!-- states of a {name}: end -->"
        marks = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text, found = marks.subn(lambda _: f"{begin}\n{diagram(table)}\n{end}", text)  # noqa: B023
        if found != 1:
            raise ValueError(f"{ARCHITECTURE.name} has {found} places marked {begin}")
    return text


def main() -> int:
    """The exit status: 1 where something is stale."""
    old = ARCHITECTURE.read_text(encoding="utf-8")
    new = rewritten(old)
    if old == new:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{ARCHITECTURE.name}: the state diagrams are stale; run `make docs`")
        return 1
    ARCHITECTURE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
