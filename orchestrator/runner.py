"""The loop: every slot observe, decide, apply (which publishes the routes), log. The only place where the parts meet in time.

A slot that fails is logged and counted and the next one comes; every wait has a limit. An order of the operator ends the wait
between slots at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Generic, TypeVar

from orchestrator import costs
from orchestrator.core import Decision, Observation, Placement, Runtime, ScalingPolicy, Target, Telemetry
from orchestrator.costs import Cost, Prices
from orchestrator.decision_log import DecisionLog, Entry
from orchestrator.metrics import Metrics

log = logging.getLogger(__name__)

OBSERVE_LIMIT_S = 5.0
NUDGE_S = 0.1
"""What may come in bursts begins a slot at most this often [s]."""

S = TypeVar("S")


class Runner(Generic[S]):
    """Steps one policy over one testbed."""

    def __init__(
        self,
        *,
        policy: ScalingPolicy[S],
        telemetry: Telemetry,
        runtime: Runtime,
        decisions: DecisionLog,
        orders: Callable[[], Mapping[str, Target]],
        version: Callable[[], int],
        metrics: Metrics,
        prices: Prices,
        slot_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._telemetry, self._runtime, self._decisions = policy, telemetry, runtime, decisions
        self._orders, self._version, self._metrics, self._prices = orders, version, metrics, prices
        self._slot_s, self._clock = slot_s, clock
        self._state = policy.initial()
        self._absent: frozenset[str] = frozenset()
        self._begin: Placement | None = None
        self._wake = asyncio.Event()
        self._nudged: asyncio.TimerHandle | None = None
        self._logging = True
        self._accounted_t, self._accounted_starts = clock(), runtime.starts
        self.cost = Cost()
        self.slots = self.failed_slots = 0
        self.observation: Observation | None = None
        self.decision: Decision | None = None
        self.desired: Placement | None = None

    def change(
        self,
        policy: ScalingPolicy[S],
        *,
        prices: Prices,
        slot_s: float,
        absent: Collection[str] = (),
        begin: Placement | None = None,
    ) -> None:
        """Step another policy from now on, beginning with a slot at once; its first state is its own.

        Args:
            policy: the other one.
            prices: of the accounting.
            slot_s: time between two slots [s].
            absent: nodes that it is to see nothing on.
            begin: what its first slot sees running; None: what runs.
        """
        self.account()
        self._policy, self._state, self.desired = policy, policy.initial(), None
        self._absent, self._begin = frozenset(absent), begin
        self._prices, self._slot_s = prices, slot_s
        self.wake()

    def wake(self) -> None:
        """Begin the next slot now."""
        self._wake.set()

    def nudge(self) -> None:
        """Begin the next slot soon, after `NUDGE_S`: for what may come in bursts, which then is one slot's business."""
        if self._nudged is None:
            self._nudged = asyncio.get_running_loop().call_later(NUDGE_S, self.wake)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            if self._nudged is not None:
                self._nudged.cancel()
                self._nudged = None
            try:
                await self.tick()
            except Exception:
                self.failed_slots += 1
                self._metrics.acted("tick", "failed")
                log.exception("slot %d failed; the next one follows", self.slots)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._slot_s):
                    await self._wake.wait()

    async def tick(self) -> None:
        """One slot."""
        self.slots += 1
        self.account()
        with self._metrics.tick.time():
            async with asyncio.timeout(OBSERVE_LIMIT_S):
                replicas = self._runtime.replicas()
                seen = await self._telemetry.observe(self._clock(), replicas)
            observation = replace(seen, orders=dict(self._orders())).without(self._absent)
            if self._begin is not None:
                observation, self._begin = observation.standing_as(self._begin), None
            state, decision = self._policy.step(self._state, observation)
            if decision.desired is not None:
                self._runtime.apply(decision.desired, replicas)
                self.desired = decision.desired
            if self.decision is None or decision.reason != self.decision.reason:
                log.info("decision: %s", decision.reason)
            self._record(Entry(self._state, observation, decision))
        self._state, self.observation, self.decision = state, observation, decision
        self._metrics.acted("hold" if decision.desired is None else "apply", "ok")

    def _record(self, entry: Entry[S]) -> None:
        """Append to the decision log. Control goes on where that fails (a full disk): it is said once, and counted."""
        try:
            self._decisions.append(entry, policy=self._policy, wall=datetime.now(UTC).isoformat(), version=self._version())
        except (OSError, ValueError) as error:
            self._metrics.acted("log", "failed")
            if self._logging:
                log.warning("the decision log cannot be written, control goes on without it: %s", error)
            self._logging = False
        else:
            if not self._logging:
                log.info("the decision log is written again")
            self._logging = True

    def account(self) -> None:
        """Add what the testbed has cost since this was called last."""
        t, starts = self._clock(), self._runtime.starts
        new_starts, self._accounted_starts = starts - self._accounted_starts, starts
        self.cost += costs.of_slot(self._runtime.replicas(), t - self._accounted_t, new_starts, self._prices)
        self._accounted_t = t
