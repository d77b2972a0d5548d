"""Whether a coordinator may go on, and with which term, by what agents say that they obey. Pure."""

from dataclasses import dataclass

from ckptd.terms import Obeyed


@dataclass(frozen=True, slots=True)
class Claim:
    """On what ground a process is the cluster's coordinator."""

    coordinator: str = "coordinator"
    """Random id of the process."""
    address: str = ""
    """Where it listens. Who listens where another did is its successor: both cannot."""
    take_over: bool = False
    """It begins a term although another coordinator may be alive: by a lease, or by hand."""
    seen_term: int = 0
    """The highest term that its lease has seen; 0 without one."""


@dataclass(frozen=True, slots=True)
class Raise:
    """Begin this term before any further order."""

    term: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End, without any further order."""

    reason: str


def judge(
    claim: Claim, term: int, obeyed: Obeyed, up_s: float, settled: bool
) -> Raise | Stop | None:
    """What follows for a coordinator of `term` (0: none yet), up for `up_s` seconds.

    `settled`: it has been up for so long that all agents that are there have been heard.
    """
    other = obeyed.term
    if other.coordinator != claim.coordinator and other.number:
        predecessor = other.address == claim.address
        if term and other.number > term and obeyed.for_s < up_s and not predecessor:
            # That term began after this process did.
            return Stop(
                f"superseded: the coordinator at {other.address} has begun term {other.number}, "
                f"and this one has term {term}; agents refuse its orders"
            )
        alive = obeyed.silent_s is not None and obeyed.silent_s < other.lease_s
        if alive and not (predecessor or claim.take_over) and (not settled or other.number >= term):
            return Stop(
                f"another coordinator is alive: an agent obeyed the one at {other.address}, term "
                f"{other.number}, {obeyed.silent_s:.1f} s ago; stop that one first and wait for "
                f"{other.lease_s:g} s, or, if it must be replaced as it is, start this one with "
                "--take-over"
            )
        if other.number >= term:
            return Raise(max(other.number, claim.seen_term) + 1)
    elif other.number > term:
        return Raise(other.number + 1)
    return None if term else Raise(claim.seen_term + 1)
