"""Nodes that burn, at moments that are made to last: what comes back, and what is said of what
does not. Real agents; the ranks compare every byte of what they are given."""

import signal
from collections.abc import Callable

import pytest

from ckptd.ids import SnapshotId

from .fleet import CELL_BYTES, JOB, Fleet

Open = Callable[..., Fleet]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def replace(fleet: Fleet, *places: int) -> None:
    """The nodes at these places burn, and with them all ranks die; newcomers take their places."""
    for place in places:
        fleet.destroy_node(fleet.places[place])
    fleet.stop_training()
    for place in places:
        fleet.places[place] = fleet.newcomer()


def goes_on(fleet: Fleet) -> SnapshotId:
    """Train; returns what it began from."""
    fleet.train()
    start = fleet.wait_for_start()
    assert start is not None
    return start


def capture_under_way(fleet: Fleet) -> int:
    """Half of the ranks have sealed the step that is returned; the others wait."""
    fleet.hold.touch()
    return fleet.wait_for("held")["step"]


def encode_under_way(fleet: Fleet, stopped: int) -> int:
    """All have sealed the step that is returned, and encode; they lack the cells of one node."""
    step = capture_under_way(fleet)
    node = fleet.places[stopped]
    assert stopped < len(fleet.places) // 2

    def reported() -> bool:
        newest = fleet.job(JOB)["snapshots"][0]
        return newest["step"] == step and str(stopped) in newest["ranks_on"]

    fleet.wait("its agent to say that it holds its segment", reported)
    fleet.kill(f"agent-{node}", signal.SIGSTOP)
    fleet.hold.unlink()
    others = [name for name in fleet.places if name != node]
    fleet.wait(
        "the others to encode",
        lambda: all(fleet.files(name, f"*.{step}.manifest") for name in others),
    )
    return step


def test_two_of_four_before_the_encode(fleet: Open) -> None:
    here = fleet(4)
    here.train()
    here.wait_for_start()
    protected = here.wait_for_protected()
    step = capture_under_way(here)
    replace(here, 0, 3)
    assert protected <= goes_on(here) < SnapshotId(JOB, 1, step)


def test_two_of_four_in_the_middle_of_the_encode(fleet: Open) -> None:
    here = fleet(4, lease_s=6.0)
    here.train()
    here.wait_for_start()
    here.wait_for_protected()
    step = encode_under_way(here, stopped=1)
    protected = here.protected()
    assert protected is not None
    assert protected < SnapshotId(JOB, 1, step)
    replace(here, 1, 2)
    assert goes_on(here) == protected


def test_two_of_four_after_the_encode(fleet: Open) -> None:
    here = fleet(4)
    here.train()
    here.wait_for_start()
    protected = here.wait_for_protected()
    replace(here, 1, 2)
    assert goes_on(here) >= protected
    ready = [e for e in here.status()["events"] if e["kind"] == "segment_ready"]
    assert sum(event["rebuilt_cells"] for event in ready) > 0


def test_a_node_and_then_the_newcomer_in_its_place_during_the_rebuild(fleet: Open) -> None:
    """Again and again: each time somebody else is given what the first one held."""
    here = fleet(4, size_bytes=100 * CELL_BYTES)
    here.train()
    here.wait_for_start()
    protected = here.wait_for_protected()
    replace(here, 2)
    for _ in range(2):
        here.train()
        newcomer = here.places[2]
        here.wait("the rebuild", lambda n=newcomer: here.files(n, "segment-*"), 60)
        replace(here, 2)
    assert goes_on(here) >= protected


def test_a_survivor_during_the_rebuild_of_another(fleet: Open) -> None:
    here = fleet(4, size_bytes=100 * CELL_BYTES)
    here.train()
    here.wait_for_start()
    protected = here.wait_for_protected()
    replace(here, 2)
    here.train()
    here.wait("the rebuild", lambda: here.files(here.places[2], "segment-*"), 60)
    replace(here, 0)
    assert goes_on(here) >= protected


def test_one_too_many_and_it_is_said_what_is_gone_and_what_is_left(fleet: Open) -> None:
    here = fleet(4)
    here.train()
    here.wait_for_start()
    here.wait_for_protected()
    newest = here.rest()
    lost, left = here.places[:3], here.places[3]
    for place in range(3):
        here.destroy_node(here.places[place])
        here.places[place] = here.newcomer()
    here.train()

    def waits() -> str:
        return here.job(JOB)["waiting_for"] if "ckptd rm" in here.job(JOB)["waiting_for"] else ""

    said = here.wait("the reason", waits, 60)
    assert f"nodes {', '.join(lost)}, which may hold a snapshot of this job" in said
    assert f"{newest}: group 0 needs 2 of 4 nodes, and the cells of" in said
    assert f"ckptd rm {JOB}" in said
    held = next(s for s in here.job(JOB)["snapshots"] if s["id"] == str(newest))
    assert not held["restorable"]
    assert held["ranks_on"] == {"3": [left]}
    assert held["parity_on"] == [left]
    assert all(name in held["reason"] for name in lost)
    # Nothing was begun, and nothing of what is left was given up.
    assert not here.said("start")
    assert here.files(left, "segment-*.digests")


def test_one_too_many_comes_back_when_one_of_them_does(fleet: Open) -> None:
    """Killed, but with its memory whole: with it there are enough again."""
    here = fleet(4)
    here.train()
    here.wait_for_start()
    protected = here.wait_for_protected()
    back = here.places[0]
    here.kill(f"agent-{back}")
    here.places[0] = here.newcomer()
    replace(here, 1, 2)
    here.train()
    here.wait("the job to wait for it", lambda: f"nodes {back}, " in here.job(JOB)["waiting_for"])
    assert not here.said("start")
    here.start_agent(back)
    start = here.wait_for_start()
    assert start is not None
    assert start >= protected
