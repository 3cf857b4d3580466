"""The image's HEALTHCHECK: exit 0 if a gateway or a worker answers on its port of this container.

Any answer below 500 will do: a Host allow-list may refuse ours, but who refuses is alive.
"""

import http.client
import os
import sys


def alive(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


ports = [int(os.environ.get(f"PENSTOCK_{name}", default)) for name, default in (("PORT", 8000), ("METRICS_PORT", 9100))]
sys.exit(not any(map(alive, ports)))
