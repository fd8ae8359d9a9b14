"""What the orchestrator counts of itself, in the Prometheus text format."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client import Counter as CounterMetric

from orchestrator.core import Placement, Replica
from orchestrator.costs import Cost

disable_created_metrics()  # type: ignore[no-untyped-call]

TICK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """The orchestrator's series, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._replicas = Gauge(
            "espalier_replicas", "Replicas by state; desired is what the last decision wants ready.",
            ("stage", "node", "state"), registry=self._registry,
        )  # fmt: skip
        self.tick = Histogram(
            "espalier_controller_tick_duration_seconds", "From observing to the end of the log entry.",
            buckets=TICK_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self.age = Gauge(
            "espalier_controller_signal_age_seconds", "Age of what a source said last.", ("source",), registry=self._registry
        )
        self._sources = Gauge(
            "espalier_controller_sources", "Replicas and gateways by the telemetry that the last slot read them through.",
            ("telemetry",), registry=self._registry,
        )  # fmt: skip
        self._actions = CounterMetric(
            "espalier_controller_actions", "Actions by result.", ("action", "result"), registry=self._registry
        )
        self._let_out = CounterMetric(
            "espalier_controller_let_out", "Standbys that gateways have let out, by what came of it.",
            ("stage", "result"), registry=self._registry,
        )  # fmt: skip
        self._failures = CounterMetric(
            "espalier_replica_failures", "Replicas that ended unasked or could not be started.",
            ("stage", "node"), registry=self._registry,
        )  # fmt: skip
        self._epsilon = Gauge(
            "espalier_pipeline_epsilon", "Share of tasks that may miss the deadline.", ("pipeline",), registry=self._registry
        )
        self._deadline = Gauge(
            "espalier_pipeline_deadline_seconds", "Deadline of a task that names none.", ("pipeline",), registry=self._registry
        )
        self._cost = CounterMetric("espalier_cost", "Cost so far, in the testbed's unit.", ("kind",), registry=self._registry)
        build = Gauge(
            "espalier_build_info", "Always 1; the labels tell the build.", ("version", "commit"), registry=self._registry
        )
        build.labels(importlib.metadata.version("espalier"), os.environ.get("ESPALIER_COMMIT", "")).set(1)
        self._seen: Tally[tuple[str, str]] = Tally()
        self._failed: Tally[tuple[str, str]] = Tally()
        self._spent = Cost()

    def acted(self, action: str, result: str, times: int = 1) -> None:
        """Count an action."""
        self._actions.labels(action, result).inc(times)

    def let_out(self, service: str, result: str) -> None:
        """Count a standby that a gateway says it has let out: `ok`, `again` (it is at work already) or `refused`."""
        self._let_out.labels(service, result).inc()

    def show(self, replicas: Iterable[Replica], desired: Placement | None) -> None:
        """Set the gauges of replicas; what is not there any more disappears."""
        self._replicas.clear()
        for replica in replicas:
            self._replicas.labels(replica.service, replica.node, replica.state).inc()
            # From zero on, so that the first failure is an increase too.
            self._failures.labels(replica.service, replica.node)
        for service, nodes in (desired.ready if desired is not None else {}).items():
            for node, count in nodes.items():
                self._replicas.labels(service, node, "desired").set(count)

    def telemetry(self, ages_s: Mapping[str, float], used: Mapping[str, int]) -> None:
        """Set the age of every source, and through what the sources were read."""
        self.age.clear()
        for source, age_s in ages_s.items():
            self.age.labels(source).set(age_s)
        for telemetry, count in used.items():
            self._sources.labels(telemetry).set(count)

    def promises(self, promises: Mapping[str, tuple[float, float]]) -> None:
        """Set deadline [s] and violation probability of every pipeline."""
        self._deadline.clear()
        self._epsilon.clear()
        for pipeline, (deadline_s, epsilon) in promises.items():
            self._deadline.labels(pipeline).set(deadline_s)
            self._epsilon.labels(pipeline).set(epsilon)

    def runtime_acted(self, actions: Mapping[tuple[str, str], int]) -> None:
        """Count what the runtime did since the last call, from its own totals."""
        for (action, result), total in actions.items():
            self.acted(action, result, total - self._seen[action, result])
            self._seen[action, result] = total

    def failed(self, totals: Mapping[tuple[str, str], int]) -> None:
        """Count the failures of each service on each node since the last call, from the runtime's own totals."""
        for place, total in totals.items():
            self._failures.labels(*place).inc(total - self._failed[place])
            self._failed[place] = total

    def spent(self, cost: Cost) -> None:
        """Set the cost so far; it only grows."""
        for kind in ("replicas", "standby", "starts"):
            self._cost.labels(kind).inc(max(0.0, getattr(cost, kind) - getattr(self._spent, kind)))
        self._spent = cost

    def exposition(self) -> bytes:
        """The page Prometheus reads."""
        return generate_latest(self._registry)
