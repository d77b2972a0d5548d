"""What a seed draws: the cluster, how fast things are in it, and which faults strike how often.

Swarm testing (Groce et al., ISSTA 2012): each seed leaves some kinds of fault out, since one kind
may hide what another would show.
"""

import random
from dataclasses import dataclass, field

from ckptd.coordinator.decider import Settings

Range = tuple[float, float]

FAULTS = (
    "kill_trainer",
    "stop_trainer",
    "restart_agent",
    "stop_agent",
    "destroy_node",
    "wipe_node",
    "cut_off",
    "mute",
    "reset_connection",
    "part_peers",
    "restart_coordinator",
    "stop_coordinator",
    "flip_bit",
    "lose_file",
    "restart_job",
    "replace_coordinator",
    "rival_coordinator",
    "roll_back",
    "isolate",
)

_CODES = [(2, 1), (3, 1), (6, 2), (4, None), (8, None), (4, 2), (3, None)]
"""(nodes of a group, its parity shards)."""


@dataclass(frozen=True)
class Plan:
    """A world, as its seed drew it. Times in seconds."""

    seed: int
    jobs: tuple[int, ...] = (3,)
    """Nodes of each job."""
    ranks_per_node: int = 1
    spares: int = 1
    """Spare nodes of each job."""
    slots: int = 2
    keep: int = 1
    """How many protected snapshots of a job are kept."""
    every: int = 1
    shared_nodes: bool = False
    """Whether the jobs run on the same nodes."""
    shared_state: bool = False
    """Whether a rank needs the segments of others to load."""
    stable_ranks: bool = True
    """Whether ranks keep their nodes where they can."""
    settings: Settings = field(default_factory=Settings)
    control_s: Range = (0.001, 0.02)
    control_tail_s: float = 0.0
    """Mean of what may come on top of that, exponentially distributed."""
    local_s: Range = (0.0005, 0.005)
    step_s: Range = (0.2, 0.3)
    capture_s: Range = (0.01, 0.3)
    check_s: Range = (0.001, 0.02)
    release_s: Range = (0.001, 0.05)
    encode_s: Range = (0.01, 0.2)
    fetch_s: Range = (0.01, 0.3)
    torn: float = 0.0
    """The share of captures that are torn, on each rank."""
    tail: float = 0.0
    """The share of captures that take ten times as long."""
    duplicate: float = 0.0
    """The share of control messages that arrive twice."""
    crash_between: float = 0.0
    """The share of actions after which the agent dies at once."""
    interval_s: dict[str, float] = field(default_factory=dict)
    """Kind of fault to the mean time between two."""
    faults_s: float = 25.0

    @property
    def quiet_s(self) -> float:
        """By then, at the latest, all jobs must have recovered after the last fault.

        Captures that take long hold their slots meanwhile, and some of them come out torn.
        """
        slowest_s = self.capture_s[1] * (10 if self.tail else 1)
        return 60.0 + 10 * self.settings.lease_s + 40 * self.step_s[1] + 6 * slowest_s


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(f"plan {seed}")
    group_nodes, parity_shards = rng.choice(_CODES)
    beat_s = rng.choice([0.25, 0.5, 1.0])
    settings = Settings(
        cell_bytes=4,
        group_nodes=group_nodes,
        parity_shards=parity_shards,
        beat_s=beat_s,
        lease_s=beat_s * rng.choice([4, 6, 8]),
    )
    jobs = _job_sizes(rng, group_nodes)
    step_s = rng.choice([0.1, 0.3, 0.3, 0.6, 1.0]) * (2 if sum(jobs) > 8 else 1)
    copy_s = step_s * rng.choice([0.3, 1.0, 2.0])
    delay_s = rng.choice([0.005, 0.02, 0.1])
    work_s = rng.choice([0.05, 0.3, 1.0])
    chosen = [name for name in FAULTS if rng.random() < rng.choice([0.2, 0.6])]
    keep = rng.choice([1, 1, 2])
    return Plan(
        seed,
        jobs=jobs,
        ranks_per_node=rng.choice([1, 1, 2]) if sum(jobs) <= 6 else 1,
        spares=rng.choice([0, 1, 2]),
        slots=max(keep + 1, rng.choice([2, 2, 2, 3])),
        keep=keep,
        every=rng.choice([1, 1, 3]),
        shared_nodes=rng.random() < 0.3,
        shared_state=sum(jobs) <= 6 and rng.random() < 0.3,
        stable_ranks=rng.random() < 0.6,
        settings=settings,
        control_s=(0.0005, delay_s),
        control_tail_s=rng.choice([0.0, 0.0, 0.05]),
        step_s=(0.8 * step_s, 1.2 * step_s),
        capture_s=(0.05 * copy_s, copy_s),
        encode_s=(0.05 * work_s, work_s),
        fetch_s=(0.05 * work_s, work_s),
        torn=rng.choice([0.0, 0.0, 0.03]),
        tail=rng.choice([0.0, 0.0, 0.05]),
        duplicate=rng.choice([0.0, 0.0, 0.02]),
        crash_between=rng.choice([0.0, 0.0, 0.0, 0.002]),
        interval_s={name: rng.uniform(2.0, 15.0) for name in chosen},
        faults_s=rng.uniform(15.0, 45.0),
    )


def _job_sizes(rng: random.Random, group_nodes: int) -> tuple[int, ...]:
    """Nodes of each job: mostly one job of one or two groups."""
    jobs = rng.choice([1, 1, 1, 2, 3])
    most = 12 if jobs == 1 else 4
    sizes = [group_nodes, group_nodes, rng.randint(1, 4), 2 * group_nodes, rng.randint(1, 12)]
    return tuple(min(most, rng.choice(sizes)) for _ in range(jobs))
