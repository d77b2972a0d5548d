"""What a coordinator says of a job, from one status to the next."""

from collections.abc import Callable, Mapping
from math import inf
from time import time
from typing import Any

from ckptd.cli.drill_faults import DIED
from ckptd.coordinator.diagnosis.score import Expected, Said


class Ear:
    """Notes all that is said of one job after it was struck. `struck_at`: seconds since the epoch,
    to be set when that is known, or known better."""

    def __init__(
        self, job: str, expected: Expected, steps_s: Callable[[float, float], float]
    ) -> None:
        """`steps_s`: how many steps fit between two moments, in seconds since the epoch."""
        self._job, self.expected, self._steps = job, expected, steps_s
        self.struck_at = inf
        self.said: list[Said] = []
        """Everything, in order: a finding each time that it changes, and each incident."""
        self.suspicions = 0
        """Hangs that were suspected where nothing is wrong: the second witness is for these."""
        self.named: Said | None = None
        """What was right first."""
        self.heard_at = inf
        """When that was heard."""
        self.confirmed_s = inf
        """When the second witness had confirmed it, in seconds after the fault."""
        self._known: dict[tuple[str, int], tuple[str, str]] = {}

    def listen(self, status: Mapping[str, Any]) -> None:
        """Take in what a coordinator says."""
        events = [
            event
            for event in status["events"]
            if event["job"] == self._job and event["time"] >= self.struck_at - 0.5
        ]
        if DIED in self.expected.kinds:
            self._hear_death(next((e for e in events if e["kind"] == "rank_left"), None))
            return
        found = {e["finding"]: e["time"] for e in events if e["kind"] == "hang_suspected"}
        slow = {e["incident"]: e["time"] for e in events if e["kind"] == "slow"}
        for finding in status["diagnosis"]["jobs"].get(self._job, {}).get("findings", []):
            number = finding["number"]
            if finding["is_hang"] and number in found:
                self._hear(("finding", number), finding, found[number])
        for incident in status["incidents"]:
            number, at = incident["number"], incident["at"]
            if incident["job"] != self._job or (number not in slow and at < self.struck_at - 5):
                continue
            self._hear(("incident", number), incident, slow.get(number, time()))
            if incident["witness"] and self.said and self.expected.is_right(self.said[-1]):
                self.confirmed_s = min(self.confirmed_s, self._since(time()))

    def _hear(self, key: tuple[str, int], one: Mapping[str, Any], at: float) -> None:
        """A finding, or an incident, as it is now; noted again only when it has changed."""
        words = one["kind"], one["culprit"]
        if self._known.get(key) == words:
            return
        if key in self._known:
            at = time()
        self._known[key] = words
        if key[0] == "finding" and not self.expected.kinds:
            self.suspicions += 1
            return
        names = tuple(one["ranks"]), tuple(one["nodes"])
        self._note(Said(*words, *names, one["confidence"], *self._after(at), one["text"]))

    def _hear_death(self, event: Mapping[str, Any] | None) -> None:
        """Only who died first is the fault's: others follow it."""
        if event is None or self.said:
            return
        rank, node = event["rank"], event["node"]
        culprit = f"rank {rank} on node {node}"
        self._note(Said(DIED, culprit, (rank,), (node,), 1.0, *self._after(event["time"])))

    def _note(self, said: Said) -> None:
        self.said.append(said)
        if self.named is None and self.expected.is_right(said):
            self.named, self.heard_at = said, time()

    def _after(self, at: float) -> tuple[float, float]:
        return self._since(at), self._steps(self.struck_at, at)

    def _since(self, at: float) -> float:
        return max(0.0, at - self.struck_at)
