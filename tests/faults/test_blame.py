"""Who sent damaged cells is counted by the agent that got them, and named by status."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ckptd.agent import shell
from ckptd.agent.cells import CellServer
from ckptd.agent.config import AgentConfig
from ckptd.agent.shell import Agent
from ckptd.cli.status import render
from ckptd.wire import GetCell, GetEncoded, PeerRequest

from .fleet import JOB, Fleet
from .peers import BadWire

MIB = 1 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


class AgentHere:
    """A whole agent in this process, that others reach over a bad wire."""

    def __init__(
        self,
        fleet: Fleet,
        node: str,
        kinds: tuple[type[PeerRequest], ...],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        wires: list[BadWire] = []

        class Behind(CellServer):
            def __init__(self, *args: object) -> None:
                super().__init__(*args)  # type: ignore[arg-type]
                wires.append(BadWire(self.address, kinds, 0))
                self.address = wires[0].address

        monkeypatch.setattr(shell, "CellServer", Behind)
        config = AgentConfig(
            node, fleet.endpoint, fleet.socket(node), fleet.memory_of(node), 256 * MIB
        )
        self._agent = Agent(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        fleet.wait_for_nodes(len(fleet.places))
        (self.wire,) = wires

    def _run(self) -> None:
        self._loop.run_until_complete(self._agent.run(signals=()))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._agent.stop)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._loop.close()
        self.wire.close()


Behind = Callable[..., tuple[Fleet, AgentHere]]


@pytest.fixture
def behind_a_bad_wire(
    fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Behind]:
    """A fleet of four that trains; what n1 sends of these kinds can be spoilt."""
    made: list[AgentHere] = []

    def make(*kinds: type[PeerRequest]) -> tuple[Fleet, AgentHere]:
        here = fleet(0)
        for node in ("n0", "n2", "n3"):
            here.start_agent(node)
        here.places = ["n0", "n1", "n2", "n3"]
        here.made(4)
        made.append(AgentHere(here, "n1", kinds, monkeypatch))
        here.train()
        here.wait_for_start()
        here.wait_for_protected()
        return here, made[-1]

    yield make
    for each in made:
        each.close()


def sent_damaged(fleet: Fleet) -> dict[str, dict[str, int]]:
    nodes = fleet.status()["nodes"]
    return {n["node"]: n["sent_damaged_cells"] for n in nodes if n["sent_damaged_cells"]}


def page(fleet: Fleet) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(render(fleet.status(), fleet.endpoint))
    return out.getvalue()


def test_flips_on_the_way_while_a_snapshot_is_protected(behind_a_bad_wire: Behind) -> None:
    here, agent = behind_a_bad_wire(GetCell, GetEncoded)
    assert sent_damaged(here) == {}
    assert "damaged" not in page(here)
    agent.wire.left = 3
    here.wait("three flips", lambda: len(agent.wire.hit) == 3)
    here.wait(
        "all of them to be counted",
        lambda: sum(sent_damaged(here).get("n1", {}).values()) == 3,
    )
    found = sent_damaged(here)
    assert found.keys() == {"n1"}
    assert found["n1"].keys() <= {"n0", "n2", "n3"}
    assert "n1 sent 3 damaged cells (" in page(here)
    # They were asked for again, and what is protected after them can be rebuilt without n1.
    protected = here.wait_for_protected(here.protected())
    here.stop_training()
    here.destroy_node("n2")
    here.places = ["n0", here.newcomer(), here.newcomer(), "n3"]
    here.train()
    start = here.wait_for_start()
    assert start is not None
    assert start >= protected


def test_flips_on_the_way_while_a_segment_is_fetched(behind_a_bad_wire: Behind) -> None:
    here, agent = behind_a_bad_wire(GetCell)
    newest = here.rest()
    agent.wire.left = 5
    newcomer = here.newcomer()
    here.places[1] = newcomer
    here.train()
    assert here.wait_for_start() == newest
    here.wait("all to be counted", lambda: sent_damaged(here) == {"n1": {newcomer: 5}})
    ready = [e for e in here.status()["events"] if e["kind"] == "segment_ready"]
    rebuilt = {e["node"]: e["rebuilt_cells"] for e in ready if e["life"] == 2}
    assert rebuilt[newcomer] == 5
    # A newcomer without a fault of its own is not in doubt; who sent them is.
    states = {n["node"]: n["reasons"] for n in here.status()["nodes"]}
    assert states[newcomer] == []
    assert states["n1"][0].startswith(f"n1 sent 5 damaged cells (5 to {newcomer})")


def test_what_was_retired_meanwhile_is_no_problem_of_anybody(
    fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    """Snapshots come and go all the time: nobody is blamed for what is not there any more."""
    here = fleet(4)
    here.train()
    here.wait_for_start()
    here.wait("some to be retired", lambda: len(here.job(JOB)["ended"]) > 20, 60)
    for node in here.status()["nodes"]:
        assert node["sent_damaged_cells"] == {}
        assert node["damaged_cells"] == 0
        assert node["reasons"] == []
