"""A stage for tests, as small as one can be: the command line, health, metrics and drain of `services.stage`, and no model.

What it does besides is told by the name of its stage: `broken` says so and ends at once, `stubborn` ignores SIGTERM, `mute` is
never ready.
Run it as `python -m tests.orchestrator.fake_stage`.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType

BROKEN_STATUS = 7


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(200, self.server.page())
        elif self.path == "/v2/health/ready":
            ready = self.server.stage != "mute"
            self._answer(200 if ready else 503, json.dumps({"ready": ready}))
        else:
            self._answer(404, "{}")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, stage: str, labels: str) -> None:
        super().__init__(listener.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.stage = stage
        self._labels = labels
        self._scrapes = 0

    def page(self) -> str:
        """Every scrape finds ten requests more."""
        self._scrapes += 1
        n = 10 * self._scrapes
        return (
            f'espalier_stage_requests_total{{{self._labels},outcome="ok"}} {n}\n'
            f"espalier_stage_queue_length{{{self._labels}}} 2\n"
            f"espalier_stage_compute_duration_seconds_sum{{{self._labels}}} {n * 0.01}\n"
            f"espalier_stage_compute_duration_seconds_count{{{self._labels}}} {n}\n"
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    for option in (
        "model",
        "stage",
        "service",
        "replica",
        "node",
        "precision",
        "cpus",
        "queue-capacity",
        "drain-grace",
        "max-batch",
    ):
        parser.add_argument(f"--{option}")
    parser.add_argument("--fd", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.stage == "broken":
        print("this stage is broken", flush=True)
        return BROKEN_STATUS
    labels = f'stage="{arguments.service}",node="{arguments.node}"'
    listener = socket.socket(fileno=arguments.fd) if arguments.fd else socket.create_server((arguments.host, arguments.port))
    server = Server(listener, arguments.stage, labels)

    def stop(number: int, frame: FrameType | None) -> None:
        if arguments.stage != "stubborn":
            threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    server.serve_forever(poll_interval=0.01)
    return 0


if __name__ == "__main__":
    sys.exit(main())
