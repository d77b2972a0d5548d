"""`ckptd bench network | protect | rebuild`, with all their processes."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ckptd.cli import bench_transfer, netns

SMALL = ("--image", "256KiB", "--cell-size", "16KiB", "--repeats", "2", "--json")


def bench(*words, fails=False):
    command = [sys.executable, "-m", "ckptd.cli", "bench", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode != 0) == fails, result.stderr
    return result.stderr if fails else json.loads(result.stdout)


def namespaces():
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in names.splitlines()}


def test_network_over_loopback():
    found = bench("network", "--loopback", *SMALL)
    assert found["link"] == {"kind": "loopback", "bytes_per_s": None}
    assert [row["connections"] for row in found["rows"]] == [1, 4]
    assert all(row["cells_bytes_per_s"]["median"] > 0 for row in found["rows"])


@pytest.mark.parametrize("verb", ["protect", "rebuild"])
def test_over_loopback_there_is_no_rate_to_compare_with(verb):
    found = bench(verb, "--loopback", "--code", "2+1", *SMALL)
    assert found["seconds"]["median"] > 0
    assert "ratio" not in found


@pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not())
class TestOverShapedLinks:
    def test_a_node_sends_no_more_than_the_code_asks_for(self):
        found = bench("protect", "--rate", "100Mbit/s", "--image", "2MiB", *SMALL[2:])
        assert found["ratio"]["median"] > 0.9, "faster than the links"
        assert 0.9 < found["sent_ratio"]["median"] < 1.2

    def test_a_newcomer_receives_one_image_not_as_many_as_the_code_has_data_shards(self):
        found = bench("rebuild", "--rate", "100Mbit/s", "--image", "2MiB", *SMALL[2:])
        assert found["ratio"]["median"] > 0.9
        assert 0.9 < found["received_ratio"]["median"] < 1.2
        again = found["protected_again"]
        assert again["seconds"]["median"] > found["seconds"]["median"]
        assert 0.9 < again["received_ratio"]["median"] < 1.2, "to (1+m/k) images"

    def test_nothing_is_left_behind(self, monkeypatch):
        mark = f"{os.getpid():x}"
        monkeypatch.setattr(netns.secrets, "token_hex", lambda size: mark)
        seen = set()
        plain = bench_transfer.Node
        monkeypatch.setattr(
            bench_transfer, "Node", lambda *node: seen.update(namespaces()) or plain(*node)
        )
        result = CliRunner().invoke(bench_transfer.network, SMALL)
        assert result.exit_code == 0, result.output
        mine = {name for name in seen if mark in name}
        assert mine
        assert not mine & namespaces()


def test_a_code_that_is_none_is_named():
    assert "--code 4x2: write k+m" in bench("protect", "--code", "4x2", fails=True)
