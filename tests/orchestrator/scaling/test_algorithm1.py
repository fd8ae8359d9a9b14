from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scaling.algorithm1 import Algorithm1
from orchestrator.scaling.effective_capacity import gamma_capacity
from orchestrator.scaling.site import Law, Promise
from tests.orchestrator.scaling.test_autoscaler import SITE, Film

ONE = replace(SITE, laws={"pool": Law(0.01, 0.5)}, promises={"p": Promise(0.1, 0.05, (("pool",),))})


@given(st.integers(5, 20), st.floats(0.05, 3.0), st.floats(0.001, 1.0))
def test_the_delay_solves_20_and_21(y: int, cv2: float, mean_s: float) -> None:
    """With theta from g = ln(r / (f epsilon)) / (theta r), the gamma slots' effective capacity is r, whatever the slot."""
    policy = Algorithm1(ONE)
    wait_s = policy.delay(mean_s, cv2)(y) - mean_s
    rate = y / (policy.window * mean_s)
    theta = math.log(rate * mean_s / policy.epsilon) / (wait_s * rate)
    for slot_s in (0.001, 0.1):
        # The rate's mean is 1 / m, and its variance over a slot makes counts vary by cv^2 / m per second.
        assert gamma_capacity(slot_s / (mean_s * cv2), cv2 / slot_s, slot_s, theta) == pytest.approx(rate, rel=1e-6)


@given(st.integers(1, 19), st.floats(0.0, 3.0), st.booleans())
def test_more_tasks_for_an_instance_are_not_sooner_done(y: int, cv2: float, tail: bool) -> None:
    delay = Algorithm1(ONE, effective_capacity=tail).delay(0.01, cv2)
    assert 0.01 <= delay(y) <= delay(y + 1)


def test_the_mean_variant_by_hand() -> None:
    """Ten tasks of 10 ms, one busy instance, nothing ordered beyond it: gains H A m dy of 500, 166 and 83 at y = 5, 4, 3 …"""
    film = Film(Algorithm1(ONE, effective_capacity=False))
    film.on = {**film.on, "pool": {"a": 1}}
    assert film.see(0, 0.0, queue_length=10.0, service_s=0.01) == 5, "10, 5, 4, 3, 2 tasks each; a sixth leaves 2"
    film = Film(Algorithm1(ONE, effective_capacity=False, eta=100.0))
    film.on = {**film.on, "pool": {"a": 1}}
    assert film.see(0, 0.0, queue_length=10.0, service_s=0.01) == 2, "500 is worth 200, 100 is not"


def test_idle_instances_go_at_once_and_busy_ones_stay() -> None:
    film = Film(Algorithm1(ONE))
    film.on = {**film.on, "pool": {"a": 4, "b": 4}}
    assert film.see(0, 300.0, queue_length=0.0, service_s=0.01) == 3, "three erlang keep three busy"
    assert film.see(1, 0.0, queue_length=0.0) == 1


def test_an_instance_holds_no_more_than_y_max() -> None:
    film = Film(Algorithm1(ONE, eta=1e9, y_max=4))
    assert film.see(0, 0.0, queue_length=21.0, service_s=0.01) == 6


def test_h_stays_at_its_floor_until_tasks_are_late_and_then_grows_by_how_late() -> None:
    film = Film(Algorithm1(ONE))
    film.see(0, 100.0, queue_length=5.0, service_s=0.01, wait_s=0.05)
    assert film.state.services["pool"] == 1.0
    film.see(1, 100.0, queue_length=5.0, service_s=0.01, wait_s=0.24)
    assert film.state.services["pool"] == pytest.approx(151.0), "0.25 s old with 0.1 s: 150 ms late"
    film.see(2, 100.0, queue_length=5.0, service_s=0.01, wait_s=0.24)
    assert film.state.services["pool"] == pytest.approx(301.0)
    film.see(3, 0.0, queue_length=0.0)
    assert film.state.services["pool"] == 1.0


def test_without_a_profile_it_takes_what_is_measured_and_without_both_it_holds() -> None:
    film = Film(Algorithm1(SITE))
    assert film.see(0, 5.0, queue_length=40.0) == 2
    assert film.see(1, 5.0, queue_length=40.0, service_s=0.01, service_cv2=1.0) > 2
