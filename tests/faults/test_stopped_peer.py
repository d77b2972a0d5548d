"""A peer that is stopped (SIGSTOP) in mid-transfer: its sockets stay open, and nothing comes."""

import signal
from collections.abc import Callable

import pytest

from .fleet import CELL_BYTES, Fleet


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_rest_comes_from_others(fleet: Callable[..., Fleet]) -> None:
    here = fleet(4, size_bytes=1500 * CELL_BYTES)
    here.train()
    here.wait_for_start()
    here.wait_for_protected()
    newest = here.rest()
    newcomer = here.newcomer()
    here.places[0] = newcomer  # n0 is there still, and has what rank 0 needs
    here.train()

    def some_of_it() -> bool:
        return any(
            path.read_bytes()[8 * CELL_BYTES : 9 * CELL_BYTES].strip(b"\0")
            for path in here.files(newcomer, "segment-*.safetensors")
        )

    here.wait("the first cells", some_of_it)
    here.kill("agent-n0", signal.SIGSTOP)
    assert here.wait_for_start() == newest
    ready = {e["node"]: e for e in here.status()["events"] if e["kind"] == "segment_ready"}
    assert ready[newcomer]["fetched_cells"] > 0
    assert ready[newcomer]["rebuilt_cells"] > 0
    assert all(not node["sent_damaged_cells"] for node in here.status()["nodes"])
