"""The stripe map against its description, and groups of nodes."""

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import (
    Stripe,
    StripeMap,
    default_parity,
    exposures,
    form_groups,
    open_codec,
    parity_of_group,
)


@st.composite
def stripe_maps(draw: st.DrawFn, max_cells: int = 30) -> StripeMap:
    """Groups of 2 to 12 members with images of uneven size, empty ones among them."""
    members = draw(st.integers(2, 12), label="members")
    parity = draw(st.integers(1, min(4, members - 1)), label="parity_shards")
    cells = st.just(0) | st.integers(0, max_cells)
    counts = draw(st.lists(cells, min_size=members, max_size=members), label="cell_counts")
    return StripeMap(counts, members - parity, parity)


def as_described(counts: tuple[int, ...], k: int, m: int) -> list[Stripe]:
    """The map done by hand: each member gives its next cell in turn, until all are used."""
    n, given_so_far = k + m, [0] * (k + m)
    stripes: list[Stripe] = []
    while any(given < count for given, count in zip(given_so_far, counts, strict=True)):
        s = len(stripes)
        data: list[tuple[int, int | None]] = []
        for j in range(k):
            member = (s + m + j) % n
            has_more = given_so_far[member] < counts[member]
            data.append((member, given_so_far[member] if has_more else None))
            given_so_far[member] += has_more
        stripes.append(Stripe(s, tuple(data), tuple((s + row) % n for row in range(m))))
    return stripes


class TestTheMap:
    def test_a_small_one_in_full(self) -> None:
        """Three nodes, 2+1, images of 3, 2 and 0 cells."""
        stripes = StripeMap([3, 2, 0], data_shards=2, parity_shards=1).stripes
        assert stripes == (
            Stripe(0, data=((1, 0), (2, None)), parity=(0,)),
            Stripe(1, data=((2, None), (0, 0)), parity=(1,)),
            Stripe(2, data=((0, 1), (1, 1)), parity=(2,)),
            Stripe(3, data=((1, None), (2, None)), parity=(0,)),
            Stripe(4, data=((2, None), (0, 2)), parity=(1,)),
        )
        assert [stripe.is_void for stripe in stripes] == [False, False, False, True, False]
        assert [stripe.encoder for stripe in stripes] == [0, 1, 2, 0, 1]

    def test_a_mirror_of_two_nodes(self) -> None:
        stripes = StripeMap([2, 1], data_shards=1, parity_shards=1).stripes
        assert stripes == (
            Stripe(0, data=((1, 0),), parity=(0,)),
            Stripe(1, data=((0, 0),), parity=(1,)),
            Stripe(2, data=((1, None),), parity=(0,)),
            Stripe(3, data=((0, 1),), parity=(1,)),
        )

    @settings(deadline=None, max_examples=200)
    @given(stripe_maps())
    def test_it_is_the_map_that_is_described(self, layout: StripeMap) -> None:
        by_hand = as_described(layout.cell_counts, layout.data_shards, layout.parity_shards)
        assert list(layout.stripes) == by_hand

    @settings(deadline=None, max_examples=100)
    @given(stripe_maps())
    def test_every_cell_is_in_exactly_one_stripe_and_is_found_there(
        self, layout: StripeMap
    ) -> None:
        seen = {
            (member, cell): (stripe.number, shard)
            for stripe in layout.stripes
            for shard, (member, cell) in enumerate(stripe.data)
            if cell is not None
        }
        real = sum(cell is not None for stripe in layout.stripes for _, cell in stripe.data)
        cells = [(b, c) for b, count in enumerate(layout.cell_counts) for c in range(count)]
        assert real == len(cells)
        assert seen == {cell: layout.locate(*cell) for cell in cells}

    @settings(deadline=None, max_examples=100)
    @given(stripe_maps())
    def test_no_member_is_twice_in_a_stripe(self, layout: StripeMap) -> None:
        everybody = list(range(len(layout.cell_counts)))
        for stripe in layout.stripes:
            members = [member for member, _ in stripe.data] + list(stripe.parity)
            assert sorted(members) == everybody

    @settings(deadline=None, max_examples=100)
    @given(stripe_maps())
    def test_parity_files_hold_each_row_of_each_stripe_once_and_stay_small(
        self, layout: StripeMap
    ) -> None:
        k, m = layout.data_shards, layout.parity_shards
        rows: Counter[tuple[int, int]] = Counter()
        for member in range(k + m):
            held = layout.parity_of(member)
            assert list(held) == sorted(held)
            assert len(held) <= m * -(-max(layout.cell_counts) // k)
            assert all(layout.stripes[number].parity[row] == member for number, row in held)
            rows.update(held)
        in_use = [stripe.number for stripe in layout.stripes if not stripe.is_void]
        assert rows == Counter((number, row) for number in in_use for row in range(m))

    @pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (4, 2), (6, 2), (5, 3)])
    def test_even_images_waste_nothing_and_load_all_alike(self, k: int, m: int) -> None:
        layout = StripeMap([3 * k] * (k + m), k, m)
        assert all(cell is not None for stripe in layout.stripes for _, cell in stripe.data)
        assert {len(layout.parity_of(member)) for member in range(k + m)} == {3 * m}
        assert set(Counter(stripe.encoder for stripe in layout.stripes).values()) == {3}

    def test_a_group_with_nothing_to_protect_has_no_stripes(self) -> None:
        layout = StripeMap([0, 0, 0], 2, 1)
        assert layout.stripes == ()
        assert layout.parity_of(1) == ()
        assert list(layout.unrestorable([], [])) == []

    def test_the_largest_group_that_is_meant(self) -> None:
        """40 nodes with 100 GB each: a million cells."""
        layout = StripeMap([25_000] * 40, 38, 2)
        assert len(layout.stripes) == 26_316
        for member, cell in [(0, 0), (0, 24_999), (17, 12_345), (39, 24_999)]:
            number, shard = layout.locate(member, cell)
            assert layout.stripes[number].data[shard] == (member, cell)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (([1, 1], 2, 0), "2 data and 0 parity shards"),
            (([1, 1], 0, 2), "0 data and 2 parity shards"),
            (([1, 1, 1], 3, 1), "group of 3 members with 3 data and 1 parity"),
            (([1, -2], 1, 1), r"cell counts \[1, -2\]: none may be below 0"),
        ],
    )
    def test_an_impossible_group_is_refused(
        self, arguments: tuple[list[int], int, int], says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            StripeMap(*arguments)

    @pytest.mark.parametrize(
        ("member", "cell", "says"),
        [
            (3, 0, "member 3 of a group of 3"),
            (-1, 0, "member -1 of a group"),
            (1, 2, "cell 2 of 2 of member 1"),
            (0, -1, "cell -1 of 3 of member 0"),
            (2, 0, "cell 0 of 0 of member 2"),
        ],
    )
    def test_a_cell_that_is_not_there_is_not_located(
        self, member: int, cell: int, says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            StripeMap([3, 2, 0], 2, 1).locate(member, cell)

    def test_a_member_that_is_not_there_has_no_parity(self) -> None:
        with pytest.raises(ValueError, match="member 3 of a group of 3"):
            StripeMap([3, 2, 0], 2, 1).parity_of(3)


class TestLoss:
    @settings(deadline=None, max_examples=60)
    @given(stripe_maps(max_cells=12))
    def test_any_loss_of_as_many_members_as_there_is_parity_is_survived(
        self, layout: StripeMap
    ) -> None:
        everybody = range(len(layout.cell_counts))
        for dead in combinations(everybody, layout.parity_shards):
            alive = set(everybody).difference(dead)
            assert list(layout.unrestorable(alive, alive)) == [], dead

    @settings(deadline=None, max_examples=200)
    @given(data=st.data(), layout=stripe_maps())
    def test_exactly_the_stripes_short_of_cells_are_lost(
        self, data: st.DataObject, layout: StripeMap
    ) -> None:
        members = st.sets(st.integers(0, len(layout.cell_counts) - 1))
        images, parity = data.draw(members, label="images"), data.draw(members, label="parity")

        def is_lost(stripe: Stripe) -> bool:
            there = [cell is None or member in images for member, cell in stripe.data]
            rows = [member in parity for member in stripe.parity]
            return not all(there) and sum(there) + sum(rows) < layout.data_shards

        expected = [stripe for stripe in layout.stripes if is_lost(stripe)]
        assert list(layout.unrestorable(images, parity)) == expected

    def test_one_node_too_many_loses_the_stripes_in_which_both_had_data(self) -> None:
        """2+1, nodes 0 and 1 die: of the small map only stripe 2 had cells of both."""
        layout = StripeMap([3, 2, 0], 2, 1)
        lost = layout.unrestorable(data_available=[2], parity_available=[2])
        # In stripes 0, 1 and 4 the parity died beside the data, so they are gone as well.
        assert [stripe.number for stripe in lost] == [0, 1, 2, 4]

    def test_lost_parity_alone_loses_nothing(self) -> None:
        layout = StripeMap([5, 5, 5], 2, 1)
        assert list(layout.unrestorable([0, 1, 2], [])) == []

    def test_before_there_is_parity_a_dead_node_loses_its_cells(self) -> None:
        layout = StripeMap([4, 4, 4], 2, 1)
        lost = {stripe.number for stripe in layout.unrestorable([0, 2], [])}
        assert lost == {layout.locate(1, cell)[0] for cell in range(4)}

    def test_a_dead_node_that_had_no_cells_is_not_missed(self) -> None:
        layout = StripeMap([3, 2, 0], 2, 1)
        assert list(layout.unrestorable([0, 1], [])) == []

    @pytest.mark.parametrize(
        ("counts", "m"),
        [((3, 2), 1), ((4, 0, 3), 1), ((5, 2, 0, 7, 4), 2), ((6, 5, 4, 3, 2, 1), 3)],
    )
    def test_a_group_gets_every_image_back(self, counts: tuple[int, ...], m: int) -> None:
        """Images are coded by the map; any m nodes die with all they hold; all is rebuilt."""
        n, cell_bytes, source = len(counts), 24, random.Random(1)
        images = [[source.randbytes(cell_bytes) for _ in range(count)] for count in counts]
        layout, codec = StripeMap(counts, n - m, m), open_codec(n - m, m)
        zeros = bytes(cell_bytes)

        parity = {}
        for stripe in layout.stripes:
            cells = [zeros if cell is None else images[b][cell] for b, cell in stripe.data]
            parity[stripe.number] = [bytearray(cell_bytes) for _ in range(m)]
            codec.encode(cells, parity[stripe.number])

        for dead in combinations(range(n), m):
            for member in dead:
                rebuilt = []
                for cell in range(counts[member]):
                    number, shard = layout.locate(member, cell)
                    stripe = layout.stripes[number]
                    survivors = {
                        j: zeros if c is None else images[b][c]
                        for j, (b, c) in enumerate(stripe.data)
                        if c is None or b not in dead
                    } | {
                        n - m + row: parity[number][row]
                        for row, b in enumerate(stripe.parity)
                        if b not in dead
                    }
                    out = bytearray(cell_bytes)
                    codec.decode(survivors, {shard: out})
                    rebuilt.append(bytes(out))
                assert rebuilt == images[member], (dead, member)


class TestGroups:
    def test_default_parity_by_group_size(self) -> None:
        assert [default_parity(nodes) for nodes in (1, 2, 3, 4, 5, 8, 40)] == [0, 1, 1, 2, 2, 2, 2]
        with pytest.raises(ValueError, match="a group of 0 nodes"):
            default_parity(0)

    def test_nodes_are_dealt_out_evenly_in_order_of_name(self) -> None:
        groups = form_groups([f"node{i}" for i in (7, 3, 1, 9, 5, 2, 8, 4, 6)])
        assert groups == (
            ("node1", "node3", "node5", "node7", "node9"),
            ("node2", "node4", "node6", "node8"),
        )

    @settings(deadline=None)
    @given(data=st.data(), count=st.integers(0, 60), max_group=st.integers(2, 12))
    def test_every_node_is_in_one_group_and_sizes_differ_by_at_most_one(
        self, data: st.DataObject, count: int, max_group: int
    ) -> None:
        nodes = [f"n{i:02}" for i in range(count)]
        parity = data.draw(st.none() | st.integers(0, max_group - 1), label="parity_shards")
        groups = form_groups(data.draw(st.permutations(nodes)), parity, max_group)

        assert groups == form_groups(nodes, parity, max_group)
        assert sorted(node for group in groups for node in group) == nodes
        sizes = [len(group) for group in groups]
        assert not sizes or max(sizes) - min(sizes) <= 1
        needed = (1 if parity is None else parity) + 1
        assert len(groups) == 1 or not sizes or min(sizes) >= needed
        # As few groups as fit, or as many as can hold the parity.
        as_few_as_fit = -(-count // max_group)
        assert len(groups) == min(as_few_as_fit, max(count // needed, 1))

    def test_with_default_limits_every_group_of_a_large_cluster_takes_two_parity_shards(
        self,
    ) -> None:
        for count in range(4, 200):
            sizes = [len(group) for group in form_groups([f"{i:03}" for i in range(count)])]
            assert max(sizes) <= 8
            assert all(default_parity(size) == 2 for size in sizes)

    def test_a_left_over_node_joins_a_group_rather_than_stay_without_parity(self) -> None:
        assert form_groups(["a", "b", "c"], max_group=2) == (("a", "b", "c"),)
        assert form_groups([*"abcde"], parity_shards=2, max_group=3) == (("a", "b", "c", "d", "e"),)

    def test_too_few_nodes_are_one_group_and_none_are_no_group(self) -> None:
        assert form_groups(["b", "a"], parity_shards=2) == (("a", "b"),)
        assert form_groups(["a"]) == (("a",),)
        assert form_groups([]) == ()

    @pytest.mark.parametrize(
        ("nodes", "parity", "max_group", "says"),
        [
            (["a", "b", "a"], 1, 8, r"nodes given twice: \['a'\]"),
            (["a", "b"], 2, 2, "max_group is 2; with 2 parity shards .* at least 3 nodes"),
            (["a", "b"], None, 1, "max_group is 1"),
            (["a", "b"], -1, 8, "parity_shards is -1"),
        ],
    )
    def test_contradictions_are_refused(
        self, nodes: list[str], parity: int | None, max_group: int, says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            form_groups(nodes, parity, max_group)


def in_racks(*sizes: int) -> dict[str, str]:
    """Nodes n00, n01 … that fill racks a, b … of these sizes one after another."""
    racks = [rack for rack, size in zip("abcdefghij", sizes, strict=False) for _ in range(size)]
    return {f"n{number:02}": rack for number, rack in enumerate(racks)}


def most_held(
    groups: tuple[tuple[str, ...], ...], domains: dict[str, str]
) -> list[tuple[int, int]]:
    """Of each group: the most nodes that one domain holds, counted the slow way, and its size."""
    labels = set(domains.values()) - {""}
    return [
        (
            max((sum(domains.get(node) == label for node in group) for label in labels), default=0),
            len(group),
        )
        for group in groups
    ]


class TestFailureDomains:
    def test_a_rack_is_spread_over_the_groups(self) -> None:
        """Four racks of four, in order of name: dealt out by name, rack a would fill a group."""
        domains = {f"n{i:02}": "abcd"[i % 4] for i in range(16)}
        by_name = form_groups(list(domains))
        assert exposures(by_name[0], 2, domains) == {"a": 4, "c": 4}
        for group in form_groups(list(domains), domains=domains):
            assert Counter(domains[node] for node in group) == dict.fromkeys("abcd", 2)
            assert exposures(group, 2, domains) == {}

    def test_a_rack_that_is_too_large_is_spread_evenly_and_named(self) -> None:
        domains = in_racks(5, 4, 3)
        first, second = form_groups(list(domains), domains=domains)
        assert exposures(first, 2, domains) == {"a": 3}
        assert exposures(second, 2, domains) == {}
        assert exposures([*first, *second], 2, domains) == {"a": 5, "b": 4, "c": 3}

    def test_a_group_without_parity_is_not_called_exposed(self) -> None:
        assert exposures(["n00", "n01"], 0, in_racks(2)) == {}

    def test_a_node_without_a_label_is_a_domain_of_its_own(self) -> None:
        nodes = [f"n{i}" for i in range(12)]
        bare = form_groups(nodes)
        assert form_groups(nodes, domains=dict.fromkeys(nodes, "")) == bare
        assert form_groups(nodes, domains={"another": "a"}) == bare
        assert all(exposures(group, 1, dict.fromkeys(nodes, "")) == {} for group in bare)

    def test_rows_of_racks_are_spread_as_racks_are(self) -> None:
        """Four groups of 6+2: each may lose two nodes, so a row of eight nodes may die."""
        domains = {f"n{i:02}": f"row{i % 4}/rack{i % 8}" for i in range(32)}
        rows = {node: label.partition("/")[0] for node, label in domains.items()}
        for group in form_groups(list(domains), domains=domains):
            assert exposures(group, 1, domains) == {}
            assert exposures(group, 2, rows) == {}

    def test_groups_of_different_parity_are_both_filled_to_what_they_may_lose(self) -> None:
        """A 2+2 and a 2+1: three nodes of a rack fit only as two and one."""
        domains = in_racks(3, 3, 1)
        groups = form_groups(list(domains), max_group=4, domains=domains)
        assert most_held(groups, domains) == [(2, 4), (1, 3)]

    @settings(deadline=None, max_examples=400)
    @given(data=st.data(), count=st.integers(1, 40), max_group=st.integers(2, 12))
    def test_no_group_is_exposed_to_a_domain_that_can_be_spread(
        self, data: st.DataObject, count: int, max_group: int
    ) -> None:
        """A domain fits exactly if it has no more nodes than all groups together may lose.

        That is needed, for a group takes no more than its parity; here it is also enough, for all
        domains at once.
        """
        nodes = [f"n{i:02}" for i in range(count)]
        parity = data.draw(st.none() | st.integers(0, max_group - 1), label="parity_shards")
        racks = st.sampled_from(["", *"abcdefghijkl"][: data.draw(st.integers(1, 13))])
        labels = data.draw(st.lists(racks, min_size=count, max_size=count), label="labels")
        domains = dict(zip(nodes, labels, strict=True))
        groups = form_groups(nodes, parity, max_group, domains)

        assert sorted(node for group in groups for node in group) == nodes
        sizes = [len(group) for group in groups]
        assert sizes == [len(group) for group in form_groups(nodes, parity, max_group)]
        shuffled = data.draw(st.permutations(nodes), label="order of arrival")
        assert form_groups(shuffled, parity, max_group, {n: domains[n] for n in shuffled}) == groups

        may_lose = [parity_of_group(size, parity) for size in sizes]
        of_domain = Counter(label for label in labels if label)
        if all(may_lose):
            too_large = {label for label, held in of_domain.items() if held > sum(may_lose)}
            found = [exposures(g, m, domains) for g, m in zip(groups, may_lose, strict=True)]
            assert {label for exposed in found for label in exposed} == too_large
        # A domain that is too large is spread as evenly as the others.
        a_round = sum(max(1, lose) for lose in may_lose)
        for group, lose in zip(groups, may_lose, strict=True):
            for label, held in Counter(domains[n] for n in group if domains[n]).items():
                assert held <= max(1, lose) * -(-of_domain[label] // a_round)

    @pytest.mark.parametrize(
        ("nodes", "wanted", "parity"),
        [(1, None, 0), (3, None, 1), (4, None, 2), (2, 2, 1), (9, 4, 4)],
    )
    def test_parity_of_a_group(self, nodes: int, wanted: int | None, parity: int) -> None:
        assert parity_of_group(nodes, wanted) == parity

    def test_an_empty_group_has_no_parity_to_speak_of(self) -> None:
        with pytest.raises(ValueError, match="a group of 0 nodes"):
            parity_of_group(0, 2)
