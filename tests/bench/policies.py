"""Ours against the autoscalers people use, live: the same steps and bursts, the same boxes, so the same replicas to be had.

Real gateway, stages and orchestrator, as processes; the stages' work is emulated (`tests.bench.emulated`), since two processors
cannot stand for three boxes. All autoscalers are tuned: at their defaults they look every 15 s and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.bench.emulated import boxes

STEPS = "step:15@8s,45@10s,15@8s,60@2s,15@8s,60@2s,15@8s"
WORKLOAD = dict.fromkeys(boxes.PIPELINES, STEPS)
DURATION_S = 46.0
QUICK = {"sync_s": 0.5, "down_window_s": 5, "period_s": 0.5}
POLICIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("lyapunov", {}),
    "hpa": ("hpa", {"utilisation": 0.5, "behavior": QUICK}),
    "kpa": ("kpa", {"concurrency": 1, "tick_s": 0.5, "stable_s": 10, "panic_s": 1}),
    "ray": ("ray", {"ongoing": 1, "up_delay_s": 0.5, "down_delay_s": 5, "look_back_s": 0.5, "metrics_interval_s": 0.5}),
    "static": ("static", {}),
}


async def measure() -> dict[str, Any]:
    """`policies`: by name {on_time_ratio, late_ratio, cost, replicas, starts}, of one schedule."""
    rows = {}
    for name, (policy, options) in POLICIES.items():
        ran = boxes.run(policy, options, WORKLOAD, seed=1, duration_s=DURATION_S)
        outcomes = ran.report["outcomes"]
        rows[name] = {
            "on_time_ratio": ran.report["on_time_ratio"],
            "late_ratio": sum(outcomes[o] for o in ("late", "expired", "rejected")) / ran.report["sent"],
            "cost": ran.cost,
            "replicas": ran.replicas,
            "starts": ran.starts,
        }
    return {"policies": rows}
