"""Clusters of data planes, closed whatever happens."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..nodes import Build, clusters


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    with clusters(tmp_path) as make:
        yield make
