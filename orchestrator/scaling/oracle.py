"""The clairvoyant limit: a policy that is told every arrival in advance, and orders the fewest replicas that keep the promises.

    n = min{n: of what comes until then, nothing waits longer than d, and v(n) <= epsilon}

over what comes within the start delay and the slot after it, so that what will be needed is ready when it is. What is there is
kept while stopping it and starting it again would cost more than keeping it. No policy that has to guess can be expected to do
as well at the same cost; it is a limit to measure by, and no proof of optimality.

It knows when tasks come (`arrivals`, made by `foresight`), how long services take on average, and what waits now; not how long
each task will take, which way it will be sent, or what the network does. d and epsilon are the stage's of `budgets.split`. The
wait of what is foreseen is that of a queue with n servers that take m each, as a fluid; v is the tail that varying service
times add to arrivals that do not vary (`effective_capacity` with a dispersion of 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from orchestrator.core import Decision, Observation, Placement
from orchestrator.scaling import autoscaler, budgets, effective_capacity
from orchestrator.scaling.autoscaler import Seen
from orchestrator.scaling.budgets import Stage
from orchestrator.scaling.effective_capacity import Arrivals, Service
from orchestrator.scaling.envelope import peak
from orchestrator.scaling.site import Law, Promise, Site


@dataclass(frozen=True, slots=True)
class OracleState:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class Oracle:
    """Parameters of the policy."""

    site: Site
    arrivals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """service -> tasks that will come in each step; a service without an entry stays as it is."""
    step_s: float = 0.05
    """Length of a step [s]."""
    origin_s: float = 0.0
    """When the first step begins, on the clock of observations [s]."""
    state_type: ClassVar[type[OracleState]] = OracleState

    def initial(self) -> OracleState:
        """State before the first slot."""
        return OracleState()

    def step(self, state: OracleState, observation: Observation) -> tuple[OracleState, Decision]:
        """One slot; see `autoscaler`."""
        laws = self.site.laws
        stages = {s.name: Stage(laws[s.name].mean_s, laws[s.name].cv2, s.cpus) for s in self.site.services if s.name in laws}
        granted = budgets.split(self.site.promises, stages)

        def rule(memory: None, seen: Seen) -> tuple[None, int]:
            if seen.name not in laws or seen.name not in self.arrivals:
                return None, seen.wanted
            law, budget = laws[seen.name], granted.get(seen.name)
            wait_s, epsilon = (budget.wait_s, budget.epsilon) if budget is not None else (math.inf, 1.0)
            # What starts now is ready when the start delay is over, and stays for the slot that follows.
            ahead_s = law.start_s + self.site.slot_s
            wanted = self._needed(law, seen, wait_s, epsilon, ahead_s)
            if wanted < seen.wanted:
                later_s = ahead_s + self._worth_keeping_s(seen.name)
                wanted = min(seen.wanted, self._needed(law, seen, wait_s, epsilon, later_s))
            return None, wanted

        placement, _, decision = autoscaler.step(self.site, state.placement, {}, None, rule, observation)
        return OracleState(placement), decision

    def _worth_keeping_s(self, name: str) -> float:
        """How long an idle replica costs less than a start [s]."""
        cpus = next(service.cpus for service in self.site.services if service.name == name)
        running = self.site.prices.cpu_second * cpus
        return self.site.prices.start / running if running > 0.0 else math.inf

    def _needed(self, law: Law, seen: Seen, wait_s: float, epsilon: float, ahead_s: float) -> int:
        counts, at = self.arrivals[seen.name], (seen.t - self.origin_s) / self.step_s
        until = len(counts) if math.isinf(ahead_s) else math.ceil(at + ahead_s / self.step_s)
        coming = counts[max(0, math.floor(at)) : max(0, until)]
        here = (seen.signal.queue_length or 0.0) + (seen.busy or 0.0)
        slot = max(1, round(self.site.slot_s / self.step_s))
        return fewest(coming, self.step_s, law, wait_s, epsilon, here=here, slot=slot)


def fewest(
    coming: Sequence[float], step_s: float, law: Law, wait_s: float, epsilon: float, *, here: float = 0.0, slot: int = 1
) -> int:
    """The fewest replicas that keep a budget, at least one, by bisection; each look is one pass over the steps.

    Args:
        coming: tasks that come in each step; those of a step come at its beginning.
        step_s: length of a step [s].
        law: how long they take.
        wait_s: d, the wait that a task can bear [s]; infinite: any, as long as all is done at last.
        epsilon: share of tasks that may wait longer where compute times vary, above 0.
        here: tasks that wait or are at work now.
        slot: steps over which a rate is taken.
    """
    m = law.batch_s(law.max_batch) / (law.max_batch * law.slots)
    arrivals, service = Arrivals(peak(coming, slot) / step_s, 0.0), Service(m, law.cv2)

    def keeps(replicas: int) -> bool:
        tasks = here
        for count in coming:
            tasks += count
            if tasks * m / replicas - law.mean_s > wait_s + 1e-12:
                return False
            tasks = max(0.0, tasks - min(replicas / m, tasks / law.mean_s) * step_s)
        if law.cv2 <= 0.0 or math.isinf(wait_s):
            return True
        return effective_capacity.late_probability(arrivals, service, replicas, wait_s) <= epsilon

    high = 1
    while not keeps(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


# --- what there is to foresee ---------------------------------------------------------------------------------------------


def visits(promise: Promise, laws: Mapping[str, Law]) -> tuple[tuple[str, float], ...]:
    """When a task that never waits reaches each service of a pipeline: service, time since the task came [s].

    Links take an even share of their path's time before every service. Where paths join, the latest counts. A service is there
    as often as a task visits it.
    """
    reached: dict[str, list[float]] = {}
    for i, path in enumerate(promise.paths):
        hop_s = (promise.fixed_s[i] if promise.fixed_s else 0.0) / max(1, len(path))
        at, times = 0.0, dict.fromkeys(path, 0)
        for name in path:
            at += hop_s
            before = reached.setdefault(name, [])
            if times[name] == len(before):
                before.append(at)
            before[times[name]] = max(before[times[name]], at)
            times[name] += 1
            at += laws[name].mean_s if name in laws else 0.0
    more = {name: at[-1:] * (promise.visits_of(name) - len(at)) for name, at in reached.items()}
    return tuple((name, when) for name, at in reached.items() for when in at + more[name])


def foresight(
    schedule: Mapping[str, Sequence[float]], visited: Mapping[str, Sequence[tuple[str, float]]], step_s: float
) -> dict[str, tuple[int, ...]]:
    """The parameter `Oracle.arrivals`, from when tasks come.

    Args:
        schedule: pipeline -> when its tasks come [s], in any order, not below 0.
        visited: pipeline -> its `visits`; pipelines without an entry visit nothing.
        step_s: length of a step [s].
    """
    reached: dict[str, list[np.ndarray]] = {}
    for pipeline, times in schedule.items():
        for name, after_s in visited.get(pipeline, ()):
            reached.setdefault(name, []).append(np.asarray(times, dtype=float) + after_s)
    steps = {name: (np.concatenate(at) / step_s).astype(np.int64) for name, at in reached.items()}
    return {name: tuple(np.bincount(at).tolist()) for name, at in steps.items()}
