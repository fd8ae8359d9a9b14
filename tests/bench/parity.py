"""One trace through live processes and through the simulator: how far what is simulated may be believed.

Same testbed file, same policy, the same arrivals to the microsecond; service times are drawn from the same law, not the same
draws. Where the two differ, `parity` says by how much in each stage, which is where to look.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from loadgen import arrivals
from orchestrator import plan as plans
from orchestrator import testbed as testbeds
from orchestrator.simulator import world as worlds
from orchestrator.simulator.run import Run, run
from orchestrator.simulator.world import Delays
from tests.bench.emulated import boxes

WORKLOAD = dict.fromkeys(boxes.PIPELINES, "step:20@15s,40@15s,20@15s")
DURATION_S, SEED = 45.0, 3
HOP_S, ROUTES_S, LAG_S = 0.0012, 0.03, 0.0
"""What the world is told of HTTP, the way of a change to the gateway, and the age of metrics [s]; measured by `make bench`."""


async def measure() -> dict[str, Any]:
    """`parity`: on-time ratio and mean replicas of both, and the mean wait and compute time of each stage."""
    live = boxes.run("lyapunov", {}, WORKLOAD, seed=SEED, duration_s=DURATION_S)
    simulated = simulate("lyapunov")
    row = simulated.row
    return {
        "parity": {
            "on_time_ratio": {"live": live.report["on_time_ratio"], "simulated": row.on_time_ratio},
            "replicas": {"live": live.replicas, "simulated": row.replicas, "ratio": live.replicas / row.replicas},
            "cost": {"live": live.cost, "simulated": row.cost},
            "stages": {name: _stage(name, live.report, simulated) for name in boxes.STAGES},
        }
    }


def simulate(policy: str) -> Run:
    """The testbed, simulated."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        boxes.export(directory / "models" / "emulated")
        text = yaml.safe_dump(boxes.testbed(policy, {}, WORKLOAD), sort_keys=False)
        plan = plans.make(testbeds.parse(text, "boxes.yaml"), directory / "models")
    delays = Delays(routes_s=ROUTES_S, metric_lag_s=LAG_S, hop_s=HOP_S)
    world = worlds.of_testbed(plan.testbed, plan.manifests, plan.wiring, delays)
    workload = {name: arrivals.parse(spec) for name, spec in WORKLOAD.items()}
    return run(
        world, policy, plan.policy(), workload, initial=plan.place(plan.testbed.targets(), None), duration_s=DURATION_S,
        slot_s=plan.testbed.control.slot, seed=SEED, keep_records=True,
    )  # fmt: skip


def _stage(name: str, report: dict[str, Any], simulated: Run) -> dict[str, Any]:
    hops = [hop for record in simulated.records for hop in record.hops if hop.service == name]
    live = report["stages"][name]
    return {
        "wait_s": {"live": live["queue_s"]["mean"], "simulated": fmean(hop.queue_s for hop in hops)},
        "compute_s": {"live": live["compute_s"]["mean"], "simulated": fmean(hop.compute_s for hop in hops)},
    }
