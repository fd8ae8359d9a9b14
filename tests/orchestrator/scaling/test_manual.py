from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.core import Node, Observation, Placement, Service, ServiceObservation, Signal, Target
from orchestrator.scaling.manual import Manual, ManualState
from orchestrator.scaling.site import Site

NODES = (Node("a", 2.0, 2**30), Node("b", 2.0, 2**30))
POLICY = Manual(
    Site(
        services=(Service("encode", "core", 0.5, 2**26), Service("pool", "light", 0.1, 2**26)),
        nodes=NODES,
        targets={"encode": Target(2), "pool": Target(1, 1)},
        stale_after_s=5.0,
    )
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
    assert {name: decision.desired.target(name) for name in POLICY.site.targets} == POLICY.site.targets
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


def lent(t: float, let_out: Mapping[str, int] | None = None, queue: float = 0.0, age_s: float = 0.1) -> Observation:
    """The pool's one standby, on b: just let out or not, and how long its queue is."""
    ready = {"encode": ServiceObservation({"a": {"ready": 1}, "b": {"ready": 1}})}
    signal = Signal(age_s=age_s, queue_length=queue)
    return Observation(t, {**ready, "pool": ServiceObservation({"b": {"ready": 1, "standby": 1}}, signal, let_out or {})})


def test_all_standbys_may_be_let_out() -> None:
    state, first = POLICY.step(POLICY.initial(), lent(0.0))
    _, second = POLICY.step(state, lent(1.0))
    assert first.desired is not None
    assert second.desired == first.desired
    assert first.desired.allowance == {"pool": 1}


def test_a_standby_that_is_let_out_stays_at_work_while_it_is_needed_and_a_while_longer() -> None:
    """t = 1: let out. t = 3: there is a queue. t = 7.9: still held, t = 8: 5 s since the queue, so it is a standby again."""
    state, _ = POLICY.step(POLICY.initial(), lent(0.0))
    told = []
    for seen in (lent(1.0, {"b": 1}), lent(2.0), lent(3.0, queue=4.0), lent(7.9), lent(8.0), lent(9.0)):
        state, decision = POLICY.step(state, seen)
        assert decision.desired is not None
        told.append((decision.desired.target("pool"), decision.desired.allowance, decision.reason))
    out: tuple[Target, dict[str, int], str] = (Target(2, 0), {}, "as ordered: encode 2, pool 1+1; let out: pool 1")
    back = (Target(1, 1), {"pool": 1}, "as ordered: encode 2, pool 1+1")
    assert told == [out, out, out, out, back, back]


def test_one_that_is_silent_is_not_taken_back() -> None:
    state, _ = POLICY.step(POLICY.initial(), lent(0.0))
    state, _ = POLICY.step(state, lent(1.0, {"b": 1}))
    state, decision = POLICY.step(state, lent(30.0, age_s=29.0))
    assert decision.desired is not None
    assert decision.desired.target("pool") == Target(2, 0)


def test_more_than_the_standbys_there_are_is_not_confirmed() -> None:
    state, _ = POLICY.step(POLICY.initial(), lent(0.0))
    for t, let_out in ((1.0, {"b": 1, "a": 1}), (2.0, {"b": 1})):
        state, decision = POLICY.step(state, lent(t, let_out))
        assert decision.desired is not None
        assert decision.desired.ready["pool"] == {"b": 2}


def test_a_new_order_takes_back_what_was_let_out_for_the_old_one() -> None:
    state, _ = POLICY.step(POLICY.initial(), lent(0.0))
    state, _ = POLICY.step(state, lent(1.0, {"b": 1}))
    state, decision = POLICY.step(state, replace(lent(2.0, {"b": 1}), orders={"encode": Target(1)}))
    assert decision.desired is not None
    assert decision.desired.target("pool") == Target(1, 1)
    assert state.let_out == {}
