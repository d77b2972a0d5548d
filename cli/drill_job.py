"""A fault for a job that already runs: `ckptd drill --job NAME --fault stop --rank 3`."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path
from time import sleep, time
from typing import Any

from ckptd.cli.drill_ear import Ear
from ckptd.cli.drill_faults import DIED, HANG, SILENT, SLOW
from ckptd.cli.run import ask, connect
from ckptd.coordinator.diagnosis.score import Expected, Said
from ckptd.coordinator.diagnosis.shared import OBSERVE
from ckptd.errors import ConfigError, CorruptData
from ckptd.watching import INTRODUCTION_SUFFIX, read_introduction, started_ticks, trainers_dir
from ckptd.wire import Here, WhereAmI

STOP, KILL, SLOW_DOWN = "stop", "kill", "slow"
KINDS = {STOP: (HANG, SILENT), KILL: (DIED,), SLOW_DOWN: (SLOW,)}
_CYCLE_S = 0.2
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """A trainer process of this node, by a descriptor that no other process ever gets."""

    job: str
    rank: int
    node: str
    pid: int
    pidfd: int

    def signal(self, number: int) -> None:
        """Raises ProcessLookupError if it has ended."""
        signal.pidfd_send_signal(self.pidfd, number)


def find(job: str, rank: int, agent_socket: Path) -> Target:
    """The process of a rank on this node. Raises ConfigError if it is not here."""
    with connect(str(agent_socket)) as conn:
        answer = ask(conn, WhereAmI())
    node = answer.node if isinstance(answer, Here) else ""
    here: dict[str, set[int]] = {}
    for path in sorted(trainers_dir(agent_socket).glob("*" + INTRODUCTION_SUFFIX)):
        try:
            told = read_introduction(path)
        except (OSError, CorruptData):
            continue
        if started_ticks(told.pid) != told.started_ticks:
            continue
        here.setdefault(told.job, set()).add(told.rank)
        if (told.job, told.rank) == (job, rank):
            pidfd = os.pidfd_open(told.pid)
            if started_ticks(told.pid) == told.started_ticks:
                return Target(job, rank, node, told.pid, pidfd)
            os.close(pidfd)
    ranks = ", ".join(map(str, sorted(here.get(job, ())))) or "none"
    jobs = ", ".join(sorted(here)) or "none"
    raise ConfigError(
        f"rank {rank} of job {job!r} does not run here: of its ranks {ranks} run under the agent "
        f"at {agent_socket}, of jobs {jobs}. Give that node's agent with --agent, or run this on "
        "the rank's own node"
    )


def consequences(fault: str, target: Target, percent: int, for_s: float, policy: str) -> str:
    """What a person is to know before it is done."""
    who = f"rank {target.rank} of {target.job!r} (process {target.pid})"
    undone = (
        "It goes on by itself afterwards, and when this is interrupted; if this is killed, "
        f"`kill -CONT {target.pid}` lets it."
    )
    if fault == KILL:
        return (
            f"{who} is killed (SIGKILL). This cannot be undone: the job ends, or its launcher "
            "starts it anew, from its newest snapshot."
        )
    if fault == SLOW_DOWN:
        return f"{who} is stopped and continued, so that it takes {percent} % longer. {undone}"
    text = f"{who} is stopped (SIGSTOP), and the job with it, for up to {for_s:.0f} s. {undone}"
    if policy != OBSERVE:
        text += (
            f" But the coordinator's policy is {policy!r}: it will kill all trainers of the job, "
            "for their launchers to start them anew, from its newest snapshot."
        )
    return text


@contextlib.contextmanager
def struck(fault: str, target: Target, percent: int) -> Iterator[None]:
    """The fault lasts as long as the block; it is undone whatever happens."""
    if fault == KILL:
        target.signal(signal.SIGKILL)
        yield
        return
    over = threading.Event()

    def stop_and_go() -> None:
        stopped_s = _CYCLE_S * percent / (100 + percent)
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                target.signal(signal.SIGSTOP)
                over.wait(stopped_s)
                target.signal(signal.SIGCONT)
                over.wait(_CYCLE_S - stopped_s)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    try:
        if fault == STOP:
            target.signal(signal.SIGSTOP)
        else:
            thread.start()
        yield
    finally:
        over.set()
        try:
            if thread.ident is not None:
                thread.join()
        finally:  # an impatient person may interrupt that, too
            with contextlib.suppress(ProcessLookupError):
                target.signal(signal.SIGCONT)


def hold(
    fault: str,
    target: Target,
    percent: int,
    for_s: float,
    status: Callable[[], dict[str, Any]],
    tell: Callable[[Said], None],
) -> Ear:
    """Strike, and tell what the coordinator says, until that is right or `for_s` are over."""
    if target.job not in {job["job"] for job in status()["jobs"]}:
        raise ConfigError(
            f"the coordinator does not know {target.job!r}: is it the one of this node's agent? "
            "Give its address with --coordinator"
        )
    culprit = f"rank {target.rank} on node {target.node}"
    expected = Expected(KINDS[fault], (culprit,), (target.rank,), (target.node,))
    ear = Ear(target.job, expected, lambda since, until: nan)
    ear.struck_at = time()
    told = 0
    with struck(fault, target, percent):
        while time() < ear.struck_at + for_s and ear.named is None:
            sleep(_LOOK_EVERY_S)
            ear.listen(status())
            for said in ear.said[told:]:
                tell(said)
            told = len(ear.said)
    return ear
