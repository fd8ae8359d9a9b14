"""What a plan is and why, as data and as text: replicas, cost and gap, what each node's loss leaves, what is tight.

`make` solves a problem and puts the light services into the room that is left; `document` and `lines` say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.core import Node, Placement, Service, Target
from orchestrator.placement import cuts, flows, greedy, trials
from orchestrator.placement.cuts import Cut, Ground
from orchestrator.placement.problem import Floats, Problem
from orchestrator.placement.program import Limits, Program, Solution
from orchestrator.placement.trials import NOTHING_LOST, Trial, Tried, Withstood
from services.dataplane.pipeline import Pipeline

HOW = {
    "optimal": "integer program, within the gap asked for",
    "incumbent": "integer program, the best found within the time limit",
    "greedy": "greedy heuristic: within the time limit the integer program found nothing cheaper that survives every loss",
    "spread": "even spread: within the time limit the integer program found nothing cheaper that survives every loss",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement of all services with everything that is to be said of it."""

    problem: Problem
    solution: Solution
    placement: Placement
    """Core services from the program, light ones in the room they leave."""
    assumptions: tuple[str, ...]
    light: tuple[Service, ...] = ()
    """Services beside those of the problem."""
    withstood: Withstood | None = None
    """The trials that it was chosen by, if there were any."""
    ground: Ground | None = None
    """What the cuts of the pipelines are weighed by; None where nobody asks."""
    pipelines: tuple[Pipeline, ...] = ()

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Every cut of the pipelines, with what it costs."""
        return () if self.ground is None else cuts.of_pipelines(self.pipelines, self.ground)


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the core services, and what stood there before."""

    light: tuple[Service, ...] = ()
    """Services placed greedily, in the room that the core leaves."""
    targets: Mapping[str, Target] = field(default_factory=dict)
    """Replicas wanted, by light service, and standbys of any service."""
    flows: tuple[tuple[str, str], ...] = ()
    """Pairs of services that pass tensors on."""
    current: Placement | None = None
    """What runs; light services stay where they can."""


def make(
    problem: Problem,
    limits: Limits,
    beside: Beside | None = None,
    *,
    assumptions: Sequence[str] = (),
    trial: Trial | None = None,
) -> Plan:
    """Place everything.

    Args:
        problem: of the core services.
        limits: of the program.
        beside: everything else.
        assumptions: what the problem took for granted.
        trial: tries placements of the core services; the one that withstands it is taken.

    Raises:
        Infeasible: the core services cannot keep every rule (with the smallest relaxation), or the light ones find no room.
    """
    beside = beside or Beside()
    withstood = None if trial is None else trials.withstand(problem, limits, trial, beside.current)
    solution = Program(problem, limits).solve(beside.current) if withstood is None else withstood.best.solution
    return Plan(problem, solution, whole(problem, beside, solution.placement), tuple(assumptions), beside.light, withstood)


def whole(problem: Problem, beside: Beside, core: Placement, lost: str | None = None) -> Placement:
    """Core services as they were placed, and greedily in the room they leave light services and all standbys.

    Args:
        problem: of the core services.
        beside: everything else.
        core: the core services' placement.
        lost: a node that is gone, with what stood on it; the light services go elsewhere.

    Raises:
        Infeasible: they find no room.
    """
    here = [node for node in problem.nodes if node.name != lost]
    core = Placement({s: {n: c for n, c in row.items() if n != lost} for s, row in core.ready.items()})
    wanted = {s.name: beside.targets.get(s.name, Target(1)) for s in beside.light}
    idle = [h.service for h in problem.services if beside.targets.get(h.service.name, Target(0)).standby]
    wanted |= {s.name: Target(0, beside.targets[s.name].standby) for s in idle}
    room = [_left(node, problem, core) for node in here]
    places = greedy.place(
        [*beside.light, *idle], room, wanted, flows=beside.flows, latencies_s=problem.latencies_s, keep=beside.current
    )  # fmt: skip
    return Placement({**core.ready, **places.ready}, places.standby)


def _left(node: Node, problem: Problem, core: Placement) -> Node:
    counts = [(core.ready_on(h.service.name, node.name), h.service) for h in problem.services]
    return Node(
        node.name,
        node.cpus - sum(count * s.cpus for count, s in counts),
        node.memory_bytes - sum(count * s.memory_bytes for count, s in counts),
        node.gpus - sum(count * s.gpus for count, s in counts),
    )


def document(plan: Plan) -> dict[str, Any]:
    """Everything about a plan, as JSON values. `ready` and `standby` are the placement; the rest explains it."""
    s, x = plan.solution, plan.problem.arrays.counts(plan.solution.placement)
    return {
        "ready": {service: dict(row) for service, row in plan.placement.ready.items()},
        "standby": {service: dict(row) for service, row in plan.placement.standby.items()},
        "how": s.status,
        "cost_per_s": s.cost,
        "bound_per_s": s.bound,
        "gap": s.gap,
        "solve_s": s.solve_s,
        "rounds": s.rounds,
        "losses_cut": list(s.cuts),
        "gamma": plan.problem.parameters.gamma,
        "carried_without": dict(s.carried),
        "survives": survives(plan),
        "binding": [{"rule": rule, "subject": subject} for rule, subject in s.binding],
        "why": {h.service.name: _why(plan.problem, x, i) for i, h in enumerate(plan.problem.services)},
        "busiest_link": _busiest(plan.problem, x),
        "trials": None if plan.withstood is None else _trials(plan.withstood),
        "hop_s": None if plan.ground is None else plan.ground.hop_s,
        "cuts": [cuts.document(cut) for cut in plan.cuts],
        "assumptions": list(plan.assumptions),
    }


def _trials(withstood: Withstood) -> dict[str, Any]:
    def told(tried: Tried) -> dict[str, Any]:
        asked = {node: {"load": s.load, "deadline_share": s.deadline} for node, s in tried.strains.items()}
        lost = {node: share for node, share in tried.on_time.items() if node != NOTHING_LOST}
        return {
            "name": tried.name, "cost_per_s": tried.solution.cost, "on_time": tried.on_time[NOTHING_LOST],
            "on_time_without": lost, "asked": asked,
        }  # fmt: skip

    return {"level": withstood.level, "chosen": withstood.best.name, "tried": [told(tried) for tried in withstood.tried]}


def survives(plan: Plan) -> bool:
    """Whether every single loss leaves gamma of the load: always so of the program, not always of the heuristic."""
    return all(share >= plan.problem.parameters.gamma - 1e-6 for share in plan.solution.carried.values())


def _why(problem: Problem, x: Floats, s: int) -> dict[str, Any]:
    """What made a service's number of replicas: its load, the file, kappa, or the loss of a node."""
    arrays, p = problem.arrays, problem.parameters
    load = float(arrays.visits[s] @ arrays.rates)
    placed = int(x[s].sum())
    return {
        "replicas": placed,
        "load": load,
        "utilisation": load / (placed * float(arrays.throughput[s])) if placed else None,
        "for_the_load_or_asked": int(arrays.need[s]),
        "for_diversity": p.kappa,
        "left_after_a_loss": int(arrays.need_after_loss[s]),
    }


def _busiest(problem: Problem, x: Floats) -> dict[str, Any] | None:
    routed = flows.route(problem, x)
    if routed is None or not routed.busiest_link:
        return None
    u, v = np.unravel_index(np.argmax(routed.links / problem.arrays.bandwidth), routed.links.shape)
    names = [node.name for node in problem.nodes]
    return {"from": names[u], "to": names[v], "share": routed.busiest_link}


def lines(plan: Plan, *, explain: bool = False) -> list[str]:
    """A plan as text: the table of replicas, and with `explain` everything else."""
    nodes = [node.name for node in plan.problem.nodes]
    services = [*dict.fromkeys([*plan.placement.ready, *plan.placement.standby])]
    rows = [["service", *nodes], *([name, *(_cell(plan.placement, name, node) for node in nodes)] for name in services)]
    said = _columns(rows)
    return [*said, "", *_reasons(plan)] if explain else said


def _cell(placement: Placement, service: str, node: str) -> str:
    ready, idle = placement.ready_on(service, node), placement.standby_on(service, node)
    return (f"{ready}+{idle}" if idle else str(ready)) if ready or idle else "-"


def _reasons(plan: Plan) -> list[str]:
    told, s = document(plan), plan.solution
    gap = "no bound is known" if s.gap is None else f"at most {s.gap:.2%} above the best possible"
    said = [f"how: {HOW[s.status]}; {gap}; solved in {s.solve_s:.2f} s, {s.rounds} rounds, {len(s.cuts)} cuts"]
    said.append(f"cost: {s.cost:.4g} per second (core tier, time on links and the busiest link)")
    for name, why in told["why"].items():
        used = "no load" if why["utilisation"] is None else f"{why['load']:.3g} tasks/s, {why['utilisation']:.0%} utilised"
        said.append(
            f"{name}: {why['replicas']} replicas ({used}); load or file asks for {why['for_the_load_or_asked']}, "
            f"diversity for {why['for_diversity']} nodes, and {why['left_after_a_loss']} must be left after any loss"
        )
    left = ", ".join(f"{node} {share:.0%}" for node, share in s.carried.items())
    kept = "kept" if told["survives"] else "NOT kept"
    said.append(f"load still carried without: {left} (at least {plan.problem.parameters.gamma:.0%} promised: {kept})")
    if plan.withstood is not None:
        said += _tried_lines(plan.withstood)
    if told["busiest_link"] is not None:
        link = told["busiest_link"]
        said.append(f"busiest link: {link['from']} -> {link['to']}, {link['share']:.1%} of its bandwidth")
    tight = "; ".join(f"{rule} ({subject})" for rule, subject in s.binding)
    said.append(f"binding: {tight or 'nothing'}")
    said += [f"assumed: {assumption}" for assumption in plan.assumptions]
    return said if plan.ground is None else [*said, *cuts.lines(plan.cuts, plan.pipelines, plan.ground)]


def _tried_lines(withstood: Withstood) -> list[str]:
    best, found = withstood.best, []
    for tried in withstood.tried:
        asked = f"; asked for more without {', '.join(tried.strains)}" if tried.strains else ""
        weakest = min(tried.on_time, key=lambda node: tried.on_time[node])
        at = f"without {weakest}" if weakest != NOTHING_LOST else "with nothing lost"
        found.append(f"simulated, {tried.name}: cost {tried.solution.cost:.4g}, at worst {tried.worst:.1%} on time {at}{asked}")
    kept = "kept" if best.worst >= withstood.level else "NOT kept"
    return [*found, f"chosen: {best.name} (at least {withstood.level:.1%} on time after any loss asked for: {kept})"]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
