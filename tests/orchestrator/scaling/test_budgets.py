from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaincinv

from orchestrator.scaling import budgets
from orchestrator.scaling.budgets import Budget, Stage
from orchestrator.scaling.site import Promise

NAMES = "abcde"
CHAIN = Promise(1.0, 0.08, (("a", "b"),), (0.1,))
FORK = Promise(1.0, 0.08, (("a", "b", "d"), ("a", "c", "d")), (0.0, 0.2), {"d": 2})

stages = st.builds(Stage, st.floats(1e-3, 0.2), st.sampled_from([0.0, 0.5, 2.0]), st.floats(0.1, 8.0))
fixed = st.builds(replace, stages, wait_s=st.floats(0.0, 0.5) | st.just(math.inf))
tables = st.dictionaries(st.sampled_from(NAMES), stages | fixed, max_size=5)
routes = st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5).map(tuple), min_size=1, max_size=3, unique=True)


@st.composite
def promises(draw: st.DrawFn) -> Promise:
    paths = tuple(draw(routes))
    fixed_s = tuple(draw(st.floats(0.0, 0.3)) for _ in paths) if draw(st.booleans()) else ()
    visits = draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), max_size=5))
    return Promise(draw(st.floats(0.05, 2.0)), draw(st.floats(0.001, 0.3)), paths, fixed_s, visits)


def numbers(budget: Budget) -> tuple[float, float, float]:
    return budget.wait_s, budget.epsilon, budget.even_s


class TestByHand:
    def test_a_chain_whose_times_do_not_vary(self) -> None:
        """Slack 1 - 0.1 - 0.05; sqrt(c m) is 0.1 and 0.4: one fifth, four fifths."""
        known = {"a": Stage(0.01, 0.0, 1.0), "b": Stage(0.04, 0.0, 4.0)}
        assert budgets.compute_epsilon(CHAIN, known) == 0.0
        assert budgets.slacks_s(CHAIN, known) == pytest.approx((0.85,))
        found = budgets.split_one(CHAIN, known)
        assert numbers(found["a"]) == pytest.approx((0.17, 0.016, 0.425))
        assert numbers(found["b"]) == pytest.approx((0.68, 0.064, 0.425))

    def test_a_fork_grants_the_least_of_its_paths_and_counts_visits(self) -> None:
        """Slacks 0.97 and 0.77, in thirds; epsilon in fifths, since d is visited twice."""
        known = dict.fromkeys("abcd", Stage(0.01, 0.0, 1.0))
        assert budgets.slacks_s(FORK, known) == pytest.approx((0.97, 0.77))
        found = budgets.split_one(FORK, known)
        for name, slack_s in {"a": 0.77, "b": 0.97, "c": 0.77, "d": 0.77}.items():
            assert numbers(found[name]) == pytest.approx((slack_s / 3, 0.016, slack_s / 3))

    def test_a_quarter_of_epsilon_goes_to_times_that_vary_and_each_path_gets_its_part(self) -> None:
        known = {"a": Stage(0.01, 1.0, 1.0), "b": Stage(0.02, 0.0, 1.0), "c": Stage(0.02, 0.5, 1.0), "d": Stage(0.01, 0.0, 1.0)}
        assert budgets.compute_epsilon(FORK, known) == pytest.approx(0.02)
        upper, lower = budgets.gamma_quantile(0.04, 1e-4, 0.99), budgets.gamma_quantile(0.04, 3e-4, 0.99)
        assert budgets.slacks_s(FORK, known) == pytest.approx((1.0 - upper, 0.8 - lower))
        whole = sum(budget.epsilon * (2 if name == "d" else 1) for name, budget in budgets.split_one(FORK, known).items())
        assert whole == pytest.approx(0.06)

    def test_a_fixed_stage_takes_what_it_needs_and_leaves_the_rest(self) -> None:
        known = {"a": Stage(0.01, 0.0, 1.0, wait_s=0.05), "b": Stage(0.04, 0.0, 4.0)}
        found = budgets.split_one(CHAIN, known)
        assert (found["a"].wait_s, found["b"].wait_s) == pytest.approx((0.05, 0.80))
        known["a"] = replace(known["a"], wait_s=math.inf)
        assert budgets.split_one(CHAIN, known)["a"].wait_s == pytest.approx(0.17)

    def test_where_the_deadline_leaves_nothing_there_is_nothing_to_wait(self) -> None:
        late = replace(CHAIN, deadline_s=0.1)
        found = budgets.split_one(late, {"a": Stage(0.01, 0.0, 1.0), "b": Stage(0.04, 0.0, 4.0)})
        assert [(each.wait_s, each.even_s) for each in found.values()] == [(0.0, 0.0)] * 2
        assert found["b"].epsilon == pytest.approx(0.064)

    def test_a_stage_that_is_not_known_gets_no_budget_and_takes_none(self) -> None:
        assert budgets.split_one(CHAIN, {}) == {}
        assert numbers(budgets.split_one(CHAIN, {"a": Stage(0.1, 0.0, 1.0)})["a"]) == pytest.approx((0.8, 0.08, 0.4))

    def test_of_several_pipelines_the_tightest_counts_for_each(self) -> None:
        known = {"a": Stage(0.01, 0.0, 1.0), "b": Stage(0.01, 0.0, 1.0)}
        strict = Promise(0.5, 0.2, (("b",),))
        found = budgets.split({"p": CHAIN, "q": strict, "r": replace(strict, paths=(("e",),))}, known)
        assert list(found) == ["a", "b"]
        assert numbers(found["b"]) == pytest.approx((0.44, 0.04, 0.44)), "wait of p, 0.88 / 2, epsilon of p, 0.08 / 2"
        assert Budget(1.0, 0.1, 3.0).tightest(Budget(2.0, 0.05, 2.0)) == Budget(1.0, 0.05, 2.0)

    def test_what_is_promised_adds_up_over_visits_and_is_never_more_than_certain(self) -> None:
        known = dict.fromkeys("abcd", Stage(0.01, 1.0, 1.0))
        assert budgets.promised(FORK, {"a": 0.01, "d": 0.02}, known) == pytest.approx(0.01 + 2 * 0.02 + 0.02)
        assert budgets.promised(FORK, {"a": 0.9, "b": 0.9}, known) == 1.0
        assert budgets.promised(FORK, {}, {}) == 0.0


def exact_quantile(shape: float, mean: float, probability: float) -> float:
    return mean / shape * float(gammaincinv(shape, probability))


@given(st.floats(1.0 / 3.0, 50.0), st.floats(0.5, 0.999), st.floats(1e-4, 10.0))
def test_the_quantile_of_a_gamma_law(shape: float, probability: float, mean: float) -> None:
    error = 0.03 if shape >= 0.5 and 0.55 <= probability <= 0.998 else 0.05
    found = budgets.gamma_quantile(mean, mean**2 / shape, probability)
    assert found == pytest.approx(exact_quantile(shape, mean, probability), rel=error)


@given(st.floats(1.0 / 3.0, 50.0), st.floats(0.999, 1.0 - 1e-9))
def test_further_out_the_quantile_errs_to_the_safe_side(shape: float, probability: float) -> None:
    assert budgets.gamma_quantile(1.0, 1.0 / shape, probability) >= exact_quantile(shape, 1.0, probability)


@given(promises(), tables)
def test_the_waits_of_a_path_sum_to_no_more_than_its_slack_and_epsilons_to_no_more_than_epsilon(
    promise: Promise, known: Mapping[str, Stage]
) -> None:
    found = budgets.split_one(promise, known)
    assert set(found) == set(promise.services) & set(known)
    for path, slack_s in zip(promise.paths, budgets.slacks_s(promise, known), strict=True):
        assert sum(found[name].wait_s for name in path if name in found) <= slack_s + 1e-9
        assert sum(found[name].even_s for name in path if name in found) <= slack_s + 1e-9
    spent = sum(promise.visits_of(name) * budget.epsilon for name, budget in found.items())
    assert spent <= promise.epsilon * (1 + 1e-9)
    assert budgets.promised(promise, {name: budget.epsilon for name, budget in found.items()}, known) <= promise.epsilon + 1e-9


@given(st.lists(promises(), min_size=1, max_size=3), tables)
def test_what_several_share_keeps_every_one_of_them(several: list[Promise], known: Mapping[str, Stage]) -> None:
    found = budgets.split({str(i): promise for i, promise in enumerate(several)}, known)
    for promise in several:
        for name, budget in budgets.split_one(promise, known).items():
            assert found[name] == found[name].tightest(budget)


@given(promises(), tables, st.floats(1e-3, 1e3))
def test_costs_count_by_their_ratios_alone(promise: Promise, known: Mapping[str, Stage], scale: float) -> None:
    scaled = {name: replace(stage, cost=scale * stage.cost) for name, stage in known.items()}
    found, again = budgets.split_one(promise, known), budgets.split_one(promise, scaled)
    assert all(numbers(again[name]) == pytest.approx(numbers(budget), abs=1e-9) for name, budget in found.items())


@given(promises(), st.dictionaries(st.sampled_from(NAMES), stages, min_size=1, max_size=5), st.data())
def test_a_fixed_stage_takes_no_more_than_it_asks_and_others_get_no_less(
    promise: Promise, known: Mapping[str, Stage], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(known)))
    asked_s = data.draw(st.floats(0.0, 0.3))
    free = budgets.split_one(promise, known)
    bound = budgets.split_one(promise, {**known, name: replace(known[name], wait_s=asked_s)})
    if name in bound:
        assert bound[name].wait_s <= min(asked_s, free[name].wait_s) + 1e-12
    assert all(bound[other].wait_s >= free[other].wait_s - 1e-12 for other in free if other != name)
