"""The timing source, read from outside: records of its ring become `Collective` records."""

from ckptd.collectives import Collective, GroupInfo
from ckptd.ring import OPS, Record
from ckptd.sketches import SEQ_END
from ckptd.watching import Gap

_FUTURE_S = 5.0
_EXACT_S = 1e-6
_GROUPS_LIMIT = 10_000


class TimingReader:
    """Turns the records of one process into collectives."""

    def __init__(self, rank: int, began_at: float) -> None:
        """`began_at`: start of the process, in seconds since the epoch; nothing is older."""
        self._rank, self.began_at = rank, began_at
        self._last: dict[str, int] = {}

    def take(
        self, records: list[Record], groups: tuple[GroupInfo, ...], now: float
    ) -> tuple[list[Collective], list[Gap], int]:
        """Collectives, gaps, and how many records made no sense.

        Point-to-point operations are numbered for each pair and direction, so that a send and its
        receive have the same number; of these, gaps are not told.
        """
        found: list[Collective] = []
        gaps: list[Gap] = []
        dropped = 0
        for record in records:
            at = record.entered_ns / 1e9
            timed = self.began_at - 1.0 <= at <= now + _FUTURE_S
            known = record.group < len(groups) and record.op < len(OPS)
            if not (timed and known and record.seq < SEQ_END):
                dropped += 1
                continue
            collective = self._collective(record, groups[record.group].group)
            if not record.ended or self._is_first_seen(collective):
                gaps += self._gap(collective)
            found.append(collective)
        return found, gaps, dropped

    def _collective(self, record: Record, group: str) -> Collective:
        known = record.ended and record.duration_ns >= 0
        return Collective(
            group=group,
            seq=record.seq,
            op=OPS[record.op],
            size_bytes=record.size_bytes,
            rank=self._rank,
            entered_at=record.entered_ns / 1e9,
            resolution_s=_EXACT_S,
            ended=record.ended,
            duration_s=record.duration_ns / 1e9 if known else None,
            peer=record.peer if record.peer >= 0 else None,
        )

    def _is_first_seen(self, collective: Collective) -> bool:
        return collective.seq > self._last.get(collective.group, 0)

    def _gap(self, collective: Collective) -> list[Gap]:
        if collective.op in ("send", "recv"):
            return []
        if len(self._last) > _GROUPS_LIMIT:
            self._last.clear()
        group, seq = collective.group, collective.seq
        last = self._last.get(group)
        self._last[group] = seq
        if last is None or seq <= last + 1:  # the first that is timed, or a group made anew
            return []
        return [Gap(group, last + 1, seq - 1)]
