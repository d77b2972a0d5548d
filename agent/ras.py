"""What NCCL counts itself: its RAS threads are asked over their text protocol, on this machine.

Each process of a job answers for all of them: of each communicator, how many operations each rank
has launched, and who does not answer. JSON since NCCL 2.28.7; older ones answer in prose, which is
not read. Whatever answers, it costs a bounded time and size, and no more than an exception.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec

from ckptd.errors import Gone, ProtocolError

ANSWER_LIMIT_BYTES = 16 << 20
"""About 20,000 ranks in one communicator."""
RANKS_LIMIT = 64
_GREETING_S = 1.0
_TRIES = 4
_LEGS_S = 3
"""How long the asked process waits for others; it then takes up to five seconds more."""
_TEXT_LIMIT = 600
_TOLD_LIMIT = 4
_FINE = (0, 7)
"""ncclSuccess and ncclInProgress."""

_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
_Name = Annotated[str, msgspec.Meta(max_length=256)]


class _Status(msgspec.Struct):
    async_error: int = 0
    unresponsive: bool = False
    considered_dead: bool = False

    @property
    def is_silent(self) -> bool:
        return self.unresponsive or self.considered_dead


class _Member(msgspec.Struct):
    """A rank of a communicator, by its number there."""

    rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]
    host: _Name = ""
    pid: int = -1
    status: _Status = msgspec.field(default_factory=_Status)
    collective_counts: dict[_Name, _Number] | None = None


class _Communicator(msgspec.Struct):
    hash: _Name = "?"
    size: _Number = 0
    ranks: list[_Member] = []
    missing_ranks: list[_Member] = []


class _Answer(msgspec.Struct):
    communicators: list[_Communicator]
    nccl_version: _Name = "?"


@dataclass(frozen=True, slots=True)
class Counts:
    """Who lags, by NCCL's own counts. Ranks are those of the job, as far as they are known."""

    behind: tuple[int, ...]
    """Have launched less than others of a communicator, and more than nobody; bounded."""
    silent: tuple[int, ...]
    """Of these NCCL has no answer; bounded."""
    text: str
    """What was counted, and what is not known."""


async def ask(address: str, timeout_s: float = 10.0) -> bytes:
    """The status of the job that answers at HOST:PORT of this machine, as JSON.

    Raises Gone if nobody listens, TimeoutError, and ProtocolError if it answers something else.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        raise ProtocolError(f"NCCL_RAS_ADDR is {address[:100]!r}; it must be HOST:PORT")
    async with asyncio.timeout(timeout_s):
        for _ in range(_TRIES):
            # All processes of a job listen at the same port: another may take the next try.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GREETING_S):
                    reader, writer = await _greet(host, int(port))
                break
        else:
            raise TimeoutError
        try:
            await _say(reader, writer, f"TIMEOUT {_LEGS_S}", "OK")
            await _say(reader, writer, "SET FORMAT json", "OK")
            writer.write(b"VERBOSE STATUS\n")
            return await _rest(reader)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Gone(f"NCCL's RAS hung up: {error}") from error
        finally:
            writer.transport.abort()


async def _greet(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an address of this machine, and to no other: from that same address."""
    try:
        reader, writer = await asyncio.open_connection(host, port, local_addr=(host, 0))
    except (OSError, OverflowError) as error:
        raise Gone(f"nobody listens at {host}:{port}: {error}") from error
    try:
        await _say(reader, writer, "CLIENT PROTOCOL 2", "SERVER PROTOCOL ")
    except BaseException as error:
        writer.transport.abort()
        if isinstance(error, OSError | asyncio.IncompleteReadError):
            raise Gone(f"{host}:{port} hung up: {error}") from error
        raise
    return reader, writer


async def _say(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str, expected: str
) -> None:
    writer.write(command.encode() + b"\n")
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as error:
        raise ProtocolError(f"it answers no line to {command!r}") from error
    answer = line.decode(errors="replace").strip()
    if answer.upper().startswith(expected):
        return
    if command.startswith("SET FORMAT") and answer.upper().startswith("ERROR"):
        raise ProtocolError("it has no JSON yet; NCCL 2.28.7 and later have")
    raise ProtocolError(f"it answers {answer[:100]!r} to {command!r}")


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """All until the other side closes."""
    raw = bytearray()
    while piece := await reader.read(1 << 16):
        raw += piece
        if len(raw) > ANSWER_LIMIT_BYTES:
            raise ProtocolError(f"it answers more than {ANSWER_LIMIT_BYTES} bytes")
    return bytes(raw)


def read(raw: bytes, trainers: Mapping[int, int], world_size: int) -> Counts:
    """What an answer says of the job whose `trainers` run here: process number to rank.

    Raises ProtocolError if it cannot be read, and Gone if it is another job's.
    """
    try:
        answer = msgspec.json.decode(raw, type=_Answer)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"NCCL's RAS answers what cannot be read: {error}") from error
    names = _Names(answer.communicators, trainers, world_size)
    told: list[str] = []
    behind: set[_Place] = set()
    ahead: set[_Place] = set()
    silent: set[_Place] = set()
    for each in answer.communicators:
        silent |= {_place(each, m) for m in each.missing_ranks if m.status.is_silent}
        if faults := [_place(each, m) for m in each.ranks if m.status.async_error not in _FINE]:
            told.append(f"{names.listed(faults)} reported an error in {_called(each)}")
        for op, counts in _differing(each):
            least, most = min(counts.values()), max(counts.values())
            late = [place for place, count in counts.items() if count < most]
            behind.update(late)
            ahead.update(place for place, count in counts.items() if count > least)
            at_least = "at least " if len({counts[place] for place in late}) > 1 else ""
            told.append(
                f"{names.listed(late)} launched {op} {at_least}{least} times, others {most}, "
                f"in {_called(each)}"
            )
    # Who waits in one communicator may lag in another: the cause is who waits in none.
    roots = behind - ahead or behind
    if not told:
        told.append("all that answer have launched the same operations")
    if silent:
        told.append(f"{names.listed(silent)} did not answer")
    told = [*told[:_TOLD_LIMIT], *(["…"] if len(told) > _TOLD_LIMIT else [])]
    if not any(m.collective_counts for each in answer.communicators for m in each.ranks):
        told = [f"NCCL {answer.nccl_version} does not tell how much each rank has launched"]
    return Counts(names.ranks(roots), names.ranks(silent), "; ".join(told)[:_TEXT_LIMIT])


_Place = tuple[str, int]
"""A host's address and a process number. Where RAS knows neither, the communicator and the number
there."""


class _Names:
    """Finds the ranks of the job that processes are."""

    def __init__(
        self, communicators: list[_Communicator], trainers: Mapping[int, int], world_size: int
    ) -> None:
        """Raises Gone if none of them are `trainers`, as far as can be told."""
        self._rank: dict[_Place, int] = {}
        here: set[_Place] = set()
        for each in communicators:
            ranks = {_place(each, m): m.rank for m in (*each.ranks, *each.missing_ranks)}
            ours = {place for place in ranks if place[1] in trainers}
            here |= ours
            # That of all ranks has them in their order. In containers other nodes' processes may
            # have the same numbers, but not the same ranks.
            if each.size == world_size and any(ranks[p] == trainers[p[1]] for p in ours):
                self._rank |= ranks
        if not self._rank and len({host for host, _ in here}) == 1:
            self._rank = {place: trainers[place[1]] for place in here}
        if not self._rank:
            raise Gone("it answers for another job, or cannot tell which processes are here")

    def ranks(self, places: Iterable[_Place]) -> tuple[int, ...]:
        """Of those that are known."""
        return tuple(sorted({self._rank[p] for p in places if p in self._rank}))[:RANKS_LIMIT]

    def listed(self, places: Iterable[_Place]) -> str:
        """In words, the first few."""
        known = sorted(places, key=lambda place: (self._rank.get(place, 1 << 30), place))
        words = [
            f"rank {self._rank[p]}" if p in self._rank else f"number {p[1]} of {p[0]}"
            for p in known[:4]
        ]
        more = f" and {len(known) - 4} more" if len(known) > 4 else ""
        return ", ".join(words) + more


def _differing(each: _Communicator) -> list[tuple[str, dict[_Place, int]]]:
    """The operations that not all ranks of a communicator have launched as often."""
    counted = [(_place(each, m), m.collective_counts) for m in each.ranks if m.collective_counts]
    found = []
    for op in dict.fromkeys(op for _, counts in counted for op in counts):
        counts = {place: counts[op] for place, counts in counted if op in counts}
        if len(set(counts.values())) > 1:
            found.append((op, counts))
    return found


def _place(each: _Communicator, member: _Member) -> _Place:
    return (member.host, member.pid) if member.pid > 0 else (_called(each), member.rank)


def _called(each: _Communicator) -> str:
    return f"communicator {each.hash} of {each.size} ranks"
