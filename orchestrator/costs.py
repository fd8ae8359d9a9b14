"""What the testbed costs: replicas at work, replicas on standby, and starts, in the testbed's cost unit.

    cost = sum over slots of  cpu_second * (cores at work + standby_fraction * cores on standby) * slot  +  start * starts

A draining replica is still at work; one that is starting is paid for by its start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.core import Replica


@dataclass(frozen=True, slots=True)
class Prices:
    """In the testbed's cost unit; see `orchestrator.testbed.CostsSection`."""

    cpu_second: float = 1.0
    standby_fraction: float = 0.1
    start: float = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """A sum of money, by what it was spent on."""

    replicas: float = 0.0
    standby: float = 0.0
    starts: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.replicas + self.standby + self.starts

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.replicas + other.replicas, self.standby + other.standby, self.starts + other.starts)


def of_slot(replicas: Iterable[Replica], elapsed_s: float, starts: int, prices: Prices) -> Cost:
    """Cost of `elapsed_s` seconds with these replicas, in which `starts` of them were started."""
    cores = {"at_work": 0.0, "standby": 0.0}
    for replica in replicas:
        if replica.state in ("ready", "draining"):
            cores["at_work"] += replica.cpus
        elif replica.state == "standby":
            cores["standby"] += replica.cpus
    second = prices.cpu_second * elapsed_s
    return Cost(cores["at_work"] * second, cores["standby"] * second * prices.standby_fraction, starts * prices.start)
