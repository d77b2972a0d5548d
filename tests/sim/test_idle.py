"""The budget of a coordinator that has nothing to do."""

from .idle import measure


def test_it_needs_less_than_100_mib_at_100_nodes() -> None:
    found = measure(nodes=100, seconds=2.0)
    print(found)
    assert found.rss_mib < 100
