from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from orchestrator.core import (
    Decision,
    Node,
    Observation,
    PipelineObservation,
    Placement,
    Service,
    ServiceObservation,
    Signal,
    Target,
)
from orchestrator.scaling import autoscaler, controller, policies
from orchestrator.scaling.controller import Lyapunov, MeanDelay, NoLyapunov, State
from orchestrator.scaling.site import Law, Promise, Site
from services.dataplane import letting_out
from tests.orchestrator.scaling.test_autoscaler import SITE

KNOWN = replace(SITE, laws={"pool": Law(0.02, 0.5)}, promises={"p": Promise(0.5, 0.05, (("encode", "pool"),))})
"""Pools of 20 ms, that 95 % of the tasks of p have half a second for."""
KINDS = (Lyapunov, NoLyapunov, MeanDelay)
STATES = TypeAdapter(State)


POOL = Signal(0.1, 0.0, 0.0, service_s=0.02, service_cv2=0.5)


def play(policy: Lyapunov, rates: Sequence[float], said: Signal = POOL) -> tuple[list[Target], Decision]:
    """Targets of pool, second by second, with such rates and nothing in queue, and the last decision."""
    loop, wanted = Loop(policy), []
    for t, rate in enumerate(rates):
        loop.see(loop.observation(float(t), {"pool": replace(said, arrival_rate=rate)}))
        wanted.append(_desired(loop.decision).target("pool"))
    return wanted, loop.decision


def film(policy: Lyapunov, rates: Sequence[float]) -> list[Target]:
    """Targets of pool, second by second."""
    return play(policy, rates)[0]


def _desired(decision: Decision) -> Placement:
    assert decision.desired is not None, decision.reason
    return decision.desired


class Loop:
    """A policy and its site, where what is ordered is ready at once."""

    def __init__(self, policy: Lyapunov, targets: Mapping[str, Target] | None = None) -> None:
        self.policy, self.state = policy, policy.initial()
        self.placement = autoscaler.place(policy.site, targets or policy.site.targets, Placement())
        self.decision = Decision(None, "")

    def observation(
        self,
        t: float,
        signals: Mapping[str, Signal | None],
        outcomes: Mapping[str, Mapping[str, float]] | None = None,
        let_out: Mapping[str, Mapping[str, int]] | None = None,
        orders: Mapping[str, Target] | None = None,
    ) -> Observation:
        """What would be seen now. Those let out are at work."""
        out = let_out or {}
        now = self.placement.with_let_out(out)
        seen = {
            service.name: ServiceObservation(
                {
                    node.name: {
                        "ready": now.ready_on(service.name, node.name),
                        "standby": now.standby_on(service.name, node.name),
                    }
                    for node in self.policy.site.nodes
                },
                signals.get(service.name),
                out.get(service.name, {}),
            )
            for service in self.policy.site.services
        }
        ended = {name: PipelineObservation(0.1, 1.0, counts) for name, counts in (outcomes or {}).items()}
        return Observation(t, seen, ended, orders or {})

    def see(self, observation: Observation) -> Decision:
        """One slot."""
        self.state, self.decision = self.policy.step(self.state, observation)
        self.placement = self.decision.desired or self.placement
        return self.decision


# --- whatever comes ---------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")
numbers = st.sampled_from([0.0, 1.0, 7.5, 40.0, 300.0])
signals: st.SearchStrategy[Signal | None] = st.none() | st.builds(
    Signal,
    st.sampled_from([0.1, 0.1, 0.1, 9.0]),
    st.none() | numbers,
    st.none() | numbers,
    service_s=st.none() | st.sampled_from([0.01, 0.05, 0.4]),
    service_cv2=st.none() | st.sampled_from([0.0, 0.5, 6.0]),
    batch_size=st.none() | st.sampled_from([1.0, 3.0]),
)
services = st.builds(
    Service,
    st.just(""),
    st.sampled_from(["core", "light", "light"]),
    st.sampled_from([0.25, 1.0, 2.0]),
    st.integers(1, 3),
    st.integers(0, 2),
)
laws = st.builds(
    Law,
    st.sampled_from([0.01, 0.1]),
    st.sampled_from([0.0, 0.5]),
    st.none() | st.just(0.008),
    max_batch=st.sampled_from([1, 8]),
    slots=st.integers(1, 2),
)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    names = NAMES[: draw(st.integers(1, 4))]
    promises = {
        name: Promise(draw(st.sampled_from([0.05, 0.5, 2.0])), draw(st.sampled_from([0.01, 0.1])), (tuple(path),))
        for name, path in draw(
            st.dictionaries(st.sampled_from("pq"), st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
        ).items()
    }
    return Site(
        services=tuple(replace(draw(services), name=name) for name in names),
        nodes=tuple(Node(f"n{i}", draw(st.sampled_from([6.0, 12.0])), draw(st.integers(20, 60))) for i in range(3)),
        targets={name: Target(draw(st.integers(1, 2)), draw(st.integers(0, 1))) for name in names},
        flows=frozenset(pairwise(names)),
        laws=draw(st.dictionaries(st.sampled_from(names), laws)),
        promises=promises,
        most=draw(st.dictionaries(st.sampled_from(names), st.integers(2, 9), max_size=1)),
    )


@st.composite
def loops(draw: st.DrawFn) -> Loop:
    kind = draw(st.sampled_from(KINDS))
    return Loop(kind(draw(sites()), standby=draw(st.booleans()), let_out=draw(st.booleans())))


def _drawn(loop: Loop, t: float, data: st.DataObject) -> Observation:
    site = loop.policy.site
    names = [service.name for service in site.services]
    out: dict[str, dict[str, int]] = {}
    for name, most in loop.placement.allowance.items():
        for node, idle in loop.placement.standby.get(name, {}).items():
            count = data.draw(st.integers(0, min(idle, most - sum(out.get(name, {}).values()))))
            # Standbys are let out where the node has the cores, which the allowance does not say.
            service = next(each for each in site.services if each.name == name)
            if count and _cores(site, loop.placement.with_let_out(out), node) + count * service.cpus <= _node(site, node).cpus:
                out.setdefault(name, {})[node] = count
    counts = st.fixed_dictionaries(dict.fromkeys(("on_time", "late", "rejected", "cancelled"), numbers))
    return loop.observation(
        t,
        data.draw(st.fixed_dictionaries(dict.fromkeys(names, signals))),
        data.draw(st.dictionaries(st.sampled_from("pq"), counts)),
        out,
        data.draw(st.dictionaries(st.sampled_from(names), st.builds(Target, st.integers(0, 4), st.integers(0, 2)), max_size=1)),
    )


def _node(site: Site, name: str) -> Node:
    return next(node for node in site.nodes if node.name == name)


def _cores(site: Site, placement: Placement, node: str) -> float:
    return sum(placement.ready_on(each.name, node) * each.cpus for each in site.services)


@settings(max_examples=60)
@given(loops(), st.data())
def test_whatever_comes_the_site_is_kept_to(loop: Loop, data: st.DataObject) -> None:
    site, t = loop.policy.site, 0.0
    for _ in range(data.draw(st.integers(2, 5))):
        t += data.draw(st.sampled_from([0.5, 1.0, 30.0]))
        seen = _drawn(loop, t, data)
        before = autoscaler.standing(loop.state.placement, seen)
        kept = STATES.validate_json(STATES.dump_json(loop.state))
        assert kept == loop.state
        again = loop.policy.step(kept, seen)
        decision = loop.see(seen)
        assert again == (loop.state, decision), "a pure function, of what JSON keeps"
        if decision.desired is None:
            assert decision.reason.startswith("hold: ")
            continue
        placed, roomy = decision.desired, "no room" not in decision.reason
        for node in site.nodes:
            assert _cores(site, placed, node.name) <= node.cpus + 1e-6
            loaded = (
                (placed.ready_on(each.name, node.name) + placed.standby_on(each.name, node.name)) * each.memory_bytes
                for each in site.services
            )
            assert sum(loaded) <= node.memory_bytes
        for service in site.services:
            name, target = service.name, placed.target(service.name)
            if name in seen.orders:
                assert target.replicas <= seen.orders[name].replicas
                assert target == seen.orders[name] or not roomy, "an order outranks the floor, the tier and the load"
                continue
            if service.tier == "core":
                assert target == site.targets[name] or not roomy
                continue
            assert target.replicas >= service.floor or not roomy
            signal = seen.services[name].signal
            if signal is None or signal.age_s > site.stale_after_s or None in (signal.arrival_rate, signal.queue_length):
                now = before.target(name)
                held = Target(max(service.floor, now.replicas or site.targets[name].replicas), now.standby)
                assert target == held or not roomy, "silence is no news"
            elif name in site.most:
                assert target.replicas <= max(site.most[name], before.target(name).replicas, service.floor)
        _allowed(loop.policy, placed)


def _allowed(policy: Lyapunov, placed: Placement) -> None:
    site = policy.site
    if not (policy.standby and policy.let_out):
        assert not placed.allowance
    free = sum(max(0.0, node.cpus - _cores(site, placed, node.name)) for node in site.nodes)
    by_name = {service.name: service for service in site.services}
    assert sum(count * by_name[name].cpus for name, count in placed.allowance.items()) <= free + 1e-6
    for name, count in placed.allowance.items():
        assert by_name[name].tier == "light"
        assert 0 < count <= placed.target(name).standby


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_survives_json(kind: type[Lyapunov]) -> None:
    name, parameters = policies.describe(kind(KNOWN, v=2.0, standby=False))
    again = policies.build(name, json.loads(json.dumps(parameters, allow_nan=False)))
    assert again == kind(KNOWN, v=2.0, standby=False)
    assert type(again) is kind


# --- load -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.tuples(st.floats(0.0, 600.0), st.floats(0.0, 600.0)).map(sorted),
    st.sampled_from(KINDS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.05, 0.5, 2.0]),
)
def test_more_load_never_asks_for_fewer(
    rates: list[float], kind: type[Lyapunov], standby: bool, let_out: bool, deadline_s: float
) -> None:
    site = replace(KNOWN, promises={"p": Promise(deadline_s, 0.05, (("encode", "pool"),))})
    policy = kind(site, standby=standby, let_out=let_out)
    few, many = (film(policy, [rate] * 4) for rate in rates)
    assert all(less.replicas <= more.replicas for less, more in zip(few, many, strict=True))
    assert all(sum(_both(less)) <= sum(_both(more)) for less, more in zip(few, many, strict=True))


def _both(target: Target) -> tuple[int, int]:
    return target.replicas, target.standby


@pytest.mark.parametrize("rate", [0.0, 3.0, 40.0, 250.0, 900.0])
@pytest.mark.parametrize(
    "policy", [Lyapunov(KNOWN), Lyapunov(KNOWN, let_out=False), Lyapunov(KNOWN, standby=False), MeanDelay(KNOWN)]
)
def test_a_load_that_stays_finds_replicas_that_stay(policy: Lyapunov, rate: float) -> None:
    wanted = film(policy, [rate] * 30)
    assert len(set(wanted[3:])) == 1
    if rate:
        assert wanted[-1].replicas >= rate * 0.02 / policy.max_utilisation


@pytest.mark.parametrize("policy", [Lyapunov(KNOWN), Lyapunov(KNOWN, let_out=False), Lyapunov(KNOWN, standby=False)])
def test_a_step_to_three_times_the_load_is_followed_within_two_slots(policy: Lyapunov) -> None:
    wanted = film(policy, [100.0] * 5 + [300.0] * 2)
    assert wanted[4].replicas < 6 <= wanted[6].replicas, "six erlang"
    assert wanted[6].replicas >= film(policy, [300.0] * 3)[-1].replicas


def test_what_is_no_longer_wanted_is_given_up_after_its_hold_and_standbys_after_what_a_start_is_worth() -> None:
    """A standby costs a tenth of a core: 10 s of it are a start. The fall is a change of rate in one slot."""
    wanted = film(Lyapunov(KNOWN, hold_s=3.0, peak_s=1.0), [300.0] * 5 + [30.0] * 25)
    high = wanted[4]
    assert [each.replicas for each in wanted[5:7]] == [high.replicas] * 2, "held for 3 s since t = 4"
    assert wanted[8].replicas < high.replicas
    falls = [t for t, (before, after) in enumerate(pairwise(wanted)) if sum(_both(after)) < sum(_both(before))]
    assert falls[0] + 1 >= 4 + 10
    assert sum(_both(wanted[-1])) < sum(_both(high))


def test_without_standbys_the_hold_is_as_long_as_a_start_is_worth() -> None:
    wanted = film(Lyapunov(KNOWN, standby=False, peak_s=1.0), [300.0] * 5 + [30.0] * 10)
    dear = replace(KNOWN, prices=replace(KNOWN.prices, start=5.0))
    longer = film(Lyapunov(dear, standby=False, peak_s=1.0), [300.0] * 5 + [30.0] * 10)
    fell, fell_later = (next(t for t in range(5, 15) if each[t] != each[4]) for each in (wanted, longer))
    assert fell == 5
    assert fell_later == 4 + 5


@pytest.mark.parametrize(("standby", "let_out"), [(True, True), (True, False), (False, True), (False, False)])
def test_no_standbys_and_no_allowance_without_the_options(standby: bool, let_out: bool) -> None:
    _, decision = play(Lyapunov(KNOWN, standby=standby, let_out=let_out), [100.0] * 5 + [300.0] * 3 + [100.0] * 8)
    placed = _desired(decision)
    assert (placed.target("pool").standby > 0) == standby
    assert bool(placed.allowance) == (standby and let_out)


def test_an_allowance_is_no_more_than_the_cores_that_are_free() -> None:
    """Three of four cores are taken; one is left for the standbys that memory has room for."""
    site = replace(KNOWN, nodes=(Node("a", 2.0, 100), Node("b", 2.0, 100)), targets={"encode": Target(2), "pool": Target(1, 5)})
    loop = Loop(Lyapunov(site))
    placed = _desired(loop.see(loop.observation(0.0, {})))
    assert placed.target("pool") == Target(1, 5)
    assert placed.allowance == {"pool": 1}


@given(st.floats(1.0, 600.0), st.sampled_from([0.1, 0.5, 2.0]), st.sampled_from([0.001, 0.01]))
@settings(max_examples=40)
def test_the_mean_asks_for_no_more_than_the_tail(rate: float, deadline_s: float, epsilon: float) -> None:
    site = replace(KNOWN, promises={"p": Promise(deadline_s, epsilon, (("encode", "pool"),))})
    mean, tail = (film(kind(site, standby=False), [rate] * 3)[-1] for kind in (MeanDelay, Lyapunov))
    assert mean.replicas <= tail.replicas


# --- doubt ------------------------------------------------------------------------------------------------------------------


def test_what_is_not_certified_is_said_and_square_root_staffing_stands_in() -> None:
    """Two erlang: 2 + 1.5 sqrt(2) are five."""
    unknown, strict = replace(KNOWN, laws={}, promises={}), {"p": Promise(0.2, 1e-6, (("pool",),))}
    heavy, few = replace(POOL, service_cv2=9.0), replace(POOL, service_cv2=None)
    for site, rate, said, why in (
        (KNOWN, 5.0, POOL, "few samples"),
        (KNOWN, 100.0, few, "few samples"),
        (unknown, 100.0, few, "few samples"),
        (KNOWN, 100.0, heavy, "heavy tail"),
        (replace(KNOWN, most={"pool": 5}, promises=strict), 100.0, POOL, "out of reach"),
        (replace(KNOWN, most={"pool": 2}), 100.0, POOL, "unstable"),
    ):
        _, decision = play(Lyapunov(site, standby=False), [rate] * 3, said)
        assert decision.reason.endswith(f"; not certified: pool ({why})")
    wanted, _ = play(Lyapunov(unknown, standby=False), [100.0] * 3, heavy)
    assert wanted[-1] == Target(5)
    assert play(Lyapunov(KNOWN), [100.0] * 3)[1].reason == "no change"


def scarce(most: int, deadline_s: float, epsilon: float) -> Lyapunov:
    promises = {"p": Promise(deadline_s, epsilon, (("pool",),))}
    return Lyapunov(replace(KNOWN, most={"pool": most}, promises=promises), standby=False)


def test_more_load_than_the_most_can_serve_never_asks_for_fewer() -> None:
    less, more = (film(scarce(4, 0.15, 1e-4), [rate] * 4)[-1].replicas for rate in (25.0, 28.0))
    assert less <= more


def test_what_is_kept_is_not_called_in_doubt() -> None:
    wanted, decision = play(scarce(6, 0.2, 1e-6), [26.0] * 4)
    assert wanted[-1] == Target(6)
    assert "not certified" not in decision.reason


def test_where_nothing_was_ever_served_nothing_is_asked_for() -> None:
    silent = replace(POOL, queue_length=9.0, service_s=None, service_cv2=None)
    wanted, decision = play(Lyapunov(replace(SITE, promises=KNOWN.promises)), [50.0] * 3, silent)
    assert wanted == [Target(2)] * 3
    assert decision.reason == "no change"


# --- broken promises --------------------------------------------------------------------------------------------------------


def trace(policy: Lyapunov, outcomes: Sequence[Mapping[str, float]], rate: float = 100.0) -> list[tuple[float, int]]:
    """Virtual queue of p and replicas of pool, slot by slot."""
    loop, found = Loop(policy), []
    for t, counts in enumerate(outcomes):
        decision = loop.see(loop.observation(float(t), {"pool": replace(POOL, arrival_rate=rate)}, {"p": counts}))
        found.append((loop.state.virtual_queues.get("p", 0.0), _desired(decision).target("pool").replicas))
    return found


def test_virtual_queues_grow_with_what_is_broken_are_capped_and_empty_where_nothing_is() -> None:
    """20 of 100 late against 5: 15 a slot, 100 a second for 10 s at most, and 5 less with every slot that breaks nothing."""
    bad, good = {"on_time": 80.0, "late": 15.0, "rejected": 4.0, "expired": 1.0}, {"on_time": 100.0}
    queues = [z for z, _ in trace(Lyapunov(KNOWN), [bad] * 3 + [good] * 10)]
    assert queues == pytest.approx([15, 30, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0, 0])
    assert max(z for z, _ in trace(Lyapunov(KNOWN), [{"late": 100.0}] * 20)) == pytest.approx(1000.0)
    assert trace(Lyapunov(KNOWN), [{"cancelled": 100.0}] * 2)[-1][0] == 0.0
    assert trace(NoLyapunov(KNOWN), [bad] * 3)[-1][0] == 0.0


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted), min_size=3, max_size=6), st.floats(1.0, 300.0))
def test_more_broken_promises_never_lead_to_fewer_replicas(late: list[list[int]], rate: float) -> None:
    fewer, more = (
        trace(Lyapunov(KNOWN), [{"late": float(pair[i]), "on_time": 100.0 - pair[i]} for pair in late], rate) for i in (0, 1)
    )
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(fewer, more, strict=True))


def test_broken_promises_do_lead_to_more_replicas() -> None:
    """Where the tail sees nobody late with the replicas there are, more of them are worth nothing, whatever Z."""
    site = replace(KNOWN, promises={"p": Promise(0.1, 0.05, (("pool",),))})
    broken = trace(Lyapunov(site), [{"late": 100.0}] * 10)[-1][1]
    assert broken > trace(Lyapunov(site), [{"on_time": 100.0}] * 10)[-1][1]
    assert broken > trace(NoLyapunov(site), [{"late": 100.0}] * 10)[-1][1]
    assert broken > trace(Lyapunov(site, v=5000.0), [{"late": 100.0}] * 10)[-1][1], "unless V says they are dear"


def test_a_promise_kept_by_far_is_loosened_until_half_of_what_may_be_broken_is() -> None:
    site = replace(KNOWN, promises={"p": Promise(0.1, 0.05, (("pool",),))})
    kept = [{"on_time": 100.0}] * 60
    usual = trace(Lyapunov(site, loosest=1.0), kept)[-1][1]
    assert trace(Lyapunov(site), kept)[-1][1] < usual
    assert trace(NoLyapunov(site), kept)[-1][1] == usual, "without memory nothing is known of it"
    half = [{"on_time": 95.0, "late": 5.0}] * 60
    assert trace(Lyapunov(site), half)[-1][1] == trace(Lyapunov(site, loosest=1.0), half)[-1][1]
    broken = trace(Lyapunov(site), [*kept, *half])
    assert broken[-1][1] >= usual, "and given back"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=20), st.floats(0.01, 9.0))
def test_credit_is_bounded_and_less_the_more_is_broken(tasks: list[tuple[int, int]], safety: float) -> None:
    policy = Lyapunov(KNOWN, safety=safety)
    fewer, more = Loop(policy), Loop(policy)
    for t, (late, on_time) in enumerate(tasks):
        for loop, broken in ((fewer, late), (more, late + on_time)):
            loop.see(loop.observation(float(t), {}, {"p": {"late": broken, "on_time": late + on_time - broken}}))
    low, high = more.state.credits.get("p", 0.0), fewer.state.credits.get("p", 0.0)
    assert 0.0 <= low <= high <= controller.MOST_CREDIT


# --- standbys that are let out ----------------------------------------------------------------------------------------------


def _steady(loop: Loop, begin: int, end: int, rate: float, let_out_at: int | None = None) -> list[int]:
    """Replicas of pool at work, with this rate from `begin` to `end`, and one let out in the slot before `let_out_at`."""
    found = []
    for t in range(begin, end):
        idle = loop.placement.standby.get("pool", {})
        out = {"pool": {next(node for node, n in idle.items() if n): 1}} if t == let_out_at else {}
        said = replace(POOL, arrival_rate=rate)
        found.append(_desired(loop.see(loop.observation(float(t), {"pool": said}, let_out=out))).target("pool").replicas)
    return found


STAYS = Lyapunov(KNOWN, steady_s=20.0)
HASTY = Lyapunov(replace(KNOWN, promises={"p": Promise(0.1, 0.05, (("pool",),))}), steady_s=20.0)
"""With a tenth of a second for every task."""


def test_one_let_out_while_the_load_stays_is_one_too_few_at_work_until_it_changes() -> None:
    loop = Loop(STAYS)
    before = _steady(loop, 0, 25, 100.0)[-1]
    after = _steady(loop, 25, 40, 100.0, let_out_at=25)
    assert after == [before + 1] * 15
    assert loop.state.services["pool"].extra == 1
    _steady(loop, 40, 45, 300.0)
    assert loop.state.services["pool"].extra == 0
    again = _steady(loop, 45, 60, 100.0)[-1]
    assert loop.state.services["pool"].extra == 0
    assert again == before, "as if none had been let out"


def test_one_let_out_before_the_load_has_stayed_goes_back_after_its_hold() -> None:
    loop = Loop(Lyapunov(KNOWN))
    before = _steady(loop, 0, 10, 100.0)[-1]
    assert _steady(loop, 10, 15, 100.0, let_out_at=10) == [before] * 5
    assert loop.state.services["pool"].extra == 0


def test_where_the_load_stays_the_data_plane_is_patient_until_it_changes() -> None:
    loop = Loop(STAYS)
    _steady(loop, 0, 15, 100.0)
    assert not loop.placement.patience
    _steady(loop, 15, 25, 100.0)
    assert loop.placement.patience == {"pool": letting_out.PATIENT_SHARE}
    _steady(loop, 25, 28, 300.0)
    assert not loop.placement.patience
    alone = Loop(replace(STAYS, let_out=False))
    _steady(alone, 0, 25, 100.0)
    assert not alone.placement.patience, "nobody lets anything out"


def _backlogged(policy: Lyapunov, slots: Mapping[int, float], end: int) -> list[int]:
    """Replicas of pool at work at 100 req/s, with such queues in some of the slots; what waits has not ended yet."""
    loop, found = Loop(policy), []
    for t in range(end):
        queue = slots.get(t, 0.0)
        said = replace(POOL, arrival_rate=100.0 - queue + slots.get(t - 1, 0.0), queue_length=queue)
        found.append(_desired(loop.see(loop.observation(float(t), {"pool": said}))).target("pool").replicas)
    return found


def test_only_a_backlog_that_lasts_two_slots_is_worth_replicas() -> None:
    """What passes by itself is gone before a replica more could have helped."""
    usual = _backlogged(HASTY, {}, 40)[-1]
    assert max(_backlogged(HASTY, {30: 150.0}, 35)[30:]) == usual
    assert max(_backlogged(HASTY, {30: 150.0, 31: 150.0}, 35)[30:]) > usual


def test_no_replica_at_work_is_given_up_while_the_load_stays() -> None:
    burst = {31: 150.0, 32: 150.0}
    held = _backlogged(HASTY, burst, 90)
    assert held[-1] == max(held) > held[30]
    assert _backlogged(replace(HASTY, steady_s=1e9), burst, 90)[-1] == held[30], "given up where none stays"


# --- where not all fits -----------------------------------------------------------------------------------------------------

TIGHT = replace(KNOWN, nodes=(Node("a", 5.0, 100), Node("b", 5.0, 100)), promises={"p": Promise(0.5, 0.05, (("pool",),))})
"""Eight cores beside the core service."""


def test_a_backlog_fills_the_nodes_and_the_reason_says_that_it_is_not_enough() -> None:
    wanted, decision = play(Lyapunov(TIGHT), [1000.0] * 3, replace(POOL, queue_length=200.0))
    assert wanted[-1].replicas == 8
    assert "no room for all of pool" in decision.reason


def test_without_a_backlog_too_what_fits_is_given() -> None:
    """20 erlang, of which the gateways refuse most: queues stay short."""
    wanted, _ = play(Lyapunov(TIGHT), [1000.0] * 10, replace(POOL, queue_length=20.0))
    assert wanted[-1].replicas == 8


def test_an_order_goes_before_load_where_not_both_fit() -> None:
    busy, ordered = Service("busy", "light", 1.0, 1), Service("ordered", "light", 1.0, 1)
    site = Site(
        (busy, ordered), (Node("a", 8.0, 100),), {"busy": Target(1), "ordered": Target(1)}, laws={"busy": Law(0.02, 0.5)}
    )
    loop = Loop(Lyapunov(site))
    for t in range(5):
        said = {"busy": replace(POOL, arrival_rate=1000.0, queue_length=200.0)}
        loop.see(loop.observation(float(t), said, orders={"ordered": Target(6)} if t else {}))
    assert loop.placement.target("ordered") == Target(6)


def _told(policy: Lyapunov, mean: float, outcomes: Mapping[int, Mapping[str, float]], end: int) -> list[tuple[int, int]]:
    """Replicas of pool at work and on standby in every slot, under Poisson counts; all tasks on time but where told."""
    loop, found, rng = Loop(policy), [], np.random.default_rng(7)
    for t in range(end):
        said = replace(POOL, arrival_rate=float(rng.poisson(mean)))
        seen = {"p": outcomes.get(t, {"on_time": mean})}
        target = _desired(loop.see(loop.observation(float(t), {"pool": said}, seen))).target("pool")
        found.append((target.replicas, target.standby))
    return found


def test_estimates_that_go_on_moving_change_nothing_while_the_load_stays_and_the_promise_is_kept() -> None:
    moved = {True: 0, False: 0}
    for mean in range(90, 130, 5):
        for stays in moved:
            found = _told(HASTY if stays else replace(HASTY, steady_s=1e9), float(mean), {}, 200)[60:]
            moved[stays] += sum(a != b for a, b in pairwise(found))
    assert moved[True] == 0
    assert moved[False] > 0, "the same loads do move what is asked for"


def test_a_promise_that_is_broken_while_the_load_stays_has_everything_reckoned_anew() -> None:
    half_late = {t: {"on_time": 80.0, "late": 20.0} for t in range(60, 80)}
    kept, broken = _told(HASTY, 100.0, {}, 80), _told(HASTY, 100.0, half_late, 80)
    assert broken[:60] == kept[:60]
    assert broken[-1][0] > kept[-1][0]
