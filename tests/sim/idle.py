"""What an idle coordinator needs: `python -m tests.sim.idle`.

The real process and its socket; the agents are simulated, each with a connection of its own, and
say that they are alive as often as they are told to. There is no job.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

import click
import psutil
import zmq

from ckptd.cli.local_cluster import LocalCluster, wait_until
from ckptd.wire import Beat, Decoder, Hello, Order, Welcome, WhoAreYou, encode

_orders: Decoder[Order] = Decoder(Order)


@dataclass(frozen=True)
class Figures:
    """Of the coordinator's process."""

    nodes: int
    seconds: float
    rss_mib: float
    anonymous_mib: float
    """Of that, what is not of files: RssAnon."""
    cpu_share: float
    """Of one core."""


class Agents:
    """Say Hello when they are asked, and that they are alive."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, nodes: int) -> None:
        self._sockets = [context.socket(zmq.DEALER) for _ in range(nodes)]
        self._poller = zmq.Poller()
        self.welcomed = 0
        self.beat_s = 0.5
        for number, socket in enumerate(self._sockets):
            socket.identity = f"agent-{number}".encode()
            socket.linger = 0
            socket.connect(address)
            self._poller.register(socket, zmq.POLLIN)
            self._hello(number)
        numbers = random.Random(0)
        self._due = [monotonic() + numbers.uniform(0, self.beat_s) for _ in range(nodes)]

    def live(self, for_s: float) -> None:
        """Let them do what agents do when there is no job."""
        end = monotonic() + for_s
        places = {socket: number for number, socket in enumerate(self._sockets)}
        while (now := monotonic()) < end:
            for number, due in enumerate(self._due):
                if due <= now:
                    self._sockets[number].send(encode(Beat(f"n{number}", f"i{number}", 0, ())))
                    self._due[number] = due + self.beat_s
            for socket, _ in self._poller.poll(max(1, int(1000 * (min(self._due) - monotonic())))):
                match _orders.decode(socket.recv()).message:
                    case WhoAreYou():
                        self._hello(places[socket])
                    case Welcome(beat_s=beat_s):
                        self.welcomed, self.beat_s = self.welcomed + 1, beat_s

    def _hello(self, number: int) -> None:
        name = f"n{number}"
        self._sockets[number].send(
            encode(
                Hello(
                    node=name, incarnation=f"i{number}", memory_token=name, address="127.0.0.1",
                    cells=f"127.0.0.1:{number + 1}", domain=f"rack-{number % 10}", spare=False,
                    codec="zfec", engine="isa-l 2.32", engine_reason="",
                    memory_limit_bytes=1 << 40, memory_used_bytes=0, holdings=(), ranks=(),
                    records=(), launchers=(), problems=(),
                )
            )
        )  # fmt: skip


def measure(nodes: int, seconds: float, flags: Sequence[str] = ()) -> Figures:
    """After all agents are known, look at the process for so long."""
    with LocalCluster(coordinator_flags=flags) as cluster, zmq.Context() as context:
        context.linger = 0
        context.max_sockets = nodes + 100
        agents = Agents(context, cluster.start_coordinator(), nodes)
        try:
            wait_until("all to be welcome", lambda: agents.live(0.1) or agents.welcomed >= nodes)
            pid = cluster.processes["coordinator"].pid
            before = sum(psutil.Process(pid).cpu_times()[:2])
            agents.live(seconds)
            cpu_s = sum(psutil.Process(pid).cpu_times()[:2]) - before
            found = Figures(
                nodes, seconds, _mib(pid, "VmRSS"), _mib(pid, "RssAnon"), cpu_s / seconds
            )
            live = [node for node in cluster.status()["nodes"] if node["state"] == "live"]
            assert len(live) == nodes, f"only {len(live)} of {nodes} agents are live"
            return found
        finally:
            context.destroy(linger=0)


def _mib(pid: int, what: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":")) / 1024


@click.command()
@click.option("--nodes", multiple=True, type=int, default=(1, 100, 1000), show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="How long to look.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each size.")
def main(nodes: tuple[int, ...], seconds: float, as_json: bool) -> None:
    """Print what the process of an idle coordinator needs, by the number of nodes."""
    if not as_json:
        click.echo(" nodes  RSS, MiB  of that its own, MiB  of one core, %")
    for count in nodes:
        found = measure(count, seconds)
        if as_json:
            click.echo(json.dumps(asdict(found)))
        else:
            click.echo(
                f"{found.nodes:6}  {found.rss_mib:8.1f}  {found.anonymous_mib:20.1f}  "
                f"{100 * found.cpu_share:13.1f}"
            )


if __name__ == "__main__":
    main()
