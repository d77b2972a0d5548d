"""Opens a machine, and closes it whatever happens."""

import pytest

from .machine import Machine


@pytest.fixture
def machine():
    with Machine() as opened:
        yield opened.open()
