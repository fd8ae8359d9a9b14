"""One running testbed: all parts put together, and what the control plane's HTTP face can ask of them.

The only place that knows every part. It decides nothing itself: the policy decides, the runtime acts, the runner keeps time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from orchestrator import plan as plans
from orchestrator import presence, survey
from orchestrator import probe as probes
from orchestrator import testbed as testbeds
from orchestrator.core import Placement, Target
from orchestrator.decision_log import DecisionLog, Origin
from orchestrator.errors import Conflict, EspalierError, Infeasible, UsageError
from orchestrator.gateways import Gateways
from orchestrator.given_gateway import GivenGateway
from orchestrator.metrics import Metrics
from orchestrator.orders import Orders
from orchestrator.plan import Plan
from orchestrator.presence import Presence
from orchestrator.rollout import Progress, Rollout, Standing
from orchestrator.routes import Caller, Publisher
from orchestrator.runner import Runner
from orchestrator.runtimes import child as children
from orchestrator.runtimes.containers import EngineOptions
from orchestrator.runtimes.doorkeeper import Door, Doorkeeper
from orchestrator.runtimes.driver import Driver, Launch
from orchestrator.runtimes.engine import Engine
from orchestrator.runtimes.keeper import Keeper
from orchestrator.runtimes.pins import Pins
from orchestrator.runtimes.processes import Processes
from orchestrator.runtimes.swarm import Swarm
from orchestrator.scaling.manual import running
from orchestrator.state_dir import StateDir
from orchestrator.telemetry import sources, targets
from orchestrator.telemetry.live import Live
from orchestrator.testbed import Loaded, Testbed
from services.dataplane import fusing
from services.dataplane.routes import Routes

log = logging.getLogger(__name__)

STAGE_MODULE, GATEWAY_MODULE = "services.stage", "services.gateway"
ANNOUNCED = "announced"
LOOK_S = 0.25
"""Time between two looks at which nodes are there [s]."""
ROOT = Path(__file__).resolve().parents[1]
"""Where the package lies, for the processes we start."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an orchestrator is told beside its testbed."""

    models_dir: Path
    control_url: str
    """Where gateways ask for the routes."""
    stage_module: str = STAGE_MODULE
    gateway_module: str = GATEWAY_MODULE
    gateway_url: str | None = None
    """A gateway that somebody else keeps running; `ANNOUNCED`: those that ask for the routes; None: one that we keep."""
    engine: EngineOptions | None = None
    """Replicas are containers of this engine; None: processes of this machine, or"""
    swarm: EngineOptions | None = None
    """tasks of this Swarm."""
    prometheus_url: str | None = None
    """Server to observe through; None: every source is scraped directly."""


class Orchestrator:
    """All parts of one running testbed; the `app.Controls` of its control plane."""

    def __init__(self, plan: Plan, state: StateDir, settings: Settings) -> None:
        self._plan, self._state, self._settings = plan, state, settings
        self._began = time.monotonic()
        self._end = asyncio.Event()
        self._stop_all = False
        self.interrupted = False
        self._orders = Orders(state.orders)
        self._metrics = Metrics()
        self._publisher = Publisher(plan.map(), state.routes)
        self._policy = plan.policy()
        self._services = plan.services()
        self._runtime = self._make_runtime()
        self._gateways = Gateways(self._publisher.heard, self._publisher.drop, self._make_gateway())
        self._telemetry = Live(self._gateways.endpoints, settings.prometheus_url, lambda: self._testbed.control.stale_after)
        self._runner = self._make_runner()
        self._presence = Presence()
        self._placed_without: frozenset[str] = frozenset()
        """Nodes that the core services are placed without."""
        self._avoided: dict[presence.Place, float] = {}
        """Places where replicas fail to start, and until when nothing is planned there."""
        self._relocating: asyncio.Task[None] | None = None
        self._probing = asyncio.Lock()
        self._rollout: Rollout | None = None
        self._rolling: asyncio.Task[None] | None = None
        self._refused: Progress | None = None

    @property
    def _testbed(self) -> Testbed:
        return self._plan.testbed

    async def run(self, update: Loaded | None = None, limit_s: float = 0.0) -> None:
        """Adopt or start everything and keep it until told to end.

        Args:
            update: a version of the testbed to go over to from the start.
            limit_s: longest time for that [s].
        """
        adopted = await self._runtime.adopt()
        log.info("testbed %s: %d replicas adopted", self._testbed.name, adopted)
        if absent := self._runtime.nodes_down | self._emptied:
            self._take(replace(self._plan, absent=absent))
        loop: asyncio.Task[None] | None = None
        watch: asyncio.Task[None] | None = None
        try:
            # Before any replica is started: a port that is taken must leave nothing behind.
            await self._gateways.open()
            loop = asyncio.create_task(self._runner.run())
            watch = asyncio.create_task(self._watch_nodes())
            if update is None and self._runtime.has_news:
                update = self._plan.loaded
            if update is not None:
                self._update_at_start(update, limit_s)
            await self._end.wait()
        finally:
            tasks = [task for task in (loop, watch, self._relocating, self._rolling) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close()

    async def _close(self) -> None:
        if self._stop_all:
            log.info("stopping everything")
            await self._gateways.close()
            await self._runtime.stop_all()
            self._state.clear()
        else:
            await self._gateways.leave()
            await self._runtime.leave()
        await self._telemetry.close()
        self._publisher.close()

    def end(self, *, stop_all: bool) -> None:
        """End soon; with `stop_all`, drain and stop everything first."""
        self._stop_all = self._stop_all or stop_all
        self._end.set()

    async def terminate(self) -> None:
        """We are told to stop: leave what runs to a successor, unless it is all being taken down."""
        kept = self._gateways.kept
        going_down = isinstance(kept, GivenGateway) and not await kept.is_there()
        if going_down:
            log.info("the gateway is gone, so the whole testbed is being taken down")
        self.end(stop_all=going_down)

    def interrupt(self) -> None:
        """Somebody pressed Ctrl-C: drain and stop everything."""
        self.interrupted = True
        self.end(stop_all=True)

    # --- nodes that come and go ------------------------------------------------------------------------------------------

    async def _watch_nodes(self) -> None:
        """Until cancelled: see which nodes are there, and go over to a plan without the others, or with them again."""
        while True:
            self._look_at_nodes()
            await asyncio.sleep(LOOK_S)

    def _look_at_nodes(self) -> None:
        # While nobody knows what runs, nobody knows where.
        if self._runtime.problem is None:
            control = self._testbed.control
            rules = presence.Rules(control.node_grace, control.node_return)
            self._presence = presence.step(self._presence, time.monotonic(), self._runtime.nodes_down, rules)
        if any(task is not None and not task.done() for task in (self._rolling, self._relocating)):
            return
        absent, without = self._presence.absent | self._emptied, self._presence.away | self._emptied
        avoided = self._avoid()
        if (absent, without, avoided) != (self._plan.absent, self._placed_without, self._plan.avoided):
            self._relocating = asyncio.create_task(self._relocate(absent, without, avoided))

    def _avoid(self) -> frozenset[presence.Place]:
        """Places where replicas fail to start, none runs, and others could be taken instead."""
        running = {(r.service, r.node) for r in self._runtime.replicas() if r.state != "starting"}
        failures = {place: b.failures for place, b in self._runtime.backoffs().items() if place not in running}
        self._avoided = presence.avoided(self._avoided, time.monotonic(), failures)
        return self._plan.avoidable(self._avoided)

    @property
    def _emptied(self) -> frozenset[str]:
        """Nodes that are there, and are to be emptied."""
        return (self._runtime.nodes_leaving | self._orders.drained) & self._testbed.nodes.keys()

    async def _relocate(self, absent: frozenset[str], without: frozenset[str], avoided: frozenset[presence.Place]) -> None:
        """Go over to a plan with nothing on `absent` nor at `avoided`, core services placed as if `without` were not there."""
        plan = replace(self._plan, avoided=avoided)
        if avoided != self._plan.avoided:
            said = ", ".join(f"{service} on {node}" for service, node in sorted(avoided))
            log.warning(
                "starts that fail again and again: %s", f"nothing more of {said}" if avoided else "tried anew everywhere"
            )
        if without != self._placed_without or avoided != self._plan.avoided:
            plan = await self._settled_plan(replace(plan, placed={}, absent=without))
        plan = replace(plan, absent=absent)
        log.info("nodes: %s", f"nothing on {', '.join(sorted(absent))}" if absent else "all are there")
        self._placed_without = without
        self._take(plan, self._begin(plan))

    def _begin(self, plan: Plan) -> Placement | None:
        """What is wanted, on the nodes of a plan: where its policy begins. None where there is no room for all of it."""
        core = {name: target for name, target in plan.targets().items() if self._services[name].tier == "core"}
        wanted = {**self._wanted(), **{name: target for name, target in core.items() if name not in self._orders.targets}}
        try:
            return plan.place(wanted, self._placed())
        except Infeasible as error:
            log.warning("nodes: not all that is wanted fits on those that are left: %s", error)
            return None

    # --- app.Controls ------------------------------------------------------------------------------------------------------

    async def routes(self, after: int, wait_s: float, gateway: Caller | None) -> Routes | None:
        """See `routes.Publisher.wait_for_news`."""
        return await self._publisher.wait_for_news(after, wait_s, gateway)

    def scale(self, service: str, replicas: int | None, standby: int | None) -> None:
        """Order a number of replicas, if it fits; None takes the order back."""
        self._check_names([service])
        if replicas is None:
            self._orders.release(service)
            log.info("order: none for %s any more, the policy decides", service)
            self._runner.wake()
            return
        current = self._wanted()
        floor = self._services[service].floor
        if replicas < floor:
            raise UsageError(f"{service} keeps at least {floor} replicas (its floor); asked for {replicas}")
        target = Target(replicas, current[service].standby if standby is None else standby)
        self._plan.place({**current, service: target}, self._placed())
        self._orders.scale(service, target)
        log.info("order: %s to %d replicas and %d on standby", service, target.replicas, target.standby)
        self._runner.wake()

    def _wanted(self) -> dict[str, Target]:
        """How many replicas of each service there should be: as ordered, else as decided, else as the file begins."""
        begins, desired = self._plan.targets(), self._runner.desired
        decided = {name: desired.target(name) for name in begins if desired.ready.get(name)} if desired is not None else {}
        return begins | decided | {name: target for name, target in self._orders.targets.items() if name in begins}

    def _placed(self) -> Placement | None:
        """What was placed last; what runs, where nothing was yet."""
        seen = self._runner.observation
        return self._runner.desired or (running(seen) if seen else None)

    def let_out(self, service: str, replica: str) -> None:
        """Put a standby to work that a gateway has let out, if its allowance and its node have room for it."""
        self._check_names([service])
        # Until now it was idle, and is paid for as such.
        self._runner.account()
        try:
            fresh = self._runtime.let_out(service, replica)
        except UsageError as error:
            self._metrics.let_out(service, "refused")
            log.info("not let out: %s", error)
            raise
        self._metrics.let_out(service, "ok" if fresh else "again")
        if fresh:
            self._runner.nudge()

    def restart(self, services: list[str] | None) -> None:
        """Order that every replica be replaced, one at a time."""
        names = list(self._services) if services is None else services
        self._check_names(names)
        self._orders.restart(names)
        log.info("order: replace every replica of %s", ", ".join(names))
        self._runtime.relaunch(self._launches())

    def update(self, text: str, name: str, limit_s: float) -> None:
        """Begin to replace the testbed by another version of it; see `rollout`."""
        if self._rolling is not None and not self._rolling.done():
            raise Conflict("an update is under way; wait until it has ended (espalier status)")
        if self._relocating is not None and not self._relocating.done():
            raise Conflict("a node has just come or gone; try again in a moment")
        new = replace(
            plans.make(testbeds.parse(text, name), self._settings.models_dir),
            absent=self._plan.absent,
            avoided=self._plan.avoided,
        )
        rollout = Rollout(
            self._plan, new, settle=self._settled_plan, take=self._take, look=self._standing, revert=self._runtime.revert
        )
        both = rollout.both
        both.place({**both.targets(), **self._wanted()}, self._placed())
        self._rollout = rollout
        self._rolling = asyncio.create_task(self._roll(rollout, new, text, limit_s))

    def _update_at_start(self, given: Loaded, limit_s: float) -> None:
        """As `update`, but nobody is there to be refused: what runs goes on, and the status says why it was not changed."""
        try:
            self.update(given.text, given.path, limit_s)
        except EspalierError as error:
            log.error("not updated: %s", error)
            self._refused = Progress("rolled_back", given.sha256, str(error))

    async def _roll(self, rollout: Rollout, new: Plan, text: str, limit_s: float) -> None:
        log.info("update to testbed file %s", new.loaded.sha256[:12])
        await self._runtime.refresh()
        await rollout.run(limit_s)
        if rollout.progress.state == "done":
            self._state.keep_testbed(text)
            self._runtime.keep()
        log.info("update: %s %s", rollout.progress.state, rollout.progress.reason)

    async def _settled_plan(self, plan: Plan) -> Plan:
        return await survey.settled(plan, self._placed())

    def _take(self, plan: Plan, begin: Placement | None = None) -> None:
        """Put a plan into force; `begin` is what its policy begins with, where that is not what runs."""
        self._plan, self._services, self._policy = plan, plan.services(), plan.policy()
        self._publisher.replan(plan.map())
        self._runtime.relaunch(self._launches(), self._services, plan.nodes())
        self._runner.change(
            self._policy,
            prices=plan.testbed.prices(),
            slot_s=plan.testbed.control.slot,
            absent=plan.absent,
            begin=begin,
        )

    def _standing(self) -> Standing:
        # A standby that is let out meanwhile is where it should be: a burst must not end an update.
        unsettled = tuple(name for name in self._services if not self._settled(name, self._states(name, let_out_is_idle=True)))
        return Standing(unsettled, {place: backoff.failures for place, backoff in self._runtime.backoffs().items()})

    def drain(self, node: str) -> None:
        """Order that a node be emptied, and stay so, if the others have room for what is wanted."""
        self._check_nodes([node])
        absent = self._presence.absent | self._emptied | {node}
        if self._testbed.nodes.keys() <= absent:
            raise UsageError(f"{node} is the last node there is, so nothing could go elsewhere")
        replace(self._plan, absent=absent).place({**self._wanted(), **self._orders.targets}, self._placed())
        self._orders.drain(node)
        log.info("order: empty %s", node)
        self._look_at_nodes()

    def undrain(self, node: str) -> None:
        """Take that back: the node is planned with again."""
        self._check_nodes([node])
        self._orders.undrain(node)
        log.info("order: use %s again", node)
        self._look_at_nodes()

    def _check_nodes(self, nodes: Sequence[str]) -> None:
        for node in nodes:
            if node not in self._testbed.nodes:
                hint = testbeds.did_you_mean(node, self._testbed.nodes) or f"; there are {', '.join(self._testbed.nodes)}"
                raise UsageError(f"there is no node {node!r}{hint}")

    async def probe(self, a: str, b: str) -> dict[str, Any]:
        """Measure the link between two nodes, by replicas that run there; for a testbed file, and in each direction."""
        self._check_nodes([a, b])
        if a == b:
            raise UsageError(f"{a} is at no distance from itself; name two nodes")
        if self._probing.locked():
            raise Conflict("another link is being measured; two at a time would find each other")
        replicas = self._runtime.replicas()
        here, there = (probes.place(node, replicas, self._plan.wiring.tiers) for node in (a, b))
        async with self._probing, httpx.AsyncClient(trust_env=False) as client:
            pair = await probes.measure(client, here, there)
        return {
            "between": [a, b], **pair.link.model_dump(),
            "directions": [pair.there.model_dump(), pair.back.model_dump()],
        }  # fmt: skip

    def shut_down(self) -> None:
        """Begin to drain and stop everything."""
        self.end(stop_all=True)

    def exposition(self) -> bytes:
        """The page of `GET /metrics`."""
        self._runner.account()
        self._metrics.show(self._runtime.replicas(), self._runner.desired)
        self._metrics.telemetry(self._telemetry.ages_s(), self._telemetry.used)
        self._metrics.runtime_acted(self._runtime.actions)
        self._metrics.failed({place: backoff.total for place, backoff in self._runtime.backoffs().items()})
        self._metrics.promises({name: (p.deadline, p.epsilon) for name, p in self._testbed.pipelines.items()})
        self._metrics.spent(self._runner.cost)
        return self._metrics.exposition()

    def targets(self) -> list[dict[str, Any]]:
        """The document of `GET /v1/targets`."""
        return targets.document(sources.sampled(self._runtime.replicas()), self._gateways.endpoints())

    def status(self) -> dict[str, Any]:
        """The document of `GET /v1/status`."""
        self._runner.account()
        services = {name: self._service_status(name) for name in self._services}
        gateway = self._gateways.record
        decision, cost = self._runner.decision, self._runner.cost
        gateway_ready = gateway is not None and gateway.state == "ready"
        return {
            "testbed": self._testbed.name,
            "sha256": self._plan.loaded.sha256,
            "ready": gateway_ready and all(s["states"]["ready"] >= s["wanted"]["ready"] for s in services.values()),
            "problem": self._runtime.problem,
            "uptime_s": round(time.monotonic() - self._began, 3),
            "version": self._publisher.current.version,
            "gateway": None if gateway is None else {"url": gateway.url, "state": gateway.state, "pid": gateway.pid},
            "gateways": self._gateways.status(),
            "nodes": {name: self._node_status(name) for name in self._testbed.nodes},
            "services": services,
            "pipelines": {name: self._pipeline_status(name) for name in self._testbed.pipelines},
            "update": self._update_status(),
            "decision": None if decision is None else {"hold": decision.desired is None, "reason": decision.reason},
            "slots": {"done": self._runner.slots, "failed": self._runner.failed_slots},
            "cost": {
                "total": cost.total, "replicas": cost.replicas, "standby": cost.standby, "starts": cost.starts,
            },
        }  # fmt: skip

    def _node_status(self, name: str) -> dict[str, Any]:
        """Its state, `drained` where it is up and to be empty, and how many replicas it has."""
        state: str = self._presence.state(name)
        if state == "up" and name in self._emptied:
            state = "drained"
        return {"state": state, "replicas": sum(replica.node == name for replica in self._runtime.replicas())}

    def _update_status(self) -> dict[str, Any] | None:
        progress = self._rollout.progress if self._rollout is not None else self._refused
        return None if progress is None else asdict(progress)

    def _service_status(self, name: str) -> dict[str, Any]:
        ours = [replica for replica in self._runtime.replicas() if replica.service == name]
        states = self._states(name)
        wanted = self._wanted()[name]
        seen = self._runner.observation.services.get(name) if self._runner.observation is not None else None
        signal_seen = seen.signal if seen is not None else None
        failures = {node: b.failures for (service, node), b in self._runtime.backoffs().items() if service == name}
        return {
            "tier": self._services[name].tier,
            "wanted": {"ready": wanted.replicas, "standby": wanted.standby},
            "states": states,
            "settled": self._settled(name, states),
            "failures": failures,
            "signal": None if signal_seen is None else {
                field: getattr(signal_seen, field)
                for field in ("age_s", "arrival_rate", "queue_length", "inflight", "wait_s", "service_s")
            },
            "replicas": [
                {"id": r.id, "node": r.node, "state": r.state, "url": r.url, **self._runtime.runs_as(r.id)} for r in ours
            ],
        }  # fmt: skip

    def _states(self, name: str, *, let_out_is_idle: bool = False) -> dict[str, int]:
        """Replicas of a service by state; with `let_out_is_idle`, the surplus at work counts as the standbys that lack."""
        ours = [replica.state for replica in self._runtime.replicas() if replica.service == name]
        states = {state: ours.count(state) for state in ("starting", "standby", "ready", "draining")}
        if let_out_is_idle:
            wanted = self._wanted()[name]
            out = max(0, min(states["ready"] - wanted.replicas, wanted.standby - states["standby"]))
            states |= {"ready": states["ready"] - out, "standby": states["standby"] + out}
        return states

    def _settled(self, name: str, states: Mapping[str, int]) -> bool:
        """Whether these states are as wanted, and no replica is outdated."""
        wanted = self._wanted()[name]
        outdated = any(replica.outdated for replica in self._runtime.replicas() if replica.service == name)
        return not outdated and states == {
            "starting": 0, "standby": wanted.standby, "ready": wanted.replicas, "draining": 0,
        }  # fmt: skip

    def _pipeline_status(self, name: str) -> dict[str, Any]:
        section, observation = self._testbed.pipelines[name], self._runner.observation
        seen = observation.pipelines.get(name) if observation is not None else None
        last_slot = None if seen is None else {"interval_s": seen.interval_s, "outcomes": dict(seen.outcomes)}
        return {"deadline_s": section.deadline, "epsilon": section.epsilon, "last_slot": last_slot}

    # --- parts ------------------------------------------------------------------------------------------------------------

    def _make_runtime(self) -> Keeper:
        control = self._testbed.control
        return Keeper(
            driver=self._make_driver(),
            state_dir=self._state.root,
            launches=self._launches(),
            services=self._services,
            nodes=self._plan.nodes(),
            routing=self._publisher,
            start_timeout_s=control.start_timeout,
            surge=control.surge,
        )

    def _make_driver(self) -> Driver:
        settings = self._settings
        if settings.swarm is not None:
            return Swarm(settings.swarm, Pins(self._state.images))
        if settings.engine is not None:
            return Engine(settings.engine, Pins(self._state.images))
        environment = children.environment(ROOT)
        return Processes(models_dir=settings.models_dir, module=settings.stage_module, environment=environment)

    def _make_gateway(self) -> Doorkeeper | GivenGateway | None:
        if self._settings.gateway_url == ANNOUNCED:
            return None
        if self._settings.gateway_url is not None:
            return GivenGateway(self._settings.gateway_url)
        gateway = self._testbed.gateway
        routes = ("--routes-url", f"{self._settings.control_url}/v1/routes")
        return Doorkeeper(
            state_dir=self._state.root,
            argv=(
                *(sys.executable, "-m", self._settings.gateway_module, *routes),
                *("--routes-file", str(self._state.gateway_routes.resolve())),
            ),
            door=Door(self._testbed.gateway_node, gateway.host, gateway.port),
            environment=children.environment(ROOT),
            on_death=self._publisher.forget,
        )

    def _make_runner(self) -> Runner[Any]:
        return Runner(
            policy=self._policy,
            telemetry=self._telemetry,
            runtime=self._runtime,
            decisions=DecisionLog(self._state.decisions, lambda: Origin(self._testbed.name, self._plan.loaded.sha256)),
            orders=lambda: self._orders.targets,
            version=lambda: self._publisher.current.version,
            metrics=self._metrics,
            prices=self._testbed.prices(),
            slot_s=self._testbed.control.slot,
        )

    def _launches(self) -> dict[str, Launch]:
        return {name: self._launch(name) for name in self._testbed.services}

    def _launch(self, name: str) -> Launch:
        section = self._testbed.services[name]
        options = [
            *("--stage", ",".join(section.members), "--service", name, "--precision", section.precision),
            *("--cpus", f"{section.cpus_at_most:g}", "--queue-capacity", str(section.queue_capacity)),
            *("--drain-grace", f"{section.drain_grace:g}"),
        ]
        if section.max_batch is not None:
            options += ["--max-batch", str(section.max_batch)]
        # Of the model as it lies there: what is fused for another service is no reason to start this one anew.
        manifest = fusing.as_exported(self._plan.manifests[section.model]).model_dump_json()
        return Launch(
            model=section.model,
            options=tuple(options),
            drain_grace_s=section.drain_grace,
            cpus=section.cpus,
            cpu_limit=section.cpus_at_most,
            memory_bytes=section.memory,
            gpus=section.gpus,
            model_sha256=hashlib.sha256(manifest.encode()).hexdigest(),
            generation=self._orders.generation(name),
        )

    def _check_names(self, names: list[str]) -> None:
        for name in names:
            if name not in self._services:
                hint = testbeds.did_you_mean(name, self._services) or f"; there are {', '.join(self._services)}"
                raise UsageError(f"there is no service {name!r}{hint}")
