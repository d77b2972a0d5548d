"""`ckptd run`: scripts without a Checkpointer are seen, and run as they do by themselves."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from click.testing import CliRunner

from ckptd.cli.local_cluster import wait_until
from ckptd.cli.main import main
from ckptd.trainer.launch import use, watched
from ckptd.trainer.standby import Standby

SCRIPT = """
import json, multiprocessing, os, pickle, sys
from pathlib import Path

class Thing:
    pass

def double(x):
    return 2 * x

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        doubled = pool.map(double, [21])
    print(json.dumps({
        "argv": sys.argv[1:], "file": Path(__file__).name, "name": __name__,
        "beside": sys.path[0] == str(Path(__file__).resolve().parent), "doubled": doubled,
        "pickles": type(pickle.loads(pickle.dumps(Thing()))).__name__,
        "shown": sorted(p.suffix for p in Path(os.environ["CKPTD_AGENT"] + ".trainers").glob("*")),
    }))
    sys.exit(7)
"""


@pytest.mark.parametrize("how", [["train.py"], ["--module", "train"]])
def test_a_script_runs_as_by_itself_and_is_seen(tmp_path, how):
    (tmp_path / "train.py").write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-m", "ckptd.trainer.script", *how, "--a", "b"],
        cwd=tmp_path,
        env={**os.environ, "CKPTD_AGENT": "agent"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 7, result.stderr
    told = json.loads(result.stdout)
    assert told["argv"] == ["--a", "b"]
    assert (told["file"], told["name"], told["beside"]) == ("train.py", "__main__", True)
    assert (told["doubled"], told["pickles"]) == ([42], "Thing")
    assert ".sock" in told["shown"]
    assert ".json" in told["shown"]


def test_torchruns_arguments_keep_their_places():
    assert watched(["--nproc-per-node=2", "train.py", "--lr", "1"]) == [
        "--nproc-per-node=2", "-m", "ckptd.trainer.script", "train.py", "--lr", "1",
    ]  # fmt: skip
    assert watched(["-m", "train", "--lr", "1"]) == [
        "-m", "ckptd.trainer.script", "--module", "train", "--lr", "1",
    ]  # fmt: skip
    assert watched(["--no-python", "bash", "x"]) == ["--no-python", "bash", "x"]


@pytest.mark.parametrize("arguments", [["--no-python", "bash"], ["--run-path", "train.py"]])
def test_a_standby_process_that_nobody_could_use_is_ended(tmp_path, arguments):
    told: list[str] = []
    standby = Standby((), [str(tmp_path)], told.append)
    use(standby, watched(arguments))
    assert told == [
        "ranks are started without the standby process: torchrun is to start no Python script"
    ]
    own = lambda: psutil.process_iter(["cmdline"])  # noqa: E731
    wait_until(
        "its end", lambda: not any(str(tmp_path) in (p.info["cmdline"] or ()) for p in own())
    )


def test_modules_for_a_standby_process_need_one():
    flags = ["--job", "j", "--no-standby", "--standby-import", "json", "--", "--standalone", "t.py"]
    result = CliRunner().invoke(main, ["run", *flags])
    assert result.exit_code == 1
    assert "with --no-standby there is no process" in result.output


def test_ranks_that_ckptd_run_starts_are_timed_from_the_first_collective(tmp_path):
    (tmp_path / "train.py").write_text(
        "import torch, torch.distributed as dist, time, os\nfrom pathlib import Path\n"
        "dist.init_process_group('gloo')\n"
        "for _ in range(5): dist.all_reduce(torch.ones(3))\n"
        "time.sleep(1)\n"
        "from ckptd.trainer import worker_server, timing\n"
        "shown = worker_server.start()\n"
        "from ckptd.ring import RingReader\n"
        "found = RingReader(shown.ring_path()).read()[0]\n"
        "saw = [(r.seq, r.ended) for r in found]\n"
        "started = Path('/proc/self/cmdline').read_text().split(chr(0))[3]\n"
        # Whole, as ranks share the output.
        "os.write(1, f'SAW {dist.get_rank()} {saw}\\nSTARTED {started}\\n'.encode())\n"
    )
    result = subprocess.run(
        [
            sys.executable, "-m", "ckptd.cli", "run", "--job", "seen", "--timing",
            "--no-standby", "--", "--standalone", "--nproc-per-node=2", "train.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "CKPTD_AGENT": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("STARTED ckptd.trainer.script") == 2
    for rank in range(2):
        assert f"SAW {rank} {[(n, True) for n in range(1, 6)]}" in result.stdout
