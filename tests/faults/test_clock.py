"""Wall clocks that are an hour off, and are set in mid-run: nothing is decided by them."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from .fleet import JOB, Fleet

WRAPPER = Path(__file__).with_name("set_clock.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Clocks(Fleet):
    """A fleet whose coordinator and agents have clocks that can be set."""

    def __init__(self, nodes: int) -> None:
        super().__init__(nodes)
        self.ahead_s: dict[str, float] = {}

    def spawn(
        self, name: str, command: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        if command[1] == "-m":
            ahead = str(self.ahead_s.get(name, 0.0))
            command = [sys.executable, str(WRAPPER), ahead, *command[2:]]
        return super().spawn(name, command, environ)


@pytest.fixture
def here() -> Iterator[Clocks]:
    fleet = Clocks(2)
    fleet.ahead_s["agent-n1"] = 7200.0
    try:
        yield fleet.open()
    finally:
        fleet.close()


def test_clocks_are_set_back_in_mid_run(here: Clocks) -> None:
    here.train()
    here.wait_for_start()
    newest = here.wait_for_protected()

    for name in ("agent-n1", "agent-n0", "coordinator"):
        here.kill(name, signal.SIGUSR1)
        newest = here.wait_for_protected(here.wait_for_protected(newest))
    told = here.status()["events"][-1]["time"]

    # What they have stored is of use to processes whose clock is another one.
    here.ahead_s = {"coordinator": -86400.0, "agent-n1": -86400.0}
    for name in ("coordinator", "agent-n1"):
        here.kill(name)
    here.start_coordinator()
    here.start_agent("n1")
    newest = here.wait_for_protected(here.wait_for_protected(newest))
    assert newest.life == 1
    assert here.status()["coordinator"]["term"] == 2
    assert here.status()["events"][-1]["time"] < told, "the clock was not set at all"
    newest = here.rest()
    here.train()
    assert here.wait_for_start() == newest
    assert here.job(JOB)["life"] == 2
