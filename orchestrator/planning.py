"""`espalier plan`: reads the testbed, its models and a saved plan, and hands them to the program."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator import losses
from orchestrator import plan as plans
from orchestrator.core import Placement
from orchestrator.errors import UsageError
from orchestrator.placement import explain
from orchestrator.placement.cuts import Ground, Part
from orchestrator.placement.explain import Beside, Plan, document, lines
from orchestrator.placement.picture import picture
from orchestrator.placement.program import Limits
from orchestrator.survey import Survey, defaults, survey
from orchestrator.testbed import Loaded, did_you_mean

__all__ = ["Asked", "document", "lines", "picture", "plan", "read"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user says beside the testbed; None: the default."""

    demands: Sequence[str] = ()
    """`PIPELINE=RATE` [tasks/s]; none: the means of the workload."""
    gamma: float | None = None
    kappa: int | None = None
    time_limit_s: float = 60.0
    keep: Path | None = None
    """A saved plan that runs now."""
    hop_s: float | None = None
    """Time of a hop beside links, waits and work [s]; default: `plan.HOP_S`."""
    check_losses: bool = False
    """Simulate the loss of every node, and ask for more where it leaves too little."""


def plan(loaded: Loaded, models_dir: Path, asked: Asked) -> Plan:
    """The plan of a testbed.

    Raises:
        SetupFailed: a model is not exported.
        TestbedInvalid: file and models do not fit each other.
        UsageError: a demand or the saved plan cannot be read.
        Infeasible: no placement keeps every rule.
    """
    made = plans.make(loaded, models_dir)
    testbed = made.testbed
    parameters = defaults(testbed)
    if asked.gamma is not None:
        parameters = replace(parameters, gamma=asked.gamma)
    if asked.kappa is not None:
        parameters = replace(parameters, kappa=asked.kappa)
    rates = dict(_demand(text, testbed.pipelines) for text in asked.demands) or None
    found = survey(made, rates, parameters)
    beside = Beside(
        light=tuple(service for service in made.services().values() if service.tier == "light"),
        targets=testbed.targets(),
        flows=tuple(sorted(made.flows())),
        current=None if asked.keep is None else read(asked.keep),
    )
    chosen = explain.make(
        found.problem,
        Limits(time_s=asked.time_limit_s),
        beside,
        assumptions=found.assumptions,
        trial=losses.of_testbed(made, found.problem, found.manifests, beside) if asked.check_losses else None,
    )
    hop_s = plans.HOP_S if asked.hop_s is None else asked.hop_s
    pipelines = tuple(made.wiring.pipelines.values())
    return replace(chosen, ground=_ground(made, found, chosen.placement, hop_s), pipelines=pipelines)


def _ground(made: plans.Plan, found: Survey, placement: Placement, hop_s: float) -> Ground:
    testbed = made.testbed
    parts = {
        name: Part(
            model=made.manifests[section.model],
            members=section.members,
            stage=made.stage(name),
            precision=section.precision,
            work_s=found.service_s[name],
            memory_bytes=section.memory,
            nodes=tuple(node for node, count in placement.ready.get(name, {}).items() for _ in range(count)),
            measured=section.precision in made.stage(name).profile,
        )
        for name, section in testbed.services.items()
    }
    return Ground(parts, testbed.gateway_node, hop_s, testbed.link_table(), found.rates, found.problem.parameters.utilisation)


def _demand(text: str, pipelines: Collection[str]) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    if name not in pipelines:
        raise UsageError(f"--demand {text}: there is no pipeline {name!r}{did_you_mean(name, pipelines)}")
    try:
        return name, float(rate)
    except ValueError:
        raise UsageError(f"--demand {text}: write PIPELINE=RATE with the rate in tasks/s, e.g. {name}=20") from None


def read(path: Path) -> Placement:
    """The placement of a saved plan.

    Raises:
        UsageError: it is not one.
    """
    try:
        saved = json.loads(path.read_text())
        ready, standby = (
            {s: {n: int(c) for n, c in row.items()} for s, row in saved[key].items()} for key in ("ready", "standby")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: not a saved plan; make one with espalier plan --save") from None
    return Placement(ready, standby)
