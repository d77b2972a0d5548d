"""Whole clusters, with the real deciders, through random faults from a seed."""

from collections.abc import Callable

import pytest

from .world import Plan, World

FAULTS_S = 12.0
QUIET_S = 8.0


def faults(world: World, chosen: list[Callable[[], None]], end: float) -> None:
    """Now and then one of these, until `end`."""

    def strike() -> None:
        if world.clock.now < end:
            world.clock.random.choice(chosen)()
            world.clock.soon(0.05, 1.5, strike)

    world.clock.soon(0.5, 3.0, strike)


def live_through(seed: int, *names: str, keep: int = 1) -> World:
    """Faults for a while, then peace; what must always hold is checked on the way."""
    world = World(seed, Plan(slots=keep + 1, keep=keep))
    start = world.clock.now
    faults(world, [getattr(world, name) for name in names], start + FAULTS_S)
    try:
        world.clock.run_until(start + FAULTS_S + QUIET_S)
        assert not world.refused, world.refused
        assert world.run is not None
        assert not world.run.over, f"the launcher has {len(world.pool)} machines"
        assert world.run.training, f"the job waits for {world.run.waiting!r}"
        new = [id for at, id in world.commits if at > start + FAULTS_S + 0.6 * QUIET_S]
        assert len(new) >= 3, f"only {new} were committed at the end; {world.slots()}"
        for name, (segments, parities) in world.slots().items():
            assert segments <= 4 + keep, f"{name} has {segments} segment files"
            assert parities <= 3 + keep, f"{name} has {parities} parity files"
    except Exception as error:
        error.add_note(f"seed {seed}, faults {names}, at {world.clock.now - start:.3f} s")
        raise
    return world


def test_without_faults_it_commits_steadily() -> None:
    world = World(1)
    world.clock.run_until(world.clock.now + 10)
    assert len(world.commits) > 20
    assert set(world.slots().values()) == {(2, 2), (0, 0)}
    assert world.grants == [None]


def test_without_faults_three_snapshots_are_kept_in_four_slots() -> None:
    world = World(1, Plan(slots=4, keep=3))
    world.clock.run_until(world.clock.now + 10)
    assert len(world.commits) > 20
    assert set(world.slots().values()) == {(4, 4), (0, 0)}


@pytest.mark.parametrize("seed", range(12))
def test_all_kinds_of_faults_while_three_snapshots_are_kept(seed: int) -> None:
    live_through(
        2000 + seed,
        "kill_trainer",
        "restart_agent",
        "destroy_node",
        "cut_off",
        "restart_coordinator",
        keep=3,
    )


@pytest.mark.parametrize("seed", range(12))
def test_going_back_now_and_then(seed: int) -> None:
    """What was asked for is what the job goes on from, through all kinds of faults."""
    live_through(
        3000 + seed,
        "roll_back",
        "kill_trainer",
        "restart_agent",
        "destroy_node",
        "cut_off",
        "restart_coordinator",
        keep=1 + seed % 3,
    )


@pytest.mark.parametrize("seed", range(30))
def test_all_kinds_of_faults(seed: int) -> None:
    """Trainers, agents, nodes, links and the coordinator fail, in any order, at any moment."""
    live_through(
        seed, "kill_trainer", "restart_agent", "destroy_node", "cut_off", "restart_coordinator"
    )


@pytest.mark.parametrize("fault", ["kill_trainer", "restart_agent", "destroy_node", "cut_off"])
@pytest.mark.parametrize("seed", range(3))
def test_one_kind_of_fault_and_the_coordinator_s_death(seed: int, fault: str) -> None:
    live_through(1000 + seed, fault, "restart_coordinator")
