"""A simulated testbed with the two verbs of the live edges, `observe` and `apply`, in virtual time.

It owns queues, links and clocks. Every rule is the live system's own, by import: which task is computed next and which is
dropped (`services.dataplane.batching`), what a batch is expected to take (`service_time`), who a hop goes to and who is ejected
(`routing`), who is let in (`admission`), when a standby is let out (`letting_out`), where a pipeline is cut (`pipeline`), what
starts and stops in which order (`orchestrator.runtimes.reconcile`), what is seen (`orchestrator.telemetry.sources`), what it
costs (`orchestrator.costs`) and how a task ended (`loadgen.outcome`). What the live gateway and stages do around those rules
(`services.gateway.walk`, `services.forward`, `services.stage.worker`) is asynchronous I/O, and stands here as events.
docs/simulator.md tells what is left out.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from loadgen.outcome import OUTCOMES, Hop, Outcome, TaskRecord, classify
from orchestrator import core, costs
from orchestrator.core import Observation, Placement
from orchestrator.costs import Cost
from orchestrator.runtimes.reconcile import EPSILON, Change, Start, reconcile
from orchestrator.simulator import laws
from orchestrator.simulator.faults import Fault, LinkFault, Loss, Silence
from orchestrator.simulator.ingredients import ALL, Ingredients
from orchestrator.simulator.kernel import LAST, URGENT, Kernel
from orchestrator.simulator.plans import Plan, Routed, Stream, Wire
from orchestrator.simulator.replica import Batch, Caller, Replica, Task, Walk
from orchestrator.simulator.world import World
from orchestrator.telemetry import sources
from orchestrator.telemetry.exposition import Key, Sample
from orchestrator.telemetry.sources import Endpoint, Source
from services.dataplane import admission, letting_out
from services.dataplane.batching import Waiting, batch_units, next_batch
from services.dataplane.routing import MAX_CANDIDATES

GATEWAY = Endpoint("gateway", "")
_TRIES = 2
"""Candidates that one call may try, as in `services.forward`."""

_NOTHING_AFTER = (0.0,)
"""What a single segment leaves to be done [s]."""
Status = Literal[200, 429, 502, 503, 504]


class SimulatedTestbed:
    """See the module. Everything happens inside `kernel.run`; `apply` takes effect at the kernel's present instant.

    Args:
        kernel: the clock.
        world: what is simulated.
        arrivals: pipeline -> times of its tasks [s], ascending, as `loadgen.arrivals` draws them.
        seed: of service times and of the router's draws.
        initial: what is ready and on standby at the beginning; starting it is not counted.
        sample_every_s: between two samples of every replica's metrics.
        measured_from_s: instant [s] from which cost, replicas and tasks count in `measured`, `cost`, `replica_seconds`,
            `starts` and `let_out`.
        ingredients: rules of the data plane that are in use.
        keep_records: keep a record of every task, in `records`.
    """

    def __init__(
        self,
        kernel: Kernel,
        world: World,
        arrivals: Mapping[str, Sequence[float]],
        *,
        seed: int,
        initial: Placement,
        sample_every_s: float = 1.0,
        measured_from_s: float = 0.0,
        ingredients: Ingredients = ALL,
        keep_records: bool = False,
    ) -> None:
        self.kernel, self.world = kernel, world
        self.cost = Cost()
        self.starts = 0
        self.let_out = 0
        """Standbys that the gateway put to work by itself."""
        self.visits = 0
        """Tasks computed, counted at every stage."""
        self.in_flight = 0
        self.outcomes: dict[str, dict[Outcome, int]] = {name: dict.fromkeys(OUTCOMES, 0) for name in world.pipelines}
        """How the tasks of each pipeline ended, so far: what the gateway's counters show."""
        self.measured = {name: dict(counts) for name, counts in self.outcomes.items()}
        """The same of tasks scheduled in the measured part."""
        self.records: list[TaskRecord] | None = [] if keep_records else None
        self.replica_seconds = 0.0
        """Integral of the number of ready replicas."""
        self._plans = {name: Plan(pipeline, world) for name, pipeline in world.pipelines.items()}
        self._wires = {pair: Wire(link) for pair, link in world.links.items()}
        self._speeds = {node.name: world.speeds.get(node.name, 1.0) for node in world.nodes}
        self._factors = {
            name: laws.endless(stage.noise, laws.stream(seed, f"service/{name}")) for name, stage in world.stages.items()
        }
        self._rng = random.Random(int(laws.stream(seed, "routing").integers(2**63)))
        self._gateway = Caller(world.gateway_node or world.nodes[0].name)
        self._services, self._nodes = world.services, {node.name: node for node in world.nodes}
        self._replicas: dict[str, Replica] = {}
        self._routed: dict[str, Routed] = {}
        self._published: tuple[core.Replica, ...] = ()
        self._numbers = {name: itertools.count() for name in world.stages}
        self._desired: Placement | None = None
        self._settled: Placement | None = None
        """What nothing is left to be done for, as long as no replica changes."""
        self._ingredients, self._sheds = ingredients, ingredients.shedding
        self._standbys: dict[str, dict[str, Replica]] = {name: {} for name in world.stages}
        self._let_out: dict[str, Replica] = {}
        """Let out since the last decision, and still there."""
        self._allowance: dict[str, int] = {}
        """What is left of it."""
        self._cramped: set[str] = set()
        """Services none of whose standbys has room to work, as long as no replica changes."""
        self._lost: set[str] = set()
        self._cuts: set[tuple[str, str]] = set()
        self._silences: list[Silence] = []
        self._accounted_t, self._accounted_starts = kernel.now, 0
        self._sources: dict[Endpoint, Source] = {}
        self._samples: dict[Endpoint, Sample] = {}
        self._sample_every_s, self._measured_from_s = sample_every_s, measured_from_s
        self._place(initial)
        self._schedule(arrivals)
        lag_s = world.delays.metric_lag_s
        first = math.floor(lag_s / sample_every_s) + 1
        kernel.at(first * sample_every_s - lag_s, self._sample, priority=URGENT)
        kernel.at(measured_from_s, self._measure, priority=URGENT)

    # --- the two verbs ----------------------------------------------------------------------------------------------------

    def observe(self) -> Observation:
        """What is known now: the newest samples that have come in."""
        t, replicas = self.kernel.now, self.replicas()
        endpoints = [*sources.sampled(replicas), GATEWAY]
        self._sources = {endpoint: self._sources.get(endpoint) or Source(t) for endpoint in endpoints}
        for endpoint, source in self._sources.items():
            source.begin()
            if endpoint in self._samples:
                source.take(self._samples[endpoint])
        return sources.observe(t, t, replicas, [GATEWAY], self._sources)

    def apply(self, desired: Placement) -> None:
        """Make it the target and take the first steps towards it; the rest follows as replicas change state.

        What has been let out is confirmed where the target wants it at work, and else taken back.
        """
        for replica in self._let_out.values():
            replica.view = replace(replica.view, let_out=False)
        self._let_out = {}
        if not self._ingredients.standby:
            desired = Placement(desired.ready)
        self._allowance = dict(desired.allowance) if self._ingredients.let_out else {}
        self._desired = desired
        self._changed()

    def replicas(self) -> tuple[core.Replica, ...]:
        """What runs now, by id."""
        return tuple(replica.view for _, replica in sorted(self._replicas.items()))

    def account(self) -> None:
        """Add what the testbed has cost since this was called last."""
        elapsed_s, views = self.kernel.now - self._accounted_t, self.replicas()
        self.cost += costs.of_slot(views, elapsed_s, self.starts - self._accounted_starts, self.world.prices)
        self.replica_seconds += elapsed_s * sum(view.state == "ready" for view in views)
        self._accounted_t, self._accounted_starts = self.kernel.now, self.starts

    def _measure(self, _: None) -> None:
        """The measured part begins."""
        self.account()
        self.cost, self.replica_seconds = Cost(), 0.0
        self.starts = self._accounted_starts = self.let_out = 0

    # --- faults -----------------------------------------------------------------------------------------------------------

    def plan_fault(self, fault: Fault) -> None:
        """Let a fault happen when it is due.

        Raises:
            ValueError: there is no such node or link.
        """
        at = self.kernel.at
        match fault:
            case Loss(node, time, back):
                if node not in self._nodes:
                    raise ValueError(f"there is no node {node!r} to lose; there are {', '.join(self._nodes)}")
                at(time, self._lose_node, node, URGENT)
                if back < math.inf:
                    at(back, self._return_node, node, URGENT)
            case LinkFault(a, b, from_s, until_s):
                if (a, b) not in self._wires or (b, a) not in self._wires:
                    raise ValueError(f"there is no link between {a!r} and {b!r}")
                at(from_s, self._begin_fault, fault, URGENT)
                if until_s < math.inf:
                    at(until_s, self._end_fault, fault, URGENT)
            case Silence():
                self._silences.append(fault)

    def _lose_node(self, node: str) -> None:
        self.account()
        self._touch()
        self._lost.add(node)
        self._end_replicas([replica for replica in self._replicas.values() if replica.node == node])
        self._changed()

    def _return_node(self, node: str) -> None:
        self._touch()
        self._lost.discard(node)
        self._changed()

    def _begin_fault(self, fault: LinkFault) -> None:
        for pair in ((fault.a, fault.b), (fault.b, fault.a)):
            self._wires[pair].faults.append(fault)
        self._suffer(fault)
        if fault.cut:
            self._break_calls({(fault.a, fault.b), (fault.b, fault.a)})

    def _end_fault(self, fault: LinkFault) -> None:
        for pair in ((fault.a, fault.b), (fault.b, fault.a)):
            self._wires[pair].faults.remove(fault)
        self._suffer(fault)

    def _suffer(self, fault: LinkFault) -> None:
        for pair in ((fault.a, fault.b), (fault.b, fault.a)):
            wire = self._wires[pair]
            wire.suffer()
            (self._cuts.add if wire.cut else self._cuts.discard)(pair)

    def _break_calls(self, cut: set[tuple[str, str]]) -> None:
        """Break off what is held open over links that are gone: each walk at the first of its hops that crosses one."""
        walks = {walk: None for replica in self._replicas.values() for walk in replica.open if not walk.over}
        for walk in walks:
            nodes = [self._gateway.node, *(replica.node for replica in walk.path)]
            hop = next((hop for hop, pair in enumerate(itertools.pairwise(nodes)) if pair in cut), None)
            if hop is not None and not walk.over:
                self._broken(walk, hop)

    # --- replicas ---------------------------------------------------------------------------------------------------------

    def _place(self, initial: Placement) -> None:
        states: tuple[tuple[core.Counts, Literal["ready", "standby"]], ...] = (
            (initial.ready, "ready"),
            (initial.standby if self._ingredients.standby else {}, "standby"),
        )
        for counts, state in states:
            for service, on_nodes in counts.items():
                for node, count in on_nodes.items():
                    for _ in range(count):
                        self._move(self._new_replica(service, node), state)
        self._published = self._ready()
        self._route(self._published)

    def _new_replica(self, service: str, node: str) -> Replica:
        self._touch()
        name = f"{service}-{next(self._numbers[service]):06d}"
        replica = Replica(
            name, self.world.stages[service], node, self._speeds[node], self._factors[service],
            urgent_first=self._ingredients.earliest_deadline_first,
        )  # fmt: skip
        self._replicas[name] = replica
        return replica

    def _touch(self) -> None:
        """A replica changes: what was found out about all of them holds no more."""
        self._settled = None
        self._cramped.clear()

    def _move(self, replica: Replica, state: Literal["standby", "ready", "draining"], *, let_out: bool = False) -> None:
        self._touch()
        replica.view = replace(replica.view, state=state, let_out=let_out)
        if state == "standby":
            self._standbys[replica.service][replica.id] = replica
        else:
            self._standbys[replica.service].pop(replica.id, None)

    def _changed(self) -> None:
        """Answer a change of any replica's state: plan, take the steps, publish; as the live keeper does."""
        self.account()
        if self._desired is not None:
            counts: dict[str, Counter[str]] = {}
            for replica in self._let_out.values():
                counts.setdefault(replica.service, Counter())[replica.node] += 1
            desired = self._desired.with_let_out(counts) if counts else self._desired
            if desired == self._settled:
                return
            blocked = [(service, node) for service in self._services for node in sorted(self._lost)]
            plan = reconcile(self.replicas(), desired, self._services, self._nodes, blocked=blocked, surge=self.world.surge)
            for step in plan:
                if isinstance(step, Start):
                    self._start(step)
                else:
                    self._change(step)
            self._settled = None if plan else desired
        self._publish()

    def _start(self, step: Start) -> None:
        self.starts += 1
        replica = self._new_replica(step.service, step.node)
        self.kernel.at(self.kernel.now + self.world.stages[step.service].start_s, self._loaded, replica)

    def _loaded(self, replica: Replica) -> None:
        if replica.alive and replica.view.state == "starting":
            self.account()
            self._move(replica, "standby")
            self._changed()

    def _change(self, step: Change) -> None:
        replica = self._replicas[step.replica]
        if step.verb != "drain":
            self._move(replica, "ready" if step.verb == "promote" else "standby")
            return
        self._move(replica, "draining")
        stage = self.world.stages[replica.service]
        # It goes on serving until the gateway has the routes without it, and then until it is empty.
        self.kernel.at(self.kernel.now + self.world.delays.routes_s, self._acknowledge, replica)
        self.kernel.at(self.kernel.now + self.world.delays.routes_s + stage.drain_grace_s, self._end_of_grace, replica)

    def _acknowledge(self, replica: Replica) -> None:
        replica.acknowledged = True
        self._leave_if_empty(replica)

    def _leave_if_empty(self, replica: Replica) -> None:
        if replica.alive and replica.acknowledged and not replica.open:
            self._end_of_grace(replica)

    def _end_of_grace(self, replica: Replica) -> None:
        if replica.alive:
            self.account()
            self._end_replicas([replica])
            self._changed()

    def _end_replicas(self, replicas: list[Replica]) -> None:
        """They are gone, all at once, and every call that they hold breaks off."""
        self._touch()
        for replica in replicas:
            replica.alive = False
            del self._replicas[replica.id]
            self._standbys[replica.service].pop(replica.id, None)
            self._let_out.pop(replica.id, None)
        for replica in replicas:
            for walk in list(replica.open):
                if not walk.over:
                    self._broken(walk, walk.path.index(replica))

    # --- routes -----------------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[core.Replica, ...]:
        return tuple(view for view in self.replicas() if view.state == "ready")

    def _publish(self) -> None:
        ready = self._ready()
        if [view.id for view in ready] != [view.id for view in self._published]:
            self._published = ready
            self.kernel.at(self.kernel.now + self.world.delays.routes_s, self._route, ready, URGENT)

    def _route(self, ready: tuple[core.Replica, ...]) -> None:
        """The gateway has a new version of the routes. What it has let out stays until it reads of it."""
        known = {view.id for view in ready}
        ready += tuple(replica.view for name, replica in self._let_out.items() if name not in known)
        of: dict[str, list[core.Replica]] = {name: [] for name in self.world.stages}
        for view in ready:
            of[view.service].append(view)
        self._routed = {name: self._routing(name, views) for name, views in of.items()}
        self._gateway.book.forget_all_but(view.id for view in ready)

    def _routing(self, service: str, views: Sequence[core.Replica]) -> Routed:
        routed = self._routed.get(service)
        if routed is not None and routed.ids == tuple([view.id for view in views]):
            return routed
        return Routed(views, self.world.stages[service].input_bytes, self.world)

    # --- letting out ------------------------------------------------------------------------------------------------------

    def _may_let_out(self, service: str) -> bool:
        """Whether the service has a standby that may work, and its allowance is not spent."""
        return bool(self._standbys[service]) and self._allowance.get(service, 0) > 0 and service not in self._cramped

    def _is_due(self, task: Task, segment: int, hop: int, order: tuple[int, ...]) -> bool:
        """Whether the replica chosen for this hop is dead or would keep the task waiting too long, or there is none.

        As `services.gateway.walk` says it.
        """
        now, book = self.kernel.now, self._gateway.book
        rest = task.plan.legs[segment].services[hop:]
        ids = self._routed[rest[0]].ids
        if not order or book.ejected(ids[order[0]], now):
            return True
        wait_s = book.view(ids[order[0]]).expected_wait_s(now)
        if wait_s <= 0.0:
            return False
        slack_s = task.due - task.after_s[segment] - now - sum(map(self._work_s, rest))
        share = self._desired.patience.get(rest[0], letting_out.SHARE) if self._desired is not None else letting_out.SHARE
        return letting_out.is_due(wait_s, slack_s, len(rest) + task.plan.hops_after[segment], share)

    def _spend_standby(self, service: str, order: tuple[int, ...], node: str) -> tuple[Routed, tuple[int, ...]]:
        """Let the nearest standby out whose node has the cores, and prefer it; without one, all stays as it is.

        Returns:
            Whom the service is routed to, and who of them may be chosen, the best first.
        """
        now, book, routed = self.kernel.now, self._gateway.book, self._routed[service]
        free = {name: there.cpus + EPSILON for name, there in self._nodes.items()}
        for replica in self._replicas.values():
            # Those that load may be wanted at work as soon as they have, so they have their cores already.
            if replica.view.state != "standby":
                free[replica.node] -= replica.view.cpus
        fitting = [each.view for each in self._standbys[service].values() if each.view.cpus <= free[each.node]]
        if not fitting:
            self._cramped.add(service)
        living = [view for view in fitting if not book.ejected(view.id, now)]
        if not living:
            return routed, order
        links_s = self._routing(service, living).links_s(node)
        index = min(range(len(living)), key=lambda i: book.completion_s(living[i].id, links_s[i], now))
        standby = self._replicas[living[index].id]
        if order:
            letting_out.introduce(book, standby.id, routed.ids[order[0]])
        self.account()
        self._move(standby, "ready", let_out=True)
        self._let_out[standby.id] = standby
        self._allowance[service] -= 1
        self.let_out += 1
        others = [view for view in routed.replicas if view.id != standby.id]
        where = {view.id: i for i, view in enumerate(others)}
        order = (len(others), *(where[name] for i in order if (name := routed.ids[i]) in where))[:MAX_CANDIDATES]
        routed = self._routed[service] = self._routing(service, [*others, standby.view])
        self._publish()
        return routed, order

    # --- telemetry --------------------------------------------------------------------------------------------------------

    def _sample(self, _: None) -> None:
        now = self.kernel.now
        self.kernel.at(now + self._sample_every_s, self._sample, priority=URGENT)
        if any(silence.from_s <= now < silence.until_s for silence in self._silences):
            return
        taken = {Endpoint(r.id, ""): r.sample(now) for r in self._replicas.values() if r.view.state in sources.SAMPLED_STATES}
        counts: dict[Key, float] = {
            ("requests_total", (("outcome", outcome), ("pipeline", name))): count
            for name, outcomes in self.outcomes.items()
            for outcome, count in outcomes.items()
        }
        taken[GATEWAY] = Sample(now, counts)
        self.kernel.at(now + self.world.delays.metric_lag_s, self._samples_come, taken, URGENT)

    def _samples_come(self, taken: dict[Endpoint, Sample]) -> None:
        self._samples = taken

    # --- tasks ------------------------------------------------------------------------------------------------------------

    def _schedule(self, arrivals: Mapping[str, Sequence[float]]) -> None:
        for pipeline, times in arrivals.items():
            if pipeline not in self._plans:
                raise ValueError(f"there is no pipeline {pipeline!r}; there are {', '.join(self._plans)}")
            self._await_next(Stream(pipeline, self._plans[pipeline], [float(time) for time in times]))

    def _await_next(self, stream: Stream) -> None:
        """One arrival of each pipeline is planned at a time, which keeps the heap small."""
        if stream.index < len(stream.times):
            self.kernel.at(stream.times[stream.index], self._arrive, stream)

    def _arrive(self, stream: Stream) -> None:
        plan, index = stream.plan, stream.index
        task = Task(stream.pipeline, plan, index, stream.times[index], shed=self._sheds)
        stream.index = index + 1
        self._await_next(stream)
        self.in_flight += 1
        if not self._admit(task):
            return
        if self._sheds:
            stream.pending.append(task)
            if len(stream.pending) == 1:
                self.kernel.at(task.due, self._time_out, stream, LAST)
        if len(plan.legs) == 1:
            task.after_s = _NOTHING_AFTER
            self._begin(task, 0, retried=False)
            return
        task.after_s = self._after_s(plan)
        for root in plan.roots:
            if not task.over:
                self._begin(task, root, retried=False)

    def _admit(self, task: Task) -> bool:
        now, book, plan, routed = self.kernel.now, self._gateway.book, task.plan, self._routed
        at_most_s = 0.0
        for service in plan.visits:
            if ids := routed[service].ids:
                at_most_s += admission.at_most_s(book, ids, now)
            elif not self._may_let_out(service):
                self._end(task, 503, "no_replica")
                return False
        if at_most_s <= plan.deadline_s or not self._sheds:
            return True
        # Those that may be let out count: somebody will be, if it must be.
        hop_s = {
            service: admission.replica_s(
                book, (*routed[service].ids, *(self._standbys[service] if self._may_let_out(service) else ())), now
            )
            for service in plan.services
        }
        predicted_s = admission.critical_path_s(plan.segments, hop_s)
        if admission.excess_s(predicted_s, plan.deadline_s) > 0:
            self._end(task, 429, "overloaded")
            return False
        return True

    def _after_s(self, plan: Plan) -> list[float]:
        """For each segment, the time [s] the longest way from its end to the pipeline's needs, without waits."""
        legs = plan.legs
        after_s = [0.0] * len(legs)
        for index in range(len(legs) - 1, -1, -1):
            if parents := legs[index].parents:
                way_s = after_s[index]
                for service in legs[index].services:
                    way_s += self._work_s(service)
                for parent in parents:
                    after_s[parent] = max(after_s[parent], way_s)
        return after_s

    def _work_s(self, service: str) -> float:
        views = map(self._gateway.book.view, self._routed[service].ids)
        return min([view.service_s + view.transfer_s for view in views], default=0.0)

    def _time_out(self, stream: Stream) -> None:
        """End those whose deadline has come, and wait for that of the next."""
        now, pending = self.kernel.now, stream.pending
        while pending:
            task = pending[0]
            if not task.over:
                if task.due > now:
                    self.kernel.at(task.due, self._time_out, stream, LAST)
                    return
                self._end(task, 504, "expired")
            pending.popleft()

    def _end(self, task: Task, status: Status, reason: str | None) -> None:
        """The task has its outcome; whatever is still done for it is given up."""
        task.over = True
        self.in_flight -= 1
        for walk in task.walks:
            if not walk.over:
                self._close(walk)
        # Nothing that has ended refers to itself in a circle, so that it is freed at once and the collector has nothing to do.
        task.walks = []
        now = self.kernel.now
        latency_s = now - task.scheduled
        # What cannot be reached is an answer too, of status 502: the gateway's.
        outcome = classify(status, latency_s, task.plan.deadline_s)
        self.outcomes[task.pipeline][outcome] += 1
        if task.scheduled >= self._measured_from_s:
            self.measured[task.pipeline][outcome] += 1
        if self.records is not None:
            answered = now if status == 200 else None
            self.records.append(
                TaskRecord(
                    task.pipeline, task.index, task.scheduled, task.scheduled, answered, task.plan.deadline_s, status, reason,
                    outcome, tuple(task.hops),
                )
            )  # fmt: skip

    # --- a walk through a segment -----------------------------------------------------------------------------------------

    def _begin(self, task: Task, segment: int, *, retried: bool) -> None:
        """Choose candidates for every hop, with the newest news there is, and call the first."""
        now, book, node = self.kernel.now, self._gateway.book, self._gateway.node
        services = task.plan.legs[segment].services
        chosen: list[tuple[str, ...]] = []
        for hop, service in enumerate(services):
            routed = self._routed[service]
            order = book.order(routed.ids, routed.links_s(node), now, self._rng) if routed.ids else ()
            if self._allowance and self._may_let_out(service) and self._is_due(task, segment, hop, order):
                order = book.best_first(order, routed.ids, routed.links_s(node), now)
                if self._is_due(task, segment, hop, order):
                    routed, order = self._spend_standby(service, order, node)
            if not order:
                self._end(task, 503, "no_replica")
                return
            ids = routed.ids
            node = routed.nodes[order[0]]
            chosen.append(ids if len(ids) == 1 else tuple([ids[i] for i in order]))
        reserve_s = task.after_s[segment]
        reserves_s = [0.0] * len(services)
        for index in range(len(services) - 1, -1, -1):
            reserves_s[index] = reserve_s
            view = book.view(chosen[index][0])
            reserve_s += view.service_s + view.transfer_s
        for candidates in chosen:
            book.sent(candidates[0], now)
        walk = Walk(task, segment, chosen, reserves_s)
        walk.retried = retried
        task.walks.append(walk)
        self._call(walk)

    def _caller(self, walk: Walk) -> Caller:
        return walk.path[-1] if walk.path else self._gateway

    def _call(self, walk: Walk) -> None:
        """Call the next hop: the best candidate, then at most one other; those the caller knows to be dead come last."""
        caller, now = self._caller(walk), self.kernel.now
        caller.retries.request()
        candidates = walk.chosen[len(walk.path)]
        if caller.met_dead:
            book = caller.book
            candidates = tuple(sorted(candidates, key=lambda replica: book.ejected(replica, now)))
        walk.untried.append(list(candidates[:_TRIES]))
        self._try(walk)

    def _try(self, walk: Walk) -> None:
        """Send to the first candidate that has not been tried."""
        hop = len(walk.path)
        name = walk.untried[-1].pop(0)
        walk.sent = now = self.kernel.now
        replica = self._replicas.get(name)
        if replica is None:
            self._dead(walk, name)
            return
        walk.target = replica
        here = walk.path[-1].node if hop else self._gateway.node
        arrival = now + self.world.delays.hop_s
        if here != replica.node and (wire := self._wires.get((here, replica.node))) is not None:
            arrival += wire.send(now, walk.task.plan.legs[walk.segment].sends_bytes[hop]) - now
        if arrival > now:
            self.kernel.at(arrival, self._reach, walk)
        else:
            self._reach(walk)

    def _reach(self, walk: Walk) -> None:
        """The request is at the replica."""
        if walk.over:
            return
        replica, now = walk.target, self.kernel.now
        if not replica.alive or (self._cuts and (self._caller(walk).node, replica.node) in self._cuts):
            self._dead(walk, replica.id)
            return
        queue = replica.queue
        if queue.full:
            self._refused(walk)
            return
        walk.transfers_s.append(now - walk.sent)
        hop = len(walk.path)
        walk.path.append(replica)
        replica.open[walk] = None
        due = walk.task.due - walk.reserves_s[hop]
        walk.waiting = Waiting(walk, due, 1, replica.lengths, now, replica.estimate.mean_s(replica.units))
        queue.push(walk.waiting)
        if len(replica.ends) < replica.slots:
            self._dispatch(replica)

    def _again(self, walk: Walk) -> bool:
        """Whether the caller may try another candidate; takes a token of its retry budget if so."""
        if not walk.untried[-1]:
            return False
        least_s = walk.reserves_s[max(len(walk.path) - 1, 0)]
        return walk.task.until - self.kernel.now > least_s and self._caller(walk).retries.allow()

    def _refused(self, walk: Walk) -> None:
        """The replica has no room in its queue."""
        if self._again(walk):
            self._try(walk)
        else:
            self._end(walk.task, 429, "queue_full")

    def _dead(self, walk: Walk, replica: str) -> None:
        """The caller could not reach the replica, or the call broke off."""
        self._found_dead(self._caller(walk), replica)
        if walk.path:
            walk.failed.append(replica)
        if self._again(walk):
            self._try(walk)
            return
        task, deeper = walk.task, bool(walk.path)
        self._learn(walk)
        self._close(walk)
        # A replica further down died with nobody to take over from there: once more, around the dead.
        if deeper and not walk.retried and task.until - self.kernel.now > walk.reserves_s[0] and self._gateway.retries.allow():
            self._begin(task, walk.segment, retried=True)
        else:
            self._end(task, 502, "upstream_error")

    def _found_dead(self, caller: Caller, replica: str) -> None:
        caller.met_dead = True
        caller.book.failed(replica, self.kernel.now)

    def _broken(self, walk: Walk, hop: int) -> None:
        """The replica of a hop is gone with the call that it held: its caller notices as soon as the link lets it."""
        again = walk.cut(hop)
        for replica in again.path:
            replica.open[again] = None
        self._close(walk, still_open=hop)
        walk.task.walks.append(again)
        lost = walk.path[hop]
        wire = self._wires.get((lost.node, self._caller(again).node))
        self.kernel.at(self.kernel.now + (wire.latency_s if wire is not None else 0.0), self._notice, (again, lost.id))

    def _notice(self, broken: tuple[Walk, str]) -> None:
        walk, replica = broken
        if not walk.over:
            self._dead(walk, replica)

    def _close(self, walk: Walk, still_open: int = 0) -> None:
        """Nobody waits for the walk any more: it leaves queues and replicas. The calls to the first `still_open` go on."""
        walk.over = True
        if walk.waiting is not None:
            walk.path[-1].queue.remove(walk.waiting)
            walk.waiting = None
        for hop, replica in enumerate(walk.path):
            replica.open.pop(walk, None)
            replica.ended += hop >= still_open
            if replica.acknowledged and replica.alive:
                self._leave_if_empty(replica)

    # --- a replica's work -------------------------------------------------------------------------------------------------

    def _dispatch(self, replica: Replica) -> None:
        """Give every free slot the next batch."""
        queue, ends, now = replica.queue, replica.ends, self.kernel.now
        while len(ends) < replica.slots and len(queue):
            members, doomed = next_batch(queue, now, replica.estimate, replica.max_batch, shed=self._sheds)
            for waiting in doomed:
                self._doomed(waiting.task)
            if members:
                units = members[0].units if len(members) == 1 else batch_units(members)
                seconds = replica.law.mean_s(units) * next(replica.factors)
                batch = Batch(replica, members, units, seconds, now)
                ends[batch] = now + replica.estimate.mean_s(units)
                self.kernel.at(now + seconds, self._computed, batch)

    def _doomed(self, walk: Walk) -> None:
        """The task was dropped before any work was spent on it."""
        task, now = walk.task, self.kernel.now
        walk.waits_s = [replica.expected_wait_s(now) for replica in walk.path]
        self._learn(walk)
        self._end(task, 504, "expired_in_queue" if now >= task.due else "would_expire")

    def _computed(self, batch: Batch) -> None:
        replica, seconds, start = batch.replica, batch.seconds, batch.start
        if not replica.alive:
            return
        del replica.ends[batch]
        replica.estimate.observe(batch.units, seconds)
        replica.batches += 1
        if len(replica.queue):
            self._dispatch(replica)
        for waiting in batch.members:
            walk = waiting.task
            if walk.over:
                continue
            queue_s = start - waiting.enqueued
            replica.queue_s += queue_s
            replica.compute_s += seconds
            replica.squares += seconds * seconds
            replica.computed += 1
            self.visits += 1
            if self.records is not None:
                step = walk.task.plan.legs[walk.segment].steps[len(walk.path) - 1]
                way_s, items = walk.transfers_s[-1], len(batch.members)
                walk.task.hops.append(
                    Hop(step, replica.service, replica.id, replica.node, queue_s, seconds, way_s, items)
                )  # fmt: skip
            walk.services_s.append(seconds)
            if len(walk.path) < len(walk.chosen):
                if self.kernel.now >= walk.task.until:
                    self._end(walk.task, 504, "expired")
                else:
                    self._call(walk)
            else:
                self._answer(walk)

    def _answer(self, walk: Walk) -> None:
        """The answer goes back through the calls that are still open, to the gateway. It meets no other on its way."""
        now, back_s, node = self.kernel.now, 0.0, self._gateway.node
        walk.waits_s = [replica.expected_wait_s(now) for replica in walk.path]
        if self._wires:
            size = walk.task.plan.legs[walk.segment].returns_bytes
            for hop, replica in enumerate(walk.path):
                if replica.node != node and (wire := self._wires.get((replica.node, node))) is not None:
                    way_s = wire.latency_s + size / wire.bytes_per_s
                    walk.transfers_s[hop] += way_s
                    back_s += way_s
                node = replica.node
        if back_s > 0:
            self.kernel.at(now + back_s, self._answered, walk)
        else:
            self._answered(walk)

    def _learn(self, walk: Walk) -> None:
        """What the gateway takes in from the reports of a walk's hops."""
        book, now = self._gateway.book, self.kernel.now
        for name in walk.failed:
            self._found_dead(self._gateway, name)
        walk.failed = []
        path, transfers_s, services_s = walk.path, walk.transfers_s, walk.services_s
        for hop, wait_s in enumerate(walk.waits_s):
            service_s = services_s[hop] if hop < len(services_s) else None
            book.answered(path[hop].id, now, wait_s=wait_s, service_s=service_s, transfer_s=transfers_s[hop])

    def _answered(self, walk: Walk) -> None:
        """The answer of a segment is at the gateway."""
        if walk.over:
            return
        self._learn(walk)
        self._close(walk)
        task = walk.task
        task.left -= 1
        if not task.left:
            self._end(task, 200, None)
            return
        for child in task.plan.legs[walk.segment].children:
            task.waits_for[child] -= 1
            if not task.waits_for[child] and not task.over:
                self._begin(task, child, retried=False)
