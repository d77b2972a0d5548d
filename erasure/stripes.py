"""Which cells protect one another: groups of nodes, and the stripes of a group.

Every node keeps its own data, so that survivors restore without the network; the parity rotates
over all nodes, as over the disks of a RAID 5 (Patterson, Gibson and Katz, SIGMOD 1988), so that
memory and load are even. All of it is a pure function of the sizes: every node computes the same
map from the manifest, and nobody has to send it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat


@dataclass(frozen=True, slots=True)
class Stripe:
    """Data cells of different members of a group, and the members that hold their parity."""

    number: int
    """Place in the map, from 0."""
    data: tuple[tuple[int, int | None], ...]
    """(member, index of the cell in that member's image) by shard number; the cell is None where
    the member has none left: a virtual cell, all zeros, that nobody stores or sends."""
    parity: tuple[int, ...]
    """The member that holds each parity row, in row order."""

    @property
    def encoder(self) -> int:
        """The member that pulls the data cells and computes all parity rows; it keeps row 0."""
        return self.parity[0]

    @property
    def is_void(self) -> bool:
        """Whether all data cells are virtual, so that there is nothing to protect."""
        return all(cell is None for _, cell in self.data)


class StripeMap:
    """The stripes of one group for images of given sizes.

    Stripe s has its parity on members s, s+1 … s+parity_shards-1 (mod n). Shard j of its data is
    the next unused cell of member s+parity_shards+j (mod n), or a virtual cell if that member has
    none left. The last stripe is the one that uses the last cell.

    Since every member but the parity's gives a cell, real or virtual, to each stripe, the pattern
    repeats after n stripes (a *turn*), in which each member gives `data_shards` cells. So a cell is
    found by arithmetic.
    """

    def __init__(self, cell_counts: Sequence[int], data_shards: int, parity_shards: int) -> None:
        """`cell_counts` are the cells of each member's image, in member order.

        Raises ValueError unless both shard counts are at least 1, their sum is the number of
        members, and no cell count is negative.
        """
        if data_shards < 1 or parity_shards < 1:
            raise ValueError(
                f"{data_shards} data and {parity_shards} parity shards; a stripe needs 1 of each"
            )
        if len(cell_counts) != data_shards + parity_shards:
            raise ValueError(
                f"a group of {len(cell_counts)} members with {data_shards} data and "
                f"{parity_shards} parity shards; the shards must add up to the members"
            )
        if min(cell_counts) < 0:
            raise ValueError(f"cell counts {list(cell_counts)}: none may be below 0")
        self.cell_counts = tuple(cell_counts)
        self.data_shards = data_shards
        self.parity_shards = parity_shards

        n = len(cell_counts)
        self._turn: list[list[tuple[int, int]]] = []
        """By stripe of a turn and shard: (member, how many cells it gave earlier in the turn)."""
        self._places: list[list[tuple[int, int]]] = [[] for _ in range(n)]
        """By member and cell of a turn: (stripe of the turn, shard)."""
        for stripe in range(n):
            givers = [(stripe + parity_shards + shard) % n for shard in range(data_shards)]
            self._turn.append([(member, len(self._places[member])) for member in givers])
            for shard, member in enumerate(givers):
                self._places[member].append((stripe, shard))

    @cached_property
    def stripes(self) -> tuple[Stripe, ...]:
        """All stripes by number, made at the first use: about 100 bytes a cell."""
        n, k = len(self.cell_counts), self.data_shards
        turns = -(-max(self.cell_counts) // k)
        cells: list[list[tuple[int, int | None]]] = [
            [*zip(repeat(member), range(count)), *repeat((member, None), turns * k - count)]
            for member, count in enumerate(self.cell_counts)
        ]
        # There may be a million cells, so no loop of ours touches each one: a place in the turn
        # takes every k-th cell of its givers, and zip makes the data of its stripes from these.
        places = []
        for place, givers in enumerate(self._turn):
            data = zip(*(cells[member][rank::k] for member, rank in givers), strict=True)
            parity = tuple((place + row) % n for row in range(self.parity_shards))
            places.append(map(Stripe, range(place, turns * n, n), data, repeat(parity)))
        used = (self.locate(member, c - 1)[0] + 1 for member, c in enumerate(self.cell_counts) if c)
        every = chain.from_iterable(zip(*places, strict=True))
        return tuple(islice(every, max(used, default=0)))

    def locate(self, member: int, cell: int) -> tuple[int, int]:
        """(stripe number, shard number) of a data cell. Raises ValueError if there is no such."""
        if not 0 <= member < len(self.cell_counts):
            raise ValueError(f"member {member} of a group of {len(self.cell_counts)}")
        if not 0 <= cell < self.cell_counts[member]:
            raise ValueError(f"cell {cell} of {self.cell_counts[member]} of member {member}")
        turn, rank = divmod(cell, self.data_shards)
        place, shard = self._places[member][rank]
        return turn * len(self.cell_counts) + place, shard

    def parity_of(self, member: int) -> tuple[tuple[int, int], ...]:
        """(stripe number, parity row) of each parity cell that `member` holds, by stripe.

        The index in it is the index of the cell in the member's parity file. Void stripes have no
        parity. Raises ValueError if there is no such member.
        """
        n = len(self.cell_counts)
        if not 0 <= member < n:
            raise ValueError(f"member {member} of a group of {n}")
        return tuple(
            (number, row)
            for number, stripe in enumerate(self.stripes)
            if (row := (member - number) % n) < self.parity_shards and not stripe.is_void
        )

    def unrestorable(
        self, data_available: Collection[int], parity_available: Collection[int]
    ) -> Iterator[Stripe]:
        """The stripes whose data is lost when only these members still have theirs.

        `data_available` are the members whose image, `parity_available` those whose parity is
        there. Virtual cells are always there. A stripe is lost when a real data cell is missing and
        fewer than `data_shards` cells are left; lost parity alone loses nothing.
        """
        data_members, parity_members = frozenset(data_available), frozenset(parity_available)
        for stripe in self.stripes:
            missing = sum(
                [cell is not None and member not in data_members for member, cell in stripe.data]
            )
            if missing > len(parity_members.intersection(stripe.parity)):
                yield stripe


def default_parity(nodes: int) -> int:
    """Parity shards of a group of `nodes`: 0 for one node (no group tier), 1 up to 3, then 2."""
    if nodes < 1:
        raise ValueError(f"a group of {nodes} nodes; it has at least 1")
    return 0 if nodes == 1 else 1 if nodes < 4 else 2


def parity_of_group(nodes: int, parity_shards: int | None = None) -> int:
    """Parity shards that a group of `nodes` has when `parity_shards` are wanted.

    None wants the `default_parity`. A group keeps one data shard at least, so that one of too few
    nodes has less. Raises ValueError for less than one node.
    """
    default = default_parity(nodes)
    return min(nodes - 1, default if parity_shards is None else parity_shards)


def form_groups(
    nodes: Collection[str],
    parity_shards: int | None = None,
    max_group: int = 8,
    domains: Mapping[str, str] | None = None,
) -> tuple[tuple[str, ...], ...]:
    """Split `nodes` into as few groups of at most `max_group` as possible, evenly.

    Sizes differ by at most one, the larger groups come first, and members are in order of name. The
    order in which the nodes are given does not matter.

    Every group gets room for one data shard beside `parity_shards` (1 if None, for then each group
    takes the `default_parity` of its size) where there are nodes enough: left-over nodes then join
    the other groups, which may exceed `max_group`. With too few nodes for even one such group, all
    of them are one group, and the caller sees from its length that it cannot hold the parity.

    `domains` gives the failure domain of a node: what dies together. A node that it lacks, or gives
    an empty label, is a domain of its own. Labels change who is in which group, never the sizes.
    A domain that has no more nodes than the parity shards of all groups together never holds more
    nodes of a group than that group has parity; one that has more must, and is spread evenly.
    A label of several levels, as in row3/rack7, is one domain, the rack. Since domains are dealt
    out in order of their labels, the racks of a row follow one another, and the same holds of rows.

    Raises ValueError for a node given twice, a negative parity, or a `max_group` too small for it.
    """
    if repeated := sorted(node for node, times in Counter(nodes).items() if times > 1):
        raise ValueError(f"nodes given twice: {repeated}")
    parity_needed = 1 if parity_shards is None else parity_shards
    if parity_needed < 0:
        raise ValueError(f"parity_shards is {parity_needed}; it is at least 0")
    if max_group <= parity_needed:
        raise ValueError(
            f"max_group is {max_group}; with {parity_needed} parity shards a group needs at least "
            f"{parity_needed + 1} nodes: raise max_group or lower parity_shards"
        )
    if not nodes:
        return ()
    count = min(-(-len(nodes) // max_group), max(1, len(nodes) // (parity_needed + 1)))
    smaller, larger_ones = divmod(len(nodes), count)
    sizes = [smaller + (group < larger_ones) for group in range(count)]
    label_of = domains or {}
    dealt = sorted(nodes, key=lambda node: (label_of.get(node, ""), node))
    groups: list[list[str]] = [[] for _ in sizes]
    for node, group in zip(dealt, _deal(sizes, parity_shards), strict=True):
        groups[group].append(node)
    return tuple(tuple(sorted(group)) for group in groups)


def _deal(sizes: Sequence[int], parity_shards: int | None) -> list[int]:
    """The group that each node goes to, one node after another.

    In rounds: in each, every group with room takes as many nodes as it has parity shards. So of
    successive nodes that are no more than a round, such as those of one domain, no group gets more
    than its parity. That holds across rounds, too, because all rounds have the same order. (Sizes
    differ by at most one. If parity differs as well, it is 1 for groups of 3 and 2 for groups of 4:
    after two rounds only the groups of 3 have room, and these are the first in each round.)
    """
    places = []
    for group, size in enumerate(sizes):
        parity = max(1, parity_of_group(size, parity_shards))
        places += [(*divmod(place, parity), parity, group) for place in range(size)]
    return [group for *_, group in sorted(places)]


def exposures(
    group: Iterable[str], parity_shards: int, domains: Mapping[str, str]
) -> dict[str, int]:
    """The failure domains that hold more nodes of `group` than `parity_shards`, and how many.

    `domains` as in `form_groups`. Those that hold most come first. A group without parity is
    exposed to each of its nodes, and not to a domain: the answer is empty.
    """
    if not parity_shards:
        return {}
    held = Counter(label for node in group if (label := domains.get(node)))
    return {label: count for label, count in held.most_common() if count > parity_shards}
