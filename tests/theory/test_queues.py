"""The simulator against closed forms: mean waits of M/M/1, M/D/1 and M/M/c, and Little's law.

A mean is compared with its closed form by a confidence interval of 99.9 % from the means of 20 batches (Student's t, 19 degrees
of freedom). Each test also asks that the interval is narrow, so that it could fail.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from loadgen import arrivals
from orchestrator.core import Decision, Observation, Target
from orchestrator.scaling import effective_capacity
from orchestrator.simulator import run as simulations
from orchestrator.simulator.ingredients import NONE
from orchestrator.simulator.run import Run
from orchestrator.simulator.world import World
from tests.orchestrator.simulator.worlds import chain, simulate, stage, static, world

BATCHES, T_999 = 20, 3.883
WARMUP = 5_000
"""Tasks at the beginning that are left out: the queue begins empty."""


def queue(cv2: float, slots: int = 1) -> World:
    """One queue of mean service time 1 s, before so many slots, that drops nothing."""
    only = stage("only", 1.0, cv2, slots=slots, queue_capacity=1_000_000)
    return world([only], [chain("tasks", "only", deadline_s=1e7)])


def waits_s(run: Run) -> np.ndarray:
    records = sorted(run.records, key=lambda record: record.index)[WARMUP:]
    return np.array([record.hops[0].queue_s for record in records])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width."""
    means = np.array([batch.mean() for batch in np.array_split(values, BATCHES)])
    return float(means.mean()), T_999 * float(means.std(ddof=1)) / math.sqrt(BATCHES)


def erlang_c(c: int, r: float) -> float:
    """P(wait) of M/M/c with offered load r < c: C = (r^c / c!) / ((1 - r/c) sum_{k<c} r^k / k! + r^c / c!)  (Erlang 1917)."""
    top = r**c / math.factorial(c)
    return top / ((1 - r / c) * sum(r**k / math.factorial(k) for k in range(c)) + top)


@functools.cache
def waited(cv2: float, slots: int, rate: float, tasks: int = 40_000) -> np.ndarray:
    """Waits of the tasks of a long run [s]."""
    load, duration_s = {"tasks": f"poisson:{rate}"}, tasks / rate
    return waits_s(
        simulate(queue(cv2, slots), load, {"only": Target(1)}, duration_s=duration_s, slot_s=1000.0, keep_records=True)
    )


def agrees(values: np.ndarray, expected: float, within: float) -> bool:
    """Whether the closed form lies in the interval, and the interval is no wider than `within` of it, to each side."""
    mean, half = interval(values)
    return half < within * expected and abs(mean - expected) < half


@pytest.mark.parametrize(
    ("cv2", "rate", "expected_s"),
    [
        # M/M/1: Wq = rho / (mu - lambda).
        pytest.param(1.0, 0.6, 0.6 / 0.4, id="M/M/1"),
        # M/D/1, by Pollaczek and Khinchine: Wq = rho / (2 mu (1 - rho)).
        pytest.param(0.0, 0.7, 0.7 / (2 * 0.3), id="M/D/1"),
        # M/G/1 with gamma service, cv2 1/2: Wq = rho (1 + cv2) / (2 mu (1 - rho)).
        pytest.param(0.5, 0.6, 0.6 * 1.5 / (2 * 0.4), id="M/G/1"),
    ],
)
def test_mean_wait_is_that_of_the_closed_form(cv2: float, rate: float, expected_s: float) -> None:
    assert agrees(waited(cv2, 1, rate), expected_s, within=0.25)


def test_mean_and_tail_of_the_wait_are_those_of_m_m_c() -> None:
    """Wq = C(c, r) / (c mu - lambda), and P(W > t) = C(c, r) exp(-(c mu - lambda) t)."""
    waits, waiting = waited(1.0, 4, 2.8), erlang_c(4, 2.8)
    assert agrees(waits, waiting / 1.2, within=0.25)
    for t in (0.0, 1.0):
        assert agrees((waits > t).astype(float), waiting * math.exp(-1.2 * t), within=0.25)


@pytest.mark.parametrize(("cv2", "rate"), [(1.0, 0.6), (0.0, 0.7), (0.5, 0.6)], ids=["M/M/1", "M/D/1", "M/G/1"])
def test_the_tail_of_the_wait_is_what_effective_capacity_says(cv2: float, rate: float) -> None:
    """P(W > d) <= exp(-eta d) for one server (Kingman), and no less than a third of it, so that the bound says something."""
    waits = waited(cv2, 1, rate)
    for d in (1.0, 3.0):
        arrivals_, service = effective_capacity.Arrivals(rate), effective_capacity.Service(1.0, cv2)
        bound = effective_capacity.late_probability(arrivals_, service, 1, d, prefactor="kingman")
        share, half = interval((waits > d).astype(float))
        assert bound / 3 < share < bound + half
        if cv2 == 1.0:
            exact = effective_capacity.late_probability(arrivals_, service, 1, d, prefactor="erlang_c")
            assert abs(share - exact) < half < 0.3 * exact


def test_without_shedding_the_late_ratio_is_the_tail_of_the_time_in_system() -> None:
    """M/M/1: P(T > D) = exp(-(mu - lambda) D), the closed form of what a pipeline's epsilon is about."""
    only = stage("only", 1.0, 1.0, queue_capacity=1_000_000)
    run = simulate(
        world([only], [chain("tasks", "only", deadline_s=5.0)]), {"tasks": "poisson:0.6"}, {"only": Target(1)},
        duration_s=40_000 / 0.6, slot_s=1000.0, ingredients=NONE, keep_records=True,
    )  # fmt: skip
    records = sorted(run.records, key=lambda record: record.index)[WARMUP:]
    assert agrees(np.array([record.outcome == "late" for record in records], dtype=float), math.exp(-0.4 * 5.0), within=0.25)


@dataclass
class Watching:
    """Changes nothing, and keeps the queue lengths it is shown."""

    lengths: list[float] = field(default_factory=list)
    state_type = int

    def initial(self) -> int:
        return 0

    def step(self, state: int, observation: Observation) -> tuple[int, Decision]:
        signal = observation.services["only"].signal
        if signal is not None and signal.queue_length is not None:
            self.lengths.append(signal.queue_length)
        return state, Decision(None, "watching")


def test_littles_law_holds_between_sampled_queue_and_measured_waits() -> None:
    """L = lambda W: the mean queue that telemetry shows, against the waits of the tasks themselves."""
    where, watching, duration_s = queue(1.0), Watching(), 20_000.0
    initial = static(where, {}).place({"only": Target(1)}, None)
    load = {"tasks": arrivals.parse("poisson:0.7")}
    run = simulations.run(
        where, "watching", watching, load, initial=initial, duration_s=duration_s, slot_s=2.0, seed=3, keep_records=True
    )
    total_wait_s = sum(record.hops[0].queue_s for record in run.records)
    # The same path of the same queue: what remains is that the length is looked at every 2 s only.
    assert np.mean(watching.lengths) == pytest.approx(total_wait_s / duration_s, rel=0.05)
