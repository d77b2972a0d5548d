"""What the coordinator's decisions cost by the number of nodes: `python -m tests.sim.scale`.

The real decider, agents that are nothing but their messages, and one job with eight ranks on each
node that trains a step a second and has every step protected. Time of the world is simulated; what
is measured is the CPU time that `Coordinator.handle` and `tick` take, and what they remember.
"""

import gc
import json
import math
import random
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import process_time

import click

from ckptd.coordinator.decider import Coordinator, Send, Settings
from ckptd.coordinator.state import State
from ckptd.ids import SnapshotId
from ckptd.manifest import Extent, JobManifest
from ckptd.wire import (
    AgentMessage,
    AskResumeFor,
    Beat,
    Commit,
    CoordinatorMessage,
    Grant,
    Hello,
    Holding,
    Holds,
    LifeResumed,
    Protect,
    RankLeft,
    RankReport,
    RankState,
    TakeSnapshot,
)

JOB = "job"
RANKS_PER_NODE = 8
SLOTS = 2
SIZE_BYTES = 64 << 20
TICKS_PER_S = 5  # as often as the coordinator's process looks at the clock
SETTINGS = Settings(beat_s=1.0, lease_s=8.0)


@dataclass
class Rank:
    """A trainer, as its agent knows it."""

    number: int
    step: int = 0
    life: int = 0
    seen_step: int = 0
    free_slots: int = 0

    def state(self, round: str, world_size: int) -> RankState:
        return RankState(
            JOB,
            round,
            self.life,
            self.number,
            world_size,
            every=1,
            step=self.step,
            seen_step=self.seen_step,
            free_slots=self.free_slots,
        )


class Node:
    """An agent that does at once what it is told."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self._cluster = cluster
        self.name, self.peer = f"n{number:05}", f"n{number:05}#1".encode()
        first = number * RANKS_PER_NODE
        self.ranks = [Rank(first + index) for index in range(RANKS_PER_NODE)]
        self._tickets: dict[int, SnapshotId] = {}
        self._held: dict[SnapshotId, Holding] = {}

    def hello(self) -> None:
        self._say(
            Hello(
                node=self.name, incarnation="1", memory_token=self.name, address=self.name,
                cells=f"{self.name}:1", domain="", spare=False, codec="zfec", engine="zfec 1.6",
                engine_reason="", memory_limit_bytes=1 << 40, memory_used_bytes=0, holdings=(),
                ranks=(), records=(), launchers=(), problems=(),
            )
        )  # fmt: skip

    def beat(self) -> None:
        self._say(Beat(self.name, "1", 0, ()))

    def attach(self) -> None:
        for rank in self.ranks:
            self._report(rank)

    def resume(self, step: int) -> None:
        for rank in self.ranks:
            rank.step = step
        self.attach()

    def leave(self) -> None:
        """Its trainers are gone; what they have sealed is held."""
        for rank in self.ranks:
            self._say(
                RankLeft(JOB, self._cluster.round, rank.life, rank.number, "killed", finished=False)
            )
            rank.step = 0
        self._tickets.clear()

    def hear(self, message: CoordinatorMessage) -> None:
        match message:
            case Grant(life=life):
                for rank in self.ranks:
                    rank.life, rank.free_slots = life, SLOTS
            case TakeSnapshot(id):
                self._tickets[id.step] = id
                for rank in self.ranks:
                    rank.seen_step = max(rank.seen_step, id.step)
                    rank.free_slots -= 1
                    self._report(rank)
            case Protect(manifest):
                self._protect(manifest)
            case Commit(_, retire):
                for id in retire:
                    self._free(id)

    def step(self, step: int) -> None:
        """All its ranks have finished a step, and seal it if they have a ticket."""
        id = self._tickets.pop(step, None)
        for rank in self.ranks:
            rank.step = step
            self._report(rank)
            if id is not None:
                self._seal(id, rank)

    def _seal(self, id: SnapshotId, rank: Rank) -> None:
        held = self._held.get(id)
        extents = (*(held.extents if held else ()), Extent(rank.number, SIZE_BYTES))
        self._hold(Holding(id, self._cluster.world_size, extents))

    def _protect(self, manifest: JobManifest) -> None:
        held = self._held[manifest.id]
        if not held.parity:
            self._hold(Holding(held.id, held.world_size, held.extents, True, manifest))

    def _free(self, id: SnapshotId) -> None:
        if self._held.pop(id, None) is not None:
            self._say(Holds(Holding(id, 0)))
            for rank in self.ranks:
                rank.free_slots += 1
                self._report(rank)

    def _hold(self, holding: Holding) -> None:
        self._held[holding.id] = holding
        self._say(Holds(holding))

    def _report(self, rank: Rank) -> None:
        self._say(RankReport(rank.state(self._cluster.round, self._cluster.world_size)))

    def _say(self, message: AgentMessage) -> None:
        self._cluster.said.append((self.peer, message))


class Cluster:
    """Nodes in front of one coordinator; `cpu_s` is what its decisions have taken."""

    def __init__(self, nodes: int) -> None:
        self.world_size = nodes * RANKS_PER_NODE
        self.now, self.cpu_s, self.messages = 1000.0, 0.0, 0
        self.round = ""
        self.said: deque[tuple[bytes, AgentMessage]] = deque()
        self.coordinator = Coordinator(SETTINGS, self.now)
        self.nodes = [Node(self, number) for number in range(nodes)]
        self._by_peer = {node.peer: node for node in self.nodes}
        self._random = random.Random(nodes)

    def _decide(self, decide: Callable[[], list[Send]]) -> None:
        start = process_time()
        sends = decide()
        self.cpu_s += process_time() - start
        self.messages += len(sends)
        for send in sends:
            self._by_peer[send.peer].hear(send.message)

    def settle(self) -> None:
        """Until nobody has anything to say; what is said at one time is timed as a whole."""
        while self.said:
            said, self.said = self.said, deque()
            self.messages += len(said)
            self._decide(partial(self._handle, said))

    def _handle(self, said: Iterable[tuple[bytes, AgentMessage]]) -> list[Send]:
        handle, now = self.coordinator.handle, self.now
        return [send for peer, message in said for send in handle(peer, message, now)]

    def _tick(self) -> list[Send]:
        sends = self.coordinator.tick(self.now)
        self.coordinator.next_deadline(self.now)
        return sends

    def start(self) -> None:
        """All nodes join, and the job begins: its rank 0 asks before the others are there."""
        order = self._random.sample(self.nodes, len(self.nodes))
        for node in order:
            node.hello()
        self.settle()
        for _ in range(int(SETTINGS.lease_s) + 1):
            self.now += 1.0
            self._beats()
        self._begin_life(0)

    def restart(self) -> None:
        """All trainers die, and come back."""
        step = self.protected.step
        for node in self._random.sample(self.nodes, len(self.nodes)):
            node.leave()
        self.settle()
        self._begin_life(step)

    def _begin_life(self, step: int) -> None:
        self.round = f"r{self.nodes[0].ranks[0].life + 1}"
        self.said.append((self.nodes[0].peer, AskResumeFor(JOB, self.round, (), 1)))
        order = self._random.sample(self.nodes, len(self.nodes))
        for node in order:
            node.attach()
        self.settle()
        life = self.nodes[0].ranks[0].life
        assert life, "the job has no life"
        self.said.append((self.nodes[0].peer, LifeResumed(JOB, life, step)))
        for node in order:
            node.resume(step)
        self.settle()

    def idle(self, seconds: int) -> None:
        """Nothing but heartbeats."""
        for _ in range(seconds):
            self._beats()
            self._pass_a_second()

    def train(self, steps: int) -> None:
        """A second for each step; everybody in an order of its own."""
        done = self.nodes[0].ranks[0].step
        for step in range(done + 1, done + 1 + steps):
            for node in self._random.sample(self.nodes, len(self.nodes)):
                node.step(step)
            self.settle()
            self._beats()
            self._pass_a_second()

    def _pass_a_second(self) -> None:
        for _ in range(TICKS_PER_S):
            self.now += 1 / TICKS_PER_S
            self._decide(self._tick)
            self.settle()

    def _beats(self) -> None:
        for node in self.nodes:
            node.beat()
        self.settle()

    @property
    def protected(self) -> SnapshotId:
        known = self.coordinator.jobs[JOB].snapshots
        return max(id for id in known if known[id].state is State.PROTECTED)


@dataclass
class Figures:
    """Of one size of cluster."""

    nodes: int
    ranks: int
    start_cpu_s: float
    """From the first Hello to the first step."""
    idle_cpu_s_per_s: float
    """With nothing but heartbeats: CPU seconds for each simulated second."""
    cpu_s_per_s: float
    """While it trains."""
    restart_cpu_s: float
    """From the death of all trainers to the first step of the next life."""
    messages_per_s: float
    """In both directions."""
    memory_mib: float
    """What the coordinator has allocated and holds, with the messages that it refers to."""
    protected: str


def measure(nodes: int, steps: int, memory: bool = True) -> Figures:
    """Live through `steps` seconds of training, after a few to get going."""
    figures = _lives(Cluster(nodes), steps)
    # Not while another cluster is in memory.
    return replace(figures, memory_mib=_memory_mib(nodes)) if memory else figures


def _lives(cluster: Cluster, steps: int) -> Figures:
    def cpu_s(live: Callable[[], None]) -> float:
        cluster.cpu_s, cluster.messages = 0.0, 0
        live()
        return cluster.cpu_s

    start_s = cpu_s(cluster.start)
    idle_s = cpu_s(lambda: cluster.idle(steps)) / steps
    cluster.train(3)
    train_s = cpu_s(lambda: cluster.train(steps)) / steps
    messages = cluster.messages / steps
    newest = str(cluster.protected)
    restart_s = cpu_s(cluster.restart)
    return Figures(
        len(cluster.nodes), cluster.world_size, start_s, idle_s, train_s, restart_s, messages,
        0.0, newest,
    )  # fmt: skip


def _memory_mib(nodes: int) -> float:
    """Of a run of its own: tracing makes everything slow."""
    gc.collect()
    tracemalloc.start()
    cluster = Cluster(nodes)
    before = tracemalloc.get_traced_memory()[0]
    cluster.start()
    cluster.train(2)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / (1 << 20)


@click.command()
@click.option("--nodes", multiple=True, type=int, default=(10, 100, 1000), show_default=True)
@click.option("--steps", default=5, show_default=True, help="Seconds of training to measure.")
@click.option("--memory/--no-memory", default=True, help="Whether to measure memory, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each size.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it, too: a .svg or .png file.")
def main(
    nodes: tuple[int, ...], steps: int, memory: bool, as_json: bool, plot: Path | None
) -> None:
    """Print what one coordinator needs, by the number of nodes."""
    every = []
    if not as_json:
        click.echo(
            " nodes   ranks  start, CPU s  idle, CPU s per s  CPU s per s  restart, CPU s"
            "  messages per s  memory, MiB"
        )
    for count in nodes:
        found = measure(count, steps, memory)
        every.append(found)
        if as_json:
            click.echo(json.dumps(asdict(found)))
        else:
            click.echo(
                f"{found.nodes:6}  {found.ranks:6}  {found.start_cpu_s:12.2f}  "
                f"{found.idle_cpu_s_per_s:17.4f}  {found.cpu_s_per_s:11.4f}  "
                f"{found.restart_cpu_s:14.2f}  {found.messages_per_s:14.0f}  "
                f"{found.memory_mib:11.1f}"
            )
    if plot is not None:
        draw(every, plot)


def draw(every: Sequence[Figures], path: Path) -> None:
    """Cost by the number of nodes, both logarithmic, beside what n log n would be."""
    from matplotlib.figure import Figure

    nodes = [found.nodes for found in every]
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    for label, values in (
        ("training, a snapshot a second: CPU s per s", [f.cpu_s_per_s for f in every]),
        ("heartbeats alone: CPU s per s", [f.idle_cpu_s_per_s for f in every]),
        ("all nodes join and a job begins: CPU s", [f.start_cpu_s for f in every]),
        ("a job begins anew: CPU s", [f.restart_cpu_s for f in every]),
    ):
        axes.plot(nodes, values, marker="o", label=label)
    scale = every[-1].cpu_s_per_s / (nodes[-1] * math.log(nodes[-1]))
    growth = [scale * count * math.log(count) for count in nodes]
    axes.plot(nodes, growth, color="grey", linestyle=":", label="n log n")
    axes.set(xscale="log", yscale="log", xlabel="nodes, eight ranks on each", ylabel="seconds")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main()
