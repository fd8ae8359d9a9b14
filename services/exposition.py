"""The Prometheus text format, the one way our processes write it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# A _created series per counter doubles the page and tells nothing that a counter's reset does not.
disable_created_metrics()  # type: ignore[no-untyped-call]


def registry() -> CollectorRegistry:
    """An empty registry: each process owns its own, so that tests can hold several."""
    return CollectorRegistry()


def exposition(registry: CollectorRegistry) -> bytes:
    """The page Prometheus reads."""
    return generate_latest(registry)
