"""A simulated testbed with the two verbs of the live edges, `observe` and `apply`, in virtual time.

It owns queues, links and clocks. Every rule is the live system's own, by import: which task is computed next and which is
dropped (`services.dataplane.batching`), what a batch is expected to take (`service_time`), who a hop goes to and who is ejected
(`routing`), who is let in (`admission`), where a pipeline is cut (`pipeline`), what starts and stops in which order
(`orchestrator.runtimes.reconcile`), what is seen (`orchestrator.telemetry.sources`), what it costs (`orchestrator.costs`) and
how a task ended (`loadgen.outcome`). What the live gateway and stages do around those rules (`services.gateway.walk`,
`services.forward`, `services.stage.worker`) is asynchronous I/O, and stands here as events. docs/simulator.md tells what is
left out.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from loadgen.outcome import OUTCOMES, Hop, Outcome, TaskRecord, classify
from orchestrator import core, costs
from orchestrator.core import Observation, Placement
from orchestrator.costs import Cost
from orchestrator.runtimes.reconcile import Change, Start, reconcile
from orchestrator.simulator import laws
from orchestrator.simulator.kernel import URGENT, Kernel
from orchestrator.simulator.plans import Plan, Routed, Wire
from orchestrator.simulator.replica import Batch, Caller, Replica, Task, Walk
from orchestrator.simulator.world import World
from orchestrator.telemetry import sources
from orchestrator.telemetry.exposition import Key, Sample
from orchestrator.telemetry.sources import Endpoint, Source
from services.dataplane import admission
from services.dataplane.batching import Waiting, batch_units, next_batch

GATEWAY = Endpoint("gateway", "")
_TRIES = 2
"""Candidates that one call may try, as in `services.forward`."""

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
        measured_from_s: instant [s] from which cost, replicas and tasks count in `measured`, `cost` and `replica_seconds`.
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
        keep_records: bool = False,
    ) -> None:
        self.kernel, self.world = kernel, world
        self.cost = Cost()
        self.starts = 0
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
        self._lost: set[str] = set()
        self._accounted_t, self._accounted_starts = kernel.now, 0
        self._sources: dict[Endpoint, Source] = {}
        self._samples: dict[Endpoint, Sample] = {}
        self._place(initial)
        self._schedule(arrivals)
        self._sample_every_s = sample_every_s
        lag_s = world.delays.metric_lag_s
        first = math.floor(lag_s / sample_every_s) + 1
        kernel.at(first * sample_every_s - lag_s, self._sample, priority=URGENT)
        self._measured_from_s = measured_from_s
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
        """Make it the target and take the first steps towards it; the rest follows as replicas change state."""
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
        self.starts = self._accounted_starts = 0

    # --- faults -----------------------------------------------------------------------------------------------------------

    def lose_node(self, node: str, time: float) -> None:
        """Plan the loss of a node: its replicas end at that instant, and nothing starts there again.

        Raises:
            ValueError: there is no such node.
        """
        if node not in self._nodes:
            raise ValueError(f"there is no node {node!r} to lose; there are {', '.join(self._nodes)}")
        self.kernel.at(time, self._lose_node, node, URGENT)

    def _lose_node(self, node: str) -> None:
        self.account()
        self._lost.add(node)
        for replica in [replica for replica in self._replicas.values() if replica.node == node]:
            self._end_replica(replica)
        self._changed()

    # --- replicas ---------------------------------------------------------------------------------------------------------

    def _place(self, initial: Placement) -> None:
        states: tuple[tuple[core.Counts, Literal["ready", "standby"]], ...] = (
            (initial.ready, "ready"),
            (initial.standby, "standby"),
        )
        for counts, state in states:
            for service, on_nodes in counts.items():
                for node, count in on_nodes.items():
                    for _ in range(count):
                        self._move(self._new_replica(service, node), state)
        self._published = self._ready()
        self._route(self._published)

    def _new_replica(self, service: str, node: str) -> Replica:
        name = f"{service}-{next(self._numbers[service]):06d}"
        replica = Replica(name, self.world.stages[service], node, self._speeds[node], self._factors[service])
        self._replicas[name] = replica
        return replica

    def _move(self, replica: Replica, state: Literal["standby", "ready", "draining"]) -> None:
        replica.view = replace(replica.view, state=state)

    def _changed(self) -> None:
        """Answer a change of any replica's state: plan, take the steps, publish; as the live keeper does."""
        self.account()
        if self._desired is not None:
            blocked = [(service, node) for service in self._services for node in sorted(self._lost)]
            plan = reconcile(
                self.replicas(), self._desired, self._services, self._nodes, blocked=blocked, surge=self.world.surge
            )
            for step in plan:
                if isinstance(step, Start):
                    self._start(step)
                else:
                    self._change(step)
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
            self._end_replica(replica)
            self._changed()

    def _end_replica(self, replica: Replica) -> None:
        """It is gone, and every call that it holds breaks off."""
        replica.alive = False
        del self._replicas[replica.id]
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
        """The gateway has a new version of the routes."""
        self._routed = {
            name: Routed([view for view in ready if view.service == name], stage.input_bytes, self.world)
            for name, stage in self.world.stages.items()
        }
        self._gateway.book.forget_all_but(view.id for view in ready)

    # --- telemetry --------------------------------------------------------------------------------------------------------

    def _sample(self, _: None) -> None:
        now = self.kernel.now
        taken = {Endpoint(r.id, ""): r.sample(now) for r in self._replicas.values() if r.view.state in sources.SAMPLED_STATES}
        counts: dict[Key, float] = {
            ("requests_total", (("outcome", outcome), ("pipeline", name))): count
            for name, outcomes in self.outcomes.items()
            for outcome, count in outcomes.items()
        }
        taken[GATEWAY] = Sample(now, counts)
        self.kernel.at(now + self.world.delays.metric_lag_s, self._samples_come, taken, URGENT)
        self.kernel.at(now + self._sample_every_s, self._sample, priority=URGENT)

    def _samples_come(self, taken: dict[Endpoint, Sample]) -> None:
        self._samples = taken

    # --- tasks ------------------------------------------------------------------------------------------------------------

    def _schedule(self, arrivals: Mapping[str, Sequence[float]]) -> None:
        for pipeline, times in arrivals.items():
            if pipeline not in self._plans:
                raise ValueError(f"there is no pipeline {pipeline!r}; there are {', '.join(self._plans)}")
            self._await_next((pipeline, enumerate(float(t) for t in times)))

    def _await_next(self, schedule: tuple[str, Iterator[tuple[int, float]]]) -> None:
        """One arrival of each pipeline is planned at a time, which keeps the heap small."""
        pipeline, times = schedule
        found = next(times, None)
        if found is not None:
            index, time = found
            task = Task(pipeline, self._plans[pipeline], index, time)
            self.kernel.at(time, self._arrive, (task, schedule))

    def _arrive(self, arrival: tuple[Task, tuple[str, Iterator[tuple[int, float]]]]) -> None:
        task, schedule = arrival
        self._await_next(schedule)
        self.in_flight += 1
        if not self._admit(task):
            return
        self.kernel.at(task.due, self._time_out, task)
        plan = task.plan
        if len(plan.segments) == 1:
            task.after_s = (0.0,)
            self._begin(task, 0, retried=False)
            return
        task.after_s = self._after_s(plan)
        for index, leg in enumerate(plan.legs):
            if not leg.parents and not task.over:
                self._begin(task, index, retried=False)

    def _admit(self, task: Task) -> bool:
        now, book, hop_s = self.kernel.now, self._gateway.book, {}
        for service in task.plan.services:
            ids = self._routed[service].ids
            if not ids:
                self._end(task, 503, "no_replica")
                return False
            hop_s[service] = admission.replica_s(book, ids, now)
        predicted_s = admission.critical_path_s(task.plan.segments, hop_s)
        if admission.excess_s(predicted_s, task.plan.deadline_s) > 0:
            self._end(task, 429, "overloaded")
            return False
        return True

    def _after_s(self, plan: Plan) -> list[float]:
        """For each segment, the time [s] the longest way from its end to the pipeline's needs, without waits."""
        work_s = [sum(self._work_s(service) for service in leg.services) for leg in plan.legs]
        after_s = [0.0] * len(plan.legs)
        for index in range(len(plan.legs) - 1, -1, -1):
            after_s[index] = max((work_s[child] + after_s[child] for child in plan.legs[index].children), default=0.0)
        return after_s

    def _work_s(self, service: str) -> float:
        views = [self._gateway.book.view(replica) for replica in self._routed[service].ids]
        return min((view.service_s + view.transfer_s for view in views), default=0.0)

    def _time_out(self, task: Task) -> None:
        if not task.over:
            self._end(task, 504, "expired")

    def _end(self, task: Task, status: Status, reason: str | None) -> None:
        """The task has its outcome; whatever is still done for it is given up."""
        task.over = True
        self.in_flight -= 1
        for walk in task.walks:
            if not walk.over:
                self._close(walk)
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
        for service in services:
            routed = self._routed[service]
            ids = routed.ids
            if not ids:
                self._end(task, 503, "no_replica")
                return
            order = book.order(ids, routed.links_s(node), now, self._rng)
            node = routed.nodes[order[0]]
            chosen.append(tuple([ids[i] for i in order]))
        reserve_s = task.after_s[segment]
        reserves_s = [0.0] * len(services)
        for index in range(len(services) - 1, -1, -1):
            reserves_s[index] = reserve_s
            view = book.view(chosen[index][0])
            reserve_s += view.service_s + view.transfer_s
        for candidates in chosen:
            book.sent(candidates[0])
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
        if not replica.alive:
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
        return walk.task.due - self.kernel.now > least_s and self._caller(walk).retries.allow()

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
        if deeper and not walk.retried and task.due - self.kernel.now > walk.reserves_s[0] and self._gateway.retries.allow():
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
        if walk.waiting is not None and walk.path:
            walk.path[-1].queue.remove(walk.waiting)
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
            members, doomed = next_batch(queue, now, replica.estimate, replica.max_batch)
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
        self._dispatch(replica)
        for waiting in batch.members:
            walk = waiting.task
            if walk.over:
                continue
            queue_s = start - waiting.enqueued
            replica.queue_s += queue_s
            replica.compute_s += seconds
            replica.computed += 1
            if self.records is not None:
                step = walk.task.plan.legs[walk.segment].steps[len(walk.path) - 1]
                way_s, items = walk.transfers_s[-1], len(batch.members)
                walk.task.hops.append(
                    Hop(step, replica.service, replica.id, replica.node, queue_s, seconds, way_s, items)
                )  # fmt: skip
            walk.services_s.append(seconds)
            if len(walk.path) < len(walk.chosen):
                if self.kernel.now >= walk.task.due:
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
