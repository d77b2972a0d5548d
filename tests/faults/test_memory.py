"""What a node needs beside slots and parity does not grow with the image."""

import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.cli.bench_transfer import Link, Node, Town

MIB = 1 << 20
BOUND_BYTES = 256 * MIB
IMAGE_BYTES = 320 * MIB
CELL_BYTES = 4 * MIB
SHM = Path("/dev/shm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Peak(threading.Thread):
    """The most memory of its own, that is no file's, that each process has had while it looked."""

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__(daemon=True)
        self._files = {n.name: Path(f"/proc/{n._process.pid}/status") for n in nodes}
        self._end = threading.Event()
        self.own_bytes = dict.fromkeys(self._files, 0)
        self.looks = 0

    def run(self) -> None:
        while not self._end.wait(0.002):
            self.looks += 1
            for name, path in self._files.items():
                for line in path.read_text().splitlines():
                    if line.startswith("RssAnon:"):
                        found = int(line.split()[1]) * 1024
                        self.own_bytes[name] = max(found, self.own_bytes[name])

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    """2+1, and a newcomer."""
    room = shutil.disk_usage(SHM).free > 8 * IMAGE_BYTES
    root = Path(tempfile.mkdtemp(prefix="ckptd-memory-", dir=SHM if room else None))
    nodes: list[Node] = []
    try:
        for name in ("n0", "n1", "n2", "n3"):
            command = ["-m", "ckptd.agent.bench", name, str(root / name), "127.0.0.1"]
            nodes.append(Node(name, [sys.executable, *command]))
        yield Town(2, 1, IMAGE_BYTES, CELL_BYTES, Link("loopback", None), nodes)
    finally:
        for node in nodes:
            node.close()
        shutil.rmtree(root, ignore_errors=True)


def test_of_an_agent_while_it_protects_and_while_others_rebuild(town: Town) -> None:
    assert IMAGE_BYTES > BOUND_BYTES
    with Peak(town.members) as protecting:
        town.protect()
    print({name: f"{found / MIB:.0f} MiB" for name, found in protecting.own_bytes.items()})
    assert protecting.looks > 10
    assert max(protecting.own_bytes.values()) < BOUND_BYTES
    with Peak([*town.members, town.newcomer]) as rebuilding:
        town.rebuild(1)
    print({name: f"{found / MIB:.0f} MiB" for name, found in rebuilding.own_bytes.items()})
    assert rebuilding.looks > 10
    assert max(rebuilding.own_bytes.values()) < BOUND_BYTES
