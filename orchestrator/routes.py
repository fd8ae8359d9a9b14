"""The routes document: built from the testbed and what runs, given a version that only grows, and handed to gateways that wait.

A gateway's long poll says two things: the version it has applied, and that it is alive. A drain waits for both, so that no
replica is stopped while a gateway still sends to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from models.manifest import Manifest
from orchestrator.core import Replica
from orchestrator.testbed import Testbed
from services.dataplane import letting_out
from services.dataplane import routes as document
from services.dataplane.pipeline import Pipeline
from services.dataplane.routes import Link, Routes, Service

log = logging.getLogger(__name__)

GATEWAY_FORGOTTEN_S = 5.0
"""A gateway that has not asked for this long is gone, or keeps what it has on its own; nobody waits for it [s]."""
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Map:
    """The part of the routes that does not change while the orchestrator runs."""

    testbed: Testbed
    manifests: Mapping[str, Manifest]
    pipelines: Mapping[str, Pipeline]

    def routes(
        self,
        replicas: Sequence[Replica],
        version: int,
        allowance: Mapping[str, int] = MappingProxyType({}),
        patience: Mapping[str, float] = MappingProxyType({}),
    ) -> Routes:
        """The document with these replicas, and with what a placement says of letting standbys out (`core.Placement`)."""
        return Routes(
            version=version,
            testbed=self.testbed.name,
            services={
                name: self._service(name, replicas, allowance.get(name, 0), patience.get(name, letting_out.SHARE))
                for name in self.testbed.services
            },
            pipelines=self.pipelines,
            links=self._links(),
        )

    def _service(self, name: str, replicas: Sequence[Replica], allowance: int, patience: float) -> Service:
        section = self.testbed.services[name]
        manifest = self.manifests[section.model]
        stage = manifest.stage(section.stage)
        return Service(
            name=name,
            model=section.model,
            stage=section.stage,
            tier=stage.tier,
            weights=manifest.weights,
            inputs=stage.inputs,
            outputs=stage.outputs,
            replicas=tuple(
                document.Replica(id=r.id, node=r.node, url=r.url, state=r.state) for r in replicas if r.service == name
            ),
            allowance=allowance,
            patience=patience,
        )

    def _links(self) -> dict[str, dict[str, Link]]:
        links: dict[str, dict[str, Link]] = {}
        for (a, b), link in self.testbed.link_table().items():
            links.setdefault(a, {})[b] = link
        return links


@dataclass(frozen=True, slots=True)
class Caller:
    """A gateway that asks for the routes."""

    name: str
    node: str = ""
    """It runs on, as it says."""
    url: str = ""
    """Its own address; empty where it does not say on which port it listens."""


@dataclass(slots=True)
class _Gateway:
    applied: int
    asking: int
    """Polls that are waiting for an answer."""
    heard: float


class Publisher:
    """Holds the current document; versions are kept on disk so that they grow across restarts."""

    def __init__(self, plan: Map, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._path = path
        self._clock = clock
        self._gateways: dict[Caller, _Gateway] = {}
        self._news = asyncio.Event()
        self._closed = False
        kept = document.load(path)
        self.current = plan.routes((), kept.version if kept else 0)
        # What was published last, so that a successor that finds everything as it was does not trouble the gateways.
        self._published = kept

    def replan(self, plan: Map) -> None:
        """The next `publish` follows this plan: other services, pipelines or links."""
        self._plan = plan

    def publish(
        self,
        replicas: Sequence[Replica],
        allowance: Mapping[str, int] = MappingProxyType({}),
        patience: Mapping[str, float] = MappingProxyType({}),
    ) -> int:
        """Publish replicas, and when standbys are let out, if that changes anything; the version they are known under."""
        version = self.current.version
        routes = self._plan.routes(replicas, version, allowance, patience)
        if routes != self._published:
            self._issue(routes.model_copy(update={"version": version + 1}))
        else:
            self.current = routes
        return self.current.version

    def _issue(self, routes: Routes) -> None:
        try:
            document.save(routes, self._path)
        except OSError as error:
            # Gateways matter more than the next start, which would overtake them anyway (`wait_for_news`).
            log.warning("routes %d could not be kept on disk: %s", routes.version, error)
        self.current = self._published = routes
        self._tell()

    def _tell(self) -> None:
        """Wake everybody who waits; each looks for itself whether it is enough."""
        self._news.set()
        self._news = asyncio.Event()

    async def wait_for_news(self, after: int, wait_s: float, gateway: Caller | None) -> Routes | None:
        """The document as soon as its version is not `after`; None when `wait_s` passed without a change."""
        if after > self.current.version:
            # The state directory was lost. Go on above what the gateway has, so that "newer" keeps its meaning.
            self._issue(self.current.model_copy(update={"version": after + 1}))
        poll = self._hear(gateway, after)
        try:
            async with asyncio.timeout(min(wait_s, LONGEST_WAIT_S)):
                while self.current.version == after and not self._closed:
                    await self._news.wait()
        except TimeoutError:
            return None
        finally:
            if poll is not None:
                poll.asking -= 1
                poll.heard = self._clock()
        return self.current if self.current.version != after else None

    def _hear(self, gateway: Caller | None, applied: int) -> _Gateway | None:
        if gateway is None:
            return None
        self._gateways = {caller: known for caller, known in self._gateways.items() if caller == gateway or self._alive(known)}
        known = self._gateways.setdefault(gateway, _Gateway(applied, 0, self._clock()))
        known.applied, known.heard = applied, self._clock()
        known.asking += 1
        self._tell()
        return known

    async def acknowledged(self, version: int, limit_s: float) -> bool:
        """Wait until every gateway that is heard of has the version; False when the limit passed first."""
        try:
            async with asyncio.timeout(limit_s):
                while not self._all_have(version):
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    def _all_have(self, version: int) -> bool:
        return all(gateway.applied >= version for gateway in self._gateways.values() if self._alive(gateway))

    def _alive(self, gateway: _Gateway) -> bool:
        return gateway.asking > 0 or self._clock() - gateway.heard < GATEWAY_FORGOTTEN_S

    def heard(self) -> dict[Caller, int]:
        """The gateways that are alive, as far as their polls tell, and the version each has applied."""
        return {caller: gateway.applied for caller, gateway in self._gateways.items() if self._alive(gateway)}

    def drop(self, caller: Caller) -> None:
        """This gateway is known to be gone; another one of its name, at another address, is not."""
        self._gateways.pop(caller, None)
        self._tell()

    def forget(self, name: str) -> None:
        """The gateway of that name is known to be dead: nobody waits for it."""
        self._gateways = {caller: known for caller, known in self._gateways.items() if caller.name != name}
        self._tell()

    def close(self) -> None:
        """Answer everybody who waits, so that the server can stop."""
        self._closed = True
        self._tell()
