"""The command line as a whole: help, start-up, torchrun's arguments, benches."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ckptd.cli.main import _VERBS, main
from ckptd.cli.run import _spans_machines
from ckptd.config import erasure_engine
from ckptd.erasure import open_codec
from ckptd.trainer.launch import complete_arguments


@pytest.mark.parametrize("verb", sorted(_VERBS))
def test_every_verb_explains_itself_and_each_flag(verb):
    result = CliRunner().invoke(main, [verb, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")
    assert verb in CliRunner().invoke(main, ["--help"]).output


def test_the_command_line_and_the_library_start_without_torch():
    script = (
        "import sys, ckptd, ckptd.cli.main, ckptd.cli.status, ckptd.cli.ls, ckptd.cli.agent\n"
        "import ckptd.cli.coordinator, ckptd.cli.run, ckptd.cli.embedded, ckptd.cli.stop\n"
        "import ckptd.cli.plan\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_run_adds_what_makes_restarts_work():
    got = complete_arguments(["--nnodes=4", "train.py"], "lm", "10.0.0.1:29400", "10.0.0.11")
    assert got[-2:] == ["--nnodes=4", "train.py"]
    assert "--rdzv-id=lm" in got
    assert "--rdzv-endpoint=10.0.0.1:29400" in got
    assert "--rdzv-backend=c10d" in got
    assert "--local-addr=10.0.0.11" in got
    assert any(argument.startswith("--rdzv-conf=is_host=0") for argument in got)
    assert any(argument.startswith("--max-restarts=") for argument in got)


def test_what_the_user_gives_to_torchrun_wins():
    given = [
        "--max_restarts=3",
        "--rdzv_id",
        "x",
        "--rdzv-endpoint=h:1",
        "--local-addr",
        "y",
        "t.py",
    ]
    assert complete_arguments(given, "lm", "h:2", "z") == given


def test_a_standalone_job_keeps_its_own_rendezvous():
    got = complete_arguments(["--standalone", "--nproc-per-node=2", "train.py"], "lm", "h:2", "z")
    assert not [argument for argument in got if "rdzv" in argument]


def test_the_scripts_own_flags_are_not_taken_for_torchruns():
    got = complete_arguments(["train.py", "--max-restarts=7"], "lm", None, None)
    assert [argument for argument in got[: got.index("train.py")] if "max-restarts" in argument]


@pytest.mark.parametrize(
    "flags",
    [
        ["--spare", "--", "train.py"],
        ["--rendezvous", "h:1", "--", "train.py"],
        ["--", "--nnodes=2", "train.py"],
        ["--", "--nproc-per-node", "2", "--nnodes", "1:4", "train.py"],
    ],
)
def test_without_an_agent_run_is_for_one_machine(flags):
    result = CliRunner(env={"CKPTD_AGENT": None}).invoke(main, ["run", "--job", "lm", *flags])
    assert result.exit_code == 1
    assert "only a job on one machine does without" in result.stderr


def test_an_agent_with_an_unknown_erasure_engine_does_not_start(tmp_path):
    flags = ["--coordinator", "tcp://127.0.0.1:9", "--memory-limit", "1MiB"]
    paths = ["--socket", str(tmp_path / "agent.sock"), "--memory-dir", str(tmp_path / "memory")]
    result = subprocess.run(
        [sys.executable, "-m", "ckptd.cli", "agent", *flags, *paths],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "CKPTD_ERASURE_ENGINE": "fastest"},
    )  # fmt: skip
    assert result.returncode == 1
    assert "CKPTD_ERASURE_ENGINE is 'fastest'; it must be one of auto, isa-l, zfec" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rollback", "lm", "--to", "2.x"], "--to 2.x: write a step, as 180, or LIFE.STEP"),
        (["rollback", "lm", "--to", "180", "--clear"], "--to or --clear, not both"),
        (["drain", "n1", "--undo", "--wait"], "--undo or --wait, not both"),
        (["isolate", "n1"], "--reason"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anybody_is_asked(arguments, says):
    result = CliRunner().invoke(main, [*arguments, "--coordinator", "tcp://127.0.0.1:9"])
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    "given", [["--nnodes=1", "t.py"], ["--nnodes", "1:1", "t.py"], ["t.py", "--nnodes=2"], ["t.py"]]
)
def test_a_job_on_one_machine_is_known_as_such(given):
    assert not _spans_machines(given)


def test_bench_erasure_measures_side_by_side():
    flags = [
        "bench",
        "erasure",
        "--code",
        "2+1",
        "--cell-size",
        "64KiB",
        "--repeats",
        "3",
        "--json",
    ]
    result = CliRunner().invoke(main, flags)
    measured = json.loads(result.output)["2+1"]
    assert measured["engine"] == open_codec(2, 1, erasure_engine()).engine
    doings = {f"{doing} {who}" for doing in ("encode", "decode") for who in ("ckptd", "raw zfec")}
    if measured["raw_isal"].startswith("isa-l "):
        doings |= {"encode raw isa-l", "decode raw isa-l"}
    rates, ratios = measured["rates"], measured["ratios"]
    assert set(rates) == {*doings, "copy"}
    assert set(ratios) == {
        f"{doing.partition(' ')[0]} ckptd / {doing.partition(' ')[2]}"
        for doing in doings
        if "raw" in doing
    }
    for spread in (*rates.values(), *ratios.values()):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    table = CliRunner().invoke(main, flags[:-1]).output
    assert f"ckptd computes with {measured['engine']}." in table
    assert "decode, m lost" in table
    assert CliRunner().invoke(main, ["bench", "erasure", "--code", "4x2"]).exit_code == 2
