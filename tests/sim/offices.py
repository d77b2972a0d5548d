"""Whom an agent may obey, seen from outside, and what a coordinator ought to know of the log."""

from ckptd.agent import events as ev
from ckptd.coordinator.decider import Coordinator
from ckptd.journal import Entry, Journal
from ckptd.terms import Obeyed
from ckptd.wire import Hello, KeepEntries, Outdated

from .kernel import Violation

Term = tuple[int, str]
"""Its number, and the coordinator's id."""


class Obedience:
    """What one memory directory must have stored, by the orders that were obeyed."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._term: Term = (0, "")
        self._log = Journal()

    @property
    def term(self) -> int:
        """The highest that it obeys."""
        return self._term[0]

    def obeys(self, event: ev.FromCoordinator) -> bool:
        """Whether this is an order of the coordinator that is obeyed."""
        return self._term == (event.term, event.coordinator)

    def check(self, event: ev.FromCoordinator, actions: list[ev.Action]) -> None:
        """A lower term is never obeyed again, and a higher one is stored first."""
        message = event.message
        acts = [action for action in actions if not isinstance(action, ev.Report)]
        if acts and not self.obeys(event):
            if event.term <= self._term[0]:
                raise Violation(
                    f"{self._node} obeys {event.coordinator}, of term {event.term}, after "
                    f"{self._term[1]}, of term {self._term[0]}: {type(message).__name__}"
                )
            kept = acts[0].kept.term if isinstance(acts[0], ev.KeepTerm) else None
            if kept is None or (kept.number, kept.coordinator) != (event.term, event.coordinator):
                raise Violation(f"{self._node} obeys term {event.term} before it has stored it")
            self._term = (event.term, event.coordinator)
        if isinstance(message, KeepEntries) and self.obeys(event):
            self._log.merge(message.entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All that it was told to keep."""
        return self._log.entries


class Hearsay:
    """What one coordinator has heard from agents."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Entry, ...]] = {}
        """By node, what it kept when it said Hello."""
        self.rival = ""
        """Another coordinator that was alive then."""

    def hear(
        self, message: Hello | Outdated, entries: tuple[Entry, ...], decider: Coordinator
    ) -> None:
        if isinstance(message, Hello):
            self._entries[message.node] = entries
        if _is_alive(message.obeyed, decider):
            self.rival = message.obeyed.term.coordinator

    def log(self, decider: Coordinator) -> Journal:
        """What its journal must hold at least: its own entries, and what live nodes had kept."""
        log = Journal()
        log.merge(decider.journal.entries)
        for node, entries in self._entries.items():
            if node in decider.nodes and decider.nodes[node].live:
                log.merge(entries)
        return log


def _is_alive(obeyed: Obeyed, decider: Coordinator) -> bool:
    """Whether an agent obeys another coordinator, which it has heard within its lease."""
    term = obeyed.term
    another = term.number and term.coordinator != decider.claim.coordinator
    elsewhere = another and term.address != decider.claim.address
    return bool(elsewhere and obeyed.silent_s is not None and obeyed.silent_s < term.lease_s)
