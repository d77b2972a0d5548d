"""Failure domains: how the coordinator draws groups by label, and what status says of them."""

import io
from typing import Any

from rich.console import Console

from ckptd.cli.status import render
from ckptd.coordinator.view import status

from .fakes import JOB, Cluster


def in_racks(racks: dict[str, str]) -> Cluster:
    """A cluster of nodes with these labels, whose job, one rank a node, has a ticket."""
    cluster = Cluster()
    for name, rack in racks.items():
        cluster.add(name, domain=rack)
    cluster.pass_time(cluster.settings.lease_s)
    cluster.start(*sorted(racks))
    return cluster


def document(cluster: Cluster) -> dict[str, Any]:
    return status(cluster.coordinator, cluster.now, 0.0)


def shown_groups(cluster: Cluster) -> list[dict[str, Any]]:
    (job,) = document(cluster)["jobs"]
    assert job["job"] == JOB
    groups: list[dict[str, Any]] = job["groups"]
    return groups


def test_a_rack_holds_no_more_of_a_group_than_may_be_lost() -> None:
    """Dealt out by name, each group of 4+2 would hold a whole rack of four."""
    names = [f"n{i:02}" for i in range(12)]
    cluster = in_racks(dict(zip(names, "ababacacbcbc", strict=True)))
    manifest = cluster.protect(cluster.tickets("n00")[0])
    for group in manifest.groups:
        racks = [cluster.nodes[member.node].domain for member in group.members]
        assert sorted(racks) == ["a", "a", "b", "b", "c", "c"]
    for shown in shown_groups(cluster):
        assert shown["exposed"] == []
        assert shown["reasons"] == []


def test_status_names_the_group_that_a_rack_could_take_down() -> None:
    """Rack7 has five of twelve nodes, and two groups of 4+2 may lose four together."""
    names = [f"n{i:02}" for i in range(12)]
    racks = ["rack7"] * 5 + ["rack8"] * 4 + [""] * 3
    cluster = in_racks(dict(zip(names, racks, strict=True)))
    cluster.protect(cluster.tickets("n00")[0])
    sound, exposed = sorted(shown_groups(cluster), key=lambda group: len(group["exposed"]))
    assert (sound["exposed"], sound["reasons"]) == ([], [])
    assert exposed["exposed"] == [{"domain": "rack7", "nodes": 3}]
    said = "is exposed: rack7 holds 3 of its 6 nodes, and 2 may be lost"
    assert exposed["reasons"] == [f"group {exposed['group']} {said}"]
    page = io.StringIO()
    Console(width=80, file=page).print(render(document(cluster), "tcp://10.0.0.9:7070"))
    assert said in " ".join(page.getvalue().split())


def test_what_is_exposed_is_still_said_when_a_node_is_lost() -> None:
    cluster = in_racks(dict(zip("abcde", ["r", "r", "r", "s", ""], strict=True)))
    cluster.protect(cluster.tickets("a")[0])
    cluster.destroy("a")
    (group,) = shown_groups(cluster)
    assert group["reasons"] == [
        "group 0 is exposed: r holds 3 of its 5 nodes, and 2 may be lost",
        "lost: a",
    ]
    assert group["may_lose"] == 1


def test_nodes_that_arrive_in_another_order_draw_the_same_groups() -> None:
    racks = {f"n{i:02}": f"rack{i % 5}" for i in range(17)}
    drawn = []
    for order in (list(racks), list(reversed(racks))):
        cluster = in_racks({name: racks[name] for name in order})
        drawn.append(cluster.protect(cluster.tickets("n00")[0]).groups)
    assert drawn[0] == drawn[1]
