"""A stand-in for kubectl that keeps leases in a file, with the API's rule for versions."""

import os
import sys
from pathlib import Path

import pytest

_KUBECTL = """#!{python}
import fcntl, json, os, sys
arguments = [each for each in sys.argv[1:] if not each.startswith("--request-timeout")]
if os.path.exists("{folder}/away"):
    sys.exit("Unable to connect to the server: dial tcp: connection refused")
with open("{folder}/leases.json", "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    leases = json.loads(file.read() or "{{}}")
    if "get" in arguments:
        name = arguments[arguments.index("lease") + 1]
        if name in leases:
            print(json.dumps(leases[name]))
        sys.exit()
    lease = json.load(sys.stdin)
    name = lease["metadata"]["name"]
    old = leases.get(name)
    if "create" in arguments and old:
        sys.exit("Error from server (AlreadyExists): leases already exists")
    if "replace" in arguments:
        if old["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"]:
            sys.exit("Error from server (Conflict): the object has been modified")
    version = int(old["metadata"]["resourceVersion"]) + 1 if old else 1
    lease["metadata"]["resourceVersion"] = str(version)
    leases[name] = lease
    file.seek(0)
    file.truncate()
    file.write(json.dumps(leases))
    print(json.dumps(lease))
"""


def put_kubectl(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put it first on PATH. A file `away` in the folder makes the cluster unreachable."""
    kubectl = folder / "kubectl"
    kubectl.write_text(_KUBECTL.format(python=sys.executable, folder=folder))
    kubectl.chmod(0o700)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
