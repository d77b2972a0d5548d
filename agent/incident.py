"""Incident folders: what was seen when a job hung or was slow, for a person to read later.

One folder an incident, of plain text and JSON, bounded in size; the oldest go when there are too
many. It is written under another name and renamed when it is whole.
"""

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from ckptd.agent.witness import Comparison, Sample, compare, host_health
from ckptd.collectives import Collective, GroupInfo

FOLDER_LIMIT_BYTES = 16 << 20
FOLDERS = 20
RECORDS_PER_RANK = 200
_REASON_LIMIT = 4000
_UNFINISHED = ".unfinished"


class RankEvidence(msgspec.Struct):
    """What is known of one rank."""

    rank: int
    samples: Sequence[Sample] = ()
    """At most two, the earlier one first."""
    records: Sequence[Collective] = ()
    """Its last ones, in order."""
    problems: Sequence[str] = ()
    """What is not seen of it."""


def write(
    directory: Path,
    job: str,
    node: str,
    reason: str,
    evidence: Sequence[RankEvidence],
    groups: Sequence[GroupInfo] = (),
    more: Mapping[str, Any] | None = None,
    now: float | None = None,
) -> Path:
    """Write a folder under `directory`; returns it. Raises OSError when it cannot be written.

    `more` is put into incident.json as it is, as far as it is plain.
    """
    now = time.time() if now is None else now
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}"
    final = directory / f"{stamp}-{_plain(job)}-{_plain(node)}"
    folder = final.with_name(final.name + _UNFINISHED)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    budget = _Budget(folder, FOLDER_LIMIT_BYTES)
    compared = {each.rank: _compared(each) for each in evidence}
    budget.json(
        "incident.json",
        {
            "job": job,
            "node": node,
            "at": now,
            "reason": reason[:_REASON_LIMIT],
            "ranks": [_summary(each, compared[each.rank]) for each in evidence],
            "groups": list(groups),
            **(more or {}),
        },
    )
    budget.json("host.json", host_health())
    for each in evidence:
        _write_rank(budget, each)
    if budget.left_out:
        budget.text("LEFT_OUT", "\n".join(budget.left_out), always=True)
    folder.rename(final)
    prune(directory)
    return final


def prune(directory: Path, keep: int = FOLDERS) -> None:
    """Remove the oldest folders beyond `keep`, and what was never finished."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    whole = [path for path in folders if not path.name.endswith(_UNFINISHED)]
    for path in [p for p in folders if p not in whole] + whole[: max(0, len(whole) - keep)]:
        shutil.rmtree(path, ignore_errors=True)


class _Budget:
    """Writes files until the folder is full; says what it left out."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._left_bytes = folder, limit_bytes
        self.left_out: list[str] = []

    def text(self, name: str, content: str, always: bool = False) -> None:
        raw = content.encode(errors="replace")
        if len(raw) > self._left_bytes and not always:
            self.left_out.append(f"{name}: {len(raw)} bytes")
            return
        self._left_bytes -= len(raw)
        (self._folder / name).write_bytes(raw)

    def json(self, name: str, content: Any) -> None:
        raw = msgspec.json.encode(content, enc_hook=str)
        self.text(name, msgspec.json.format(raw, indent=1).decode())


def _write_rank(budget: _Budget, evidence: RankEvidence) -> None:
    for number, each in enumerate(evidence.samples[:2], 1):
        if each.stacks:
            budget.text(f"rank{evidence.rank}.stacks{number}.txt", each.stacks)
        plain = asdict(each)
        plain.pop("stacks")
        budget.json(f"rank{evidence.rank}.sample{number}.json", plain)
    records = [_named(each) for each in list(evidence.records)[-RECORDS_PER_RANK:]]
    budget.json(f"rank{evidence.rank}.records.json", records)


def _compared(evidence: RankEvidence) -> Comparison | None:
    samples = evidence.samples
    return compare(samples[0], samples[1]) if len(samples) > 1 else None


def _summary(evidence: RankEvidence, compared: Comparison | None) -> dict[str, Any]:
    last = evidence.records[-1] if evidence.records else None
    return {
        "rank": evidence.rank,
        "witness": asdict(compared) if compared is not None else None,
        "last": _named(last) if last is not None else None,
        "problems": list(evidence.problems),
    }


def _named(record: Collective) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:60].lstrip(".") or "_"
