"""One running testbed: all parts put together, and what the control plane's HTTP face can ask of them.

The only place that knows every part. It decides nothing itself: the policy decides, the runtime acts, the runner keeps time.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.manifest import Manifest
from orchestrator import testbed as testbeds
from orchestrator import wiring
from orchestrator.core import Target
from orchestrator.costs import Prices
from orchestrator.decision_log import DecisionLog
from orchestrator.errors import UsageError
from orchestrator.metrics import Metrics
from orchestrator.orders import Orders
from orchestrator.routes import Map, Publisher
from orchestrator.runner import Runner
from orchestrator.runtimes import child as children
from orchestrator.runtimes.doorkeeper import Door, Doorkeeper
from orchestrator.runtimes.processes import Launch, Processes
from orchestrator.scaling.manual import Manual, ManualState, running
from orchestrator.state_dir import StateDir
from orchestrator.telemetry.scrape import Scrape
from orchestrator.testbed import Loaded
from services.dataplane.routes import Routes

log = logging.getLogger(__name__)

STAGE_MODULE, GATEWAY_MODULE = "services.stage", "services.gateway"
ROOT = Path(__file__).resolve().parents[1]
"""Where the package lies, for the processes we start."""


class Orchestrator:
    """All parts of one running testbed; the `app.Controls` of its control plane."""

    def __init__(
        self,
        loaded: Loaded,
        models: Mapping[str, Manifest],
        wired: wiring.Wiring,
        state: StateDir,
        models_dir: Path,
        control_url: str,
        stage_module: str = STAGE_MODULE,
        gateway_module: str = GATEWAY_MODULE,
    ) -> None:
        self._testbed = testbed = loaded.testbed
        self._sha256, self._state, self._models_dir = loaded.sha256, state, models_dir.resolve()
        self._stage_module = stage_module
        self._began = time.monotonic()
        self._end = asyncio.Event()
        self._stop_all = False
        self.interrupted = False
        self._services = {service.name: service for service in testbed.core_services(wired.tiers)}
        self._orders = Orders(state.orders)
        self._metrics = Metrics()
        self._publisher = Publisher(Map(testbed, models, wired.pipelines), state.routes)
        self._runtime = self._make_runtime()
        self._gateway = self._make_gateway(control_url, gateway_module)
        self._telemetry = Scrape(self._gateway_urls)
        self._policy = self._make_policy()
        self._runner = self._make_runner()

    async def run(self) -> None:
        """Adopt or start everything and keep it until told to end."""
        adopted = self._runtime.adopt()
        log.info("testbed %s: %d replicas adopted", self._testbed.name, adopted)
        loop: asyncio.Task[None] | None = None
        try:
            # Before any replica is started: a port that is taken must leave nothing behind.
            await self._gateway.open()
            loop = asyncio.create_task(self._runner.run())
            await self._end.wait()
        finally:
            if loop is not None:
                loop.cancel()
                await asyncio.gather(loop, return_exceptions=True)
            await self._close()

    async def _close(self) -> None:
        if self._stop_all:
            log.info("stopping everything")
            await self._gateway.close()
            await self._runtime.stop_all()
            self._state.clear()
        else:
            await self._gateway.leave()
            await self._runtime.leave()
        await self._telemetry.close()
        self._publisher.close()

    def end(self, *, stop_all: bool) -> None:
        """End soon; with `stop_all`, drain and stop everything first."""
        self._stop_all = self._stop_all or stop_all
        self._end.set()

    def interrupt(self) -> None:
        """Somebody pressed Ctrl-C: drain and stop everything."""
        self.interrupted = True
        self.end(stop_all=True)

    # --- app.Controls ------------------------------------------------------------------------------------------------------

    async def routes(self, after: int, wait_s: float, gateway: str | None) -> Routes | None:
        """See `routes.Publisher.wait_for_news`."""
        return await self._publisher.wait_for_news(after, wait_s, gateway)

    def scale(self, service: str, replicas: int, standby: int | None) -> None:
        """Order a number of replicas, if it fits."""
        current = self._policy.wanted(self._orders.targets)
        self._check_names([service])
        floor = self._services[service].floor
        if replicas < floor:
            raise UsageError(f"{service} keeps at least {floor} replicas (its floor); asked for {replicas}")
        target = Target(replicas, current[service].standby if standby is None else standby)
        seen = self._runner.observation
        self._policy.place({**current, service: target}, self._runner.desired or (running(seen) if seen else None))
        self._orders.scale(service, target)
        log.info("order: %s to %d replicas and %d on standby", service, target.replicas, target.standby)
        self._runner.wake()

    def restart(self, services: list[str] | None) -> None:
        """Order that every replica be replaced, one at a time."""
        names = list(self._services) if services is None else services
        self._check_names(names)
        self._orders.restart(names)
        log.info("order: replace every replica of %s", ", ".join(names))
        self._runtime.relaunch(self._launches())

    def shut_down(self) -> None:
        """Begin to drain and stop everything."""
        self.end(stop_all=True)

    def exposition(self) -> bytes:
        """The page of `GET /metrics`."""
        self._runner.account()
        self._metrics.show(self._runtime.replicas(), self._runner.desired)
        self._metrics.ages(self._telemetry.ages_s())
        self._metrics.runtime_acted(self._runtime.actions)
        self._metrics.spent(self._runner.cost)
        return self._metrics.exposition()

    def status(self) -> dict[str, Any]:
        """The document of `GET /v1/status`."""
        self._runner.account()
        services = {name: self._service_status(name) for name in self._services}
        gateway = self._gateway.record
        decision, cost = self._runner.decision, self._runner.cost
        gateway_ready = gateway is not None and gateway.state == "ready"
        return {
            "testbed": self._testbed.name,
            "sha256": self._sha256,
            "ready": gateway_ready and all(s["states"]["ready"] >= s["wanted"]["ready"] for s in services.values()),
            "uptime_s": round(time.monotonic() - self._began, 3),
            "version": self._publisher.current.version,
            "gateway": None if gateway is None else {"url": gateway.url, "state": gateway.state, "pid": gateway.pid},
            "services": services,
            "pipelines": {name: self._pipeline_status(name) for name in self._testbed.pipelines},
            "decision": None if decision is None else {"hold": decision.desired is None, "reason": decision.reason},
            "slots": {"done": self._runner.slots, "failed": self._runner.failed_slots},
            "cost": {
                "total": cost.total, "replicas": cost.replicas, "standby": cost.standby, "starts": cost.starts,
            },
        }  # fmt: skip

    def _service_status(self, name: str) -> dict[str, Any]:
        ours = [replica for replica in self._runtime.replicas() if replica.service == name]
        states = {state: sum(r.state == state for r in ours) for state in ("starting", "standby", "ready", "draining")}
        wanted = self._policy.wanted(self._orders.targets)[name]
        seen = self._runner.observation.services.get(name) if self._runner.observation is not None else None
        signal_seen = seen.signal if seen is not None else None
        failures = {node: b.failures for (service, node), b in self._runtime.backoffs().items() if service == name}
        return {
            "tier": self._services[name].tier,
            "wanted": {"ready": wanted.replicas, "standby": wanted.standby},
            "states": states,
            "settled": states == {"starting": 0, "standby": wanted.standby, "ready": wanted.replicas, "draining": 0}
            and not any(replica.outdated for replica in ours),
            "failures": failures,
            "signal": None if signal_seen is None else {
                field: getattr(signal_seen, field)
                for field in ("age_s", "arrival_rate", "queue_length", "inflight", "wait_s", "service_s")
            },
            "replicas": [
                {"id": r.id, "node": r.node, "state": r.state, "url": r.url, "pid": self._runtime.pid(r.id)} for r in ours
            ],
        }  # fmt: skip

    def _pipeline_status(self, name: str) -> dict[str, Any]:
        section, observation = self._testbed.pipelines[name], self._runner.observation
        seen = observation.pipelines.get(name) if observation is not None else None
        last_slot = None if seen is None else {"interval_s": seen.interval_s, "outcomes": dict(seen.outcomes)}
        return {"deadline_s": section.deadline, "epsilon": section.epsilon, "last_slot": last_slot}

    # --- parts ------------------------------------------------------------------------------------------------------------

    def _make_runtime(self) -> Processes:
        control = self._testbed.control
        return Processes(
            state_dir=self._state.root,
            launches=self._launches(),
            services=self._services,
            nodes={node.name: node for node in self._testbed.core_nodes()},
            routing=self._publisher,
            environment=children.environment(ROOT),
            start_timeout_s=control.start_timeout,
            surge=control.surge,
        )

    def _make_gateway(self, control_url: str, module: str) -> Doorkeeper:
        gateway = self._testbed.gateway
        return Doorkeeper(
            state_dir=self._state.root,
            argv=(
                *(sys.executable, "-m", module, "--routes-url", f"{control_url}/v1/routes"),
                *("--routes-file", str(self._state.gateway_routes.resolve())),
            ),
            door=Door(self._testbed.gateway_node, gateway.host, gateway.port),
            environment=children.environment(ROOT),
            on_death=self._publisher.forget,
        )

    def _make_policy(self) -> Manual:
        return Manual(
            services=tuple(self._services.values()),
            nodes=self._testbed.core_nodes(),
            targets=self._testbed.targets(),
            flows=self._testbed.flows(),
            latencies_s=self._testbed.latencies_s(),
            stale_after_s=self._testbed.control.stale_after,
        )

    def _make_runner(self) -> Runner[ManualState]:
        control = self._testbed.control
        return Runner(
            policy=self._policy,
            telemetry=self._telemetry,
            runtime=self._runtime,
            decisions=DecisionLog(self._state.decisions, ManualState),
            orders=lambda: self._orders.targets,
            version=lambda: self._publisher.current.version,
            metrics=self._metrics,
            prices=Prices(**control.costs.model_dump()),
            slot_s=control.slot,
        )

    def _launches(self) -> dict[str, Launch]:
        return {name: self._launch(name) for name in self._testbed.services}

    def _launch(self, name: str) -> Launch:
        section = self._testbed.services[name]
        argv = [
            *(sys.executable, "-m", self._stage_module, "--model", str(self._models_dir / section.model)),
            *("--stage", section.stage, "--service", name, "--precision", section.precision),
            *("--cpus", f"{section.cpus:g}", "--queue-capacity", str(section.queue_capacity)),
            *("--drain-grace", f"{section.drain_grace:g}"),
        ]
        if section.max_batch is not None:
            argv += ["--max-batch", str(section.max_batch)]
        return Launch(tuple(argv), section.drain_grace, self._orders.generation(name))

    def _gateway_urls(self) -> list[str]:
        record = self._gateway.record
        return [record.url] if record is not None and record.state == "ready" else []

    def _check_names(self, names: list[str]) -> None:
        for name in names:
            if name not in self._services:
                hint = testbeds.did_you_mean(name, self._services) or f"; there are {', '.join(self._services)}"
                raise UsageError(f"there is no service {name!r}{hint}")
