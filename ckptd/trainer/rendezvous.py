"""The store in which torchrun's launchers meet, as a process of its own.

torchrun hosts it in one of the launchers otherwise, which makes that node special: when it dies the
job cannot be put together again.
"""

import os
import signal
import socket
import threading
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch exports it silently

from ckptd.errors import ConfigError


def serve_rendezvous(host: str, port: int, announce: Path | None) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if the address cannot be bound."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        # Left to itself, the store listens on every interface, whatever the host.
        listener = socket.create_server((host, port), backlog=1024)
        store = TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    if announce is not None:
        new = announce.with_name(announce.name + ".new")
        new.write_text(f"{host}:{store.port}\n")
        os.replace(new, announce)
    stop.wait()
