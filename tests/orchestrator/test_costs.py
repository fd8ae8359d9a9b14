from __future__ import annotations

import pytest

from orchestrator import costs
from orchestrator.core import Replica
from orchestrator.costs import Cost, Prices
from services.dataplane.routes import ReplicaState


def replica(state: ReplicaState, cpus: float) -> Replica:
    return Replica(state, "s", "n", state, cpus, 0)


def test_a_slot_costs_what_works_a_part_of_what_waits_and_every_start() -> None:
    """2 s: 0.5 + 1 cores at work (one draining), 2 on standby, one loading (paid by its start), 3 starts."""
    replicas = [replica("ready", 0.5), replica("draining", 1.0), replica("standby", 2.0), replica("starting", 4.0)]
    cost = costs.of_slot(replicas, 2.0, 3, Prices(cpu_second=10.0, standby_fraction=0.25, start=7.0))
    assert cost == Cost(replicas=30.0, standby=10.0, starts=21.0)
    assert cost.total == pytest.approx(61.0)


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
