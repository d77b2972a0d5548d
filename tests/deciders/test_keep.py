"""More than the newest snapshot is kept, and a job goes back to an older one when asked to."""

from dataclasses import replace
from itertools import chain, combinations, product, starmap

import msgspec
import pytest

from ckptd.coordinator.state import State
from ckptd.coordinator.view import status
from ckptd.ids import SnapshotId
from ckptd.manifest import Ancestor, Extent, GivenUp
from ckptd.wire import (
    Commit,
    Drop,
    Holding,
    Holds,
    LifeResumed,
    Protect,
    ResumeWaits,
    RollBack,
    SnapshotFailed,
)

from .fakes import JOB, SIZE_BYTES, Cluster, snapshot

NODES = ("a", "b", "c", "d")


def training(keep: int, snapshots: int) -> tuple[Cluster, list[SnapshotId]]:
    """A job on four nodes in its first life, with so many protected snapshots behind it."""
    cluster = Cluster(*NODES)
    cluster.pass_time(cluster.settings.lease_s)
    cluster.start(*NODES, keep=keep)
    return cluster, [cluster.make_protected() for _ in range(snapshots)]


def protected(cluster: Cluster) -> list[SnapshotId]:
    """Oldest first."""
    known = cluster.coordinator.jobs[JOB].snapshots
    return sorted(id for id in known if known[id].state is State.PROTECTED)


def waits(cluster: Cluster, name: str = "a") -> list[ResumeWaits]:
    return [m for m in cluster.inbox(name) if isinstance(m, ResumeWaits)]


def shown(cluster: Cluster) -> dict[str, object]:
    (job,) = status(cluster.coordinator, cluster.now, 0.0)["jobs"]
    return job


def go_back(cluster: Cluster, id: SnapshotId) -> str:
    return cluster.obey(RollBack(JOB, id.step, id.life))


class TestKeep:
    def test_as_many_protected_snapshots_stay_as_the_job_keeps(self) -> None:
        for keep in (1, 2, 3):
            cluster, made = training(keep, snapshots=5)
            assert protected(cluster) == made[-keep:]
            assert shown(cluster)["keep"] == keep

    def test_what_was_only_sealed_is_retired_by_a_newer_protected_one(self) -> None:
        cluster, made = training(3, snapshots=1)
        cluster.free(slots=2)
        first, second = sorted(
            id for id in cluster.tickets("a") if id > made[0]
        )[:2]  # fmt: skip
        cluster.seal_all(first)
        cluster.protect(second)
        assert first not in cluster.coordinator.jobs[JOB].snapshots
        assert protected(cluster) == [made[0], second]

    def test_one_that_cannot_be_restored_any_more_is_not_counted(self) -> None:
        """Three nodes lose what they hold of the one before: an older one stays in its place."""
        cluster, made = training(2, snapshots=2)
        for name in ("a", "b", "c"):
            del cluster.nodes[name].holdings[made[1]]
            cluster.hello(name)
        last = cluster.tickets("a")[-1]  # dropped, as those before it: its ranks hear of that
        for rank in range(len(NODES)):
            cluster.update(rank, seen_step=last.step)
        newest = cluster.make_protected()
        assert made[0] in protected(cluster)
        assert newest in protected(cluster)

    def test_the_next_life_and_the_next_coordinator_know_how_many_are_kept(self) -> None:
        """Also with no trainer there to say it, when protection is completed."""
        cluster, made = training(3, snapshots=2)
        newest = cluster.tickets("a")[-1]
        cluster.seal_all(newest)
        cluster.stop_job()
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        for name in NODES:
            cluster.encode(name, newest)
        assert protected(cluster) == [*made, newest]

    def test_what_is_wanted_counts_among_them_only_if_it_was_protected(self) -> None:
        cluster, made = training(2, snapshots=2)
        cluster.free(slots=2)
        first, wanted = sorted(id for id in cluster.tickets("a") if id > made[-1])[:2]
        cluster.seal_all(wanted)
        assert go_back(cluster, wanted) == ""
        cluster.protect(first)
        assert protected(cluster) == [made[-1], first]
        assert wanted in cluster.coordinator.jobs[JOB].snapshots

    def test_snapshots_of_lives_before_are_kept_as_well(self) -> None:
        cluster, made = training(3, snapshots=3)
        cluster.stop_job()
        cluster.start(*NODES, round_="r2", keep=3)
        new = cluster.make_protected()
        assert new.life == 2
        assert protected(cluster) == [*made[1:], new]

    def test_one_node_keeps_as_many_without_parity(self) -> None:
        cluster = Cluster("a")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.start("a", keep=2)
        made = []
        for _ in range(4):
            id = min(
                id for id, s in cluster.coordinator.jobs[JOB].snapshots.items()
                if s.state is State.TICKETED
            )  # fmt: skip
            cluster.update(0, step=id.step)
            cluster.seal_all(id)
            made.append(id)
            cluster.free([i for m in cluster.told("a", Commit) for i in m.retire], slots=1)
        known = cluster.coordinator.jobs[JOB].snapshots
        assert sorted(id for id in known if known[id].state is State.SEALED) == made[-2:]

    def test_where_there_is_no_slot_for_a_new_one_the_oldest_goes(self) -> None:
        """A node whose memory holds other things besides; it trains, so it has laid out its own."""
        cluster, made = training(3, snapshots=3)
        for open_ in cluster.tickets("a"):
            cluster.say("a", SnapshotFailed(open_, "dropped", "for the story"))
        cluster.update(0, free_slots=0)
        cluster.pass_time(2 * cluster.settings.lease_s)
        assert protected(cluster) == made, "no step was done meanwhile"
        for rank in range(4):
            cluster.update(rank, step=cluster.state(rank).step + 5)
        cluster.pass_time(1)
        assert protected(cluster) == made[1:]
        assert {id for m in cluster.told("a", Commit) for id in m.retire} == {made[0]}

    def test_a_new_coordinator_keeps_what_the_life_began_from(self) -> None:
        """The newer one could not be loaded, which only the coordinator before it knew."""
        cluster, made = training(2, snapshots=2)
        start, newest = made
        held = {name: cluster.nodes[name].holdings[newest] for name in NODES}
        cluster.stop_job()
        cluster.attach("r2", *NODES)
        cluster.ask()
        again = cluster.ask(newest)
        assert again is not None
        assert again.id == start
        for name in NODES:
            parity = name != "d"
            cluster.nodes[name].holdings[newest] = msgspec.structs.replace(
                held[name], parity=parity
            )
        cluster.restart_coordinator()
        cluster.encode("d", newest)
        assert start in cluster.coordinator.jobs[JOB].snapshots

    def test_room_is_made_by_what_was_given_up_and_not_by_what_the_life_began_from(self) -> None:
        cluster, made = training(2, snapshots=2)
        go_back(cluster, made[0])
        cluster.stop_job()
        cluster.start(*NODES, round_="r2", keep=2)
        for open_ in cluster.tickets("a"):
            cluster.say("a", SnapshotFailed(open_, "dropped", "for the story"))
        cluster.update(0, free_slots=0)
        cluster.pass_time(2 * cluster.settings.lease_s)
        for rank in range(4):
            cluster.update(rank, step=cluster.state(rank).step + 5)
        cluster.pass_time(1)
        assert protected(cluster) == made[:1]

    def test_a_new_coordinator_keeps_the_newest_though_a_segment_of_it_is_lost(self) -> None:
        cluster, made = training(2, snapshots=2)
        older, newest = made
        held = cluster.nodes["d"].holdings[newest]
        cluster.nodes["d"].holdings[newest] = msgspec.structs.replace(held, extents=())
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        assert {older, newest} <= set(cluster.coordinator.jobs[JOB].snapshots)
        assert not any(newest in (drop.id,) for drop in cluster.told("a", Drop))  # type: ignore[attr-defined]

    def test_one_of_those_that_are_kept_stays_though_a_segment_of_it_is_lost(self) -> None:
        """A newer one is protected, and the oldest goes, as these two are as many as are kept."""
        cluster, (oldest, older) = training(2, snapshots=2)
        newest = cluster.tickets("a")[-1]
        cluster.seal_all(newest)
        held = cluster.nodes["c"].holdings[older]
        cluster.nodes["c"].holdings[older] = msgspec.structs.replace(held, extents=())
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        for name in NODES:
            cluster.encode(name, newest)
        cluster.pass_time(2)
        known = cluster.coordinator.jobs[JOB].snapshots
        assert known[newest].state is State.PROTECTED
        assert oldest not in known
        assert older in known

    def test_a_new_coordinator_keeps_what_was_protected_though_a_place_was_given_away(self) -> None:
        """The node that had it is back when its heir has the parity of the newest alone."""
        cluster, (older, newest) = training(2, snapshots=2)
        cluster.add("e")
        for id in (older, newest):
            cluster.bring("e", id, 3)
        cluster.restart_coordinator("a", "b", "c", "e")
        cluster.pass_time(cluster.settings.lease_s + 0.5, silent="d")
        assert [m for m in cluster.told("e", Protect) if m.manifest.id == older]  # type: ignore[attr-defined]
        cluster.hello("d")
        cluster.encode("e", newest)
        assert newest in [m.id for m in cluster.told("e", Commit)]  # type: ignore[attr-defined]
        assert {older, newest} <= set(cluster.coordinator.jobs[JOB].snapshots)

    @pytest.mark.parametrize("older", [1, 2])
    def test_a_new_coordinator_keeps_what_may_have_been_protected_if_there_is_room(
        self, older: int
    ) -> None:
        """A segment of it is lost, and the parity of another node; an older one is whole."""
        cluster, made = training(2, snapshots=older)
        newest = cluster.make_protected() if older == 1 else cluster.tickets("a")[-1]
        if older == 2:
            cluster.seal_all(newest)
            for name in ("a", "b", "d"):
                cluster.encode(name, newest)
        for name, lost in (("b", {"parity": False}), ("c", {"extents": ()})):
            held = cluster.nodes[name].holdings[newest]
            cluster.nodes[name].holdings[newest] = msgspec.structs.replace(held, **lost)
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s + 1)
        known = cluster.coordinator.jobs[JOB].snapshots
        assert set(made) <= set(known)
        assert (newest in known) is (older == 1)

    def test_ranks_that_differ_are_told_so_and_get_no_life(self) -> None:
        cluster = Cluster("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        cluster.attach("r1", "a", "b", keep=2)
        cluster.update(1, keep=3)
        assert cluster.ask() is None
        said = waits(cluster)[-1]
        assert said.final
        assert "rank 0 says 2, rank 1 says 3" in said.reason
        assert "CKPTD_KEEP" in said.reason


class TestRollback:
    def test_the_next_life_begins_from_the_chosen_one_though_newer_ones_are_there(self) -> None:
        cluster, made = training(3, snapshots=3)
        assert go_back(cluster, made[0]) == ""
        assert shown(cluster)["rollback"] == str(made[0])
        cluster.stop_job()
        grant = cluster.start(*NODES, round_="r2", keep=3)
        assert grant.id == made[0]
        assert "asked for with `ckptd rollback`" in grant.reason
        cluster.pass_time(1)
        assert shown(cluster)["rollback"] is None

    def test_what_was_given_up_goes_with_the_first_snapshot_of_the_new_life(self) -> None:
        cluster, made = training(3, snapshots=3)
        go_back(cluster, made[0])
        cluster.stop_job()
        cluster.start(*NODES, round_="r2", keep=3)
        assert protected(cluster) == made
        assert shown(cluster)["at_risk"]["process_steps"] == 0  # type: ignore[index]
        new = cluster.make_protected()
        assert protected(cluster) == [made[0], new]
        retired = {id for m in cluster.told("a", Commit) for id in m.retire}
        assert {made[1], made[2]} <= retired
        # A node that missed it is told when it comes back with them.
        late = Holding(made[2], 4, (Extent(1, SIZE_BYTES),))
        cluster.say("b", Holds(late))
        assert made[2] in {m.id for m in cluster.told("b", Drop)}

    def test_a_life_that_ends_early_does_not_bring_the_newer_ones_back(self) -> None:
        """Nor does a new coordinator, nor one that has never heard of the wish."""
        cluster, made = training(3, snapshots=3)
        go_back(cluster, made[0])
        cluster.stop_job()
        cluster.start(*NODES, round_="r2", keep=3)
        cluster.pass_time(1)
        cluster.stop_job()
        again = cluster.start(*NODES, round_="r3", keep=3)
        assert again.id == made[0]
        cluster.stop_job()
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s)
        assert cluster.start(*NODES, round_="r4", keep=3).id == made[0]

    def test_until_the_ranks_have_loaded_it_the_wish_stands(self) -> None:
        cluster, made = training(3, snapshots=3)
        go_back(cluster, made[1])
        cluster.stop_job()
        cluster.attach("r2", *NODES, keep=3)
        first = cluster.ask()
        assert first is not None
        cluster.pass_time(1)
        assert shown(cluster)["rollback"] == str(made[1])
        cluster.stop_job()
        cluster.attach("r3", *NODES, keep=3)
        second = cluster.ask()
        assert second is not None
        assert (second.life, second.id) == (3, made[1])

    def test_one_that_cannot_be_loaded_is_not_replaced_by_another(self) -> None:
        cluster, made = training(3, snapshots=3)
        go_back(cluster, made[0])
        cluster.stop_job()
        cluster.attach("r2", *NODES, keep=3)
        assert cluster.ask() is not None
        assert cluster.ask(made[0]) is None
        said = waits(cluster)[-1]
        assert said.final
        assert f"{made[0]}, to which somebody wants to go back, could not be loaded" in said.reason
        assert f"ckptd rollback {JOB} --clear" in said.reason

    def test_one_that_cannot_be_restored_now_is_waited_for(self) -> None:
        cluster, made = training(2, snapshots=2)
        go_back(cluster, made[0])
        cluster.stop_job()
        for name in ("b", "c", "d"):
            del cluster.nodes[name].holdings[made[0]]
            cluster.hello(name)
        cluster.attach("r2", *NODES, keep=2)
        assert cluster.ask() is None
        said = waits(cluster)[-1]
        assert not said.final
        assert str(made[0]) in said.reason
        assert cluster.obey(RollBack(JOB)) == ""
        assert [grant.id for grant in cluster.granted("a")][-1] == made[1]

    def test_the_chosen_one_stays_while_the_job_still_trains(self) -> None:
        """It counts as one of those that are kept; the newest is always another."""
        cluster, made = training(2, snapshots=2)
        go_back(cluster, made[0])
        for _ in range(3):
            newest = cluster.make_protected()
        assert protected(cluster) == [made[0], newest]
        cluster.stop_job()
        assert cluster.start(*NODES, round_="r2", keep=2).id == made[0]

    def test_where_one_is_kept_the_chosen_one_stays_beside_the_newest(self) -> None:
        cluster, (old,) = training(1, snapshots=1)
        go_back(cluster, old)
        newest = cluster.make_protected()
        assert protected(cluster) == [old, newest]
        cluster.stop_job()
        assert cluster.start(*NODES, round_="r2").id == old

    @pytest.mark.parametrize("parity", [False, True])
    def test_the_chosen_one_does_not_make_a_new_coordinator_drop_the_newest(
        self, parity: bool
    ) -> None:
        """It was protected; a segment of it is lost, and maybe the parity of another node."""
        cluster, (old,) = training(1, snapshots=1)
        go_back(cluster, old)
        newest = cluster.make_protected()
        for rank in range(4):
            cluster.update(rank, free_slots=0)
        for name, left in (("b", {"parity": parity}), ("c", {"extents": ()})):
            held = cluster.nodes[name].holdings[newest]
            cluster.nodes[name].holdings[newest] = msgspec.structs.replace(held, **left)
        cluster.restart_coordinator()
        cluster.pass_time(cluster.settings.lease_s + 1)
        assert {old, newest} <= set(cluster.coordinator.jobs[JOB].snapshots)

    @pytest.mark.parametrize("given_up", [False, True])
    def test_the_chosen_one_is_protected_again_though_a_newer_one_is_there(
        self, given_up: bool
    ) -> None:
        """Also when the job has gone back, and the newer one is given up."""
        cluster, (old, newest) = training(2, snapshots=2)
        if given_up:
            go_back(cluster, old)
            cluster.stop_job()
            assert cluster.start(*NODES, round_="r2", keep=2).id == old
        cluster.add("e")
        for name in ("d", "e"):
            cluster.nodes[name].holdings.pop(old, None)
            cluster.hello(name)
        cluster.bring("e", old, 3)
        cluster.pass_time(1)
        assert cluster.coordinator.jobs[JOB].has_given_up(newest) is given_up
        if not given_up:
            assert not cluster.told("e", Protect), "the newer one would replace it"
            go_back(cluster, old)
            cluster.pass_time(1)
        assert [m.manifest.id for m in cluster.told("e", Protect)] == [old]  # type: ignore[attr-defined]

    def test_an_unknown_step_is_refused_with_the_choices(self) -> None:
        cluster, made = training(2, snapshots=3)
        refusal = cluster.obey(RollBack(JOB, 9999))
        assert "no snapshot of step 9999 that can be restored" in refusal
        for id in made[1:]:
            assert f"{id.life}.{id.step}" in refusal
        assert f"{made[0].life}.{made[0].step}," not in refusal
        assert "known jobs: job" in cluster.obey(RollBack("jab", 1))

    def test_a_step_of_two_lives_needs_the_life(self) -> None:
        cluster, made = training(3, snapshots=3)
        go_back(cluster, made[0])
        cluster.stop_job()
        cluster.start(*NODES, round_="r2", keep=3)
        # Its second life comes to the same step; the first life's is not yet retired.
        twin = snapshot(2, made[1].step)
        job = cluster.coordinator.jobs[JOB]
        job.snapshots[twin] = replace(job.snapshots[made[1]], id=twin)
        for name, node in cluster.coordinator.nodes.items():
            held = node.holdings[made[1]]
            node.holdings[twin] = msgspec.structs.replace(held, id=twin)
            cluster.coordinator._inventory.put(name, node.holdings[twin])
        refusal = cluster.obey(RollBack(JOB, twin.step))
        assert "of lives 1 and 2; say which: --to 2." in refusal
        assert go_back(cluster, twin) == ""

    def test_what_was_given_up_can_be_taken_back_as_long_as_it_is_there(self) -> None:
        cluster, made = training(3, snapshots=3)
        go_back(cluster, made[0])
        cluster.stop_job()
        cluster.start(*NODES, round_="r2", keep=3)
        cluster.pass_time(1)
        assert go_back(cluster, made[2]) == ""
        cluster.stop_job()
        assert cluster.start(*NODES, round_="r3", keep=3).id == made[2]
        new = cluster.make_protected()
        assert protected(cluster) == [made[1], made[2], new]

    def test_what_was_taken_back_stays_so_though_a_life_could_not_load_it(self) -> None:
        """Its nodes were away for a moment, and the job began from an older one."""
        cluster, made = training(3, snapshots=3)
        for number, id in enumerate((made[0], made[2]), 2):
            go_back(cluster, id)
            cluster.stop_job()
            assert cluster.start(*NODES, round_=f"r{number}", keep=3).id == id
            cluster.pass_time(1)
        cluster.stop_job()
        cluster.attach("r4", *NODES, keep=3)
        cluster.ask()
        again = cluster.ask(made[2])
        assert again is not None
        assert again.id == made[1]
        cluster.stop_job()
        assert cluster.start(*NODES, round_="r5", keep=3).id == made[2]

    def test_only_what_is_on_the_path_is_taken_back(self) -> None:
        """Of four lives of three steps, whatever path they took."""
        lives = list(product(range(1, 5), range(1, 4)))
        for path in chain.from_iterable(combinations(lives, length) for length in (1, 2, 3)):
            if len({life for life, _ in path}) < len(path):
                continue
            there = {(life, step) for life, last in path for step in range(1, last + 1)}
            for (life, step), before in product(lives, range(2, 6)):
                left = list(GivenUp(life, step, before).without(tuple(starmap(Ancestor, path))))
                for id in lives:
                    gone = any(one.covers(snapshot(*id)) for one in left)
                    was = GivenUp(life, step, before).covers(snapshot(*id))
                    assert gone == (was and id < path[-1] and id not in there)

    def test_a_wish_that_was_fulfilled_is_not_fulfilled_again(self) -> None:
        """Though the news of it was lost with the coordinator that knew."""
        cluster, made = training(3, snapshots=3)
        go_back(cluster, made[0])
        before = cluster.coordinator.journal.entries
        cluster.stop_job()
        cluster.start(*NODES, round_="r2", keep=3)
        new = cluster.make_protected()
        cluster.restart_coordinator()
        cluster.coordinator.journal.__init__()  # type: ignore[misc]
        cluster.coordinator.journal.merge(before)
        cluster.pass_time(cluster.settings.lease_s)
        cluster.stop_job()
        assert cluster.start(*NODES, round_="r3", keep=3).id == new

    def test_the_chosen_one_is_not_dropped_for_a_better_one(self) -> None:
        """It was only sealed, and its protection fails, when a newer one is protected."""
        cluster = Cluster(*NODES)
        cluster.pass_time(cluster.settings.lease_s)
        cluster.start(*NODES)
        old = min(cluster.tickets("a"))
        cluster.seal_all(old)
        assert go_back(cluster, old) == ""
        cluster.free(slots=1)
        newer = cluster.make_protected()
        assert newer > old
        cluster.say("a", SnapshotFailed(old, "dropped", "no memory for parity"))
        assert old in cluster.coordinator.jobs[JOB].snapshots
        assert not [m for m in cluster.told("a", Drop) if m.id == old]

    def test_a_life_of_another_coordinator_before_does_not_end_the_wish(self) -> None:
        """It is heard of only after somebody has asked, but may well have begun before."""
        cluster, made = training(1, snapshots=1)
        running = msgspec.structs.replace(cluster.nodes["c"].record, life=2, term=0)
        cluster.nodes["c"].record = running
        rank = msgspec.structs.replace(cluster.nodes["c"].ranks[2], life=2, round="r2", step=9)
        cluster.nodes["c"].ranks[2] = rank
        cluster.restart_coordinator("a", "b")
        cluster.pass_time(cluster.settings.lease_s)
        assert go_back(cluster, made[0]) == ""
        cluster.hello("c")
        cluster.pass_time(1.0)
        assert cluster.coordinator.jobs[JOB].life == 2
        assert shown(cluster)["rollback"] == str(made[0])

    def test_the_end_of_the_job_ends_the_wish(self) -> None:
        cluster, made = training(2, snapshots=2)
        go_back(cluster, made[0])
        for rank in range(4):
            cluster.leave(rank, "detached", finished=True)
        assert cluster.coordinator.journal.rollback(JOB) is None

    def test_a_life_that_was_only_granted_is_not_the_end_of_the_wish(self) -> None:
        cluster, made = training(2, snapshots=2)
        cluster.stop_job()
        cluster.attach("r2", *NODES, keep=2)
        grant = cluster.ask()
        assert grant is not None
        assert go_back(cluster, made[0]) == ""  # life 2 goes on from the newest all the same
        cluster.say("a", LifeResumed(JOB, grant.life, made[1].step))
        cluster.pass_time(1)
        assert shown(cluster)["rollback"] == str(made[0])
