"""One coordinator dies, or stops, or is one too many: who is obeyed, and what is still known."""

import contextlib
import json
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ckptd.agent.log_file import LogFile
from ckptd.client import ask_status
from ckptd.errors import CoordinatorUnreachable
from ckptd.journal import Entry, Isolated
from ckptd.segment import read_checked_record
from ckptd.terms import KeptTerm
from tests.kubernetes import put_kubectl

from .town import JOB, Town

pytestmark = pytest.mark.timeout(240)

SAID = Entry(1, 1, Isolated("n9", True, "it hung twice"))


class Service:
    """An address that outlives coordinators: what comes to it goes on to `target`."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.target = ""
        self._mutex = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, target: str) -> None:
        """From now on, also for those that are connected: they must connect again."""
        with self._mutex:
            self.target = target
            cut, self._open = self._open, set()
        for each in cut:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.lead_to("")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(here,), daemon=True).start()

    def _carry(self, here: socket.socket) -> None:
        with here, contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            with self._mutex:
                host, _, port = self.target.removeprefix("tcp://").partition(":")
                there = socket.create_connection((host, int(port)))
                self._open |= {here, there}
            with there:
                selector.register(here, selectors.EVENT_READ, there)
                selector.register(there, selectors.EVENT_READ, here)
                while True:
                    for key, _ in selector.select():
                        data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        if not data:
                            return
                        key.data.sendall(data)


class Served(Town):
    """A town whose agents reach the coordinator by a service address."""

    def __init__(self, nodes: int) -> None:
        super().__init__(nodes)
        self.service = Service()
        self.addresses: dict[str, str] = {}

    def close(self) -> None:
        super().close()
        self.service.close()

    def coordinator(self, name: str, *flags: str) -> str:
        """Start one at an address of its own, to which the service leads; returns the address."""
        self.spawn(name, self.coordinator_command(name, *flags))
        self.announced(name)
        self.lead_to(name)
        return self.addresses[name]

    def coordinator_command(self, name: str, *flags: str) -> list[str]:
        return [
            *(sys.executable, "-m", "ckptd.cli", "coordinator", "--listen", "tcp://127.0.0.1:*"),
            *("--announce", str(self.directory / f"{name}.address")),
            *(*self._coordinator_flags, *flags),
        ]

    def announced(self, name: str) -> None:
        """Wait until it says where it listens."""
        announce = self.directory / f"{name}.address"
        self.addresses[name] = self._announced(name, announce)

    def lead_to(self, name: str) -> None:
        self.service.lead_to(self.addresses[name])

    def open(self) -> "Served":
        self.endpoint = self.service.address
        for node in self.nodes:
            self.start_agent(node)
        self.wait_for_nodes(len(self.nodes))
        return self

    def status(self) -> dict[str, Any]:
        """As always; nothing while the service leads to nobody who answers."""
        with contextlib.suppress(CoordinatorUnreachable):
            return super().status()
        return {"nodes": [], "jobs": []}

    def asked(self, name: str) -> dict[str, Any]:
        """What a coordinator says of itself."""
        found: dict[str, Any] = ask_status(self.addresses[name], self.key, 10.0)["coordinator"]
        return found

    def refusal(self, name: str) -> str:
        """Wait for the end of a coordinator; returns its last words."""
        process = self.processes[name]
        self.wait(f"{name} to end", lambda: process.poll() is not None)
        assert process.returncode == 1
        return self.log(name).splitlines()[-1]


def term_of(here: Town, node: str) -> KeptTerm:
    return read_checked_record(here.memory_of(node) / ".term", KeptTerm)


def log_of(here: Town, node: str) -> tuple[Entry, ...]:
    problems: list[str] = []
    entries = LogFile(here.memory_of(node) / ".log").read(problems)
    assert not problems
    return entries


def said_before(here: Town, node: str) -> None:
    """The node kept this when its agent ran last."""
    here.memory_of(node).mkdir(parents=True, mode=0o700)
    LogFile(here.memory_of(node) / ".log").append([SAID])


@pytest.fixture
def served() -> Iterator[Any]:
    opened: list[Served] = []

    def make(nodes: int) -> Served:
        opened.append(Served(nodes))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_a_killed_coordinator_comes_back_with_the_next_term_and_all_entries(town):
    here = town(0)
    here.nodes = ["n0", "n1"]
    said_before(here, "n0")
    for node in here.nodes:
        here.start_agent(node)
    here.wait_for_nodes(2)
    here.wait("n1 to keep it, too", lambda: log_of(here, "n1") == (SAID,))
    first = here.status()["coordinator"]
    assert (first["term"], first["log_entries"]) == (2, 1)

    here.kill("coordinator")
    here.destroy_node("n0")
    here.start_coordinator()
    here.wait_for_nodes(1)
    second = here.wait(
        "the entries", lambda: (c := here.status()["coordinator"])["log_entries"] and c
    )
    assert (second["term"], second["log_entries"]) == (3, 1)
    assert second["id"] != first["id"]
    assert term_of(here, "n1").term.number == 3


def test_when_everything_was_dead_the_memory_still_knows(town):
    here = town(0)
    here.nodes = ["n0"]
    said_before(here, "n0")
    here.start_agent("n0")
    here.wait_for_nodes(1)
    assert here.status()["coordinator"]["term"] == 2
    here.kill("agent-n0")
    here.kill("coordinator")
    here.start_coordinator()
    assert here.status()["coordinator"]["term"] == 0
    here.start_agent("n0")
    here.wait_for_nodes(1)
    now = here.wait("the entries", lambda: (c := here.status()["coordinator"])["log_entries"] and c)
    assert (now["term"], now["log_entries"]) == (3, 1)
    assert log_of(here, "n0") == (SAID,)


def test_a_stopped_coordinator_that_goes_on_after_a_take_over_ends(served):
    here = served(2)
    here.coordinator("first")
    here.open()
    names = here.train()
    here.wait_for_start(names)
    here.wait_for_snapshot("protected", after=2)
    here.kill("first", signal.SIGSTOP)

    address = here.coordinator("second", "--take-over")
    here.wait_for_nodes(2)
    assert here.asked("second")["term"] == 2
    step = here.wait_for_snapshot("protected")
    here.wait_for_snapshot("protected", after=step + 2)

    here.kill("first", signal.SIGCONT)
    here.lead_to("first")
    said = here.refusal("first")
    assert f"superseded: the coordinator at {address} has begun term 2" in said
    for node in here.nodes:
        kept = term_of(here, node).term
        assert (kept.number, kept.address) == (2, address)

    here.lead_to("second")
    here.wait_for_nodes(2)
    step = here.wait_for_snapshot("protected")
    here.wait_for_snapshot("protected", after=step + 2)
    assert here.job(JOB)["life"] == 1
    assert here.asked("second")["term"] == 2
    here.kill_trainers(names)
    assert here.check_equal([names]) > step


def test_a_second_coordinator_refuses_while_the_first_is_alive(served):
    here = served(2)
    first = here.coordinator("first", "--lease", "60")
    here.open()
    here.coordinator("second")
    said = here.refusal("second")
    assert "another coordinator is alive" in said
    assert first in said
    assert "--take-over" in said
    here.lead_to("first")
    here.wait_for_nodes(2)
    assert here.asked("first")["term"] == 1
    assert {term_of(here, node).term.address for node in here.nodes} == {first}


def test_who_holds_the_lease_file_needs_no_take_over(served):
    here = served(1)
    lease = here.directory / "lease"
    flags = "--lease", "60", "--lease-file", str(lease)
    first = here.coordinator("first", *flags)
    here.open()
    assert here.asked("first")["term"] == 1
    here.spawn(
        "second",
        [sys.executable, "-m", "ckptd.cli", "coordinator", "--listen", "tcp://127.0.0.1:*", *flags],
    )
    assert f"process {here.processes['first'].pid}" in here.refusal("second")
    assert here.asked("first")["address"] == first

    here.kill("first")
    here.coordinator("third", *flags)
    here.wait_for_nodes(1)
    assert here.asked("third")["term"] == 2
    assert json.loads(lease.read_text())["term"] == 2


def test_a_second_coordinator_waits_for_the_kubernetes_lease(served, tmp_path, monkeypatch):
    put_kubectl(tmp_path, monkeypatch)
    here = served(1)
    flags = "--lease", "60", "--kubernetes-lease", "training/ckptd"
    first = here.coordinator("first", *flags)
    here.open()
    here.spawn("second", here.coordinator_command("second", *flags))
    here.wait("the second to wait", lambda: "waiting until the lease" in here.log("second"))
    here.spawn("third", here.coordinator_command("third", *flags))
    here.wait("the third to wait", lambda: "waiting until the lease" in here.log("third"))
    here.processes["third"].terminate()
    assert here.processes["third"].wait(30) == 0
    assert here.asked("first")["address"] == first
    here.kill("first")
    here.announced("second")
    here.lead_to("second")
    here.wait_for_nodes(1)
    assert here.asked("second")["term"] == 2
