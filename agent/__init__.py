"""The agent: one daemon per node, which owns the memory in which segments live."""
