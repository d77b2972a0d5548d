"""One machine with its agent and coordinator, and trainers on it that are killed and come back."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

from ckptd.cli.local_cluster import LocalCluster

JOB = "integration"
LOST_STEPS = (
    5  # at most, of 50 ms or more each; two or three where the machine has nothing else to do
)


class Machine(LocalCluster):
    """Runs the trainers that lie beside this file. Each keeps a diary, a JSON object a line:

    `{"event": "start", "step": N}`, `{"step": N, "digest": ...}` after each step, and
    `{"event": "end", ...}`, or `{"event": "refused", ...}`.
    """

    def __init__(self) -> None:
        super().__init__(
            coordinator_flags=["--cell-size", "4096", "--beat", "0.2", "--lease", "1.5"],
            agent_flags=["--memory-limit", "64MiB"],
            environ={"CKPTD_JOB": JOB, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.runs = 0

    def open(self) -> "Machine":
        self.start_coordinator()
        self.start_agent("here")
        self.wait_for_nodes(1)
        return self

    def run(
        self, script: str, *flags: str, ranks: int = 1, fails: bool = False, ckptd: bool = True
    ) -> str:
        """Run a trainer to its end, which may be its own SIGKILL; returns its name."""
        self.runs += 1
        name = f"run-{self.runs}"
        command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
        environ = {"CKPTD_AGENT": str(self.socket("here")), "DIARY": str(self.diary(name))}
        if ranks > 1:
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        processes = []
        for rank in range(ranks):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(
                self.spawn(
                    name if rank == 0 else f"{name}-{rank}",
                    [*command, *([] if ckptd else ["--plain"])],
                    {**environ, **numbers},
                )
            )
        self.wait(f"{script} to end", lambda: all(p.poll() is not None for p in processes), 200)
        if fails:
            refused = self.event(name, "refused") is not None
            assert processes[0].returncode == (1 if refused else -9), self.log(name)
        else:
            assert [process.returncode for process in processes] == [0] * ranks, self.log_ends()
        return name

    def diary(self, name: str) -> Path:
        return self.directory / f"{name}.diary"

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.diary(name)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def event(self, name: str, event: str) -> dict[str, Any] | None:
        """What rank 0 has written of it."""
        found = (x for x in self.lines(name) if x.get("event") == event and x["rank"] == 0)
        return next(found, None)

    def steps(self, name: str) -> dict[tuple[int, int], str]:
        """Digest by rank and step."""
        return {(x["rank"], x["step"]): x["digest"] for x in self.lines(name) if "digest" in x}

    def check_story(self, script: str, *flags: str, die_at: list[int], ranks: int = 1) -> None:
        """Train without and with dying after these steps.

        Every step that any run makes, and the state at the end, must be equal to those of a run
        without ckptd that nothing interrupts.
        """
        calm = self.run(script, *flags, ranks=ranks, ckptd=False)
        expected = self.steps(calm)
        runs = [
            self.run(script, *flags, "--die-at", str(step), ranks=ranks, fails=True)
            for step in die_at
        ]
        runs.append(self.run(script, *flags, ranks=ranks))
        last = 0
        for name in runs:
            start = self.event(name, "start")
            assert start is not None, self.log(name)
            begun = start["step"]
            assert last - LOST_STEPS <= begun <= last, f"{name} began at {begun}, not near {last}"
            made = self.steps(name)
            for key, digest in made.items():
                assert digest == expected[key], f"{name}: rank and step {key} differ"
            assert min(step for _, step in made) == begun + 1
            last = max(step for _, step in made)
        assert self.event(runs[-1], "end") == self.event(calm, "end")
        self.wait("the job to be forgotten", lambda: not self.job(JOB))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
