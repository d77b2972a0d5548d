"""How all agents come to keep the same journal as the coordinator. No IO, no clock.

Each method returns messages with the nodes that they are for. Of many agents that keep the same
entries only one is asked for them, so that ten thousand that come at once do not send them all.
"""

from collections.abc import Iterable

from ckptd.journal import Entry, Journal, LogSummary
from ckptd.wire import AskEntries, KeepEntries

Messages = list[tuple[str, AskEntries | KeepEntries]]


class Replication:
    """What each live agent keeps of the journal, as far as that is not all of it."""

    def __init__(self, journal: Journal, again_s: float) -> None:
        self._journal = journal
        self._again_s = again_s
        self._nodes: set[str] = set()
        self._kept: dict[str, LogSummary] = {}
        """What each of them has said that it keeps."""
        self._behind: dict[str, LogSummary] = {}
        """Nodes that keep something else than the journal, and what they said of it."""
        self._asked: dict[LogSummary, tuple[str, float]] = {}
        """The node that was asked for these entries, and when."""

    @property
    def awaited(self) -> tuple[str, ...]:
        """Nodes whose entries may be news, and have not come yet."""
        return tuple(sorted(node for node, _ in self._asked.values()))

    @property
    def lacking(self) -> tuple[str, ...]:
        """Live nodes that have not said yet that they keep all of the journal."""
        whole = self._journal.summary
        return tuple(sorted(node for node in self._nodes if self._kept.get(node) != whole))

    def kept(self, node: str, summary: LogSummary) -> None:
        """An agent has stored what it was told to keep."""
        self._kept[node] = summary

    def hello(self, node: str, summary: LogSummary, now: float) -> Messages:
        """A live agent says what it keeps."""
        found = self.lost(node, now)
        self._nodes.add(node)
        self._kept[node] = summary
        if summary == self._journal.summary:
            return found
        if not summary.entries:
            return [*found, (node, KeepEntries(self._journal.entries))]
        self._behind[node] = summary
        return [*found, *self._ask(node, summary, now)]

    def said(self, entries: Iterable[Entry]) -> Messages:
        """These are new in the journal: for all."""
        news = KeepEntries(tuple(entries))
        return [(node, news) for node in sorted(self._nodes)]

    def answered(self, node: str, entries: tuple[Entry, ...]) -> Messages:
        """An agent has sent all that it keeps."""
        summary = self._behind.get(node)
        if summary is None:
            return []
        self._asked.pop(summary, None)
        found: Messages = []
        news = self._journal.merge(entries)
        alike = [name for name, said in self._behind.items() if said == summary]
        for name in alike:
            del self._behind[name]
        if news:
            found += [pair for pair in self.said(news) if pair[0] not in alike]
        held = set(entries)
        lacking = tuple(entry for entry in self._journal.entries if entry not in held)
        if lacking:
            found += [(name, KeepEntries(lacking)) for name in alike]
        return found

    def lost(self, node: str, now: float) -> Messages:
        """A node is gone; if it was asked, another is asked in its stead."""
        self._nodes.discard(node)
        self._kept.pop(node, None)
        summary = self._behind.pop(node, None)
        if summary is None or self._asked.get(summary, ("",))[0] != node:
            return []
        del self._asked[summary]
        other = next((name for name, said in self._behind.items() if said == summary), None)
        return [] if other is None else self._ask(other, summary, now)

    def tick(self, now: float) -> Messages:
        """Ask again where an answer did not come."""
        late = [(s, node) for s, (node, at) in self._asked.items() if now - at >= self._again_s]
        for summary, node in late:
            self._asked[summary] = (node, now)
        return [(node, AskEntries()) for _, node in late]

    def _ask(self, node: str, summary: LogSummary, now: float) -> Messages:
        if summary in self._asked:
            return []
        self._asked[summary] = (node, now)
        return [(node, AskEntries())]
