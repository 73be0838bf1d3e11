"""Whether the server in this container is in one of the states named on the command line.

    python -m japanese_stable_diffusion.probe READY BUSY

/health-check answers 200 in every state, so a probe that only looks at the HTTP status would take a container
that failed to start for one that works. Exit code: 0 if it is, 1 if it is in another state or doesn't answer.
"""

import json
import os
import sys
import urllib.request

SECONDS = 5
"""How long an answer may take."""


def status() -> str:
    """The state that the server on the port `PORT` (default 5000) of this machine tells.

    Raises:
        OSError: it doesn't answer.
    """
    address = f"http://127.0.0.1:{os.environ.get('PORT', '5000')}/health-check"
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        return str(json.load(answer)["status"])


if __name__ == "__main__":
    try:
        told = status()
    except OSError as error:
        sys.exit(f"/health-check: no answer ({error})")
    if told not in sys.argv[1:]:
        sys.exit(f"/health-check: {told}")
