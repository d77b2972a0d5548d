"""`ckptd run --standby`: ranks are killed, and the ones that were waiting take their places."""

import psutil
import pytest

from .test_hangs import Watched
from .town import JOB, TRAINER

pytestmark = pytest.mark.timeout(300)


class Prepared(Watched):
    """A town whose launcher keeps standby processes."""

    def launch_prepared(self) -> None:
        arguments = ["--standalone", "--nproc-per-node=2", str(TRAINER)]
        arguments += ["--steps", "100000", "--until", str(self.directory / "until")]
        self.start_launcher("n0", JOB, arguments, "--standby")

    def children(self, module: str) -> list[psutil.Process]:
        """Those of the launcher that were started as this module."""
        return [one for one in self.trainers("n0") if module in one.cmdline()]

    def standbys(self) -> list[psutil.Process]:
        ranks = {line["pid"] for line in self.lines() if line.get("event") == "start"}
        waiting = self.children("ckptd.trainer.standby")
        return [one for one in waiting if one.pid not in ranks]

    def ranks(self, life: int) -> dict[int, int]:
        """Process by rank."""
        starts = [line for line in self.lines() if line.get("event") == "start"]
        return {line["rank"]: line["pid"] for line in starts if line["life"] == life}

    def wait_for_standbys(self, times: int) -> None:
        text = "2 standby processes are ready"
        self.wait(text, lambda: self.log("launcher-n0").count(text) >= times, 100)

    def wait_for_ranks(self, life: int) -> dict[int, int]:
        self.wait(f"life {life}", lambda: len(self.ranks(life)) == 2, 100)
        return self.ranks(life)

    def kill_rank(self, pid: int) -> None:
        self.wait_for_snapshot("sealed", self.step())
        psutil.Process(pid).kill()


def test_ranks_killed_twice_in_a_row_go_on_from_standbys_and_end_equal():
    with Prepared(1).open() as here:
        here.launch_prepared()
        cold = here.wait_for_ranks(1)
        here.wait_for_standbys(1)
        waiting = {one.pid for one in here.standbys()}
        here.kill_rank(cold[1])
        warm = here.wait_for_ranks(2)
        assert {*warm.values()} == waiting

        # One is ready by now, or none: what is missing is started cold.
        here.kill_rank(warm[0])
        assert not {*here.wait_for_ranks(3).values()} & {*cold.values(), *warm.values()}

        here.wait_for_standbys(2)
        for one in here.standbys():
            one.kill()
        here.finish(2)
        here.wait("the launcher's end", lambda: here.processes["launcher-n0"].poll() == 0, 60)
        here.check_digests(2)
