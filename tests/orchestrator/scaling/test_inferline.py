from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core import Service, Target
from orchestrator.scaling import budgets, queueing
from orchestrator.scaling.budgets import Stage
from orchestrator.scaling.inferline import InferLine, plan
from orchestrator.scaling.site import Law, Promise, Site
from tests.orchestrator.scaling.test_autoscaler import SITE, Film

EXPONENTIAL = Law(0.1, 1.0)
ONE = replace(SITE, laws={"pool": EXPONENTIAL, "encode": Law(0.05)}, promises={"p": Promise(1.0, 0.05, (("encode", "pool"),))})
STEADY = (50.0,) * 40


def left(site: Site, wait_s: float) -> Promise:
    """The site's promise, with a deadline that leaves its path so much for waits."""
    promise, known = site.promises["p"], {s.name: s for s in site.services}
    stages = {name: Stage(law.mean_s, law.cv2, known[name].cpus) for name, law in site.laws.items()}
    return replace(promise, deadline_s=promise.deadline_s - budgets.slacks_s(promise, stages)[0] + wait_s)


def test_the_plan_is_the_least_that_keeps_the_deadline() -> None:
    """One light stage: its replicas are the fewest whose epsilon-quantile of the wait (M/M/n) fits what compute leaves."""
    alone = replace(ONE, promises={"p": Promise(1.0, 0.05, (("pool",),))})
    found = plan(alone, {"pool": STEADY}, alone.laws)["pool"]
    assert found.rate == 50.0
    assert found.envelope == (50.0,) * 6
    assert found.replicas == 6
    assert found.provisioning == pytest.approx(5.0 / 6.0)
    tight = replace(alone, promises={"p": left(alone, 0.11)})
    assert plan(tight, {"pool": STEADY}, tight.laws)["pool"].replicas == 7
    assert queueing.mmc_wait_tail(50.0, 0.1, 7, 0.11) <= 0.05 < queueing.mmc_wait_tail(50.0, 0.1, 6, 0.11)


def test_a_deadline_that_compute_alone_breaks_is_left_out() -> None:
    hopeless = replace(ONE, promises={"p": Promise(0.01, 0.05, (("pool",),))})
    assert plan(hopeless, {"pool": STEADY}, hopeless.laws)["pool"].replicas == 6


def test_where_the_cap_is_in_the_way_the_plan_ends_there() -> None:
    capped = replace(ONE, most={"pool": 4})
    assert plan(capped, {"pool": STEADY}, capped.laws)["pool"].replicas == 4


def test_the_cheaper_grows_first_and_what_can_be_spared_goes() -> None:
    """By hand, waits at epsilon 0.05: pool on 8, 9, 10 needs .040, .012, 0 s, quick on 1, 2 needs .046, .005 s.

    For .04 s, pool grows to 10 and quick to 2; then pool can spare one and not two.
    """
    site = replace(
        ONE,
        services=(*SITE.services, Service("quick", "light", 0.5, 1)),
        targets={**SITE.targets, "quick": Target(1)},
        laws={"pool": EXPONENTIAL, "quick": Law(0.01, 1.0)},
        promises={"p": Promise(9.0, 0.05, (("pool", "quick"),))},
    )
    site = replace(site, promises={"p": left(site, 0.04)})
    found = plan(site, {"pool": STEADY, "quick": STEADY}, site.laws)
    assert (found["pool"].replicas, found["quick"].replicas) == (9, 2)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 80.0), st.floats(0.2, 3.0), st.floats(0.0, 2.0))
def test_a_plan_is_stable_and_grows_with_the_load(rate: float, deadline_s: float, cv2: float) -> None:
    site = replace(ONE, laws={"pool": Law(0.1, cv2)}, promises={"p": Promise(deadline_s, 0.05, (("pool",),))})
    least, more = (plan(site, {"pool": (r,) * 40}, site.laws)["pool"].replicas for r in (rate, rate + 10.0))
    assert rate * 0.1 < least <= more


def test_the_tuner_grows_at_once_and_shrinks_when_settled() -> None:
    """k = ceil(r_max / (mu rho)): planned 50 / s on 6, rho = 5 / 6; at 90 / s it is ceil(9 * 6 / 5) = 11."""
    alone = replace(ONE, promises={"p": Promise(1.0, 0.05, (("pool",),))})
    film = Film(InferLine(alone, sample={"pool": STEADY}))
    quiet = {"queue_length": 0.0, "service_s": 0.1}
    assert film.see(0, 50, **quiet) == 6, "as planned"
    assert film.see(1, 50, **quiet) == 6
    assert film.see(2, 90, **quiet) == 11
    assert {film.see(t, 20, **quiet) for t in range(3, 17)} == {11}, "settling"
    assert film.see(17, 20, **quiet) == 5, "of the last 30 s, the busiest 5 had 40 / s: ceil(4 * 6 / 5)"
    assert {film.see(t, 20, **quiet) for t in range(18, 32)} == {5}
    assert film.see(32, 20, **quiet) == 3, "ceil(2 * 6 / 5)"


def test_a_queue_that_grows_has_arrived() -> None:
    film = Film(InferLine(ONE, sample={"pool": STEADY}))
    before = film.see(0, 50, queue_length=0.0, service_s=0.1)
    film.see(1, 50, queue_length=0.0, service_s=0.1)
    assert film.see(2, 50, queue_length=50.0, service_s=0.1) > before


def test_without_a_sample_the_first_minute_is_it() -> None:
    film = Film(InferLine(ONE))
    for t in range(60):
        assert film.see(t, 50, queue_length=0.0, service_s=0.1) == 2
    assert film.see(60, 50, queue_length=0.0, service_s=0.1) > 5


def test_a_service_shrinks_by_the_least_utilisation_of_its_pipelines() -> None:
    light = Service("idle", "light", 1.0, 1)
    site = replace(
        ONE,
        services=(*SITE.services, light),
        targets={**SITE.targets, "idle": Target(1)},
        laws={"pool": Law(0.1), "idle": Law(0.001)},
        promises={"p": Promise(1.0, 0.05, (("pool", "idle"),))},
    )
    wanted = {}
    for wide in (True, False):
        film = Film(InferLine(site, {"pool": STEADY, "idle": STEADY}, pipeline_wide=wide))
        film.on = {**film.on, "idle": {"a": 1}}
        film.see(0, 50, queue_length=0.0, service_s=0.1)
        for t in range(1, 40):
            wanted[wide] = film.see(t, 20, queue_length=0.0, service_s=0.1)
    assert wanted == {True: 6, False: 3}
