"""Starts jobs, watches them as an agent does, and ends them whatever happens."""

import tempfile
from pathlib import Path

import pytest

from .watched import WatchedJob


@pytest.fixture
def job():
    started: list[WatchedJob] = []
    # pytest's own directories are too long for the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="ckptd-") as directory:

        def start(mode: str, ranks: int = 2, **kwargs) -> WatchedJob:
            path = Path(directory, str(len(started)))
            started.append(WatchedJob(mode, ranks, path, **kwargs))
            return started[-1]

        yield start
        for each in started:
            each.end()
