#!/usr/bin/env -S python3 -IS
"""Exit with 0 while the server in this container is healthy; the image's HEALTHCHECK.

It asks /healthz where the ready file says that it is: HTTP on the container's own interface,
whatever TLS, tokens and hosts the server was told. There is no such file before the server is
ready, nor while it drains.
"""

import http.client
import json
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 3


def main() -> str | None:
    """Return what is wrong, None for nothing."""
    try:
        ready = json.loads(Path(os.environ["TANDEM_READY_FILE"]).read_text(encoding="utf-8"))
        netloc = urlsplit(ready["metrics_url"]).netloc
        connection = http.client.HTTPConnection(netloc, timeout=TIMEOUT_S)
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return f"not healthy: {error!r}"
    return None if status == http.client.OK else f"not healthy: /healthz answers {status}"


if __name__ == "__main__":
    sys.exit(main())
