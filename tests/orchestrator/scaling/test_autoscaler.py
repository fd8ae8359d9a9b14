from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from orchestrator.core import Decision, Node, Observation, Placement, ScalingPolicy, Service, ServiceObservation, Signal, Target
from orchestrator.errors import Infeasible
from orchestrator.scaling import policies
from orchestrator.scaling.algorithm1 import Algorithm1
from orchestrator.scaling.autoscaler import place
from orchestrator.scaling.hpa import Hpa, Keda
from orchestrator.scaling.inferline import InferLine
from orchestrator.scaling.kpa import Kpa
from orchestrator.scaling.oracle import Oracle
from orchestrator.scaling.ray import Ray
from orchestrator.scaling.site import Law, Promise, Site
from orchestrator.scaling.square_root import SquareRoot, Static

SITE = Site(
    services=(Service("encode", "core", 1.0, 1), Service("pool", "light", 1.0, 1)),
    nodes=(Node("a", 40.0, 100), Node("b", 40.0, 100)),
    targets={"encode": Target(2), "pool": Target(2)},
    flows=frozenset({("encode", "pool")}),
    latencies_s={("a", "b"): 0.01},
)
ALL: list[ScalingPolicy[Any]] = [
    Static(SITE),
    Hpa(SITE),
    Keda(SITE),
    Kpa(SITE, concurrency=1.0),
    Ray(SITE),
    SquareRoot(SITE),
    InferLine(SITE),
    InferLine(SITE, sample={"pool": (90, 110)}),
    Algorithm1(SITE),
    Oracle(SITE, {"pool": (1,) * 99}),
]


class Film:
    """A policy, slot by slot, with everything it orders ready at once."""

    def __init__(self, policy: ScalingPolicy[Any]) -> None:
        self.policy, self.state = policy, policy.initial()
        self.on: Mapping[str, Mapping[str, int]] = {"encode": {"a": 1, "b": 1}, "pool": {"a": 1, "b": 1}}
        self.decision = Decision(None, "")

    def see(self, t: float, rate: float | None = None, age_s: float = 0.1, orders: Any = None, **signal: float) -> int:
        """Replicas of pool that are wanted after this slot."""
        said = Signal(age_s, rate, **signal)
        seen = {
            name: ServiceObservation({node: {"ready": n} for node, n in on.items()}, said if name == "pool" else Signal(0.1))
            for name, on in self.on.items()
        }
        self.state, self.decision = self.policy.step(self.state, Observation(t, seen, orders=orders or {}))
        again = TypeAdapter(self.policy.state_type)
        self.state = again.validate_json(again.dump_json(self.state))
        assert self.decision.desired is not None
        self.on = self.decision.desired.ready
        return self.decision.desired.target("pool").replicas


def test_square_root_follows_load_and_backlog_and_gives_up_after_its_hold() -> None:
    film = Film(SquareRoot(SITE, beta=1.0))
    assert film.see(0, 40, queue_length=0.0, service_s=0.1) == 2, "nothing to compare with yet"
    assert film.see(1, 40, queue_length=0.0, service_s=0.1) == 6
    assert film.see(2, 40, queue_length=50.0, service_s=0.1) == 12, "90 a second came: a jump"
    for t in range(3, 7):
        assert film.see(t, 40, queue_length=50.0, service_s=0.1) == 12
    assert film.see(7, 40, queue_length=50.0, service_s=0.1) < 12


def test_static_is_what_the_testbed_says() -> None:
    film = Film(Static(SITE))
    assert film.see(0, 900, queue_length=99.0, service_s=0.1) == 2
    assert film.decision.reason == "no change"


@pytest.mark.parametrize("policy", ALL, ids=lambda p: type(p).__name__)
class TestEveryPolicy:
    def test_survives_json(self, policy: ScalingPolicy[Any]) -> None:
        name, parameters = policies.describe(policy)
        assert policies.build(name, json.loads(json.dumps(parameters, allow_nan=False))) == policy

    def test_holds_where_nothing_is_known(self, policy: ScalingPolicy[Any]) -> None:
        film = Film(policy)
        assert film.see(0) == 2
        assert film.see(1000, 0.0, age_s=9.0, queue_length=0.0, inflight=0.0, service_s=0.1) == 2

    def test_obeys_the_operator_and_leaves_the_core_alone(self, policy: ScalingPolicy[Any]) -> None:
        film = Film(policy)
        assert film.see(0, 900, inflight=500.0, queue_length=500.0, service_s=0.5, orders={"pool": Target(3)}) == 3
        assert film.decision.desired is not None
        assert film.decision.desired.target("encode") == Target(2)

    def test_fills_the_nodes_and_no_more(self, policy: ScalingPolicy[Any]) -> None:
        film = Film(policy)
        reasons = []
        for t in range(0, 200, 15):
            film.see(t, 900 + t, inflight=5000.0, queue_length=t * 100.0, service_s=0.5)
            reasons.append(film.decision.reason)
        assert all(sum(film.on[s].get(node, 0) for s in film.on) <= 40 for node in "ab")
        if not isinstance(policy, Static | Hpa | Oracle):
            assert sum(film.on["pool"].values()) == 78
            assert any("no room for all of pool" in reason for reason in reasons)

    def test_moves_nothing_that_runs(self, policy: ScalingPolicy[Any]) -> None:
        film = Film(policy)
        before = film.on
        film.see(0, 50, inflight=50.0, queue_length=0.0, service_s=0.1)
        film.see(30, 50, inflight=50.0, queue_length=0.0, service_s=0.1)
        assert all(film.on[name][node] >= n for name, on in before.items() for node, n in on.items())


@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0, 200), st.floats(0.01, 0.5)), min_size=1, max_size=6))
def test_never_below_the_floor_nor_above_the_most(slots: list[tuple[float, float, float]]) -> None:
    light = replace(SITE.services[1], floor=2)
    site = replace(SITE, services=(SITE.services[0], light), most={"pool": 9})
    profiled = replace(site, laws={"pool": Law(0.1, 0.5)}, promises={"p": Promise(0.5, 0.05, (("encode", "pool"),))})
    for policy in (
        *(kind(site) for kind in (Hpa, Keda, Kpa, Ray, SquareRoot, InferLine, Algorithm1)),
        InferLine(profiled, {"pool": (0, 30, 90)}),
        Algorithm1(profiled),
        Oracle(profiled, {"pool": (0, 40) * 99}, step_s=10.0),
    ):
        film = Film(policy)
        for i, (rate, waiting, service_s) in enumerate(slots):
            wanted = film.see(400.0 * i, rate, inflight=waiting, queue_length=waiting, service_s=service_s)
            assert 2 <= wanted <= 9


def test_what_lies_in_pieces_is_a_hold_or_a_place_and_never_too_much() -> None:
    """Nodes that others have filled to the last core: what has no room is not placed, and says so."""
    full = replace(SITE, nodes=(Node("a", 2.0, 100), Node("b", 2.0, 100)))
    film = Film(Keda(full, queue_length=1.0))
    assert film.see(0, inflight=50.0) == 2
    assert film.decision.reason == "no change; no room for all of pool 6"
    grown = place(full, {"encode": Target(2), "pool": Target(1)}, Placement(film.on, {}))
    assert grown.target("pool") == Target(1)
    with pytest.raises(Infeasible, match="no node has room for replica 3 of 3 of pool"):
        place(full, {"encode": Target(2), "pool": Target(3)}, Placement(film.on, {}))


def test_only_what_changes_is_looked_at_and_the_rest_keeps_its_room() -> None:
    others = tuple(Service(f"s{i}", "light", 1.0, 1) for i in range(3))
    site = replace(SITE, services=(*SITE.services, *others), targets={**SITE.targets, **{s.name: Target(2) for s in others}})
    on = {"encode": {"a": 1, "b": 1}, "pool": {"a": 1}, "s0": {"a": 30}, "s1": {"b": 3}, "s2": {"b": 3}}
    targets = {name: Target(sum(nodes.values())) for name, nodes in on.items()} | {"pool": Target(20)}
    placed = place(site, targets, Placement(on, {}))
    assert {name: placed.ready[name] for name in ("s0", "s1", "s2")} == {name: on[name] for name in ("s0", "s1", "s2")}
    assert placed.ready["pool"]["a"] + 31 <= 40
    assert placed.target("pool") == Target(20)
