"""Ranks that are forked from a standby process are killed, and so is the standby itself."""

import signal

import psutil
import pytest

from ckptd.watching import STANDBY_NAME

from .test_hangs import Watched
from .town import JOB, TRAINER

pytestmark = pytest.mark.timeout(300)


class Prepared(Watched):
    """A town whose trainers are forked from their launcher's standby."""

    def launch_two(self) -> None:
        arguments = ["--standalone", "--nproc-per-node=2", str(TRAINER)]
        arguments += ["--steps", "100000", "--until", str(self.directory / "until")]
        self.start_launcher("n0", JOB, arguments)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.processes["launcher-n0"].pid).children()

    def standby(self) -> psutil.Process:
        """The one that lives, once it has its name."""

        def found() -> psutil.Process | None:
            return next((one for one in self.children() if one.name() == STANDBY_NAME), None)

        return self.wait("the standby", found, 100)

    def ranks(self, life: int) -> dict[int, psutil.Process]:
        starts = [line for line in self.lines() if line.get("event") == "start"]
        return {
            line["rank"]: psutil.Process(line["pid"]) for line in starts if line["life"] == life
        }

    def wait_for_ranks(self, life: int) -> dict[int, psutil.Process]:
        self.wait(f"life {life}", lambda: len(self.ranks(life)) == 2, 100)
        return self.ranks(life)

    def let_a_snapshot_be(self) -> None:
        self.wait_for_snapshot("sealed", self.step())


def is_forked(one: psutil.Process) -> bool:
    return "ckptd.trainer.standby" in one.cmdline()


def test_ranks_killed_again_and_again_with_their_standby_and_without_end_equal():
    with Prepared(1).open() as here:
        here.launch_two()
        first = here.wait_for_ranks(1)
        standby = here.standby()
        assert all(is_forked(one) for one in first.values())
        assert all(one.ppid() == standby.ppid() for one in first.values())
        assert {one.pid for one in here.trainers("n0")} == {one.pid for one in first.values()}

        here.let_a_snapshot_be()
        first[1].kill()
        second = here.wait_for_ranks(2)
        assert all(is_forked(one) for one in second.values())
        assert here.standby() == standby

        here.let_a_snapshot_be()
        standby.send_signal(signal.SIGSTOP)
        second[0].kill()
        third = here.wait_for_ranks(3)
        assert "started without the standby process: it does not answer" in here.log("launcher-n0")
        assert not all(is_forked(one) for one in third.values())

        here.let_a_snapshot_be()
        here.standby().kill()
        here.finish(2)
        here.wait("the launcher's end", lambda: here.processes["launcher-n0"].poll() == 0, 60)
        here.check_digests(2)
