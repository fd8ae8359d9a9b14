"""A small scenario, and rows made up for reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.simulator import scenario
from orchestrator.simulator.scenario import Loaded

TINY = """\
name: tiny
about: two services on two nodes
world:
  written:
    nodes:
      left: {cpus: 8, memory: 4GiB}
      right: {cpus: 8, memory: 4GiB, speed: 0.5}
    links:
      - {between: [left, right], latency: 1ms, bandwidth: 1Gb/s}
    services:
      heavy: {tier: core, cpus: 2, memory: 100MiB, mean: 10ms, replicas: 2, output: 10kB}
      quick: {tier: light, cpus: 1, memory: 10MiB, mean: 5ms, cv2: 0.5, replicas: 2, standby: 1, start: 100ms, input: 1kB}
    pipelines:
      task:
        deadline: 200ms
        epsilon: 0.05
        steps:
          - {id: first, service: quick}
          - {id: second, service: heavy, after: [first]}
workload: {task: "poisson:40"}
loads: [1.0, 2.0]
seeds: 2
duration: 4s
warmup: 1s
slot: 500ms
policies:
  - {policy: lyapunov, label: ours, role: ours}
  - {policy: square_root, sweep: {beta: [0.5, 2.0]}}
  - {policy: static, without: [shedding]}
plots: [violins, promises]
claims:
  - {claim: on_time, load: 1.0, at_least: 0.9}
  - {claim: promise}
  - {claim: steady, after: 0.9}
"""


def loaded(text: str = TINY) -> Loaded:
    return scenario.parse(text, Path("tiny.yaml"))


def row(label: str, on_time: float, cost: float, **other: Any) -> dict[str, Any]:
    """A row as `study.row` gives it, as far as reports look at it."""
    role = "ours" if label.startswith("ours") else "baseline"
    return {
        "policy": label, "label": label, "family": label.partition(" ")[0], "role": role, "options": {}, "case": {},
        "load": 1.0, "seed": 1, "on_time_ratio": on_time, "late_ratio": 1 - on_time, "epsilon": 0.05, "promised": None,
        "cost": cost, "core_cost": 0.0, "replicas": 3.0, "starts": 1, "backlog": 0.0, **other,
    }  # fmt: skip
