"""The coordinator, and an agent, killed at each message of a commit."""

import re
import signal
from collections.abc import Callable, Iterator

import pytest

from ckptd.wire import Commit, Holds, Protect, TakeSnapshot

from .between import Overheard
from .fleet import JOB

VICTIM = "n1"

Moment = Callable[[object], bool]

MOMENTS: dict[str, Moment] = {
    "the ticket": lambda said: isinstance(said, TakeSnapshot),
    "sealed": lambda said: (
        isinstance(said, Holds) and bool(said.holding.extents) and not said.holding.parity
    ),
    "protect": lambda said: isinstance(said, Protect),
    "encoded": lambda said: isinstance(said, Holds) and said.holding.parity,
    "commit": lambda said: isinstance(said, Commit),
}
"""A message to or from VICTIM. Nodes before it in the order of names have had theirs already, and
those after it will not get it from a coordinator that is dead."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def here() -> Iterator[Overheard]:
    fleet = Overheard(3)
    try:
        yield fleet.open()
    finally:
        fleet.close()


def kill_at(here: Overheard, name: str, moment: Moment) -> None:
    """SIGKILL a process at the next such message, which is lost."""
    killed: list[str] = []

    def meddle(node: str, said: object) -> bool:
        if not killed and node == VICTIM and moment(said):
            here.processes[name].send_signal(signal.SIGKILL)
            killed.append(name)
            return True
        return False

    here.between.meddle = meddle
    here.wait("the moment", lambda: killed)
    here.processes[name].wait(30)


def went_on(here: Overheard, life: int) -> None:
    """Nothing is lost, nothing begun anew, and what is there can be loaded, bit for bit."""
    newest = here.rest()
    assert newest.life == life
    here.train()
    assert here.wait_for_start() == newest


def test_the_coordinator(here: Overheard) -> None:
    life = here.job(JOB)["life"]
    for moment in MOMENTS.values():
        before = here.wait_for_protected(here.protected())
        kill_at(here, "coordinator", moment)
        here.start_coordinator(listen=here.direct)
        here.wait_for_nodes(len(here.places))
        assert here.wait_for_protected() >= before
        here.wait_for_protected(here.protected())
    went_on(here, life)


def test_an_agent(here: Overheard) -> None:
    life = here.job(JOB)["life"]
    for moment in MOMENTS.values():
        before = here.wait_for_protected(here.protected())
        kill_at(here, f"agent-{VICTIM}", moment)
        here.endpoint = here.between.address
        here.start_agent(VICTIM)
        after = here.wait_for_protected(here.wait_for_protected(before))
        assert after > before
        ready = [line for line in here.log(f"agent-{VICTIM}").splitlines() if "agent ready" in line]
        assert int(re.search(r"adopted_segments=(\d+)", ready[-1])[1]) > 0  # type: ignore[index]
    went_on(here, life)
