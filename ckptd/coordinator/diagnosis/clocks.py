"""How far the nodes' clocks are from the coordinator's, by questions and answers (as NTP does)."""

from collections import deque

from ckptd.coordinator.diagnosis.detector import Offset

_EVERY_S = 2.0
_KEPT = 16
_DRIFT_S_PER_S = 100e-6
_UNKNOWN = Offset(0.0, 60.0)


class Clocks:
    """Offsets by node. The answer that came back fastest counts: half its way is the error."""

    def __init__(self) -> None:
        self._answers: dict[str, deque[tuple[float, Offset]]] = {}
        self._asked_at: dict[str, float] = {}

    def is_due(self, node: str, now: float) -> bool:
        """Whether the node is to be asked now; then it counts as asked."""
        if now - self._asked_at.get(node, float("-inf")) < _EVERY_S:
            return False
        self._asked_at[node] = now
        return True

    def heard(self, node: str, asked: float, at: float, now: float) -> None:
        """It answered `at`, in seconds of its clock, what it was `asked` at ours."""
        if not 0 <= now - asked <= 10:
            return
        offset = Offset(at - (asked + now) / 2, (now - asked) / 2)
        known = self.offset(node, now)
        if abs(offset.ahead_s - known.ahead_s) > offset.error_s + known.error_s:
            self._answers.pop(node, None)  # its clock has been set meanwhile
        self._answers.setdefault(node, deque(maxlen=_KEPT)).append((now, offset))

    def offset(self, node: str, now: float) -> Offset:
        """What is known of a node's clock; the error says how well."""
        answers = self._answers.get(node)
        if not answers:
            return _UNKNOWN
        aged = [
            Offset(offset.ahead_s, offset.error_s + _DRIFT_S_PER_S * (now - at))
            for at, offset in answers
        ]
        return min(aged, key=lambda offset: offset.error_s)
