"""Runs a module as `python -m` does, in a process whose wall clock can be set.

    python set_clock.py AHEAD_S MODULE ARGUMENT ...

Its clock is AHEAD_S ahead of the machine's, and SIGUSR1 sets it back by an hour.
"""

import runpy
import signal
import sys
import time

BACK_S = 3600.0

_time, _time_ns = time.time, time.time_ns
_ahead_s = float(sys.argv[1])


def set_back(number: int, frame: object) -> None:
    global _ahead_s
    _ahead_s -= BACK_S


time.time = lambda: _time() + _ahead_s
time.time_ns = lambda: _time_ns() + int(_ahead_s * 1e9)
signal.signal(signal.SIGUSR1, set_back)
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
