"""A gateway for tests: long-polls the routes, writes down the versions it has applied, says that it is ready, serves nothing.

Run it as `python -m tests.orchestrator.fake_gateway`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import FrameType

from tests.orchestrator.fake_stage import Server


def follow(url: str, name: str, file: Path) -> None:
    after = 0
    while True:
        try:
            with urllib.request.urlopen(f"{url}?after={after}&wait=5&gateway={name}", timeout=10) as answer:
                body = answer.read()
            after = json.loads(body)["version"]
            file.write_bytes(body)
        except (OSError, ValueError):
            time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser()
    for option in ("routes-url", "routes-file", "name", "node", "host"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--fd", type=int)
    arguments = parser.parse_args()
    server = Server(socket.socket(fileno=arguments.fd), "gateway", 'pipeline="embed"')
    threading.Thread(
        target=follow, args=(arguments.routes_url, arguments.name, Path(arguments.routes_file)), daemon=True
    ).start()

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.01)
    return 0


if __name__ == "__main__":
    sys.exit(main())
