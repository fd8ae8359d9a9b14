"""The paper's online algorithm, read literally: instances that are busy stay, idle ones go, and others come one at a time.

Every slot, for each service, from N = the instances that are busy:

    add one  while  phi H A (d(y(N)) - d(y(N + 1))) > eta (c_run + [c_start where it does not run yet])

with A active tasks, y(N) = ceil(A / N) tasks per instance (N is first raised until y <= y_max, the paper's (11)), d the delay
of a stage at that level of parallelism, and H the virtual queue of the tasks (18): H <- max(H + age - D, floor) once a slot.

    mean rate (the paper's PropAvg):   d(y) = y m
    effective capacity:                d(y) = m + g(y)+,   g(y) = ln(r / (f epsilon)) / (theta r),  EC(theta) = r(y) = y / W

f = 1 / m is the mean rate of an instance, r the stationary rate that a level stands for, W the window in which its tasks are
admitted, and EC that of a rate drawn from a gamma distribution anew in every slot (20). With that distribution's two moments
taken from the service's law, EC(theta) = ln(1 + theta cv^2) / (theta cv^2 m): the length of a slot drops out, and with
u = r / f and x the root of ln(1 + x) = u x,  g = m cv^2 ln(u / epsilon) / (x u).

What the paper leaves open, and how it is read here:
- r(y) needs a window. W is `window` mean service times, longer than y_max of them, so that every level has a rate below f.
- An observation tells no task's age. All active tasks of a stage are of one age: the way to the stage without waits, plus the
  measured wait there, plus m; of the pipelines that visit it, the one whose tasks are the latest counts. Without active tasks,
  H is back at the floor.
- Time is in `unit_s`, the paper's millisecond, since H and d are weighed against costs as they are. c_run is a replica's price
  for a slot, c_start that of a start.
- The sum over services has no term that couples them but the nodes' capacities; those are `autoscaler`'s, which gives every
  service its next instance in turn, where Algorithm 1 would give it to whichever gains most.

It frees idle instances every slot and has no headroom: it presumes that an instance starts at once. H stays at its floor until
tasks are late and grows by their lateness, so that tasks already lost weigh most.

Source: arXiv 2601.19563, (7), (11), (18)-(21), Algorithm 1; of its authors' code: epsilon 0.2, eta 1, floor 1, y_max 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

from orchestrator.core import Decision, Observation, Placement
from orchestrator.scaling import autoscaler
from orchestrator.scaling.autoscaler import Seen
from orchestrator.scaling.oracle import visits
from orchestrator.scaling.site import Site


@dataclass(frozen=True, slots=True)
class Algorithm1State:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None
    services: Mapping[str, float] = field(default_factory=dict)
    """H of a service's tasks, in units of time."""


@dataclass(frozen=True, slots=True)
class Algorithm1:
    """Parameters of the policy."""

    site: Site
    effective_capacity: bool = True
    """False: the mean rate instead."""
    epsilon: float = 0.2
    eta: float = 1.0
    phi: float = 1.0
    floor: float = 1.0
    y_max: int = 20
    window: float = 21.0
    """W, in mean service times; above `y_max`."""
    unit_s: float = 0.001
    state_type: ClassVar[type[Algorithm1State]] = Algorithm1State

    def initial(self) -> Algorithm1State:
        """State before the first slot."""
        return Algorithm1State()

    def step(self, state: Algorithm1State, observation: Observation) -> tuple[Algorithm1State, Decision]:
        """One slot; see `autoscaler`."""
        reached = [(promise.deadline_s, dict(visits(promise, self.site.laws))) for promise in self.site.promises.values()]

        def rule(h: float, seen: Seen) -> tuple[float, int]:
            law = self._law(seen)
            busy, queue = seen.busy, seen.signal.queue_length
            if law is None or busy is None or queue is None:
                return h, seen.wanted
            active = math.ceil(queue + busy - 1e-9)
            if not active:
                return self.floor, 1
            here_s = (seen.signal.wait_s or 0.0) + law[0]
            late_s = [way[seen.name] + here_s - deadline_s for deadline_s, way in reached if seen.name in way]
            h = max(h + max(late_s, default=0.0) / self.unit_s, self.floor)
            return h, self._instances(seen, active, h, self.delay(*law))

        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, self.floor, rule, observation
        )
        return Algorithm1State(placement, services), decision

    def delay(self, mean_s: float, cv2: float) -> Callable[[int], float]:
        """The delay of a stage [s], d(y), of a service with this law."""
        if not self.effective_capacity:
            return lambda y: y * mean_s
        return lambda y: mean_s + max(0.0, mean_s * cv2 * _quantile(y / self.window, self.epsilon))

    def _law(self, seen: Seen) -> tuple[float, float] | None:
        """Mean [s] and squared coefficient of variation: the profile's, else as measured."""
        law = self.site.laws.get(seen.name)
        if law is not None:
            return law.mean_s, law.cv2
        return None if seen.signal.service_s is None else (seen.signal.service_s, seen.signal.service_cv2 or 0.0)

    def _instances(self, seen: Seen, active: int, h: float, delay_s: Callable[[int], float]) -> int:
        cpus = next(service.cpus for service in self.site.services if service.name == seen.name)
        run = self.site.prices.cpu_second * cpus * self.site.slot_s
        n = max(1, min(seen.ready, active), math.ceil(active / self.y_max))
        while n < active:
            gain = self.phi * h * active * (delay_s(math.ceil(active / n)) - delay_s(math.ceil(active / (n + 1)))) / self.unit_s
            if gain <= self.eta * (run + (self.site.prices.start if n >= seen.wanted else 0.0)):
                break
            n += 1
        return n


@lru_cache(maxsize=1024)
def _quantile(u: float, epsilon: float) -> float:
    """The factor ln(u / epsilon) / (x u) of g, with ln(1 + x) = u x and 0 < u < 1, by bisection."""
    high = 1.0
    while math.log1p(high) > u * high:
        high *= 2.0
    low = 0.0
    while (middle := (low + high) / 2.0) not in (low, high):
        low, high = (middle, high) if math.log1p(middle) > u * middle else (low, middle)
    return math.log(u / epsilon) / (high * u)
