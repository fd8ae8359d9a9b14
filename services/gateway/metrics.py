"""What the gateway counts, in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import Counter, Gauge, Histogram

from services import exposition
from services.gateway.table import Plan

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
SLACK = (-10.0, -5.0, -1.0, -0.5, -0.25, -0.1, -0.05, 0.0, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0)


class GatewayMetrics:
    """Counters of tasks by pipeline and outcome.

    A histogram's buckets are fixed when it is made, and each pipeline's deadline must be one of them: so the duration
    histogram belongs to the pipelines known by then, and is made once the first routes are there.
    """

    def __init__(self) -> None:
        self._registry = exposition.registry()
        self._outcomes = Counter("espalier_requests", "Tasks by outcome.", ("pipeline", "outcome"), registry=self._registry)
        self._bad = Counter("espalier_bad_requests", "Requests that never became a task.", ("reason",), registry=self._registry)
        self._slack = Histogram(
            "espalier_deadline_slack_seconds",
            "Time left at the answer; negative when late.",
            ("pipeline",),
            buckets=SLACK,
            registry=self._registry,
        )
        self._let_out = Counter(
            "espalier_gateway_let_out", "Standbys let out between two decisions.", ("stage",), registry=self._registry
        )
        self.first_token = self._of_streams("time_to_first_token_seconds", "From a streamed task's arrival to its first token.")
        self.between_tokens = self._of_streams("time_between_tokens_seconds", "Wait for more of a stream after that.")
        self._tokens = Counter(
            "espalier_generated_tokens", "Tokens of answers, as far as they were sent.", ("pipeline",), registry=self._registry
        )
        self._duration: Histogram | None = None
        self._ended: dict[tuple[str, str], Counter] = {}
        self._observed: dict[tuple[Histogram, str], Histogram] = {}
        """Both looked up once: finding the labels costs more than counting."""
        self._routes_version = Gauge("espalier_gateway_routes_version", "Routes in use.", registry=self._registry)

    def watch(self, *, in_flight: Callable[[], float]) -> None:
        """Read the number of tasks in flight whenever somebody asks."""
        gauge = Gauge("espalier_gateway_inflight_requests", "Tasks not answered yet.", registry=self._registry)
        gauge.set_function(in_flight)

    def routes(self, version: int, plans: Collection[Plan]) -> None:
        """Note the version in use, and on the first one make the histogram that needs the deadlines."""
        self._routes_version.set(version)
        for service in (service for plan in plans for service in plan.services):
            self._let_out.labels(service)  # from zero on, so that the first one is an increase too
        deadlines = {plan.pipeline.deadline_s for plan in plans}
        if self._duration is None and deadlines:
            self._duration = Histogram(
                "espalier_request_duration_seconds",
                "Time from a task's arrival to its answer, answered or not.",
                ("pipeline",),
                buckets=sorted({*SECONDS, *deadlines}),
                registry=self._registry,
            )

    def task(self, pipeline: str, outcome: str, duration_s: float, slack_s: float) -> None:
        """Count a task that has ended."""
        counter = self._ended.get((pipeline, outcome))
        if counter is None:
            counter = self._ended[pipeline, outcome] = self._outcomes.labels(pipeline, outcome)
        counter.inc()
        for histogram, seconds in ((self._slack, slack_s), (self._duration, duration_s)):
            if histogram is not None:
                observed = self._observed.get((histogram, pipeline))
                if observed is None:
                    observed = self._observed[histogram, pipeline] = histogram.labels(pipeline)
                observed.observe(seconds)

    def tokens(self, pipeline: str, count: int) -> None:
        """Count an answer's tokens."""
        self._tokens.labels(pipeline).inc(count)

    def _of_streams(self, name: str, text: str) -> Histogram:
        return Histogram(f"espalier_{name}", text, ("pipeline",), buckets=SECONDS, registry=self._registry)

    def let_out(self, service: str) -> None:
        """Count a standby that was let out."""
        self._let_out.labels(service).inc()

    def bad_request(self, reason: str) -> None:
        """Count a request that was refused before it became a task."""
        self._bad.labels(reason).inc()

    def exposition(self) -> bytes:
        """The text Prometheus reads."""
        return exposition.exposition(self._registry)
