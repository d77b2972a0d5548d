"""A cluster of real agents that keeps one job's snapshots, with ranks that need no torch."""

import json
import sys
from pathlib import Path
from typing import Any

from ckptd.cli.local_cluster import LocalCluster
from ckptd.ids import SnapshotId

RANKS = Path(__file__).with_name("bare_ranks.py")
JOB = "fleet"
CELL_BYTES = 4096


class Fleet(LocalCluster):
    """Nodes n0, n1, …; `places` says which node has the place of each rank."""

    def __init__(
        self,
        nodes: int,
        *,
        seed: int = 0,
        size_bytes: int = 20 * CELL_BYTES,
        lease_s: float = 1.5,
        agent_flags: tuple[str, ...] = (),
        key_file: Path | None = None,
    ) -> None:
        super().__init__(
            coordinator_flags=[
                "--cell-size", str(CELL_BYTES), "--beat", "0.2", "--lease", str(lease_s),
            ],
            agent_flags=["--memory-limit", "256MiB", *agent_flags],
            key_file=key_file,
        )  # fmt: skip
        self.seed, self.size_bytes = seed, size_bytes
        self.places = [f"n{number}" for number in range(nodes)]
        self.hold = self.directory / "hold"
        self.ranks = ""
        self._made, self._rounds = nodes, 0

    def open(self) -> "Fleet":
        """Start the coordinator and the agents."""
        self.start_coordinator()
        for node in self.places:
            self.start_agent(node)
        self.wait_for_nodes(len(self.places))
        return self

    def get_going(self) -> None:
        """Train until a snapshot is protected."""
        self.train()
        self.wait_for_start()
        self.wait_for_protected()

    def newcomer(self) -> str:
        """Start the agent of a node that nobody has seen yet; returns its name."""
        node = f"n{self._made}"
        self._made += 1
        self.start_agent(node)
        return node

    def made(self, nodes: int) -> None:
        """So many have a name already."""
        self._made = nodes

    # Ranks.

    def train(self) -> None:
        """Start all ranks, rank r on places[r]."""
        self.hold.unlink(missing_ok=True)
        self._rounds += 1
        self.ranks = f"ranks-{self._rounds}"
        sockets = [str(self.socket(node)) for node in self.places]
        command = [sys.executable, str(RANKS), str(self.seed), JOB, str(self.size_bytes)]
        self.spawn(self.ranks, [*command, str(self.hold), *sockets])

    def stop_training(self) -> None:
        """SIGKILL all ranks at once."""
        self.kill(self.ranks)

    def rest(self) -> SnapshotId:
        """Stop training; returns the one snapshot that is left, once nothing is under way."""
        self.stop_training()

        def settled() -> SnapshotId | None:
            job = self.job(JOB)
            states = {snapshot["state"] for snapshot in job["snapshots"]}
            if job["attached_ranks"] or states != {"protected"}:
                return None
            return self.protected()

        return self.wait("the job to come to rest", settled, 60)

    def said(self, event: str) -> list[dict[str, Any]]:
        """What the ranks that run now have said of this kind."""
        lines = []
        for line in self.log(self.ranks).splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # a warning, or a line that is just being written
        return [line for line in lines if line.get("event") == event]

    def wait_for(self, event: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The first event of this kind that the ranks that run now report."""

        def look() -> dict[str, Any] | None:
            found = self.said(event)
            if not found and self.processes[self.ranks].poll() is not None:
                raise AssertionError(f"the ranks have ended:\n{self.log(self.ranks)}")
            return found[0] if found else None

        return self.wait(f"{event!r} of {self.ranks}", look, timeout_s)

    def wait_for_start(self) -> SnapshotId | None:
        """Wait until all ranks train; returns what they began from, which they have compared."""
        start = self.wait_for("start")
        assert not self.said("wrong")
        began = self.said("granted")[-1]
        assert began["step"] == start["step"]
        if not start["step"]:
            return None
        compared = {line["rank"] for line in self.said("compared")}
        assert compared == set(range(len(self.places)))
        return SnapshotId(JOB, self._life_of(start["step"]), start["step"])

    def _life_of(self, step: int) -> int:
        resumed = self.job(JOB)["resumed_from"]
        life, _, said = resumed.rpartition("/")[2].partition(".")
        assert int(said) == step
        return int(life)

    # Snapshots.

    def snapshots(self, state: str) -> list[SnapshotId]:
        """Those in this state, the newest first."""
        return [
            SnapshotId(JOB, each["life"], each["step"])
            for each in self.job(JOB).get("snapshots", [])
            if each["state"] == state
        ]

    def protected(self) -> SnapshotId | None:
        return next(iter(self.snapshots("protected")), None)

    def wait_for_protected(self, after: SnapshotId | None = None) -> SnapshotId:
        """A protected snapshot, newer than `after`."""

        def look() -> SnapshotId | None:
            found = self.protected()
            return found if found is not None and (after is None or found > after) else None

        return self.wait(f"a protected snapshot after {after}", look, 60)

    # What lies in memory directories.

    def files(self, node: str, pattern: str) -> list[Path]:
        return sorted(self.memory_of(node).glob(f"{JOB}/{pattern}"))
