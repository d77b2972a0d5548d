"""What `ckptd bench capture` and `overhead` found out."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ckptd.cli import show
from ckptd.cli.bench_numbers import Spread, paired
from ckptd.cli.bench_runner import Measured, Samples
from ckptd.errors import CkptdError
from ckptd.trainer.bench_messages import Ready

PLAIN, CKPTD, COPY = "plain", "ckptd", "copy"


@dataclass(frozen=True)
class Outcome:
    """What one method cost. Times in seconds; `ratio` and `rate_ratio` are paired by turn."""

    step_s: Spread | None = None
    ratio: Spread | None = None
    """Step time, to that of training without snapshots."""
    ratios: tuple[float, ...] = ()
    """By turn."""
    blocked_s: Spread | None = None
    """What a snapshot blocks training for; ckptd's full audits are left out."""
    copy_bytes_per_s: Spread | None = None
    rate_ratio: Spread | None = None
    """Rate of the copy, to that of the plain copy."""
    snapshots: int = 0
    """So many are in `blocked_s`."""
    captured: int = 0
    """Of the `trained` steps."""
    trained: int = 0
    error: str = ""
    """Why it does not work here."""


@dataclass(frozen=True)
class Report:
    """All that a run has found out."""

    training: Ready
    disk: str
    """What kind of file system it was; "" where none was asked for."""
    repeats: int
    steps: int
    outcomes: dict[str, Outcome]
    audit_blocked_s: Spread | None
    """What a full audit of a capture blocked training for."""
    audits: int
    sealed: int
    torn: int
    failed: int
    eager_because: str
    """Why ckptd's captures copied everything at once, if they did."""

    def as_json(self) -> dict[str, Any]:
        training = {name: getattr(self.training, name) for name in Ready.__struct_fields__}
        del training["error"]
        return {**asdict(self), "training": training}


def report_of(training: Ready, disk: str, repeats: int, steps: int, measured: Measured) -> Report:
    """Raises CkptdError if plain training or ckptd did not work."""
    samples = measured.samples
    for name in (PLAIN, CKPTD):
        if name in samples and samples[name].error:
            raise CkptdError(f"{name} did not work: {samples[name].error}")
    ckptd = samples.get(CKPTD, Samples())
    audited_s = [*measured.audited_s, *(s.blocked_s for s in ckptd.snapshots if s.audited)]
    return Report(
        training=training,
        disk=disk,
        repeats=repeats,
        steps=steps,
        outcomes={name: _outcome(each, samples) for name, each in samples.items()},
        audit_blocked_s=Spread.of(audited_s) if audited_s else None,
        audits=len(audited_s),
        sealed=ckptd.counts.sealed,
        torn=ckptd.counts.torn,
        failed=ckptd.counts.failed,
        eager_because=ckptd.counts.eager_because,
    )


def _outcome(samples: Samples, others: Mapping[str, Samples]) -> Outcome:
    if samples.error:
        return Outcome(error=samples.error)
    plain, copy = others[PLAIN].steps, others.get(COPY, Samples()).rates
    blocked_s = [each.blocked_s for each in samples.snapshots if not each.audited]
    return Outcome(
        step_s=Spread.of(list(samples.steps.values())),
        ratio=paired(samples.steps, plain),
        ratios=tuple(value / plain[turn] for turn, value in samples.steps.items()),
        blocked_s=Spread.of(blocked_s) if blocked_s else None,
        copy_bytes_per_s=Spread.of(list(samples.rates.values())) if samples.rates else None,
        rate_ratio=paired(samples.rates, copy),
        snapshots=len(blocked_s),
        captured=samples.captured,
        trained=samples.trained,
    )


def about(report: Report) -> str:
    """What was trained, and how it was measured."""
    training = report.training
    return (
        f"{training.parameters / 1e6:.1f} million parameters, {show.size(training.state_bytes)} of "
        f"state; batch {training.batch} on {training.device}, {training.threads} threads, torch "
        f"{training.torch}; {show.count(report.repeats, 'turn')} of {report.steps} steps; "
        + (f"the disk is {report.disk}; " if report.disk else "")
        + "median (quartiles)"
    )


def remarks(report: Report) -> Iterator[str]:
    """What the table does not say, line by line."""
    ckptd, copy = report.outcomes.get(CKPTD), report.outcomes.get(COPY)
    if ckptd is not None:
        yield (
            f"ckptd captured {ckptd.captured} of {ckptd.trained} steps; warm-up included it sealed "
            f"{report.sealed}, {report.torn} torn, {report.failed} failed"
        )
        if report.audit_blocked_s is not None:
            yield (
                f"its {report.audits} full audits, not counted above, blocked for "
                f"{_text(report.audit_blocked_s, 1e3)} ms"
            )
        if report.eager_because:
            yield f"it copied all before step() returned: {report.eager_because}"
        if ckptd.copy_bytes_per_s is not None:
            yield (
                "it copied, and digested, in the background at "
                f"{_text(ckptd.copy_bytes_per_s, 1e-9)} GB/s"
            )
        if ckptd.rate_ratio is not None and copy is not None and copy.copy_bytes_per_s is not None:
            yield (
                f"a plain copy ran at {_text(copy.copy_bytes_per_s, 1e-9)} GB/s; ckptd's rate to "
                f"that: {_ratio(ckptd.rate_ratio)}"
            )
    for name, outcome in report.outcomes.items():
        if outcome.error:
            yield f"{name} did not work: {outcome.error}"


def capture_table(report: Report) -> Table:
    """`blocked` is for a snapshot; `to` means: divided by that of."""
    table = _table("method", "step (ms)", "to plain", "blocked (ms)", "to ckptd")
    ckptd = report.outcomes.get(CKPTD, Outcome()).blocked_s
    for name, outcome in report.outcomes.items():
        blocked = outcome.blocked_s
        table.add_row(
            name,
            f"{1e3 * outcome.step_s.median:.0f}" if outcome.step_s else "failed",
            _ratio(outcome.ratio) if name != PLAIN else "",
            _text(blocked, 1e3) if blocked else "",
            f"{blocked.median / ckptd.median:.1f}" if blocked and ckptd and name != CKPTD else "",
        )
    return table


def overhead_table(report: Report) -> Table:
    """Only how long steps took."""
    table = _table("method", "step (ms)", "to plain")
    for name, outcome in report.outcomes.items():
        table.add_row(
            name,
            _text(outcome.step_s, 1e3) if outcome.step_s else "",
            _ratio(outcome.ratio) if name != PLAIN else "",
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ratio(spread: Spread | None) -> str:
    return _text(spread, decimals=3 if spread.median < 2 else 1) if spread else ""


def _text(spread: Spread, scale: float = 1.0, decimals: int | None = None) -> str:
    """Median and quartiles, with as many decimals as make three digits of the median."""
    values = [scale * each for each in (spread.median, spread.low, spread.high)]
    if decimals is None:
        decimals = 0 if values[0] >= 100 else 1 if values[0] >= 10 else 2
    median, low, high = (f"{value:.{decimals}f}" for value in values)
    return f"{median} ({low}–{high})"
