"""Opens towns, and closes them whatever happens."""

import pytest

from .town import Town


@pytest.fixture
def town():
    opened: list[Town] = []

    def make(nodes: int, **kwargs) -> Town:
        opened.append(Town(nodes, **kwargs))
        return opened[-1].open()

    yield make
    for each in opened:
        each.close()
