"""Nodes in network namespaces, around a switch that loses what some of them say, or with a rule
that refuses it, and then not."""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckptd.cli import netns
from ckptd.errors import ConfigError
from ckptd.keys import new_key

from .fleet import JOB, Fleet

LEASE_S = 1.5
COORDINATOR = 3
"""The place of its machine; before it come the nodes."""
_CLONE_NEWNET = 0x40000000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not()),
]


class Cables(netns.Network):
    """Machines, each at a port of the switch."""

    def cut(self, machine: int) -> None:
        """What goes to it and comes from it vanishes; nobody is told."""
        self._port(machine, "nomaster")

    def mend(self, machine: int) -> None:
        self._port(machine, "master", "br0")

    def refuse(self, machine: int, to: int, verb: str = "add") -> None:
        """What a machine sends to that one is refused by a rule, as by a firewall that rejects;
        whoever sends is told. All others it reaches."""
        where, host = self.nodes[machine], self.host(to)
        command = ["ip", "-n", where, "rule", verb, "to", host, "prohibit", "priority", "10"]
        subprocess.run(command, check=True)

    def _port(self, machine: int, *change: str) -> None:
        command = ["ip", "-n", self._switch, "link", "set", f"p{machine}", *change]
        subprocess.run(command, check=True)


class Apart(Fleet):
    """Three nodes and a coordinator, each on a machine of its own. Trainers reach their agents by
    Unix sockets, as always."""

    def __init__(self, key_file: Path) -> None:
        key_file.write_bytes(new_key())
        key_file.chmod(0o600)
        super().__init__(COORDINATOR, lease_s=LEASE_S, key_file=key_file)
        try:
            self.cables = Cables(COORDINATOR + 1, None)
        except ConfigError as error:  # root in a container, for one
            self.close()
            pytest.skip(str(error))
        # Threads have a network namespace each: this one asks where the coordinator can be asked.
        self._asker = ThreadPoolExecutor(1, initializer=self._enter_coordinators)

    def open(self) -> "Apart":
        self.start_coordinator(listen=f"tcp://{self.cables.host(COORDINATOR)}:*")
        for number, node in enumerate(self.places):
            self.start_agent(node, address=self.cables.host(number))
        self.wait_for_nodes(len(self.places))
        self.get_going()
        return self

    def close(self) -> None:
        super().close()
        if hasattr(self, "cables"):
            self._asker.shutdown()
            self.cables.close()

    def spawn(
        self, name: str, command: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        role, _, node = name.partition("-")
        if role in ("agent", "coordinator"):
            machine = self.places.index(node) if node else COORDINATOR
            command = [*self.cables.inside(machine), *command]
        return super().spawn(name, command, environ)

    def status(self) -> dict[str, Any]:
        return self._asker.submit(super().status).result()

    def _enter_coordinators(self) -> None:
        fd = os.open(f"/run/netns/{self.cables.nodes[COORDINATOR]}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)

    def state(self, node: str) -> str:
        found = next(each for each in self.status()["nodes"] if each["node"] == node)
        return str(found["state"])

    def trained_steps(self) -> int:
        step: int = self.job(JOB)["step"]
        return step


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    fleet = Apart(tmp_path_factory.mktemp("cluster") / "key")
    try:
        yield fleet.open()
    finally:
        fleet.close()


def test_a_node_and_then_the_coordinator_are_cut_off_and_come_back(here: Apart) -> None:
    """For longer than the lease. Nobody stops training, and nobody begins anew."""
    before = here.wait_for_protected(here.protected())
    here.cables.cut(2)
    here.wait("n2 to be lost", lambda: here.state("n2") == "lost")
    cut_off = here.protected()
    assert cut_off is not None
    step = here.trained_steps()
    here.wait("training to go on", lambda: here.trained_steps() > step + 20)
    assert here.protected() == cut_off, "protected without the node that is cut off"
    here.cables.mend(2)
    back = here.wait_for_protected(cut_off)
    here.wait("n2 to be live", lambda: here.state("n2") == "live")

    coordinator = here.status()["coordinator"]["id"]
    step = here.trained_steps()
    here.cables.cut(COORDINATOR)
    here.wait("all to be lost", lambda: {here.state(node) for node in here.places} == {"lost"})
    here.cables.mend(COORDINATOR)
    here.wait_for_nodes(3)
    again = here.wait_for_protected(here.wait_for_protected(back))
    assert again.life == before.life
    assert again.step > step
    said = here.status()["coordinator"]
    assert (said["id"], said["term"]) == (coordinator, 1)
    # What is there is what the ranks had captured.
    newest = here.rest()
    assert newest >= again
    here.train()
    assert here.wait_for_start() == newest


def test_a_rule_refuses_what_a_node_sends_to_the_coordinator_and_is_taken_back(
    here: Apart,
) -> None:
    """Its peers it reaches. It is lost, for nobody can ask it anything, and comes back."""
    before = here.wait_for_protected(here.protected())
    here.cables.refuse(2, to=COORDINATOR)
    here.wait("n2 to be lost", lambda: here.state("n2") == "lost")
    step, cut_off = here.trained_steps(), here.protected()
    here.wait("training to go on", lambda: here.trained_steps() > step + 20)
    assert here.protected() == cut_off, "protected without the node that is refused"
    here.cables.refuse(2, to=COORDINATOR, verb="del")
    after = here.wait_for_protected(cut_off)
    here.wait("n2 to be live", lambda: here.state("n2") == "live")
    assert after.life == before.life


def test_a_node_that_is_cut_off_for_a_moment_in_mid_encode(here: Apart) -> None:
    """For less than the lease: nothing is lost by it, and nobody is blamed."""
    before = here.wait_for_protected(here.protected())
    here.hold.touch()
    held = here.wait_for("held")["step"]
    here.cables.cut(1)
    here.hold.unlink()
    here.wait("all to have sealed", lambda: any(e["step"] == held for e in here.said("sealed")))
    here.cables.mend(1)
    after = here.wait_for_protected(here.wait_for_protected(here.protected()))
    assert after.life == before.life
    here.wait("n1 to be live", lambda: here.state("n1") == "live")
    assert not any(node["sent_damaged_cells"] for node in here.status()["nodes"])
