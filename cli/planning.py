"""The arithmetic of `ckptd plan`: what a code costs, and what it survives. No IO.

Costs are those that the design allows ckptd; chances rest on two papers:

- REFT (Wang et al., "Reliable and Efficient In-Memory Fault Tolerance of Large Language Model
  Pretraining") asks how probable it is that every group of nodes loses no more of them than its
  parity covers, each node failing by itself with the same probability: a product of binomial sums,
  there for one parity node, here for any number. See `chance_of_more`.
- GEMINI (Wang et al., "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory
  Checkpoints") asks how probable it is that a number of nodes lost at the same time, any of them
  alike, leaves every group enough. It bounds that from below; here it is counted. See
  `loss_at_once`.

Both assume that nodes fail independently of one another. Racks don't keep to that, so whole domains
are looked at apart from chance.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb, expm1

from ckptd.erasure import exposures, form_groups, parity_of_group

MONTH_S, YEAR_S = 30 * 86400.0, 365 * 86400.0
AT_ONCE = (2, 3, 4, 5)
"""How many nodes are lost at the same time in what `estimate` looks at."""


@dataclass(frozen=True, slots=True)
class Code:
    """Shards of a stripe: data_shards + parity_shards nodes, written k+m."""

    data_shards: int
    parity_shards: int

    @property
    def nodes(self) -> int:
        return self.data_shards + self.parity_shards

    def __str__(self) -> str:
        return f"{self.data_shards}+{self.parity_shards}"


USUAL_CODES = tuple(Code(k, m) for k, m in ((1, 1), (2, 1), (4, 2), (6, 2), (8, 2), (10, 4)))


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is known before anyone starts."""

    nodes: int
    """Nodes of the job, each with an equal part of the state."""
    state_bytes: int
    """The whole job's state in bytes, what ranks hold alike counted once."""
    link_bytes_per_s: float
    """What a node can send, and receive at the same time, in bytes per second."""
    node_mtbf_s: float
    """Mean time between losses of one node, in seconds."""
    repair_s: float
    """From the loss of a node until another has taken its place, in seconds."""
    keep: int = 1
    """How many protected snapshots are kept."""
    slots: int = 2
    """Places for segments on each rank."""
    copy_bytes_per_s: float | None = None
    """What a node captures, in bytes per second; None: capture takes no time."""
    domains: int | None = None
    """Failure domains over which the nodes are spread evenly; None: each node is one."""

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be; the message names the value and the limit."""
        for name in ("state_bytes", "link_bytes_per_s", "node_mtbf_s", "copy_bytes_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be more than 0")
        if self.nodes < 2:
            raise ValueError(f"nodes is {self.nodes}; nodes protect one another from 2 on")
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; at least one snapshot is kept")
        if self.slots <= self.keep:
            raise ValueError(
                f"slots is {self.slots}; {self.keep} hold a snapshot each, one takes the next"
            )
        if self.repair_s < 0:
            raise ValueError(f"repair_s is {self.repair_s}; it is at least 0")
        if self.domains is not None and not 1 <= self.domains <= self.nodes:
            raise ValueError(f"domains is {self.domains}; there are 1 to {self.nodes}, the nodes")

    @property
    def image_bytes(self) -> int:
        """Bytes of one node's segments."""
        return -(-self.state_bytes // self.nodes)

    @property
    def between_losses_s(self) -> float:
        """Mean time between losses of any node of the job, each of which needs a rebuild."""
        return self.node_mtbf_s / self.nodes


@dataclass(frozen=True, slots=True)
class Chance:
    """Of being lost; kept rather than that of survival, whose last digits would be rounded off."""

    lost: float

    @property
    def survived(self) -> float:
        return 1.0 - self.lost


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one code means for a cluster. Where groups differ, costs are those of the dearest."""

    code: Code
    """As asked for."""
    groups: tuple[Code, ...]
    """Those that the coordinator would draw; nodes left over make some smaller, or larger."""
    memory_bytes: int
    """On each node, in slots and parity; without rounding to cells."""
    sent_bytes: int
    """By each node, and received by it, to protect one snapshot."""
    protect_s: float
    """From sealed to protected over a link that does nothing else."""
    interval_s: float
    """The least time from one snapshot to the next."""
    image_back_s: float
    """Until a newcomer has the image of the one node that was lost."""
    protected_again_s: float
    """Until the newcomer has the image and its parity, counted from the same moment."""
    fatal_domains: tuple[str, ...]
    """Numbers of the failure domains that hold more nodes of some group than it may lose."""
    at_once: dict[int, Chance]
    """By number of nodes lost at the same time, any of them alike."""
    incident: Chance
    """That more of a group follow before a lost node is replaced and protected."""
    month: Chance
    """Of 30 days."""
    year: Chance
    """Of 365 days."""


def estimate(cluster: Cluster, code: Code) -> Estimate:
    """What `code` costs `cluster`, and what it survives.

    Groups are drawn as the coordinator does it when told `code`. With P for parity shards, D for
    data shards and one node's image: memory is slots + (keep+1) P/D images, for the parity of those
    that are kept stays until that of the next is complete; a node sends (D+P-1)/D images to
    protect; a newcomer receives one image to have it back and 1 + P/D in all. With keep+1 slots a
    capture waits until the snapshot before it is protected; with more, the two overlap.

    Raises ValueError for a code without data or parity shards, or of more nodes than there are.
    """
    if min(code.data_shards, code.parity_shards) < 1:
        raise ValueError(f"{code}: a code has at least 1 data shard and 1 parity shard")
    if code.nodes > cluster.nodes:
        raise ValueError(
            f"{code} needs groups of {code.nodes} nodes, and there are {cluster.nodes}"
        )
    domain_of = _domain_of(cluster)
    drawn = form_groups(list(domain_of), code.parity_shards, code.nodes, domain_of)
    groups = []
    fatal: set[str] = set()
    for members in drawn:
        parity = parity_of_group(len(members), code.parity_shards)
        groups.append(Code(len(members) - parity, parity))
        fatal.update(exposures(members, parity, domain_of))
    dearest = min(groups, key=lambda group: group.data_shards)  # all have the same parity
    k, m = dearest.data_shards, dearest.parity_shards
    image = cluster.image_bytes
    sent = -(-image * (k + m - 1) // k)
    overlap = cluster.slots > cluster.keep + 1
    capture_s = image / cluster.copy_bytes_per_s if cluster.copy_bytes_per_s else 0.0
    protect_s = sent / cluster.link_bytes_per_s
    return Estimate(
        code=code,
        groups=tuple(groups),
        memory_bytes=cluster.slots * image + (cluster.keep + 1) * -(-image * m // k),
        sent_bytes=sent,
        protect_s=protect_s,
        interval_s=max(capture_s, protect_s) if overlap else capture_s + protect_s,
        image_back_s=image / cluster.link_bytes_per_s,
        protected_again_s=_protected_again_s(cluster, dearest),
        fatal_domains=tuple(sorted(fatal)),
        at_once={
            lost: Chance(loss_at_once(groups, lost)) for lost in AT_ONCE if lost <= cluster.nodes
        },
        incident=Chance(loss_in_incident(cluster, groups)),
        month=Chance(loss_in_period(cluster, groups, MONTH_S)),
        year=Chance(loss_in_period(cluster, groups, YEAR_S)),
    )


def chance_of_more(nodes: int, than: int, each: float) -> float:
    """That more `than` of `nodes` are lost when `each` is with that probability, by itself.

    The complement of one factor of REFT's survival probability, which is this sum up to one loss.
    Summed from the small end, so that tiny chances keep their digits.
    """
    terms = (
        comb(nodes, lost) * each**lost * (1 - each) ** (nodes - lost)
        for lost in range(nodes, max(-1, than), -1)
    )
    return min(1.0, sum(terms))


def loss_at_once(groups: Iterable[Code], lost: int) -> float:
    """That a group loses more than its parity when `lost` of all nodes go at the same time.

    GEMINI's question (its corollary on the recovery from CPU memory): every choice of `lost` nodes
    is as probable as any other. GEMINI subtracts, for each group, the choices that take all its
    replicas; those that take two such groups are then counted twice, which makes it a bound. Here
    the survived choices are counted, as the coefficient of x**lost in the product, over groups, of
    the sum of C(nodes, i) x**i for i up to the parity shards. It is exact.

    Raises ValueError when there are fewer nodes than are lost.
    """
    survived, nodes = [1] + [0] * lost, 0
    for group in groups:
        nodes += group.nodes
        ways = [comb(group.nodes, i) for i in range(min(lost, group.parity_shards) + 1)]
        survived = [
            sum(way * survived[total - i] for i, way in enumerate(ways[: total + 1]))
            for total in range(lost + 1)
        ]
    if lost > nodes:
        raise ValueError(f"{lost} nodes cannot be lost of {nodes}")
    all_ways = comb(nodes, lost)
    return (all_ways - survived[lost]) / all_ways


def loss_in_incident(cluster: Cluster, groups: Sequence[Code]) -> float:
    """That a loss is not survived: more of its group follow than its parity covers.

    An incident is the loss of a node, any alike, of a group that was whole. It lasts until the node
    is replaced and protected again. REFT's sum over the other nodes of the group, each of which is
    lost in that time with probability 1 - exp(-time / mtbf): failures are independent, and as
    probable for a node that has run for long as for a new one (exponentially distributed).
    """
    nodes = sum(group.nodes for group in groups)
    each = Counter(groups).items()
    return sum(n * group.nodes * _fatal(cluster, group) for group, n in each) / nodes


def loss_in_period(cluster: Cluster, groups: Sequence[Code], period_s: float) -> float:
    """That some incident within `period_s` is not survived.

    Incidents come with the rate at which nodes are lost, each with its chance, by itself (a Poisson
    process): 1 - exp(-incidents × chance of each). The error is of the order of the part of the
    time that a group is in an incident, for it counts as whole then.
    """
    incidents = period_s / cluster.between_losses_s
    return -expm1(-incidents * loss_in_incident(cluster, groups))


def _fatal(cluster: Cluster, group: Code) -> float:
    window_s = cluster.repair_s + _protected_again_s(cluster, group)
    each = -expm1(-window_s / cluster.node_mtbf_s)
    return chance_of_more(group.nodes - 1, group.parity_shards - 1, each)


def _protected_again_s(cluster: Cluster, group: Code) -> float:
    images = 1 + group.parity_shards / group.data_shards
    return images * cluster.image_bytes / cluster.link_bytes_per_s


def _domain_of(cluster: Cluster) -> dict[str, str]:
    """Made-up nodes, and the number of the domain that each is in."""
    domains = cluster.domains or cluster.nodes
    width = len(str(cluster.nodes))
    return {
        f"{node:0{width}}": f"{node * domains // cluster.nodes:0{width}}"
        for node in range(cluster.nodes)
    }
