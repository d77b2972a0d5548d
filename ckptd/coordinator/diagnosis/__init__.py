"""Who is slow, who hangs, and what to do about it: deciders, fed with sketches and samples.

`Detector` finds; `witness.judge` asks the suspects' processes before anything is done; `matrix`
looks at transfers between nodes; `Policy` decides about a restart. Each decision has its reason.
"""

from ckptd.coordinator.diagnosis.detector import Detector, Offset
from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Kind, Scope
from ckptd.coordinator.diagnosis.thresholds import Thresholds

__all__ = ["Culprit", "Detector", "Finding", "Kind", "Offset", "Scope", "Thresholds"]
