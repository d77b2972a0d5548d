"""A job of real ranks, and a watcher on it in a thread."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ckptd.agent.watcher import Pace, TrainerView, Watcher
from ckptd.collectives import Collective, GroupInfo
from ckptd.watching import Gap, Observed, trainers_dir

JOB = Path(__file__).with_name("job.py")
DEADLINE_S = 60.0
PACE = Pace(slow_s=0.2, fast_s=0.1, deadline_s=0.5, stuck_s=0.5, share=0.5)

_Found = TypeVar("_Found")


class WatchedJob:
    """A job, and what the watcher has seen of it."""

    def __init__(
        self,
        mode: str,
        ranks: int,
        directory: Path,
        *,
        pace: Pace = PACE,
        watch: bool = True,
        **environ: str,
    ) -> None:
        directory.mkdir()
        self.ranks, self.directory = ranks, directory
        self.socket = socket = directory / "agent"
        self.observed: list[Observed] = []
        self.log = (directory / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, str(JOB), mode, str(ranks), str(directory)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CKPTD_AGENT": str(socket),
                "CKPTD_JOB": "watched",
                "TORCH_FR_BUFFER_SIZE": "256",
                **environ,
            },
            stdout=self.log,
            stderr=self.log,
        )
        self.watcher = Watcher(trainers_dir(socket), self.observed.append, pace)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if watch:
            self._thread.start()

    def wait(self, what: str, look: Callable[[], _Found], deadline_s: float = DEADLINE_S) -> _Found:
        """Wait for something true; returns it."""
        until = time.monotonic() + deadline_s
        while True:
            found = look()
            if found:
                return found
            log = (self.directory / "log").read_text()
            assert self.process.poll() in (None, 0), f"the job has ended, before {what}:\n{log}"
            assert time.monotonic() < until, f"waited {deadline_s:.0f} s for {what}:\n{log}"
            time.sleep(0.02)

    def call(self, work: Any) -> Any:
        """Run a coroutine where the watcher runs."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def end(self) -> None:
        if self._thread.ident is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(10.0)
        for rank in range(self.ranks):
            with contextlib.suppress(OSError, ValueError, KeyError):
                pid = self.said(rank)["pid"]
                os.kill(pid, signal.SIGKILL)
                for ring in Path("/dev/shm").glob(f"ckptd-{os.getuid()}-{pid}-*.ring"):
                    ring.unlink()
        self.process.kill()
        self.process.wait()
        self.log.close()

    def stop(self) -> None:
        """Let the ranks end by themselves, and check that they have ended well."""
        (self.directory / "stop").touch()
        assert self.process.wait(DEADLINE_S) == 0, (self.directory / "log").read_text()

    def said(self, rank: int) -> dict[str, Any]:
        """What the rank has said last; {} before."""
        try:
            return json.loads((self.directory / f"{rank}.json").read_text())
        except OSError:
            return {}

    def pid(self, rank: int) -> int:
        return self.wait(f"rank {rank}", lambda: self.said(rank).get("pid", 0))

    def view(self, rank: int) -> TrainerView:
        def look() -> TrainerView | None:
            found = [v for v in self.watcher.views() if v.introduction.rank == rank]
            return found[0] if found else None

        return self.wait(f"the watcher to see rank {rank}", look)

    def records(self, rank: int) -> dict[tuple[str, int, str, int | None], Collective]:
        """By group, number, operation and peer; the newest of each."""
        found = {}
        for each in list(self.observed):
            if each.rank == rank:
                for record in each.collectives:
                    found[record.group, record.seq, record.op, record.peer] = record
        return found

    def open(self, rank: int) -> list[Collective]:
        """What the rank has entered and not ended, as far as is known."""
        return [record for record in self.records(rank).values() if not record.ended]

    def gaps(self, rank: int) -> list[Gap]:
        return [gap for each in list(self.observed) if each.rank == rank for gap in each.gaps]

    def groups(self, rank: int) -> dict[str, GroupInfo]:
        """The groups as they were told last."""
        told = [each.groups for each in list(self.observed) if each.rank == rank and each.groups]
        return {info.group: info for info in told[-1]} if told else {}

    def _watch(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self.watcher.run())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
