"""A node whose memory directory, with the log in it, is full: to the last byte, in mid-run."""

import itertools
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptd.agent.log_file import LogFile
from ckptd.client import give_order
from ckptd.errors import Refused
from ckptd.journal import Entry
from ckptd.wire import SetQuota

from .fleet import JOB, Fleet

SIZE_BYTES = 2 << 20
QUOTA_BYTES = 64 << 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs"),
]


class Small(Fleet):
    """Two nodes; n1 has a file system of its own, a small one."""

    def open(self) -> "Small":
        where = self.memory_of("n1")
        where.mkdir(parents=True)
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size={SIZE_BYTES},mode=0700",
            "ckptd-tests",
            str(where),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            self.close()
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr}")
        super().open()
        return self

    def close(self) -> None:
        self.kill_all()
        subprocess.run(["umount", "-l", str(self.memory_of("n1"))], capture_output=True)
        super().close()

    @property
    def _ballast(self) -> Path:
        return self.memory_of("n1") / ".ballast"

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as file, ExitStack() as stack:
            stack.enter_context(pytest.raises(OSError, match="No space left"))
            for size_bytes in (1 << 16, 1):
                while True:
                    file.write(bytes(size_bytes))

    def leave(self, pages: int) -> None:
        """So much room."""
        os.truncate(self._ballast, self._ballast.stat().st_size - pages * mmap.PAGESIZE)

    def empty(self) -> None:
        self._ballast.unlink()

    def kept(self, node: str) -> tuple[Entry, ...]:
        """Of the journal."""
        return LogFile(self.memory_of(node) / ".log").read([])

    def reasons(self) -> list[str]:
        (reasons,) = (node["reasons"] for node in self.status()["nodes"] if node["node"] == "n1")
        return list(reasons)


@pytest.fixture
def here() -> Iterator[Small]:
    fleet = Small(2)
    try:
        yield fleet.open()
    finally:
        fleet.close()


def test_training_goes_on_and_what_is_protected_stays(here: Small) -> None:
    here.get_going()
    here.fill()
    here.wait("it to be said", lambda: "No space left" in str(here.job(JOB)["ended"]))
    before = here.wait_for_protected()
    step = here.job(JOB)["step"]
    here.wait("training to go on", lambda: here.job(JOB)["step"] > step + 20)
    assert here.protected() == before

    # Room for the digests of a segment, and then none for its agent's own records.
    def says_so() -> list[str]:
        here.fill()  # what a capture in mid-way had, and gave back
        here.leave(pages=1)
        time.sleep(0.5)
        return [reason for reason in here.reasons() if "cannot store" in reason]

    here.wait("its agent to say so", says_so, 60)
    assert here.wait_for_protected() >= before
    sizes = itertools.count(QUOTA_BYTES)

    def is_refused() -> bool:
        here.fill()
        try:
            give_order(here.endpoint, here.key, SetQuota(JOB, next(sizes)))
        except Refused as error:
            return "n1 has not stored it yet" in str(error)
        return False

    here.wait("an order that n1 cannot store", is_refused, 60)
    here.wait("the other to keep it", lambda: len(here.kept("n0")) == 1)
    assert here.kept("n1") != here.kept("n0")

    here.kill("agent-n1")
    here.start_agent("n1")
    here.wait("n1 to be back", lambda: here.log("agent-n1").count("agent ready") == 2)
    here.wait_for_nodes(2)
    assert here.wait_for_protected() >= before

    here.empty()
    after = here.wait_for_protected(here.wait_for_protected())
    assert after.life == before.life
    here.wait("n1 to keep the order", lambda: here.kept("n1") == here.kept("n0"))
    give_order(here.endpoint, here.key, SetQuota(JOB, QUOTA_BYTES))
    newest = here.rest()
    here.train()
    assert here.wait_for_start() == newest
