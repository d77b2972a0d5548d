"""Logs of the daemons: structured lines on standard error."""

import logging
import sys
import threading

import structlog

_KINDS_LOGGED = 100

log = structlog.get_logger()


class BadMessages:
    """Counts messages that made no sense, and logs each kind of them once. Thread-safe.

    A peer that talks nonsense must not fill the disk too.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mutex = threading.Lock()
        self._logged: set[str] = set()

    def drop(self, sender: str, error: Exception) -> None:
        """One more of them, with the reason."""
        text = f"{sender}: {error}"
        with self._mutex:
            self.count += 1
            if text in self._logged or len(self._logged) >= _KINDS_LOGGED:
                return
            self._logged.add(text)
        log.warning("message dropped", error=text)


def set_up_logs(level: str, as_json: bool) -> None:
    """One line an event: readable on a terminal, JSON where a machine collects it."""
    renderer = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
