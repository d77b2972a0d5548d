"""Networks are measured before they are blamed: who is asked, what is believed, what it takes."""

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from ckptd.agent import cells
from ckptd.agent.cells import CellServer, Peers
from ckptd.agent.store import Store
from ckptd.cli.local_cluster import LocalCluster
from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Kind, Scope
from ckptd.coordinator.diagnosis.probing import PATIENCE_S, Probing
from ckptd.coordinator.diagnosis.shared import Tell
from ckptd.coordinator.diagnosis.supervisor import Supervisor
from ckptd.coordinator.shell import CoordinatorConfig, CoordinatorProcess
from ckptd.errors import Gone
from ckptd.keys import ClusterKey
from ckptd.wire import PROBE_LIMIT_BYTES, Probe, Transfer

KEY = ClusterKey(bytes(range(32)))
NODES = ["a", "b", "c", "d"]
STUCK = Finding(
    3, Kind.COMMUNICATION_HANG, Culprit(Scope.NODES, (0, 1, 2, 3), tuple(NODES)), 0.0, 1.0, 0.2,
    "all are stuck",
)  # fmt: skip


def nobody(request: object) -> bytes:
    raise Gone("nothing is here")


async def measured(cluster: LocalCluster, announce: Path) -> Finding:
    """What a real coordinator hears from real agents."""
    config = CoordinatorConfig("tcp://127.0.0.1:*", announce=announce)
    process = CoordinatorProcess(config)
    running = asyncio.create_task(process.run(signals=()))
    async with asyncio.timeout(100):
        while not announce.exists():
            await asyncio.sleep(0.05)
        cluster.endpoint = announce.read_text().strip()
        for node in NODES:
            cluster.start_agent(node, *(["--send-rate", "4Mbit/s"] if node == "c" else []))
        decider = process._decider
        while len(decider.nodes) < len(NODES):
            await asyncio.sleep(0.05)
        probing = Probing(STUCK, NODES, decider._cells_of, inf)
        supervisors = decider.supervisors
        supervisors.jobs["job"] = Supervisor("job", supervisors.shared)
        supervisors.jobs["job"]._probing[STUCK.number] = probing
        for node, order in probing.orders("job", 0):
            supervisors.shared.do(Tell(node, order))
        while probing.awaited:
            await asyncio.sleep(0.05)
        process.stop()
        await running
    assert len(supervisors.matrix.delays()) == 12
    return probing.narrowed()


def test_agents_measure_and_the_finding_is_narrowed_to_who_sends_slowly(tmp_path: Path) -> None:
    with LocalCluster(agent_flags=["--memory-limit", "8MiB"]) as cluster:
        narrowed = asyncio.run(measured(cluster, tmp_path / "address"))
    assert (narrowed.culprit.scope, narrowed.culprit.nodes) == (Scope.NODE, ("c",))
    assert narrowed.measured
    assert "node c sends" in narrowed.sentence
    assert "the agents' network" in narrowed.sentence


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CellServer]:
    store = Store(tmp_path / "memory")
    made = CellServer("127.0.0.1", 0, "a", store, KEY, nobody, nobody)
    yield made
    made.close()


def test_a_peer_that_is_gone_silent_or_asked_for_too_much_harms_nobody(
    server: CellServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "PEER_TIMEOUT_S", 0.5)
    peers, address = Peers(KEY), server.address
    assert 0 < peers.probe(address, PROBE_LIMIT_BYTES) < float("inf")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = "{}:{}".format(*silent.getsockname())
        assert peers.probe(where, 1000) == float("inf")
    assert peers.probe(where, 1000) == float("inf")
    assert peers.probe(address, PROBE_LIMIT_BYTES + 1) == float("inf")
    assert peers.probe(address, 1000) < float("inf")
    peers.close()


def answered(slow: dict[tuple[str, str], float], finding: Finding = STUCK) -> Finding:
    probing = Probing(finding, NODES, lambda node: f"{node}:1", 10.0)
    for node, order in probing.orders("job", 1):
        assert isinstance(order, Probe)
        found = [
            Transfer(source, 1, PROBE_LIMIT_BYTES, slow.get((source, node), 0.001))
            for source in order.cells
        ]
        probing.heard(node, found)
    return probing.narrowed()


def test_a_link_that_failed_is_named_and_a_network_that_is_well_is_not_blamed() -> None:
    dead = float("inf")
    link = answered({("a", "b"): dead, ("b", "a"): dead}).culprit
    assert (link.scope, link.nodes) == (Scope.LINK, ("a", "b"))
    well = answered({})
    assert well.culprit == STUCK.culprit
    assert not well.measured
    assert "nothing unusual" in str(well.evidence["matrix"])


def test_only_communication_is_probed_and_only_who_can_be_reached() -> None:
    def orders(finding: Finding, away: str = "") -> list[tuple[str, Probe]]:
        found = Probing(finding, NODES, lambda node: "" if node == away else f"{node}:1", 0.0)
        return found.orders("job", 1)

    assert len(orders(STUCK)) == len(NODES)
    assert orders(replace(STUCK, kind=Kind.NON_COMMUNICATION_HANG)) == []
    assert orders(replace(STUCK, culprit=Culprit(Scope.RANK, (1,), ("b",)))) == []
    reached = orders(STUCK, away="b")
    assert sorted(node for node, _ in reached) == ["a", "c", "d"]
    assert not any("b" in order.cells for _, order in reached)


def test_what_nobody_asked_for_and_what_is_too_little_says_nothing() -> None:
    probing = Probing(STUCK, NODES, lambda node: f"{node}:1", 10.0)
    assert probing.until == 10.0 + PATIENCE_S
    probing.heard("a", [Transfer("z", 1, PROBE_LIMIT_BYTES, 9.0)])
    probing.heard("z", [Transfer("a", 1, PROBE_LIMIT_BYTES, 9.0)])
    assert "too few pairs" in str(probing.narrowed().evidence["matrix"])
