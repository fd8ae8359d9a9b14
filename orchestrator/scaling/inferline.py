"""After InferLine: a planner that knows a sample of the load, and a tuner that watches for load the plan was not made for.

**Planner**, once. From the stable minimum it adds replicas where utilisation is highest until the estimated tail latency of
every path is within its deadline, and then takes away the dearest replica that the estimate can spare, again and again.
**Tuner**, every slot. The plan's envelope is the most that came in any window of 1, 2, 4, ... slots, up to a minute:

    a window that ends now exceeds it:  k = ceil(r_max / (mu rho_m)),  rho_m = lambda / (k_m mu) as planned
    else, 15 s after the last change:   k = ceil(r_new / (mu rho_p)),  rho_p the least rho_m of its pipelines

with r_new the most that came in 5 s within the last 30 s. Growth acts at once; shrinking waits for its pipelines to settle.

Like the paper's in rule and constants, different in what it has to work with. The finest window is a slot of the control loop
(theirs: the service time of the pipeline). Arrivals are counted at each service, where theirs are counted at the pipeline's
entry and multiplied by the share s_m that reaches the service. Replicas have one size and form batches themselves, so that of
the planner's three moves (batch size, hardware, replicas) only the last remains. Its estimator replays the sample in a
simulation; here the tail is estimated from the sample's mean rate and dispersion and the services' laws: the quantile of
compute (`budgets.slacks_s`), plus for every light service the wait that is exceeded with probability epsilon. Without a sample,
the first minute seen is the sample, and until then nothing changes. A service that is neither profiled nor measured by then is
left alone.

Source: Crankshaw, Sela, Mo, Zumar, Stoica, Gonzalez, Tumanov, InferLine, SoCC 2020 (arXiv 1812.01776v2), sections 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from orchestrator.core import Decision, Observation, Placement
from orchestrator.scaling import autoscaler, budgets, effective_capacity, estimators
from orchestrator.scaling.autoscaler import Seen
from orchestrator.scaling.budgets import Stage
from orchestrator.scaling.effective_capacity import Arrivals, Service
from orchestrator.scaling.envelope import envelope, peak
from orchestrator.scaling.site import Law, Site


@dataclass(frozen=True, slots=True)
class Planned:
    """What the planner decided for a service, and for which load."""

    replicas: int
    per_request_s: float
    """1 / mu: what a request takes of a replica [s]."""
    rate: float
    """lambda of the sample [req/s]."""
    envelope: tuple[float, ...]
    """The sample's largest rate in 1, 2, 4, ... slots [req/s]."""

    @property
    def provisioning(self) -> float:
        """rho_m, the utilisation that the plan holds to be enough; 0 of a sample without arrivals."""
        return self.rate * self.per_request_s / self.replicas


@dataclass(frozen=True, slots=True)
class InferLineMemory:
    """Of one service."""

    t: float | None = None
    """When it was seen last [s]."""
    queue: float = 0.0
    """Tasks that waited then."""
    rates: tuple[float, ...] = ()
    """Arrivals of the last slots, over a slot's length [req/s]."""
    changed: float | None = None
    """When its replicas were changed last, by the plan or since [s]."""


@dataclass(frozen=True, slots=True)
class InferLineState:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None
    services: Mapping[str, InferLineMemory] = field(default_factory=dict)
    began: float | None = None
    """First slot [s]."""
    planned: Mapping[str, Planned] = field(default_factory=dict)
    """Empty until there is a sample."""


@dataclass(frozen=True, slots=True)
class InferLine:
    """Parameters of the policy."""

    site: Site
    sample: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """service -> arrivals in each slot of the load that is planned for; empty: what is seen first."""
    window_s: float = 60.0
    """The longest window of the envelope; of what is seen first, so much is the sample [s]."""
    settle_s: float = 15.0
    """After a change of any service of a pipeline, none of them shrinks [s]."""
    recent_s: float = 30.0
    recent_window_s: float = 5.0
    pipeline_wide: bool = True
    """Shrinks by the least utilisation planned in its pipelines, as the paper does; False: by its own. With whole replicas of
    very unequal services, the first hardly ever shrinks."""
    state_type: ClassVar[type[InferLineState]] = InferLineState

    def initial(self) -> InferLineState:
        """State before the first slot."""
        return InferLineState()

    def step(self, state: InferLineState, observation: Observation) -> tuple[InferLineState, Decision]:
        """One slot; see `autoscaler`."""
        began = observation.t if state.began is None else state.began
        planned = state.planned or self._plan(state, observation, observation.t - began)

        def rule(memory: InferLineMemory, seen: Seen) -> tuple[InferLineMemory, int]:
            memory = self._record(memory, seen)
            if seen.name not in planned:
                return memory, seen.wanted
            if memory.changed is None:
                return replace(memory, changed=seen.t), planned[seen.name].replicas
            wanted = self._tuned(planned, state.services, memory, seen)
            return (memory if wanted == seen.wanted else replace(memory, changed=seen.t)), wanted

        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, InferLineMemory(), rule, observation
        )
        return InferLineState(placement, services, began, planned), decision

    def _plan(self, state: InferLineState, observation: Observation, seen_s: float) -> dict[str, Planned]:
        if self.sample:
            rates = {name: [count / self.site.slot_s for count in counts] for name, counts in self.sample.items()}
        elif seen_s >= self.window_s:
            rates = {name: list(memory.rates) for name, memory in state.services.items()}
        else:
            return {}
        return plan(self.site, rates, _laws(self.site, observation))

    def _slots(self, seconds: float) -> int:
        return max(1, round(seconds / self.site.slot_s))

    def _record(self, memory: InferLineMemory, seen: Seen) -> InferLineMemory:
        """Arrivals are what ended plus what the queue grew by."""
        ended, queue = seen.signal.arrival_rate, seen.signal.queue_length
        if ended is None or queue is None:
            return memory
        if memory.t is None or seen.t <= memory.t:
            return replace(memory, t=seen.t, queue=queue)
        came = max(0.0, ended + (queue - memory.queue) / (seen.t - memory.t))
        return replace(memory, t=seen.t, queue=queue, rates=(*memory.rates, came)[-self._slots(self.window_s) :])

    def _tuned(
        self, planned: Mapping[str, Planned], memories: Mapping[str, InferLineMemory], memory: InferLineMemory, seen: Seen
    ) -> int:
        mine = planned[seen.name]
        # A window that exceeds the plan is seen when it ends; what ended earlier is no reason to grow again.
        now = (peak(memory.rates[-(2**i) :], 2**i) for i in range(len(memory.rates).bit_length()))
        over = [rate for rate, allowed in zip(now, mine.envelope, strict=False) if rate > allowed * (1.0 + 1e-9)]
        needed = _replicas(max(over, default=0.0), mine, mine.provisioning)
        if needed >= seen.wanted:
            return needed
        peers = _peers(self.site, seen.name) & planned.keys() & memories.keys()
        if any(seen.t - (memories[name].changed or 0.0) < self.settle_s - 1e-9 for name in peers):
            return seen.wanted
        recent = peak(memory.rates[-self._slots(self.recent_s) :], self._slots(self.recent_window_s))
        least = min(planned[name].provisioning for name in peers) if self.pipeline_wide else mine.provisioning
        needed = max(1, needed, _replicas(recent, mine, least))
        return min(seen.wanted, needed)


def _replicas(rate: float, planned: Planned, provisioning: float) -> int:
    """The count k = ceil(r / (mu rho)); as planned where the plan knows no load."""
    if provisioning <= 0.0:
        return planned.replicas if rate > 0.0 else 0
    return math.ceil(rate * planned.per_request_s / provisioning - 1e-9)


def _peers(site: Site, name: str) -> set[str]:
    """The services of every pipeline that visits this one, and itself."""
    visiting = [promise for promise in site.promises.values() if any(name in path for path in promise.paths)]
    return {name}.union(*(path for promise in visiting for path in promise.paths))


def _laws(site: Site, observation: Observation) -> dict[str, Law]:
    """Profiles, and where there is none what was measured."""
    laws = dict(site.laws)
    for name, seen in observation.services.items():
        if name not in laws and seen.signal is not None and seen.signal.service_s:
            laws[name] = Law(seen.signal.service_s / (seen.signal.batch_size or 1.0), seen.signal.service_cv2 or 0.0)
    return laws


# --- the planner ----------------------------------------------------------------------------------------------------------


def plan(site: Site, rates: Mapping[str, Sequence[float]], laws: Mapping[str, Law]) -> dict[str, Planned]:
    """The fewest replicas, in cores, that the greedy search finds to keep every promise that can be kept.

    About (replicas + services) steps, each a look at every path.

    Args:
        site: light services are planned for; core services are there and never wait.
        rates: service -> the sample [req/s], a value per slot; services without one are not planned for.
        laws: by service; services without one are not planned for.
    """
    light = {s.name: s for s in site.services if s.tier == "light" and s.name in laws and len(rates.get(s.name, ())) > 0}
    arrivals = {name: _arrivals(rates[name], site.slot_s) for name in light}
    work = {name: Service(_per_request_s(laws[name]), laws[name].cv2) for name in light}
    stages = {s.name: Stage(laws[s.name].mean_s, laws[s.name].cv2, s.cpus) for s in site.services if s.name in laws}
    least = {name: max(1, light[name].floor, math.floor(arrivals[name].rate * work[name].mean_s) + 1) for name in light}
    least = {name: min(replicas, site.most.get(name, replicas)) for name, replicas in least.items()}
    chosen = dict(least)
    paths = [
        _Path(services, slack_s, promise.epsilon)
        for promise in site.promises.values()
        for services, slack_s in zip(promise.paths, budgets.slacks_s(promise, stages), strict=True)
        if slack_s > 0.0  # else no number of replicas keeps it
    ]
    known: dict[tuple[str, int, float], float] = {}

    def wait_s(name: str, epsilon: float) -> float:
        key = (name, chosen[name], epsilon)
        if key not in known:
            known[key] = _wait_s(arrivals[name], work[name], chosen[name], epsilon)
        return known[key]

    def late(path: _Path) -> bool:
        return sum(wait_s(name, path.epsilon) for name in path.services if name in light) > path.slack_s + 1e-12

    def utilisation(name: str) -> float:
        return arrivals[name].rate * work[name].mean_s / chosen[name]

    while broken := [path for path in paths if late(path)]:
        growing = {n for path in broken for n in path.services if n in light and chosen[n] < site.most.get(n, math.inf)}
        if not growing:
            break
        chosen[max(sorted(growing), key=lambda n: (utilisation(n), -light[n].cpus))] += 1
    # What cannot be spared now cannot be spared later: others only get fewer.
    spare = [] if broken else [name for name in light if chosen[name] > least[name]]
    while spare:
        name = max(spare, key=lambda n: (light[n].cpus, -utilisation(n)))
        chosen[name] -= 1
        if any(late(path) for path in paths if name in path.services):
            chosen[name] += 1
            spare.remove(name)
        elif chosen[name] == least[name]:
            spare.remove(name)
    return {n: Planned(chosen[n], work[n].mean_s, arrivals[n].rate, envelope(rates[n])) for n in light}


@dataclass(frozen=True, slots=True)
class _Path:
    services: tuple[str, ...]
    slack_s: float
    """What its services may make a task wait in all [s]."""
    epsilon: float


def _per_request_s(law: Law) -> float:
    return law.batch_s(law.max_batch) / (law.max_batch * law.slots)


def _arrivals(rates: Sequence[float], slot_s: float) -> Arrivals:
    mean = math.fsum(rates) / len(rates)
    spread = estimators.dispersion([rate * slot_s for rate in rates])
    return Arrivals(mean, max(1.0, spread) if isinstance(spread, float) else 1.0)


def _wait_s(arrivals: Arrivals, service: Service, replicas: int, epsilon: float) -> float:
    """The wait that is exceeded with probability epsilon [s]: where gamma exp(-eta d) = epsilon."""
    waiting = effective_capacity.waits(arrivals, service, replicas, "erlang_c")
    if waiting <= epsilon:
        return 0.0
    eta = effective_capacity.decay(arrivals, service, replicas)
    return math.log(waiting / epsilon) / eta if eta > 0.0 else math.inf
