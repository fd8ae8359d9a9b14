"""What the loss of each single node leaves of a placement, by simulating it: the trial that `placement.trials` asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import ClassVar

from loadgen.arrivals import ArrivalProcess, Poisson
from loadgen.outcome import Outcome
from models.manifest import Manifest
from orchestrator import plan as plans
from orchestrator.core import Decision, Observation, Placement
from orchestrator.errors import Infeasible
from orchestrator.placement.explain import Beside, whole
from orchestrator.placement.problem import Problem
from orchestrator.placement.trials import NOTHING_LOST
from orchestrator.simulator import world as worlds
from orchestrator.simulator.faults import Loss
from orchestrator.simulator.run import run
from orchestrator.simulator.world import World

SLOT_S, SETTLE_S = 1.0, 5.0
"""Between two decisions, and what the light services have to start elsewhere [s]."""


@dataclass(frozen=True, slots=True)
class Held:
    """The policy that leaves everything as it was placed, but for what is to run after a loss."""

    after: Placement | None
    """None: nothing changes then."""
    lost_at_s: float
    state_type: ClassVar[type[None]] = NoneType

    def initial(self) -> None:
        """There is no state."""

    def step(self, state: None, observation: Observation) -> tuple[None, Decision]:
        """Hold until the loss."""
        desired = self.after if observation.t > self.lost_at_s else None
        return None, Decision(desired, "what was placed is tried as it is")


@dataclass(frozen=True, slots=True)
class LossTrial:
    """Runs a placement once as it is, and once for each node with any of it, which is lost. Core services are not replaced.

    O(nodes) runs. The same arrivals and service times in all of them.
    """

    world: World
    workload: Mapping[str, ArrivalProcess]
    whole: Callable[[Placement, str | None], Placement] = lambda placement, lost: placement
    """Everything that runs, of what is tried and the node that is lost: what is placed beside it moves after a loss."""
    lost_at_s: float = 2.0
    settle_s: float = 0.0
    """Time after the loss that is not counted: the light services start elsewhere."""
    measured_s: float = 30.0
    seed: int = 1

    def __call__(self, placement: Placement) -> dict[str, float]:
        """Lost node -> least share of any pipeline's tasks that are on time; with nothing lost under `NOTHING_LOST`."""
        nothing = self._on_time(placement, None)
        used = {node for row in self.whole(placement, None).ready.values() for node, count in row.items() if count}
        return {
            NOTHING_LOST: nothing,
            **{n.name: self._on_time(placement, n.name) if n.name in used else nothing for n in self.world.nodes},
        }

    def _on_time(self, placement: Placement, lost: str | None) -> float:
        after = None
        if lost is not None:
            with contextlib.suppress(Infeasible):  # no room for the light services: then they stay lost
                after = self.whole(placement, lost)
        began = self.lost_at_s + self.settle_s
        row = run(
            self.world, "held", Held(after, self.lost_at_s), self.workload, initial=self.whole(placement, None),
            losses=[] if lost is None else [Loss(lost, self.lost_at_s)], seed=self.seed,
            duration_s=began + self.measured_s, warmup_s=began, slot_s=SLOT_S,
        ).row  # fmt: skip
        return min((_share(outcomes) for outcomes in row.pipelines.values() if any(outcomes.values())), default=1.0)


def _share(outcomes: Mapping[Outcome, int]) -> float:
    return outcomes["on_time"] / sum(outcomes.values())


def of_testbed(made: plans.Plan, problem: Problem, manifests: Mapping[str, Manifest], beside: Beside) -> LossTrial:
    """Trials of a testbed's core services under Poisson arrivals at the rates of the problem.

    Args:
        made: the testbed.
        problem: with the demand.
        manifests: with a profile of every stage that is served.
        beside: the light services.
    """
    world = worlds.of_testbed(made.testbed, manifests, made.wiring)
    workload = {demand.name: Poisson(rate=demand.rate) for demand in problem.demands}
    return LossTrial(world, workload, partial(whole, problem, beside), settle_s=SETTLE_S)
