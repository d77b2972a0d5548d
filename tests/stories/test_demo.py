"""The demo, as `make demo` runs it, and what an impatient user leaves behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid

import psutil
import pytest

from ckptd.cli.local_cluster import wait_until


def of_this_test(mark):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("DEMO_TEST") == mark:
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_loss_and_the_final_state_are_equal_through_four_faults_and_a_straggler(tmp_path):
    picture = tmp_path / "loss.png"
    done = subprocess.run(
        [sys.executable, "-m", "ckptd.cli", "demo", "--json", "--plot", str(picture)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads(done.stdout)
    assert result["equal"] is True
    assert result["final_digest"] == result["calm_digest"]
    assert result["compared_steps"] >= 180
    killed, stopped, one_node, two_nodes = result["faults"]
    assert killed["rebuilt_cells"] == stopped["rebuilt_cells"] == 0
    assert "node n2" in stopped["named"]
    assert result["slowness"]["right"]
    assert 0 < one_node["rebuilt_cells"] < two_nodes["rebuilt_cells"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_leaves_no_process_and_no_memory_behind(tmp_path):
    mark = uuid.uuid4().hex
    with (tmp_path / "out").open("wb") as out:
        demo = subprocess.Popen(
            [sys.executable, "-m", "ckptd.cli", "demo", "--plot", ""],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={**os.environ, "DEMO_TEST": mark, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
    memory = set()

    def trainers_run():
        processes = of_this_test(mark)
        with contextlib.suppress(psutil.Error):
            marks = {p.environ().get("CKPTD_LOCAL_CLUSTER") for p in processes}
            memory.update(marks - {None})
        lines = [" ".join(p.cmdline()) for p in processes if p.is_running()]
        return any("train_lm.py" in line and "ckptd.cli" not in line for line in lines)

    with contextlib.suppress(psutil.Error):
        wait_until("the demo to train", trainers_run, 90)
    demo.send_signal(signal.SIGINT)
    demo.wait(60)
    assert demo.returncode != 0
    assert of_this_test(mark) == []
    assert memory
    for each in memory:
        assert not os.path.exists(f"/dev/shm/ckptd-{each}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
