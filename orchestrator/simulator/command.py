"""`espalier simulate`: a testbed file's own workload, in virtual time, under policies by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from loadgen import arrivals
from orchestrator.core import ScalingPolicy
from orchestrator.errors import UsageError
from orchestrator.plan import Plan
from orchestrator.scaling.policies import POLICIES
from orchestrator.scaling.site import Site
from orchestrator.simulator import world as worlds
from orchestrator.simulator.run import Row, run

HEADINGS = ("policy", "seed", "on time", "too late", "cost", "replicas", "starts")


def simulate(plan: Plan, policies: Sequence[str], duration_s: float, seeds: int) -> Iterator[Row]:
    """A row for every policy and seed, the seeds from 1 on. All begin with the replicas that the file asks for.

    Raises:
        UsageError: the testbed has no workload, or a policy needs what no testbed file says.
        SetupFailed: a stage has no profile.
        Infeasible: the replicas that the file asks for do not fit.
    """
    testbed = plan.testbed
    if not testbed.workload:
        raise UsageError(f"{plan.loaded.path} has no workload; add one")
    world = worlds.of_testbed(testbed, plan.manifests, plan.wiring)
    workload = {name: arrivals.parse(spec) for name, spec in testbed.workload.items()}
    initial = plan.policy().place(testbed.targets(), None)
    built = {name: build(name, plan) for name in policies}
    for name, policy in built.items():
        for seed in range(1, seeds + 1):
            slot_s = testbed.control.slot
            yield run(world, name, policy, workload, initial=initial, duration_s=duration_s, slot_s=slot_s, seed=seed).row


def build(name: str, plan: Plan) -> ScalingPolicy[Any]:
    """The policy of that name for a testbed: parameters that the file tells are taken from it, others are its defaults.

    Raises:
        UsageError: there is no such policy, or it needs what no testbed file says.
    """
    if name not in POLICIES:
        raise UsageError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    kind: Any = POLICIES[name]
    manual = plan.policy()
    told: dict[str, Any] = {field.name: getattr(manual, field.name) for field in dataclasses.fields(manual)}
    told["site"] = Site(**_of(Site, told))
    try:
        policy: ScalingPolicy[Any] = kind(**_of(kind, told))
    except TypeError as error:
        raise UsageError(f"policy {name} cannot be made of a testbed file alone: {error}") from None
    return policy


def _of(kind: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """What of it is a field of that dataclass."""
    return {field.name: told[field.name] for field in dataclasses.fields(kind) if field.name in told}


def document(plan: Plan, duration_s: float, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as one JSON object, with what they are of."""
    return {
        "testbed": plan.testbed.name,
        "sha256": plan.loaded.sha256,
        "duration_s": duration_s,
        "slot_s": plan.testbed.control.slot,
        "rows": [row.as_dict() for row in rows],
    }


def table(rows: Sequence[Row]) -> Table:
    """The rows as a person reads them."""
    made = Table(box=SIMPLE)
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in rows:
        ratios = ["-" if ratio is None else f"{ratio:.4f}" for ratio in (row.on_time_ratio, row.late_ratio)]
        made.add_row(row.policy, str(row.seed), *ratios, f"{row.cost:.1f}", f"{row.replicas:.2f}", str(row.starts))
    return made
