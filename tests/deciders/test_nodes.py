"""Nodes that are silent, that are to leave, or shall have no part; jobs side by side."""

import random

import msgspec
import pytest

from ckptd.coordinator.decider import Settings
from ckptd.coordinator.diagnosis.shared import Note
from ckptd.coordinator.rhythm import Rhythm
from ckptd.coordinator.state import State
from ckptd.coordinator.view import status
from ckptd.ids import SnapshotId
from ckptd.manifest import Extent
from ckptd.wire import (
    Activate,
    AskResumeFor,
    Beat,
    DrainNode,
    Grant,
    Hasten,
    Holding,
    Holds,
    IsolateNode,
    LifeResumed,
    Protect,
    RankReport,
    RankState,
    ResumeWaits,
    SetQuota,
    TakeSnapshot,
)

from .fakes import JOB, SIZE_BYTES, Cluster

NODES = ("a", "b", "c", "d")
DEFAULT = Settings()


def trained(*names: str) -> Cluster:
    """A job, one rank a node, that trains and has one protected snapshot and an open ticket."""
    cluster = Cluster(*names)
    cluster.pass_time(cluster.settings.lease_s)
    cluster.start(*names)
    cluster.make_protected()
    return cluster


def shown(cluster: Cluster, name: str) -> dict[str, object]:
    nodes = status(cluster.coordinator, cluster.now, 0.0)["nodes"]
    return next(node for node in nodes if node["node"] == name)


def beats(rhythm: Rhythm, *intervals_s: float) -> float:
    now = 0.0
    rhythm.beat(now)
    for interval_s in intervals_s:
        now += interval_s
        rhythm.beat(now)
    return rhythm.bound_s(DEFAULT.beat_s, DEFAULT.lease_s)


class TestRhythm:
    def test_a_steady_node_is_suspect_after_two_heartbeats(self) -> None:
        assert beats(Rhythm(), *[0.5] * 10) == pytest.approx(2 * 0.5)

    def test_a_node_that_is_not_known_yet_is_given_three(self) -> None:
        assert beats(Rhythm()) == pytest.approx(3 * 0.5)

    def test_single_stalls_change_nothing(self) -> None:
        assert beats(Rhythm(), *([0.5] * 9 + [3.0]) * 3) == pytest.approx(2 * 0.5)

    def test_a_busy_node_is_given_more_but_never_more_than_three_of_its_heartbeats(self) -> None:
        drawn = random.Random(7)
        bound_s = beats(Rhythm(), *[drawn.uniform(0.3, 1.1) for _ in range(40)])
        assert 2 * 0.5 < bound_s <= 3 * 1.1

    def test_the_bound_is_never_beyond_the_lease(self) -> None:
        assert beats(Rhythm(), *[3.0] * 10) == DEFAULT.lease_s

    def test_the_defaults_notice_a_node_within_three_heartbeats_and_long_before_the_lease(
        self,
    ) -> None:
        assert beats(Rhythm()) <= 3 * DEFAULT.beat_s < DEFAULT.lease_s / 2


class TestSuspects:
    def test_a_silent_node_is_suspect_first_and_lost_when_its_lease_is_out(self) -> None:
        cluster = trained("a", "b")
        cluster.pass_time(3 * cluster.settings.beat_s, silent=["b"])
        node = shown(cluster, "b")
        assert node["state"] == "suspect"
        assert "longer than usual" in str(node["reasons"])
        assert cluster.coordinator.live_holdings(cluster.tickets("a")[0]).keys() == {"a", "b"}
        cluster.pass_time(cluster.settings.lease_s - 3 * cluster.settings.beat_s, silent=["b"])
        assert shown(cluster, "b")["state"] == "lost"

    def test_the_newest_snapshot_of_a_suspect_node_is_protected_first(self) -> None:
        cluster = trained("a", "b", "c", "d")
        id = max(cluster.coordinator.jobs[JOB].snapshots)
        cluster.pass_time(3 * cluster.settings.beat_s, silent=["b"])
        assert cluster.told("a", Hasten) == [], "nothing waits for protection"
        cluster.pass_time(cluster.settings.beat_s)
        cluster.seal_all(id)
        assert cluster.told("a", Hasten) == [], "nobody is suspect"
        cluster.pass_time(3 * cluster.settings.beat_s, silent=["b"])
        for name in ("a", "c", "d"):
            assert cluster.told(name, Hasten) == [Hasten(id)]
        cluster.pass_time(cluster.settings.beat_s)
        cluster.pass_time(3 * cluster.settings.beat_s, silent=["b"])
        assert cluster.told("a", Hasten) == [Hasten(id)], "once is enough"

    def test_nodes_that_fall_silent_together_are_all_named(self) -> None:
        cluster = trained("a", "b", "c", "d")
        id = max(cluster.coordinator.jobs[JOB].snapshots)
        cluster.seal_all(id)
        cluster.pass_time(3 * cluster.settings.beat_s, silent=["b", "c"])
        assert cluster.told("a", Hasten) == [Hasten(id)]
        (text,) = (e.text for e in cluster.coordinator.events if e.kind == "protected_first")
        assert text == f"{id} is protected first: b, c may be lost"

    def test_and_so_is_that_of_a_node_whose_rank_may_hang(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cluster = trained("a", "b", "c", "d")
        id = max(cluster.coordinator.jobs[JOB].snapshots)
        supervisors = cluster.coordinator.supervisors
        monkeypatch.setattr(supervisors, "suspects_of", lambda job: {"c"})
        cluster.seal_all(id)  # a suspicion that is older than the snapshot
        assert cluster.told("a", Hasten) == [Hasten(id)]
        cluster = trained("a", "b", "c", "d")
        cluster.seal_all(id)
        supervisors = cluster.coordinator.supervisors
        monkeypatch.setattr(supervisors, "suspects_of", lambda job: {"c"})
        supervisors.shared.do(Note("hang_suspected", JOB, "rank 2 may hang"))
        cluster.pass_time(cluster.settings.beat_s)
        assert cluster.told("a", Hasten) == cluster.told("d", Hasten) == [Hasten(id)]

    def test_jobs_with_ranks_on_it_get_no_tickets_until_it_is_heard(self) -> None:
        cluster = trained("a", "b")
        cluster.pass_time(3 * cluster.settings.beat_s, silent=["b"])
        before = len(cluster.tickets("a"))
        cluster.update(0, free_slots=2)
        assert len(cluster.tickets("a")) == before
        (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
        assert job["suspect_nodes"] == ["b"]
        cluster.update(1, free_slots=2)  # any word of it will do
        assert shown(cluster, "b")["state"] == "live"
        assert len(cluster.tickets("a")) > before

    def test_a_busy_agent_is_never_lost_and_seldom_suspect(self) -> None:
        """Its heartbeats are up to half a second late, and once in a while two seconds."""
        cluster = trained("a", "b")
        drawn = random.Random(3)
        due = cluster.now
        for _ in range(1000):
            cluster.now += 0.1
            cluster.say("a", Beat("a", "1", 0, ()))
            if cluster.now >= due:
                cluster.say("b", Beat("b", "1", 0, ()))
                stall_s = 2.0 if drawn.random() < 0.02 else drawn.uniform(0.0, 0.5)
                due = cluster.now + cluster.settings.beat_s + stall_s
            cluster.deliver(cluster.coordinator.tick(cluster.now))
        kinds = [event.kind for event in cluster.coordinator.events]
        assert "node_lost" not in kinds
        assert kinds.count("node_suspect") <= 10
        assert kinds.count("node_heard") >= kinds.count("node_suspect") - 1

    def test_nobody_is_suspect_because_the_coordinator_was_held_up(self) -> None:
        cluster = trained("a", "b")
        cluster.now += 2.5
        cluster.deliver(cluster.coordinator.tick(cluster.now))
        assert {shown(cluster, name)["state"] for name in ("a", "b")} == {"live"}

    def test_a_lost_node_comes_back_under_its_id_with_what_it_still_holds(self) -> None:
        cluster = trained("a", "b", "c", "d")
        (id,) = [i for i, s in cluster.coordinator.jobs[JOB].snapshots.items()
                 if s.state is State.PROTECTED]  # fmt: skip
        cluster.pass_time(cluster.settings.lease_s + 1, silent=["b"])
        assert shown(cluster, "b")["state"] == "lost"
        cluster.hello("b")
        assert shown(cluster, "b")["state"] == "live"
        assert cluster.coordinator.live_holdings(id).keys() == set(NODES)


class TestDrain:
    def test_a_node_without_ranks_or_segments_may_go_at_once(self) -> None:
        cluster = trained("a", "b")
        cluster.add("spare")
        assert cluster.obey(DrainNode("spare", True)) == ""
        assert shown(cluster, "spare")["draining"] == {"may_go": True, "waits_for": []}
        assert "drained: may go" in str(shown(cluster, "spare")["reasons"])

    def test_it_waits_for_its_ranks_and_then_for_nothing_if_others_can_restore(self) -> None:
        cluster = trained(*NODES)
        cluster.obey(DrainNode("b", True))
        (waits_for,) = shown(cluster, "b")["draining"]["waits_for"]  # type: ignore[index]
        assert "rank 1 of job" in waits_for
        cluster.stop_job()
        assert shown(cluster, "b")["draining"]["may_go"]  # type: ignore[index]

    def test_it_waits_until_the_newest_snapshot_can_be_restored_without_it(self) -> None:
        """One is only sealed when the job stops; agents complete its protection."""
        cluster = trained(*NODES)
        newest = cluster.tickets("a")[-1]
        cluster.seal_all(newest)
        cluster.stop_job()
        cluster.obey(DrainNode("b", True))
        (waits_for,) = shown(cluster, "b")["draining"]["waits_for"]  # type: ignore[index]
        assert str(newest) in waits_for
        for name in NODES:
            cluster.encode(name, newest)
        assert shown(cluster, "b")["draining"]["may_go"]  # type: ignore[index]

    def test_what_only_it_holds_keeps_it(self) -> None:
        cluster = Cluster("a")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.start("a")
        id = cluster.tickets("a")[0]
        cluster.seal_all(id)
        cluster.stop_job()
        cluster.obey(DrainNode("a", True))
        (waits_for,) = shown(cluster, "a")["draining"]["waits_for"]  # type: ignore[index]
        assert f"{id}, which cannot be restored without it" in waits_for

    def test_no_spare_on_it_is_called_until_it_is_to_stay(self) -> None:
        cluster = trained(*NODES)
        cluster.add("spare")
        cluster.obey(DrainNode("spare", True))
        cluster.wait_for_launcher("spare")
        cluster.destroy("c")
        assert cluster.told("spare", Activate) == []
        cluster.obey(DrainNode("spare", False))
        assert shown(cluster, "spare")["draining"] is None
        assert len(cluster.told("spare", Activate)) == 1

    def test_an_unknown_node_is_refused_with_the_known_ones(self) -> None:
        assert "known nodes: a, b" in Cluster("a", "b").obey(DrainNode("x", True))

    def test_a_new_coordinator_knows_it(self) -> None:
        cluster = trained("a", "b")
        cluster.obey(DrainNode("b", True))
        cluster.restart_coordinator()
        assert shown(cluster, "b")["draining"] is not None


class TestIsolation:
    def test_a_life_with_ranks_on_it_waits_and_says_how_to_go_on(self) -> None:
        cluster = trained(*NODES)
        cluster.stop_job()
        assert cluster.obey(IsolateNode("b", True, "bad memory")) == ""
        assert "isolated: bad memory" in str(shown(cluster, "b")["reasons"])
        cluster.attach("r2", *NODES)
        assert cluster.ask() is None
        said = cluster.told("a", ResumeWaits)[-1]
        assert isinstance(said, ResumeWaits)
        assert not said.final
        assert "rank 1 on b, which is isolated (bad memory)" in said.reason
        assert "ckptd readmit b" in said.reason
        cluster.obey(IsolateNode("b", False, "memory replaced"))
        assert cluster.granted("a")[-1].life == 2

    def test_what_it_holds_still_counts(self) -> None:
        """The job goes on elsewhere; two others are lost besides, so it is needed."""
        cluster = trained(*NODES)
        cluster.stop_job()
        cluster.obey(IsolateNode("b", True, "slow"))
        cluster.destroy("c", "d")
        for name in ("e", "f", "g"):
            cluster.add(name)
        grant = cluster.start("a", "e", "f", "g", round_="r2")
        assert grant.id is not None
        assert grant.source is not None
        assert grant.source.ranks[1] == ("b",)

    def test_a_life_that_runs_goes_on(self) -> None:
        cluster = trained(*NODES)
        cluster.obey(IsolateNode("b", True, "slow"))
        before = cluster.tickets("a")
        cluster.make_protected()
        assert len(cluster.tickets("a")) > len(before)

    def test_no_spare_on_it_is_called_and_one_is_called_in_its_place(self) -> None:
        cluster = trained(*NODES)
        for name in ("s1", "s2"):
            cluster.add(name)
            cluster.wait_for_launcher(name)
        cluster.obey(IsolateNode("s1", True, "slow"))
        cluster.obey(IsolateNode("b", True, "slow"))
        assert cluster.told("s2", Activate) == [], "its rank still runs"
        cluster.leave(1)
        cluster.pass_time(1)
        assert len(cluster.told("s2", Activate)) == 1
        assert cluster.told("s1", Activate) == []
        (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
        assert job["vacancies"] == {"b": "s2"}

    def test_a_new_coordinator_knows_it(self) -> None:
        cluster = trained(*NODES)
        cluster.obey(IsolateNode("b", True, "slow"))
        cluster.restart_coordinator()
        assert shown(cluster, "b")["isolated"] == "slow"

    def test_an_unknown_node_is_refused_with_the_known_ones(self) -> None:
        assert "known nodes: a, b" in Cluster("a", "b").obey(IsolateNode("x", True, "why"))


class TestJobsSideBySide:
    def train(self, cluster: Cluster, job: str, *names: str) -> SnapshotId:
        """One rank a node; all have sealed the first snapshot."""
        ranks = [
            RankState(job, f"round of {job}", 0, rank, len(names), 1, 0, 0, 0)
            for rank in range(len(names))
        ]
        for name, state in zip(names, ranks, strict=True):
            cluster.say(name, RankReport(state))
        cluster.say(names[0], AskResumeFor(job, ranks[0].round, (), cluster.coordinator.term))
        cluster.say(names[0], LifeResumed(job, 1, 0))
        for name, state in zip(names, ranks, strict=True):
            cluster.say(name, RankReport(msgspec.structs.replace(state, life=1, free_slots=1)))
        (ticket,) = [
            m.id for m in cluster.told(names[0], TakeSnapshot)
            if isinstance(m, TakeSnapshot) and m.id.job == job
        ]  # fmt: skip
        for rank, name in enumerate(names):
            extents = (Extent(rank, SIZE_BYTES),)
            cluster.say(name, Holds(Holding(ticket, len(names), extents)))
        return ticket

    def test_each_has_groups_of_its_own_nodes(self) -> None:
        cluster = Cluster(*NODES, "e", "f")
        cluster.pass_time(cluster.settings.lease_s)
        self.train(cluster, "one", "a", "b", "c", "d")
        self.train(cluster, "two", "c", "d", "e", "f")
        found = {}
        for name in ("c", "d"):
            for order in cluster.told(name, Protect):
                assert isinstance(order, Protect)
                (group,) = order.manifest.groups
                found[order.manifest.id.job] = [member.node for member in group.members]
        assert found == {"one": ["a", "b", "c", "d"], "two": ["c", "d", "e", "f"]}

    def test_the_end_of_one_leaves_the_other_as_it_is(self) -> None:
        cluster = Cluster(*NODES)
        cluster.pass_time(cluster.settings.lease_s)
        first = self.train(cluster, "one", *NODES)
        second = self.train(cluster, "two", *NODES)
        cluster.coordinator._forget(cluster.coordinator.jobs["one"], "finished", cluster.now)
        assert cluster.coordinator.jobs.keys() == {"two"}
        assert cluster.coordinator.live_holdings(second).keys() == set(NODES)
        assert not cluster.coordinator.live_holdings(first)

    def test_a_quota_is_told_with_each_life_the_job_s_own_before_that_of_all(self) -> None:
        settings = Settings(cell_bytes=4, job_quota_bytes=1000)
        cluster = Cluster("a", "b", settings=settings)
        cluster.pass_time(settings.lease_s)
        cluster.obey(SetQuota("two", 50))
        self.train(cluster, "one", "a", "b")
        self.train(cluster, "two", "a", "b")
        grants = [m for m in cluster.told("b", Grant) if isinstance(m, Grant)]
        assert {grant.job: grant.quota_bytes for grant in grants} == {"one": 1000, "two": 50}
        cluster.restart_coordinator()
        jobs = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
        assert {job["job"]: job["quota_bytes"] for job in jobs}["two"] == 50
        cluster.obey(SetQuota("two", None))
        assert cluster.coordinator.quota_of("two") == 1000
