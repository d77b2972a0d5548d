"""`ckptd plan`: its formulas against counting and simulation, and what it says and refuses."""

import io
import json
import random
from fractions import Fraction
from heapq import heappop, heappush
from itertools import combinations, product
from math import comb, prod
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ckptd.cli.main import main
from ckptd.cli.options import Duration, Rate
from ckptd.cli.plan import render
from ckptd.cli.planning import (
    USUAL_CODES,
    Cluster,
    Code,
    chance_of_more,
    estimate,
    loss_at_once,
    loss_in_incident,
    loss_in_period,
)

GB = 10**9
DAY_S = 86400.0


def cluster(nodes: int = 8, **changed: Any) -> Cluster:
    """Nodes with 10 GB each on links of 1 GB/s."""
    known: dict[str, Any] = {
        "nodes": nodes,
        "state_bytes": nodes * 10 * GB,
        "link_bytes_per_s": float(GB),
        "node_mtbf_s": 250 * DAY_S,
        "repair_s": 900.0,
    }
    return Cluster(**known | changed)


class TestCosts:
    def test_of_one_group(self) -> None:
        one = estimate(cluster(8), Code(6, 2))
        assert one.groups == (Code(6, 2),)
        # (keep + 1) × (1 + m/k) × image, with one protected snapshot kept.
        assert one.memory_bytes == pytest.approx(2 * (1 + 2 / 6) * 10 * GB)
        assert one.sent_bytes == pytest.approx(7 / 6 * 10 * GB)
        assert one.protect_s == pytest.approx(7 / 6 * 10)
        assert one.image_back_s == 10.0
        assert one.protected_again_s == pytest.approx((1 + 2 / 6) * 10)

    def test_a_third_slot_holds_an_image_and_lets_capture_and_protection_overlap(self) -> None:
        two = estimate(cluster(copy_bytes_per_s=2.0 * GB), Code(6, 2))
        three = estimate(cluster(copy_bytes_per_s=2.0 * GB, slots=3), Code(6, 2))
        assert three.memory_bytes - two.memory_bytes == 10 * GB
        assert two.interval_s == pytest.approx(5 + 7 / 6 * 10)
        assert three.interval_s == pytest.approx(7 / 6 * 10)
        slow = estimate(cluster(copy_bytes_per_s=0.5 * GB, slots=3), Code(6, 2))
        assert slow.interval_s == pytest.approx(20)

    def test_each_snapshot_that_is_kept_costs_an_image_and_its_parity(self) -> None:
        three = estimate(cluster(8, keep=3, slots=4), Code(6, 2))
        assert three.memory_bytes == pytest.approx(4 * (1 + 2 / 6) * 10 * GB)
        assert three.interval_s == estimate(cluster(8), Code(6, 2)).interval_s

    def test_where_groups_differ_the_dearest_counts(self) -> None:
        """Ten nodes are not 8 and 2: the coordinator draws two groups of 3+2."""
        one = estimate(cluster(10), Code(6, 2))
        assert one.groups == (Code(3, 2), Code(3, 2))
        assert one.memory_bytes == pytest.approx(2 * (1 + 2 / 3) * 10 * GB)
        assert [str(g) for g in estimate(cluster(3), Code(1, 1)).groups] == ["2+1"]

    def test_a_job_loses_nodes_more_often_than_each_is_lost(self) -> None:
        assert cluster(50, node_mtbf_s=100 * DAY_S).between_losses_s == 2 * DAY_S

    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"nodes": 1}, "nodes is 1; nodes protect one another from 2 on"),
            ({"state_bytes": 0}, "state_bytes is 0; it must be more than 0"),
            ({"link_bytes_per_s": 0.0}, "link_bytes_per_s is 0.0"),
            ({"node_mtbf_s": float("nan")}, "node_mtbf_s is nan"),
            ({"copy_bytes_per_s": -1.0}, "copy_bytes_per_s is -1.0"),
            ({"slots": 1}, "slots is 1; 1 hold a snapshot each, one takes the next"),
            ({"slots": 3, "keep": 3}, "slots is 3; 3 hold"),
            ({"keep": 0}, "keep is 0"),
            ({"repair_s": -1.0}, "repair_s is -1.0; it is at least 0"),
            ({"domains": 9}, "domains is 9; there are 1 to 8"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changed: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            cluster(**{"nodes": 8, **changed})

    @pytest.mark.parametrize(
        ("code", "says"),
        [
            (Code(8, 2), r"8\+2 needs groups of 10 nodes, and there are 8"),
            (Code(4, 0), r"4\+0: a code has at least 1 data shard and 1 parity"),
        ],
    )
    def test_a_code_that_does_not_fit_is_refused(self, code: Code, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            estimate(cluster(8), code)


def lost_by(groups: list[Code], dead: set[int]) -> bool:
    """Whether a group, of nodes numbered one after another, has lost more than its parity."""
    first = 0
    for group in groups:
        if len(dead & set(range(first, first + group.nodes))) > group.parity_shards:
            return True
        first += group.nodes
    return False


some_groups = st.lists(
    st.builds(Code, st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3
)


class TestChances:
    @settings(deadline=None)
    @given(st.integers(1, 7), st.integers(-1, 8), st.floats(0, 1))
    def test_more_than_so_many_of_a_group(self, nodes: int, than: int, each: float) -> None:
        """All 2**nodes outcomes, one by one."""
        counted = sum(
            prod(each if dead else 1 - each for dead in outcome)
            for outcome in product([False, True], repeat=nodes)
            if sum(outcome) > than
        )
        assert chance_of_more(nodes, than, each) == pytest.approx(counted, abs=1e-12)

    def test_tiny_chances_keep_their_digits(self) -> None:
        assert chance_of_more(8, 2, 1e-9) == pytest.approx(comb(8, 3) * 1e-27, rel=1e-6)
        one = estimate(cluster(8, repair_s=0.0, node_mtbf_s=1e6 * DAY_S), Code(6, 2))
        assert 0 < one.year.lost < 1e-16

    @settings(deadline=None)
    @given(some_groups, st.integers(0, 5))
    def test_nodes_lost_at_once(self, groups: list[Code], lost: int) -> None:
        """All choices of nodes, one by one."""
        nodes = sum(group.nodes for group in groups)
        if lost > nodes:
            with pytest.raises(ValueError, match=f"{lost} nodes cannot be lost of {nodes}"):
                loss_at_once(groups, lost)
            return
        choices = [set(choice) for choice in combinations(range(nodes), lost)]
        counted = Fraction(sum(lost_by(groups, dead) for dead in choices), len(choices))
        assert loss_at_once(groups, lost) == pytest.approx(float(counted))

    @pytest.mark.parametrize(("nodes", "replicas", "lost"), [(16, 2, 2), (16, 2, 3), (24, 3, 5)])
    def test_replicas_are_as_geminis_bound_where_it_is_exact(
        self, nodes: int, replicas: int, lost: int
    ) -> None:
        """It is while fewer nodes are lost than two groups have."""
        groups = [Code(1, replicas - 1)] * (nodes // replicas)
        bound = nodes / replicas * comb(nodes - replicas, lost - replicas) / comb(nodes, lost)
        assert loss_at_once(groups, lost) == pytest.approx(bound)

    def test_two_of_sixteen_nodes(self) -> None:
        assert 1 - loss_at_once([Code(7, 1)] * 2, 2) == pytest.approx(64 / 120)
        assert 1 - loss_at_once([Code(1, 1)] * 8, 2) == pytest.approx(112 / 120)
        assert loss_at_once([Code(6, 2)] * 2, 2) == 0

    def test_an_incident(self) -> None:
        """The first node is any; the others of its group follow, or not, one by one."""
        known = cluster(5, node_mtbf_s=100.0, repair_s=30.0, link_bytes_per_s=1e12)
        groups = [Code(1, 1), Code(1, 2)]
        counted = 0.0
        for first in range(5):
            mates = {0, 1} if first < 2 else {2, 3, 4}
            group = groups[first >= 2]
            # Replaced after 30 s, and 0.01 s for each of an image and its parity.
            window_s = 30 + 0.01 * (1 + group.parity_shards)
            follow = 1 - 2.718281828459045 ** (-window_s / 100)
            for outcome in product([False, True], repeat=len(mates) - 1):
                dead = {first, *(m for m, d in zip(mates - {first}, outcome, strict=True) if d)}
                chance = prod(follow if d else 1 - follow for d in outcome)
                counted += chance / 5 if lost_by(groups, dead) else 0
        assert loss_in_incident(known, groups) == pytest.approx(counted)

    @pytest.mark.parametrize(
        ("groups", "repair_s", "period_s"),
        [
            ([Code(3, 1)] * 2, 1.0, 1500.0),
            ([Code(4, 2), Code(3, 2)], 3.0, 8000.0),
            ([Code(1, 1)] * 5, 2.0, 1500.0),
        ],
    )
    def test_a_period_is_as_simulated(
        self, groups: list[Code], repair_s: float, period_s: float
    ) -> None:
        """Nodes that fail by themselves, each back after its own repair, until a group has lost
        more than its parity: 3,000 lives, so that the error is under 1 % (one deviation)."""
        mtbf_s, lives = 200.0, 3000
        nodes = sum(group.nodes for group in groups)
        known = cluster(nodes, node_mtbf_s=mtbf_s, repair_s=repair_s, link_bytes_per_s=1e18)
        said = loss_in_period(known, groups, period_s)
        assert 0.2 < said < 0.98
        group_of = [index for index, group in enumerate(groups) for _ in range(group.nodes)]
        source, lost = random.Random(7), 0
        for _ in range(lives):
            down = [0] * len(groups)
            events: list[tuple[float, int, bool]] = []
            for node in range(nodes):
                heappush(events, (source.expovariate(1 / mtbf_s), node, True))
            while (event := heappop(events))[0] < period_s:
                now, node, fails = event
                down[group_of[node]] += 1 if fails else -1
                if down[group_of[node]] > groups[group_of[node]].parity_shards:
                    lost += 1
                    break
                wait_s = repair_s if fails else source.expovariate(1 / mtbf_s)
                heappush(events, (now + wait_s, node, not fails))
        assert lost / lives == pytest.approx(said, abs=0.03)


class TestDomains:
    def test_a_rack_that_fits_into_the_parity_of_all_groups_may_be_lost(self) -> None:
        assert estimate(cluster(64, domains=4), Code(6, 2)).fatal_domains == ()
        assert len(estimate(cluster(64, domains=3), Code(6, 2)).fatal_domains) == 3
        assert estimate(cluster(64, domains=3), Code(4, 4)).fatal_domains == ()

    def test_uneven_racks(self) -> None:
        """25 nodes in 3 racks of 9, 8 and 8; four groups of 2 parity may lose 8 together."""
        assert estimate(cluster(25, domains=3), Code(5, 2)).fatal_domains == ("00",)

    def test_without_racks_none_is_fatal(self) -> None:
        assert estimate(cluster(25), Code(5, 2)).fatal_domains == ()


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("25Gbit", 25e9 / 8),
        ("10 Gbit/s", 10e9 / 8),
        ("400Gbps", 50e9),
        ("400Gb/s", 50e9),
        ("1GB/s", 1e9),
        ("1.5GiB/s", 1.5 * 2**30),
        ("100kB/s", 1e5),
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert Rate().convert(text, None, None) == rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1.5min", 90), ("1000h", 3.6e6), ("30d", 2.592e6)]
)
def test_times(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["25", "25Gbot", "-1Gbit", "Gbit", "25Gbit/h", "25gbit", "0GB/s"])
def test_a_rate_without_sense_is_refused_by_name(text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{text}'"):
        Rate().convert(text, None, None)


@pytest.mark.parametrize("text", ["30", "30 parsecs", "-3d", "5m", "d"])
def test_a_time_without_sense_is_refused_by_name(text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{text}' is not a time; write it like"):
        Duration().convert(text, None, None)


FLAGS = ["--nodes=64", "--state=900GiB", "--link=25Gbit", "--node-mtbf=250d"]


def plan(*flags: str) -> Any:
    return CliRunner().invoke(main, ["plan", *FLAGS, *flags])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_each_code_has_a_column_and_no_line_is_cut(width: int) -> None:
    known = cluster(64, domains=3, state_bytes=900 << 30)
    found = [estimate(known, code) for code in USUAL_CODES]
    page = io.StringIO()
    Console(width=width, file=page, highlight=False).print(render(known, found))
    said = page.getvalue()
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    heads = [line.split()[1:] for line in said.splitlines() if line.startswith("k+m ")]
    assert [code for head in heads for code in head] == [str(code) for code in USUAL_CODES]
    assert len(heads) == {60: 3, 80: 2, 120: 1}[width]
    words = " ".join(said.split())
    for expected in (
        "64 nodes · 900 GiB of state, 14.1 GiB on each node",
        "a node is lost, and must be rebuilt, every 3.9 days",
        "its image is back 15 s after another has taken its place",
        "6 × 7+2",
        "2 nodes lost at once 98.4 % 96.9 %",
        "3 may not",
        "always",
    ):
        assert expected in words


def test_the_command_says_what_it_counted() -> None:
    result = plan("--code=6+2")
    assert result.exit_code == 0
    assert "6+2" in result.output
    assert "10+4" not in result.output
    assert "--parity-shards 2 --group-nodes 8" in result.output
    assert "The time to capture is not counted" in result.output
    assert "is not counted" not in plan("--code=6+2", "--copy=20GB/s").output


def test_a_pipe_gets_numbers() -> None:
    said = json.loads(plan("--json", "--code=6+2", "--code=1+1", "--domains=16").output)
    assert said["cluster"]["image_bytes"] == -(-(900 << 30) // 64)
    first, second = said["codes"]
    assert (first["code"], second["code"]) == ("6+2", "1+1")
    assert first["groups"] == [{"code": "6+2", "count": 8}]
    assert first["fatal_domains"] == 0
    assert [entry["nodes"] for entry in first["at_once"]] == [2, 3, 4, 5]
    assert second["at_once"][0]["lost"] == pytest.approx(32 / comb(64, 2))
    for chance in (*first["at_once"], first["incident"], first["month"], first["year"]):
        assert chance["survived"] + chance["lost"] == pytest.approx(1)
    assert 0 < first["month"]["lost"] < first["year"]["lost"] < second["year"]["lost"] < 1


def test_only_codes_that_fit_are_compared_unasked() -> None:
    said = json.loads(plan("--json", "--nodes=7").output)
    assert [one["code"] for one in said["codes"]] == ["1+1", "2+1", "4+2"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--code=60+8"], "--code 60+8 needs groups of 68 nodes; --nodes is 64"),
        (["--nodes=500", "--code=200+2"], "groups of 202 nodes; a group has at most 128"),
        (["--code=6x2"], "--code 6x2: write k+m, such as 4+2"),
        (["--code=6+0"], "--code 6+0: it takes at least 1 data shard, and 1 to 32 parity shards"),
        (["--link=0Gbit"], "'0Gbit': at a rate of 0 nothing ever arrives"),
        (["--link=fast"], "'fast' is not a rate; write it like 25Gbit/s or 1GB/s"),
        (["--node-mtbf=0d"], "--node-mtbf is 0; it must be more"),
        (["--node-mtbf=30"], "'30' is not a time"),
        (["--state=0"], "--state is 0; it must be more"),
        (["--state=lots"], "'lots' is not a size"),
        (["--nodes=1"], "1 is not in the range x>=2"),
        (["--domains=65"], "--domains 65: more than --nodes 64"),
    ],
)
def test_what_cannot_be_is_refused_with_the_flag(flags: list[str], says: str) -> None:
    result = plan(*flags)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
