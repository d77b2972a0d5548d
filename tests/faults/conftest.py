"""Clusters of data planes and fleets of agents, closed whatever happens."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..nodes import Build, clusters
from .fleet import Fleet


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    with clusters(tmp_path) as make:
        yield make


@pytest.fixture
def fleet() -> Iterator[Callable[..., Fleet]]:
    opened: list[Fleet] = []

    def make(nodes: int, **settings: Any) -> Fleet:
        opened.append(Fleet(nodes, **settings))
        return opened[-1].open()

    yield make
    for each in opened:
        each.close()
