"""When something counts as unusual: the one place with numbers in it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Slowness is relative to the job's own history; only hangs know seconds, as a floor."""

    hang_floor_s: float = 0.7
    """Seconds of silence that are never suspicious, however short the steps."""
    hang_gaps: float = 2.0
    """A rank is suspicious after this many times the longest silence that is usual in the job."""
    startup_hang_s: float = 600.0
    """The time-out until the job's usual silences are known: start, compilation, re-planning."""
    idle_s: float = 1800.0
    """All ranks stopped and none waits for another: after this it is worth a word."""
    stale_s: float = 5.0
    """A node of which nothing was heard for so long is unknown, and proves nothing; never less
    than twice the usual silence of nodes."""
    gap_windows: int = 64
    """Windows over which a silence is remembered as usual."""
    gap_quantile: float = 0.9
    """Silences longer than this share of windows had are not usual."""

    window_min_s: float = 2.0
    """Shortest time over which ranks are compared."""
    window_max_s: float = 600.0
    """Longest time that a comparison waits for enough operations."""
    window_ops: int = 8
    """Operations of every group that is compared, in one window."""
    rows_min: int = 3
    """Sampled operations of a group, known from all its ranks, below which it says nothing."""
    warmup_windows: int = 2
    """First windows, and those after a re-plan, that are thrown away."""
    learning_windows: int = 6
    """Windows of which the medians are the first baseline."""
    history_windows: int = 48
    """Windows that tell how much ranks differ when all is well."""

    slow_fraction: float = 0.05
    """A rank that costs its peers less than this share of their time is not worth a finding."""
    slow_deviations: float = 6.0
    """And it must stand out by so many robust standard deviations of healthy windows."""
    slow_windows: int = 5
    """Last windows whose median counts, for a finding and for its end: a single delay may fall
    into two of them."""
    slow_long_windows: int = 12
    """A weaker deviation counts when it is there in the median of so many."""
    slow_over: float = 0.5
    """A slow finding is over below this share of what would begin it."""

    slow_next: float = 0.5
    """Of the slowest rank's deviation: those below this share of it are not named beside it."""

    transfer_share: float = 0.005
    """Slower communication that costs less than this share of time is not worth a finding."""
    transfer_ratio: float = 1.4
    """Communication is slow when even the shortest durations are so many times the baseline."""
    pace_ratio: float = 1.25
    """All ranks are slow together when the job takes so many times as long as it did."""
    node_share: float = 0.5
    """When at least this share of a node's ranks (and two) is to blame, the node is."""
    coverage: float = 0.9
    """Share of its groups that must be bad for a node or link to be to blame."""
    baseline_drift: float = 0.02
    """How far a baseline follows each healthy window."""
