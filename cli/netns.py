"""A network of its own for measurements: nodes in network namespaces, links of a known rate."""

import os
import secrets
import shutil
import subprocess
from types import TracebackType

from ckptd.agent.bench import DEVICE
from ckptd.errors import ConfigError

_QUEUE_MS = 50
_BURST_S = 0.01
_BURST_MIN_BYTES = 64 << 10
_NEEDS = ("ip", "tc")


def why_not() -> str:
    """Why no such network can be made here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in _NEEDS if shutil.which(tool) is None]
    return f"{' and '.join(missing)} of iproute2 not found" if missing else ""


class Network:
    """Namespaces around one switch; each way of each link carries `bits_per_s`, or all it can."""

    def __init__(self, nodes: int, bits_per_s: float | None) -> None:
        """Raises ConfigError if the kernel does not allow it; nothing is left then."""
        self._prefix = f"ckptd-{secrets.token_hex(3)}"
        self._made: list[str] = []
        self._bits_per_s = bits_per_s
        try:
            self._switch = self._namespace("sw")
            _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "br0", "up")
            self.nodes = [self._node(number) for number in range(nodes)]
        except BaseException:
            self.close()
            raise

    def host(self, number: int) -> str:
        """The address of a node."""
        return f"10.77.{number // 250}.{number % 250 + 1}"

    def inside(self, number: int) -> list[str]:
        """What to put before a command so that it runs on a node."""
        return ["ip", "netns", "exec", self.nodes[number]]

    def limit(self, number: int, bits_per_s: float | None) -> None:
        """From now on the link of a node carries so much each way; None: nothing at all."""
        for where, device in ((self.nodes[number], DEVICE), (self._switch, f"p{number}")):
            if bits_per_s is None:
                # No packet fits the bucket, so all are dropped, and nobody is told.
                _run(
                    *("tc", "-n", where, "qdisc", "replace", "dev", device, "root", "tbf"),
                    *("rate", "8bit", "burst", "10", "latency", "1ms"),
                )
            else:
                self._shape(where, device, bits_per_s)

    def close(self) -> None:
        """Give the namespaces back; whatever runs in them must have ended."""
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        self._made.clear()

    def __enter__(self) -> "Network":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _namespace(self, suffix: str) -> str:
        name = f"{self._prefix}-{suffix}"
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _node(self, number: int) -> str:
        name, port = self._namespace(str(number)), f"p{number}"
        _run(
            *("ip", "-n", name, "link", "add", DEVICE, "type", "veth"),
            *("peer", "name", port, "netns", self._switch),
        )
        _run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", name, "addr", "add", f"{self.host(number)}/16", "dev", DEVICE)
        _run("ip", "-n", name, "link", "set", DEVICE, "up")
        if self._bits_per_s is not None:
            for where, device in ((name, DEVICE), (self._switch, port)):
                self._shape(where, device, self._bits_per_s)
        return name

    def _shape(self, where: str, device: str, bits_per_s: float) -> None:
        burst = max(_BURST_MIN_BYTES, int(bits_per_s / 8 * _BURST_S))
        _run(
            *("tc", "-n", where, "qdisc", "replace", "dev", device, "root", "tbf"),
            *("rate", f"{bits_per_s:.0f}bit", "burst", str(burst), "latency", f"{_QUEUE_MS}ms"),
        )


def _run(*command: str) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(
            f"`{' '.join(command)}` failed: {result.stderr.strip()}; measure without links of a "
            "known rate instead: --loopback"
        )
