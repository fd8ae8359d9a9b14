"""Exposition endpoints whose pages a test writes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from orchestrator.core import Replica
from services.dataplane.routes import ReplicaState


class Page(ThreadingHTTPServer):
    """One endpoint; a `text` of None answers 500, and while `held` is set nothing is answered."""

    daemon_threads = True

    def __init__(self, text: str | None = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.text = text
        self.content_type = "text/plain; version=0.0.4"
        self.asked: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.go_on.wait(10)
        body = (self.server.text or "").encode()
        self.send_response(200 if self.server.text is not None else 500)
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(count: int) -> Iterator[list[Page]]:
    """Several endpoints with empty pages."""
    found = [Page() for _ in range(count)]
    for page in found:
        threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield found
    finally:
        for page in found:
            page.go_on.set()
            page.shutdown()
            page.server_close()


class Clock:
    """Shows what the test sets."""

    t = 100.0

    def __call__(self) -> float:
        return self.t


def stage_page(requests: int, queue: int, compute_s: float) -> str:
    labels = 'stage="pool",node="a"'
    return (
        f'espalier_stage_requests_total{{{labels},outcome="ok"}} {requests}\n'
        f"espalier_stage_queue_length{{{labels}}} {queue}\n"
        f"espalier_stage_compute_duration_seconds_sum{{{labels}}} {compute_s}\n"
        f"espalier_stage_compute_duration_seconds_count{{{labels}}} {requests}\n"
    )


def timed_page(times_s: list[float], batches: int) -> str:
    """All compute times so far, and the batches they were computed in."""
    labels = 'stage="pool",node="a"'
    return stage_page(len(times_s), 0, sum(times_s)) + (
        f"espalier_stage_compute_seconds_squared_total{{{labels}}} {sum(s * s for s in times_s)}\n"
        f"espalier_stage_batch_size_count{{{labels}}} {batches}\n"
    )


def gateway_page(on_time: int, late: int) -> str:
    return (
        f'espalier_requests_total{{pipeline="embed",outcome="on_time"}} {on_time}\n'
        f'espalier_requests_total{{pipeline="embed",outcome="late"}} {late}\n'
    )


def replica(id: str, url: str, state: ReplicaState = "ready") -> Replica:
    return Replica(id, "pool", "a", state, 0.1, 1, url=url)
