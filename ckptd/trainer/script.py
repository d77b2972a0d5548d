"""`python -m ckptd.trainer.script SCRIPT ARGUMENTS`: runs a training script as if by itself.

`ckptd run` starts scripts this way, so that the agent sees the collectives of one without a
Checkpointer, too, and from the first one on. The script is `__main__`, as under coverage or pdb;
what fails here is logged, and the script runs all the same.
"""

import logging
import os
import runpy
import sys
from types import ModuleType

from ckptd.config import watch_config

log = logging.getLogger("ckptd")


def main(arguments: list[str]) -> None:
    """Show this process to its agent, then become the script."""
    _show()
    if arguments[0] == "--module":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    path = arguments[0]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = ModuleType("__main__")
    module.__file__ = path
    module.__dict__["__builtins__"] = __builtins__
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _show() -> None:
    config = watch_config()
    if not config.watch:
        return
    try:
        from ckptd.trainer import timing, worker_server

        shown = worker_server.start(config)
        if shown is not None and config.timing:
            timing.start(shown)
    except Exception as error:
        log.warning("ckptd: this trainer is not watched: %s", error)


if __name__ == "__main__":
    main(sys.argv[1:])
