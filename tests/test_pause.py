"""A pause, as the agent reads it: there while its block lasts, and no longer."""

import contextlib

import pytest
import torch

import ckptd
from ckptd.config import WatchConfig
from ckptd.errors import ConfigError
from ckptd.trainer.worker_server import Shown
from ckptd.watching import INTRODUCTION_SUFFIX, read_introduction


@pytest.fixture
def shown(tmp_path):
    config = WatchConfig(str(tmp_path / "agent.sock"), "job", 0, 1, True, False, 256)
    made = Shown(config)
    yield made
    made.close()


@pytest.fixture
def ckpt():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ckptd.Checkpointer(model=model, optimizer=optimizer, job="job", agent="/nowhere")


def told(shown: Shown) -> str:
    paused = read_introduction(shown.path(INTRODUCTION_SUFFIX)).paused
    return paused.what if paused else ""


def test_a_pause_is_told_and_taken_back_whatever_happens_in_it(ckpt, shown):
    ckpt._shown = shown
    with ckpt.pause("evaluation"):
        assert told(shown) == "evaluation"
        seen = []
        with contextlib.suppress(ZeroDivisionError), ckpt.pause("export " * 1000):
            seen.append(told(shown))
            raise ZeroDivisionError
        assert seen[0].startswith("export")
        assert told(shown) == "evaluation"
        shown.add_problem("another word about this process")
        assert told(shown) == "evaluation"
    assert told(shown) == ""


def test_one_that_lasted_too_long_is_said_in_the_trainers_log_too(ckpt, shown, caplog):
    ckpt._shown = shown
    with ckpt.pause("evaluation", at_most_s=1e-9):
        pass
    assert "pass a larger at_most_s" in caplog.text


def test_without_an_agent_it_does_nothing_and_nonsense_is_refused_all_the_same(ckpt):
    with ckpt.pause("evaluation"):
        pass
    for what, at_most_s in (("", 1.0), ("a", 0.0), ("a", -1.0), ("a", float("inf"))):
        with pytest.raises(ConfigError, match="how many"), ckpt.pause(what, at_most_s):
            pass
