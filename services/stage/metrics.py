"""What a stage counts, in the Prometheus text format. Label `stage` is the service's name."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from services import exposition

SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
)
LABELS = ("stage", "node")
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class StageMetrics:
    """The stage's counters, bound to its labels once so that counting costs about a microsecond."""

    def __init__(self, service: str, node: str) -> None:
        self._registry = exposition.registry()
        self._labels = (service, node)
        self.queue = self._histogram("queue_duration_seconds", "Time a task waited for its batch.", SECONDS)
        self.compute = self._histogram("compute_duration_seconds", "Service time of the batch a task was computed in.", SECONDS)
        self._squares = Counter(
            "espalier_stage_compute_seconds_squared",
            "Squares of the compute times, summed; with sum and count of the histogram they tell the variance.",
            LABELS,
            registry=self._registry,
        ).labels(service, node)
        self.transfer = self._histogram("transfer_duration_seconds", "Time of a call to the next hop on the way.", SECONDS)
        self.batch_size = self._histogram("batch_size", "Items computed together.", ITEMS)
        self.prefill = self._histogram("prefill_duration_seconds", "Time to read a prompt and make its first token.", SECONDS)
        self.step = self._histogram("step_duration_seconds", "Time to make one more token of every sequence.", SECONDS)
        self.tokens = Counter("espalier_stage_tokens", "Tokens made.", LABELS, registry=self._registry).labels(service, node)
        self._requests = Counter(
            "espalier_stage_requests", "Requests by how they ended here.", (*LABELS, "outcome"), registry=self._registry
        )
        self._ended: dict[str, Counter] = {}
        """Looked up once per outcome: finding the labels costs more than counting."""
        self._drops = Counter(
            "espalier_stage_dropped", "Tasks dropped before any work.", (*LABELS, "reason"), registry=self._registry
        )

    def watch(self, *, queue_length: Callable[[], float], in_flight: Callable[[], float], wait: Callable[[], float]) -> None:
        """Read these three whenever somebody asks, instead of counting them up and down."""
        self._gauge("queue_length", "Tasks waiting now.").set_function(queue_length)
        self._gauge("inflight_requests", "Requests not answered yet.").set_function(in_flight)
        self._gauge("expected_wait_seconds", "Predicted wait of a task that arrives now.").set_function(wait)

    def computed(self, queue_s: float, compute_s: float) -> None:
        """Count a task that was computed."""
        self.queue.observe(queue_s)
        self.compute.observe(compute_s)
        self._squares.inc(compute_s * compute_s)

    def ended(self, outcome: str) -> None:
        """Count a request: `ok`, or the reason it failed."""
        counter = self._ended.get(outcome)
        if counter is None:
            counter = self._ended[outcome] = self._requests.labels(*self._labels, outcome)
        counter.inc()

    def dropped(self, reason: str) -> None:
        """Count a task dropped before any work."""
        self._drops.labels(*self._labels, reason).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"espalier_stage_{name}", text, LABELS, buckets=buckets, registry=self._registry).labels(*self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"espalier_stage_{name}", text, LABELS, registry=self._registry).labels(*self._labels)

    def exposition(self) -> bytes:
        """The text Prometheus reads."""
        return exposition.exposition(self._registry)
