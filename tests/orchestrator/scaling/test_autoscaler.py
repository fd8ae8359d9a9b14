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
from orchestrator.scaling.autoscaler import place
from orchestrator.scaling.hpa import Behavior, Hpa, Keda
from orchestrator.scaling.kpa import Kpa
from orchestrator.scaling.ray import Ray
from orchestrator.scaling.site import Site
from orchestrator.scaling.square_root import SquareRoot, Static

SITE = Site(
    services=(Service("encode", "core", 1.0, 1), Service("pool", "light", 1.0, 1)),
    nodes=(Node("a", 40.0, 100), Node("b", 40.0, 100)),
    targets={"encode": Target(2), "pool": Target(2)},
    flows=frozenset({("encode", "pool")}),
    latencies_s={("a", "b"): 0.01},
)
ALL: list[ScalingPolicy[Any]] = [Static(SITE), Hpa(SITE), Keda(SITE), Kpa(SITE), Ray(SITE), SquareRoot(SITE)]


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


def test_hpa_keeps_within_its_tolerance_grows_at_once_and_shrinks_after_its_window() -> None:
    film = Film(Hpa(SITE, utilisation=0.5))
    assert film.see(0, 10, service_s=0.109) == 2, "1.09 of 1.0: within a tenth"
    assert film.see(15, 10, service_s=0.2) == 4
    assert film.see(20, 10, service_s=0.9) == 4, "it looks every 15 s"
    assert film.see(30, 10, service_s=2.0) == 8, "40 wanted; four pods or double, whichever is more"
    assert film.see(45, 10, service_s=2.0) == 16
    for t in range(60, 345, 15):
        assert film.see(t, 1, service_s=0.1) == 16
    assert film.see(345, 1, service_s=0.1) == 1, "the last high proposal was at 45"


def test_hpa_takes_replicas_that_are_not_ready_to_idle() -> None:
    film = Film(Hpa(SITE, utilisation=0.5, behavior=Behavior(sync_s=1.0)))
    assert film.see(0, 10, service_s=0.2) == 4
    film.on = {**film.on, "pool": {"a": 1, "b": 1}}
    assert film.see(1, 10, service_s=0.2) == 4, "two are ready, and busy all the time; two more are on their way"


def test_keda_divides_the_queue() -> None:
    film = Film(Keda(SITE, queue_length=5.0, behavior=Behavior(sync_s=1.0)))
    assert film.see(0, inflight=10.0) == 2
    assert film.see(1, inflight=17.0) == 4
    assert film.see(2, inflight=1.0) == 4
    assert film.see(302, inflight=1.0) == 1


def test_kpa_panics_on_the_short_window_and_takes_nothing_away_until_a_stable_window_later() -> None:
    film = Film(Kpa(SITE, concurrency=1.0, utilisation=0.7))
    for t in range(0, 60, 2):
        assert film.see(t, inflight=1.4) == 2
    film.see(60, inflight=14.0)
    film.see(62, inflight=14.0)
    assert film.see(64, inflight=14.0) == 20, "6 s at 14 / 0.7"
    for t in range(66, 122, 2):
        assert film.see(t, inflight=1.4) == 20, "in panic nothing is taken away"
    assert film.see(122, inflight=1.4) == 10, "more than 60 s after twice of what was ready was wanted; half at once"
    assert film.see(124, inflight=1.4) == 5
    assert film.see(126, inflight=1.4) == 2


def test_ray_waits_for_its_delays_and_smooths() -> None:
    film = Film(Ray(SITE, up_delay_s=3.0, down_delay_s=6.0, look_back_s=1.0, up_factor=0.5))
    assert [film.see(t, inflight=12.0) for t in (0, 1, 2, 3)] == [2, 2, 2, 4], "half of the way from 2 to 6"
    assert film.see(4, inflight=1.0) == 4
    assert film.see(5, inflight=8.0) == 4, "a break: the delay starts anew"
    assert [film.see(t, inflight=1.0) for t in range(6, 13)] == [4, 4, 4, 4, 4, 4, 1]


def test_ray_shrinks_by_one_where_smoothing_alone_would_keep_it() -> None:
    film = Film(Ray(SITE, down_delay_s=0.0, down_factor=0.1))
    assert film.see(0, inflight=1.0) == 1


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
        if not isinstance(policy, Static | Hpa):
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
    for kind in (Hpa, Keda, Kpa, Ray, SquareRoot):
        film = Film(kind(site))
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
