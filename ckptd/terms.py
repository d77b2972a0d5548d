"""The term of a coordinator: an agent stores it before it obeys, and obeys no lower one after."""

import msgspec

from ckptd.ids import Count


class Term(msgspec.Struct, frozen=True):
    """One coordinator process's time in office."""

    number: Count = 0
    """Of two terms, the greater is the later one; 0: none yet."""
    coordinator: str = ""
    """Random id of the process."""
    address: str = ""
    """Where it listens, for people, and to know its successor by."""
    lease_s: float = 0.0
    """One that has been silent for so long, in seconds, does not count as alive."""


class KeptTerm(msgspec.Struct, frozen=True):
    """A term as an agent stores it; `since` is in monotonic seconds, which go on from boot."""

    term: Term
    since: float


class Obeyed(msgspec.Struct, frozen=True):
    """What an agent says of the term that it obeys."""

    term: Term = Term()
    for_s: float = 0.0
    """For how long it has obeyed this term, in seconds."""
    silent_s: float | None = None
    """How long ago its last order came, in seconds; None: not since this agent was started."""
