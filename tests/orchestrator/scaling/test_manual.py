from __future__ import annotations

from collections.abc import Mapping

from orchestrator.core import Node, Observation, Placement, Service, ServiceObservation, Signal, Target
from orchestrator.scaling.manual import Manual, ManualState

NODES = (Node("a", 2.0, 2**30), Node("b", 2.0, 2**30))
POLICY = Manual(
    services=(Service("encode", "core", 0.5, 2**26), Service("pool", "light", 0.1, 2**26)),
    nodes=NODES,
    targets={"encode": Target(2), "pool": Target(1, 1)},
    stale_after_s=5.0,
)


def seen(orders: Mapping[str, Target] | None = None, age_s: float = 0.1, t: float = 0.0) -> Observation:
    signal = Signal(age_s=age_s)
    return Observation(
        t,
        {
            "encode": ServiceObservation({"a": {"ready": 1}, "b": {"ready": 1}}, signal),
            "pool": ServiceObservation({"b": {"ready": 1, "starting": 1}}, signal),
        },
        orders=orders or {},
    )


def test_the_first_slot_orders_what_the_testbed_asks_for() -> None:
    _, decision = POLICY.step(POLICY.initial(), Observation(0.0, {}))
    assert decision.desired is not None
    assert {name: decision.desired.target(name) for name in POLICY.targets} == POLICY.targets
    assert decision.reason == "new order: encode 2, pool 1+1"


def test_after_a_restart_what_runs_stays_where_it_is() -> None:
    _, decision = POLICY.step(POLICY.initial(), seen())
    assert decision.desired is not None
    assert decision.desired.ready == {"encode": {"a": 1, "b": 1}, "pool": {"b": 1}}
    assert decision.desired.standby == {"pool": {"b": 1}}


def test_the_operators_order_outranks_the_testbed_and_is_kept() -> None:
    """t = 0: as the file says; t = 1: the operator wants 3; t = 2: nothing new, so 3 it stays."""
    state, _ = POLICY.step(POLICY.initial(), seen())
    state, grown = POLICY.step(state, seen({"encode": Target(3)}, t=1.0))
    assert grown.desired is not None
    assert grown.desired.target("encode") == Target(3)
    again, same = POLICY.step(state, seen({"encode": Target(3)}, t=2.0))
    assert again == state
    assert same.desired == grown.desired
    assert same.reason == "as ordered: encode 3, pool 1+1"


def test_nothing_is_taken_from_a_service_whose_signal_is_stale() -> None:
    state = POLICY.step(POLICY.initial(), seen())[0]
    orders = {"encode": Target(1), "pool": Target(2, 1)}
    state, decision = POLICY.step(state, seen(orders, age_s=7.2, t=1.0))
    assert decision.desired is not None
    assert decision.desired.target("encode") == Target(2)
    assert decision.desired.target("pool") == Target(2, 1), "growing needs nobody's word"
    assert decision.reason == "new order: encode 2, pool 2+1; nothing taken from services whose signal is stale: encode (7.2 s)"
    _, later = POLICY.step(state, seen(orders, age_s=0.3, t=2.0))
    assert later.desired is not None
    assert later.desired.target("encode") == Target(1)


def test_an_order_that_does_not_fit_is_a_hold_with_its_reason() -> None:
    state = POLICY.step(POLICY.initial(), seen())[0]
    after, decision = POLICY.step(state, seen({"encode": Target(9)}))
    assert after == state
    assert decision.desired is None
    assert decision.reason.startswith("hold: no node has room for replica 9 of 9 of encode")


def test_an_equal_state_and_observation_give_an_equal_decision() -> None:
    state = ManualState(Placement({"encode": {"a": 2}}, {}))
    assert POLICY.step(state, seen()) == POLICY.step(state, seen())
