"""The controller of the light tier: as many replicas as the tail of the wait asks for, trimmed by what really was late.

Each slot, for every service:

1. **Load.** Arrivals are what ended plus what the backlog grew by, or what the gateways saw of its pipelines, whichever is
   more; `estimators.follow` turns them into a rate that is exact while it stays and anew when it jumps. Service times come from
   the profile until they have been measured.
2. **Promise.** `budgets.split` gives the stage a wait d and a share epsilon; the tail of effective capacity, v(n) of
   `effective_capacity`, says how many replicas keep them. Where it has nothing to say, square-root staffing stands in, and the
   decision says why.
3. **Two levels.** Enough replicas for the load that tasks met lately, but only as many of them at work as today's load needs;
   the rest on standby. Where standbys are let out by events (`services.dataplane.letting_out`) the ready ones only have to be
   so many that it happens seldom; where they wait for a slot, ready ones keep the promise alone, and standbys shorten a rise.
4. **Trim.** Drift plus penalty (`lyapunov`): replicas more as long as they are worth their price in backlog drained and in
   lateness avoided, weighed by the virtual queue of every pipeline's broken promises.
5. **Loosen.** The bound adds up worst cases, and is met by far. A pipeline that has broken less than half of what it may break
   for a while gives its stages more epsilon than their shares, until it breaks that half.
6. **Steady.** Where the load has not changed for a while and the promise is kept, what is wanted stays as it is, whatever the
   estimates' noise; a standby that is let out all the same is one too few at work, and they are raised. Nothing is given up as
   long as the load stays, so that it finds replicas that stay.
7. **Hold.** What is no longer wanted is given up only after it was too much for a while; a standby after as long as it costs as
   much to keep as to start again (ski rental: no more than twice the cost of knowing the future).

Then nodes: what runs stays, what is new goes where `autoscaler.place` puts it. Where not all fits, drift plus penalty decides
who goes without. Core services keep their replicas, the operator's orders outrank all, a silent service is held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from orchestrator.core import Decision, Observation, PipelineObservation, Placement, Service, Target
from orchestrator.errors import Infeasible
from orchestrator.placement.greedy import EPSILON
from orchestrator.scaling import autoscaler, budgets, effective_capacity, estimators, lyapunov, queueing
from orchestrator.scaling.budgets import Budget
from orchestrator.scaling.effective_capacity import Arrivals, NoBound, Prefactor
from orchestrator.scaling.estimators import Level, Rates, Served
from orchestrator.scaling.lyapunov import Demand
from orchestrator.scaling.site import Law, Site
from services.dataplane import letting_out

BROKEN = ("late", "expired", "rejected")
"""Outcomes that a pipeline's epsilon is held against."""
CORE_SHARE = 0.01
"""Of a core service's requests, that may wait longer than the others have to allow for."""
MOST_CREDIT = 1.5
"""More than counts, so that a promise broken now and then moves nothing."""
LEAST_CAP = 5.0
"""Broken promises [tasks] that all credit is good for, however few tasks there are."""
MOST_LET_OUT = 0.9
"""Share of tasks that may let a standby out, at most: with all of them there would be nobody at work."""
CERTIFIED = "certified"
NO_BUDGET = Budget(0.0, 1.0, 0.0)
NOT_MEASURED = effective_capacity.Service(1.0)

Wishes = tuple[tuple[float, int], ...]
"""(t, replicas): the wishes that may still be the largest of those to be held, the newest last."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of a service."""

    t: float | None = None
    """When it was seen last [s]."""
    queue: float = 0.0
    """Requests that waited then,"""
    backlog: float = 0.0
    """and of them, those that are not just passing: no fewer waited the time before."""
    load: Level = field(default_factory=Level)
    rates: Rates = field(default_factory=Rates)
    peak: int | None = None
    """Bin of the rate that all replicas together are for (`estimators.rate_of`)."""
    served: Served = field(default_factory=Served)
    law: effective_capacity.Service | None = None
    """What it is staffed by: follows what is measured in steps, so that noise moves nothing."""
    steady_since: float | None = None
    """When the load began to count as one that stays [s]; None while it does not."""
    level: int = 0
    """Replicas at work that the load asks for."""
    extra: int = 0
    """Replicas more, that standbys were let out for while the load did not change."""
    total: int = 0
    """Replicas, standbys included, that the peak asks for."""
    wishes: Wishes = ()
    """To be at work."""
    totals: Wishes = ()
    verdict: str = "no data"
    """`certified`, or what the bound lacks."""


@dataclass(frozen=True, slots=True)
class State:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None
    services: Mapping[str, Memory] = field(default_factory=dict)
    virtual_queues: Mapping[str, float] = field(default_factory=dict)
    """Z of every pipeline [tasks]."""
    credits: Mapping[str, float] = field(default_factory=dict)
    """What every pipeline has broken less than it may, as a share of what it may in `cap_s`; 0 to `MOST_CREDIT`."""
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    basis: Mapping[str, float] = field(default_factory=dict)
    """Service times that the budgets were made with [s]."""
    promised: Mapping[str, float] = field(default_factory=dict)
    """What the bound says of the share of each pipeline's tasks that will be late, with the replicas decided."""


@dataclass(frozen=True, slots=True)
class Lyapunov:
    """Parameters of the policy."""

    site: Site
    v: float = 50.0
    """V: how much a core for a second, or a start, counts against late tasks and backlog."""
    safety: float = 1.0
    """Every stage's epsilon, and `let_out_share`, is multiplied by this: below 1 to be safer; so large that no tail is asked
    for, and drift plus penalty decides alone."""
    loosest: float = 20.0
    """Stages of pipelines that break far less than they may are given up to so many times their epsilon; 1: their own."""
    loosest_steady: float = 5.0
    """The same where the rate stays the same: so near to what would do that a standby is not let out every other minute."""
    loosen_after_s: float = 2.0
    """Not before the rate has been the same for so long: the credit was earned under another [s]."""
    standby: bool = True
    """Whether to keep replicas on standby."""
    let_out: bool = True
    """Whether standbys are let out by events, between decisions."""
    let_out_share: float = 0.05
    """With it: share of tasks whose wait may be long enough to let out a standby."""
    virtual_queue: bool = True
    """Whether broken promises, and promises kept by far, are remembered."""
    mean_delay: bool = False
    """Staff by the mean of the wait instead of its tail (the paper's ablation)."""
    memory_s: float = 120.0
    """The rate is a mean over no more than this [s]."""
    peak_share: float = 0.05
    peak_s: float = 120.0
    """Rates that tasks met so long ago weigh 1/e in the peak [s]."""
    hold_s: float = 1.0
    """Replicas too many are at work for so long before they go to standby [s]."""
    steady_s: float = 40.0
    """A rate that has been the same for so long counts as one that stays [s]."""
    max_utilisation: float = 0.95
    """No fewer replicas at work than keep them idle for the rest of the time."""
    beta: float = 1.5
    """Of square-root staffing, where there is no bound."""
    prefactor: Prefactor = "erlang_c"
    cap_s: float = 10.0
    """A virtual queue holds at most as many tasks as come in so long [s]."""
    state_type: ClassVar[type[State]] = State

    def initial(self) -> State:
        """State before the first slot."""
        return State()

    def step(self, state: State, observation: Observation) -> tuple[State, Decision]:
        """One slot; see the module."""
        current = autoscaler.standing(state.placement, observation)
        came = self._came(observation.pipelines)
        services = {
            service.name: self._learn(service, state.services.get(service.name, Memory()), observation, came.get(service.name))
            for service in self.site.services
        }
        queues = self._queues(state.virtual_queues, observation.pipelines)
        credits = self._credits(state.credits, observation.pipelines)
        basis, shares = self._budgets(state, services, current)
        fresh = {name for name, memory in services.items() if memory.t == observation.t}
        asked: dict[str, Target] = {}
        demands: dict[str, Demand] = {}
        for service in self.site.services:
            name = service.name
            memory, budget = services[name], shares.get(name)
            if name in observation.orders:
                asked[name] = observation.orders[name]
            elif service.tier == "core":
                asked[name] = self.site.targets[name]
            elif name not in fresh or memory.load.rate is None or memory.law is None:
                now = current.target(name)
                asked[name] = Target(max(service.floor, now.replicas or self.site.targets[name].replicas), now.standby)
            else:
                demands[name] = self._demand(service, memory, budget, current, queues)
                loose = self._loosened(name, credits, memory.load.span_s)
                services[name], asked[name] = self._ask(service, memory, budget, demands[name], observation, loose)
        targets = autoscaler.clip(self.site, asked, current)
        short = [name for name in asked if asked[name] != targets[name]]
        if any(asked[name].replicas > targets[name].replicas for name in demands):
            targets = self._share_out(demands, asked, current)
        promised = self._promised(services, shares, targets)
        kept = State(state.placement, services, queues, credits, shares, basis, promised)
        if state.placement is not None and all(current.target(name) == target for name, target in targets.items()):
            desired = current
        else:
            try:
                desired = autoscaler.place(self.site, targets, current, spendable=self.let_out)
            except Infeasible as error:
                return kept, Decision(None, f"hold: {error}")
        desired = replace(desired, allowance=self._allowance(desired), patience=self._patience(services))
        return replace(kept, placement=desired), Decision(desired, self._reason(targets, current, short, services, demands))

    # --- what is known --------------------------------------------------------------------------------------------------------

    def _came(self, pipelines: Mapping[str, PipelineObservation]) -> dict[str, float]:
        """Requests that each service would get of what ended at the gateways, refused tasks included [req/s]."""
        came: dict[str, float] = {}
        for name, promise in self.site.promises.items():
            seen = pipelines.get(name)
            if seen is None or seen.interval_s <= 0.0 or seen.age_s > self.site.stale_after_s:
                continue
            rate = math.fsum(seen.outcomes.values()) / seen.interval_s
            for service in promise.services:
                came[service] = came.get(service, 0.0) + rate * promise.visits_of(service)
        return came

    def _learn(self, service: Service, memory: Memory, observation: Observation, came: float | None) -> Memory:
        """What this slot tells of a service; unchanged, but for `t`, where it is too soon to tell anything."""
        seen = observation.services.get(service.name)
        signal = seen.signal if seen is not None else None
        if signal is None or signal.age_s > self.site.stale_after_s:
            return memory
        if signal.arrival_rate is None or signal.queue_length is None:
            return memory
        prior = self.site.laws.get(service.name)
        if memory.t is None or observation.t <= memory.t:
            law, verdict = _law(memory, prior)
            return replace(memory, t=observation.t, queue=signal.queue_length, law=law, verdict=verdict)
        elapsed_s = observation.t - memory.t
        rate = max(0.0, signal.arrival_rate + (signal.queue_length - memory.queue) / elapsed_s, came or 0.0)
        served = memory.served
        if signal.service_s is not None:
            served = estimators.serve(
                served, signal.arrival_rate * elapsed_s, signal.service_s, signal.service_cv2, signal.batch_size
            )
        rates = memory.rates.add(rate, elapsed_s, self.peak_s)
        memory = replace(
            memory,
            t=observation.t,
            queue=signal.queue_length,
            backlog=min(memory.queue, signal.queue_length),
            load=estimators.follow(memory.load, rate, elapsed_s, self.memory_s),
            rates=rates,
            served=served,
        )
        law, verdict = _law(memory, prior)
        return replace(memory, law=law, verdict=verdict)

    def _queues(self, queues: Mapping[str, float], pipelines: Mapping[str, PipelineObservation]) -> dict[str, float]:
        if not self.virtual_queue:
            return {}
        found = dict(queues)
        for name, promise in self.site.promises.items():
            seen = pipelines.get(name)
            if seen is None or seen.interval_s <= 0.0:
                continue
            broken, ended = _kept(seen)
            cap = max(10.0, self.cap_s * ended / seen.interval_s, found.get(name, 0.0) * (1.0 - promise.epsilon))
            found[name] = lyapunov.virtual_queue(found.get(name, 0.0), broken, ended, promise.epsilon, cap)
        return found

    def _credits(self, credits: Mapping[str, float], pipelines: Mapping[str, PipelineObservation]) -> dict[str, float]:
        """A virtual queue the other way round: of what was not broken, though half of epsilon might have been."""
        if not self.virtual_queue or self.loosest <= 1.0:
            return {}
        found = dict(credits)
        for name, promise in self.site.promises.items():
            seen = pipelines.get(name)
            if seen is None or seen.interval_s <= 0.0:
                continue
            broken, ended = _kept(seen)
            may = self.safety * promise.epsilon * ended
            if may > 0.0:
                most = max(LEAST_CAP, self.cap_s * may / seen.interval_s)
                found[name] = min(MOST_CREDIT, max(0.0, found.get(name, 0.0) + (may / 2.0 - broken) / most))
        return found

    def _loosened(self, service: str, credits: Mapping[str, float], span_s: float) -> float:
        """Times its epsilon that a service is given whose rate has been the same for so long.

        As much as the pipeline allows that has the least to spare.
        """
        through = [name for name, promise in self.site.promises.items() if promise.visits_of(service)]
        spare = min((credits.get(name, 0.0) for name in through), default=0.0)
        if span_s < self.loosen_after_s or spare <= 0.0:
            return 1.0
        if span_s >= self.steady_s:
            return min(self.loosest, self.loosest_steady)
        return float(self.loosest ** min(1.0, spare))

    def _budgets(
        self, state: State, services: Mapping[str, Memory], current: Placement
    ) -> tuple[Mapping[str, float], Mapping[str, Budget]]:
        """Budgets, made anew when what is staffed by has changed."""
        basis = {name: memory.law.mean_s for name, memory in services.items() if memory.law is not None}
        if basis == state.basis:
            return state.basis, state.budgets
        stages: dict[str, budgets.Stage] = {}
        for service in self.site.services:
            memory = services[service.name]
            if memory.law is not None:
                fixed_s = self._wait_s(service, memory, current) if service.tier == "core" else None
                stages[service.name] = budgets.Stage(memory.law.mean_s, memory.law.cv2, service.cpus, fixed_s)
        return basis, budgets.split(self.site.promises, stages)

    def _wait_s(self, service: Service, memory: Memory, current: Placement) -> float:
        """The wait that a core service keeps with the replicas it has [s], but for `CORE_SHARE` of the requests."""
        peak = memory.rates.quantile(CORE_SHARE)
        if peak is None:
            return math.inf
        tail = self._tail(service, memory, 0.0, estimators.rate_of(peak))
        return tail.wait_s(current.target(service.name).replicas, CORE_SHARE)

    # --- what to ask for ------------------------------------------------------------------------------------------------------

    def _tail(self, service: Service, memory: Memory, wait_s: float, rate: float, sd: float = 0.0) -> Tail:
        prior = self.site.laws.get(service.name)
        law = memory.law or NOT_MEASURED
        arrivals = Arrivals(rate, memory.load.dispersion, sd)
        return Tail(arrivals, _batches(law, prior), prior.slots if prior is not None else 1, wait_s, self)

    def _demand(
        self, service: Service, memory: Memory, budget: Budget | None, current: Placement, queues: Mapping[str, float]
    ) -> Demand:
        """What more replicas than the level would be worth to a service."""
        law, rate, prices = memory.law or NOT_MEASURED, memory.load.rate or 0.0, self.site.prices
        slots = self._slots(service.name)
        fastest = min(_batches(law, self.site.laws.get(service.name)), key=lambda each: each.per_request_s)
        per_request_s = fastest.per_request_s / slots
        budget = budget or NO_BUDGET
        tail = self._tail(service, memory, budget.wait_s, rate)
        # A backlog that all replicas together end within the budget is what the budget is for.
        ready = max(1, current.target(service.name).replicas)
        behind = max(0.0, memory.backlog - ready * budget.wait_s / per_request_s)
        cost = self.v * prices.cpu_second * service.cpus
        weight = math.fsum(z * self.site.promises[name].visits_of(service.name) * rate for name, z in queues.items() if z > 0.0)
        loaded = {
            node: current.ready_on(service.name, node) + current.standby_on(service.name, node)
            for node in (*current.ready.get(service.name, {}), *current.standby.get(service.name, {}))
        }
        return Demand(
            service=service,
            floor=max(service.floor, math.ceil(rate * per_request_s / self.max_utilisation - 1e-9)),
            most=self._most(service.name, rate * per_request_s),
            running=loaded,
            work=behind + rate * self.site.slot_s,
            # At least what makes work that would be left behind worth a replica, whatever V.
            queue=max(behind, 1.001 * cost * per_request_s),
            served=self.site.slot_s / per_request_s,
            late_weight=weight * self.site.slot_s,
            late=tail.late,
            cost=cost * self.site.slot_s,
            start=self.v * prices.start,
        )

    def _ask(
        self,
        service: Service,
        memory: Memory,
        budget: Budget | None,
        demand: Demand,
        observation: Observation,
        loose: float,
    ) -> tuple[Memory, Target]:
        """What a service wants.

        Args:
            service: which.
            memory: what is known of it.
            budget: its share of what the pipelines promise.
            demand: what more replicas would be worth.
            observation: of this slot.
            loose: times its epsilon that it is given at work; standbys are for when that was too much.
        """
        name, load, t = service.name, memory.load, observation.t
        rate, error = load.rate or 0.0, load.standard_error
        peak = memory.rates.quantile(self.peak_share, memory.peak)
        verdict = memory.verdict

        def least(rate: float, sd: float, epsilon: float, wait_s: float) -> int:
            """Replicas for such a load: by the tail where there is one."""
            nonlocal verdict
            if budget is not None:
                found = self._tail(service, memory, wait_s, rate, sd).least(epsilon, demand.most)
                if not isinstance(found, NoBound):
                    return found
                if verdict == CERTIFIED:
                    verdict = found.reason
                if found.reason == "out of reach" and name in self.site.most:
                    return demand.most
            law = memory.law or NOT_MEASURED
            return min(demand.most, queueing.square_root_staffing(rate * law.per_request_s / self._slots(name), self.beta))

        share = budget or NO_BUDGET
        epsilon = min(1.0, self.safety * budget.epsilon) if budget is not None else 1.0
        spends = self.standby and self.let_out
        if spends:
            seldom = min(MOST_LET_OUT, loose * self.safety * self.let_out_share)

            def wanted(rate: float) -> int:
                return least(rate, 0.0, seldom, letting_out.SHARE * share.even_s)
        else:
            start_s = 0.0 if self.standby else self._start_s(name)
            sd = effective_capacity.over_delay(math.sqrt(load.error_variance), self.site.slot_s, start_s)

            def wanted(rate: float) -> int:
                return least(rate, sd, min(1.0, loose * epsilon), share.wait_s)

        since = None if load.span_s < self.steady_s else t if memory.steady_since is None else memory.steady_since
        # What moves while the load stays and the promise is kept is the estimates' noise; a standby let out tells of more.
        calm = memory.steady_since is not None and since is not None and loose > 1.0
        level, said = wanted(rate), verdict
        level = memory.level if calm else max(level, min(memory.level, wanted(rate + 2.0 * error)))
        verdict = said
        extra = memory.extra if since is not None else 0
        if since is not None and name in observation.services and any(observation.services[name].let_out.values()):
            extra += max(1, round(math.sqrt(level) / 2.0))
        level += extra
        total = level
        if self.standby:
            high = estimators.rate_of(peak) if peak is not None else rate
            total = max(0 if calm else least(high, 0.0, epsilon, share.wait_s), level + spends)
        chosen = lyapunov.alone(replace(demand, floor=min(demand.most, max(demand.floor, level))))
        stays_s = 0.0 if since is None else t - since
        wishes, ready = _held(memory.wishes, t, chosen, max(self.hold_s, stays_s))
        price = self.site.prices.cpu_second * service.cpus * (self.site.prices.standby_fraction if self.standby else 1.0)
        keep_s = max(self.hold_s, self.site.prices.start / price if price > 0.0 else math.inf)
        totals, total = _held(memory.totals, t, max(total, ready), max(keep_s, stays_s))
        most = demand.most
        ready = min(most, ready if self.standby else total)
        memory = replace(
            memory,
            peak=peak,
            steady_since=since,
            level=level - extra,
            extra=extra,
            wishes=wishes,
            totals=totals,
            verdict=verdict,
        )
        return memory, Target(ready, max(0, min(total, most) - ready) if self.standby else 0)

    def _share_out(self, demands: Mapping[str, Demand], asked: Mapping[str, Target], current: Placement) -> dict[str, Target]:
        """Not all fits: replicas go where they are worth most."""
        wanted = []
        for name, demand in demands.items():
            goal, cost = asked[name].replicas, demand.cost
            gain = demand.late(goal - 1) - demand.late(goal) if goal > 0 else 0.0
            # What the tail alone asked for is worth its price, and no more.
            weight = demand.late_weight + cost / max(gain, 1e-3)
            floor = demand.service.floor
            wanted.append(replace(demand, floor=floor, most=max(goal, floor), late_weight=weight, start=0.0))
        others = [service for service in self.site.services if service.name not in demands]
        chosen = lyapunov.choose(wanted, self.site.nodes, self._reserved(others, asked, current))
        fewer = {name: replace(target, replicas=chosen[name]) if name in chosen else target for name, target in asked.items()}
        return autoscaler.clip(self.site, fewer, current)

    def _reserved(
        self, services: list[Service], asked: Mapping[str, Target], current: Placement
    ) -> list[tuple[Service, Mapping[str, int]]]:
        """Where replicas go that load has no say in: those that run stay, and what is ordered besides goes where it fits."""
        room = lyapunov.Room(self.site.nodes)
        found: list[tuple[Service, Mapping[str, int]]] = []
        for service in services:
            held: dict[str, int] = {}
            stay = [node for node, n in current.ready.get(service.name, {}).items() for _ in range(n)]
            for i in range(asked[service.name].replicas):
                node = stay[i] if i < len(stay) else room.best(service, held)
                if node is not None:
                    room.take(service, node)
                    held[node] = held.get(node, 0) + 1
            found.append((service, held))
        return found

    def _slots(self, name: str) -> int:
        prior = self.site.laws.get(name)
        return prior.slots if prior is not None else 1

    def _start_s(self, name: str) -> float:
        prior = self.site.laws.get(name)
        return prior.start_s if prior is not None else Law(0.0).start_s

    def _most(self, name: str, offered: float) -> int:
        return self.site.most.get(name, math.ceil(4.0 * offered) + 32)

    # --- what is told ---------------------------------------------------------------------------------------------------------

    def _allowance(self, placement: Placement) -> dict[str, int]:
        """Standbys that the nodes have cores for; whether one that is let out has them is checked again then."""
        if not (self.standby and self.let_out):
            return {}
        left = {node.name: node.cpus + EPSILON for node in self.site.nodes}
        for service in self.site.services:
            for node, count in placement.ready.get(service.name, {}).items():
                if node in left:
                    left[node] -= count * service.cpus
        allowed: dict[str, int] = {}
        for service in self.site.services:
            for node, idle in placement.standby.get(service.name, {}).items():
                count = min(idle, math.floor(left.get(node, 0.0) / service.cpus)) if service.tier == "light" else 0
                if count > 0:
                    allowed[service.name] = allowed.get(service.name, 0) + count
                    left[node] -= count * service.cpus
        return allowed

    def _patience(self, services: Mapping[str, Memory]) -> dict[str, float]:
        """Where the load stays the same, the data plane need not take a single wait for the beginning of a burst."""
        if not (self.standby and self.let_out):
            return {}
        return {name: letting_out.PATIENT_SHARE for name, memory in services.items() if memory.steady_since is not None}

    def _promised(
        self, services: Mapping[str, Memory], shares: Mapping[str, Budget], targets: Mapping[str, Target]
    ) -> dict[str, float]:
        late: dict[str, float] = {}
        stages: dict[str, budgets.Stage] = {}
        for service in self.site.services:
            name = service.name
            memory, budget = services[name], shares.get(name)
            if budget is None or memory.law is None or memory.load.rate is None:
                continue
            stages[name] = budgets.Stage(memory.law.mean_s, memory.law.cv2, service.cpus)
            target = targets[name]
            replicas = target.replicas + (target.standby if self.let_out else 0)
            late[name] = self._tail(service, memory, budget.wait_s, memory.load.rate).late(replicas)
        return {name: budgets.promised(promise, late, stages) for name, promise in self.site.promises.items()}

    def _reason(
        self,
        targets: Mapping[str, Target],
        current: Placement,
        short: list[str],
        services: Mapping[str, Memory],
        demands: Mapping[str, Demand],
    ) -> str:
        changed = autoscaler.changes(targets, current)
        reason = f"change: {changed}" if changed else "no change"
        if short:
            reason += f"; no room for all of {', '.join(short)}"
        doubts: dict[str, list[str]] = {}
        for name in demands:
            if services[name].verdict != CERTIFIED:
                doubts.setdefault(services[name].verdict, []).append(name)
        if doubts:
            told = (f"{', '.join(names)} ({why})" for why, names in doubts.items())
            reason += f"; not certified: {', '.join(told)}"
        return reason


@dataclass(frozen=True, slots=True)
class NoLyapunov(Lyapunov):
    """The same without memory of broken promises."""

    virtual_queue: bool = False


@dataclass(frozen=True, slots=True)
class MeanDelay(Lyapunov):
    """The same with the mean of the wait instead of its tail: PropAvg of the paper."""

    mean_delay: bool = True


@dataclass(frozen=True, slots=True)
class Tail:
    """How late the requests of a service would be with so many replicas."""

    arrivals: Arrivals
    laws: tuple[effective_capacity.Service, ...]
    """One for each size of batches that may be computed; the best of them counts."""
    slots: int
    """Batches that a replica computes at once."""
    budget_s: float
    policy: Lyapunov

    def late(self, replicas: int) -> float:
        """The value v(n)."""
        return min(self._late(law, replicas) for law in self.laws)

    def _late(self, law: effective_capacity.Service, replicas: int) -> float:
        budget_s = self._budget_s(law)
        if self.policy.mean_delay:
            offered, servers = self.arrivals.rate * law.per_request_s, replicas * self.slots
            if offered >= servers:
                return 1.0 if offered > 0.0 else 0.0
            # Markov's inequality: P(W > d) <= E W / d.
            mean_s = queueing.mmc_mean_wait_s(self.arrivals.rate, law.per_request_s, servers)
            return min(1.0, mean_s / budget_s) if budget_s > 0.0 else 1.0
        return effective_capacity.late_probability(
            self.arrivals, law, replicas * self.slots, budget_s, prefactor=self.policy.prefactor
        )

    def wait_s(self, replicas: int, epsilon: float) -> float:
        """The wait that a share epsilon exceeds [s]; infinite without enough replicas."""
        servers, law = replicas * self.slots, min(self.laws, key=lambda each: each.per_request_s)
        eta = effective_capacity.decay(self.arrivals, law, servers)
        waits = effective_capacity.waits(self.arrivals, law, servers, self.policy.prefactor)
        if eta <= 0.0 or math.isinf(eta):
            return 0.0 if eta > 0.0 else math.inf
        return max(0.0, math.log(waits / epsilon) / eta) if waits > 0.0 else 0.0

    def least(self, epsilon: float, most: int) -> int | NoBound:
        """The fewest replicas that keep epsilon; by the mean: that keep the mean wait within the budget."""
        found: list[int | NoBound] = []
        for law in self.laws:
            if self.policy.mean_delay:
                start = math.floor(self.arrivals.rate * law.per_request_s / self.slots)
                kept = next((n for n in range(start, most + 1) if self._late(law, n) < 1.0), None)
                found.append(NoBound("out of reach", "the mean wait is too long") if kept is None else kept)
            else:
                servers = effective_capacity.least_replicas(
                    self.arrivals, law, self._budget_s(law), epsilon, most=most * self.slots, prefactor=self.policy.prefactor
                )
                found.append(servers if isinstance(servers, NoBound) else math.ceil(servers / self.slots))
        counts = [each for each in found if not isinstance(each, NoBound)]
        return min(counts) if counts else found[0]

    def _budget_s(self, law: effective_capacity.Service) -> float:
        """What is left to wait when a batch takes longer than a request alone."""
        return max(0.0, self.budget_s - (law.mean_s - self.laws[0].mean_s))


def _kept(seen: PipelineObservation) -> tuple[float, float]:
    """Tasks of a slot whose promise was broken, and all of them."""
    broken = math.fsum(seen.outcomes.get(outcome, 0.0) for outcome in BROKEN)
    return broken, math.fsum(count for outcome, count in seen.outcomes.items() if outcome != "cancelled")


STEP = 0.05
"""By how much a service time has to have moved for staffing to follow it, as a share of it."""
HEAVY = 4.0
"""A squared coefficient of variation beyond which a tail is no longer taken for one that falls exponentially."""


def _law(memory: Memory, prior: Law | None) -> tuple[effective_capacity.Service | None, str]:
    """The law of a request that is computed alone, and what can be said for it."""
    served = memory.served
    if served.samples < estimators.LEAST_SAMPLES:
        if prior is not None:
            return effective_capacity.Service(prior.mean_s, prior.cv2), "few samples"
        if served.samples <= 0.0:
            return None, "no data"
        return effective_capacity.Service(served.mean_s, 1.0), "few samples"
    alone = prior.batch_s(1.0) / prior.batch_s(max(1.0, served.batch)) if prior is not None else 1.0 / max(1.0, served.batch)
    mean_s = served.mean_s * alone
    cv2 = served.cv2
    verdict = CERTIFIED if cv2 is not None and cv2 <= HEAVY else "heavy tail" if cv2 is not None else "few samples"
    if cv2 is None:
        cv2 = prior.cv2 if prior is not None else 1.0
    known = memory.law
    if known is not None:
        moved = abs(mean_s - known.mean_s) > STEP * known.mean_s or abs(cv2 - known.cv2) > max(0.1, 4.0 * STEP * known.cv2)
        if not moved:
            return known, verdict
    return effective_capacity.Service(mean_s, cv2), verdict


def _batches(law: effective_capacity.Service, prior: Law | None) -> tuple[effective_capacity.Service, ...]:
    """The law with batches of 1, 2, 4, ... up to the largest."""
    if prior is None or prior.max_batch <= 1 or prior.mean_s <= 0.0:
        return (law,)
    scale = law.mean_s / prior.mean_s
    sizes = [2**k for k in range(prior.max_batch.bit_length()) if 2**k <= prior.max_batch]
    return tuple(effective_capacity.Service(scale * prior.batch_s(size), law.cv2, size) for size in sizes)


def _held(wishes: Wishes, t: float, wish: int, hold_s: float) -> tuple[Wishes, int]:
    """The largest wish of the last `hold_s`; of the wishes before, those that may still be the largest are kept."""
    kept = (*((then, n) for then, n in wishes if t - then < hold_s and n > wish), (t, wish))
    return kept, kept[0][1]
