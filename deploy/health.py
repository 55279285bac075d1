"""Exit 0 where the server runs, or a site is connected to it; for the health check of a container.

python health.py project.yaml | party.yaml
"""

import json
import subprocess
import sys

_HEALTHY = {"RUNNING", "CONNECTED"}


def state(file: str) -> str:
    """Return what `fedllm status` says of a server or a site; empty where it says nothing.

    Args:
        file: The project's file at the coordinator, or the party's file at a site.
    """
    command = [sys.executable, "-m", "fedllm", "status", file, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    try:
        data = json.loads(done.stdout)["data"]
        server = data["server"]
        # At the coordinator `server` is an object with a state; at a site it is the server's address.
        return str(server["state"] if isinstance(server, dict) else data["state"])
    except (ValueError, KeyError, TypeError):
        return ""


if __name__ == "__main__":
    sys.exit(0 if state(sys.argv[1]) in _HEALTHY else 1)
