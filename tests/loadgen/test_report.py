from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.outcome import OUTCOMES, Hop, Outcome, TaskRecord, classify
from loadgen.report import PipelinePlan, Plan, build, quantile, quantile_interval, wilson

ENCODE = Hop("encode", "encode-a", "a0", "n0", 0.01, 0.03, 0.01, 4)
POOL = Hop("pool", "pool-a", "p0", "n0", 0.0, 0.02, 0.0, 1)


def task(outcome: Outcome = "on_time", *, at: float = 1.0, lag: float = 0.0, took: float = 0.1, **changes: Any) -> TaskRecord:
    answered = outcome not in {"failed", "cancelled"}
    fields: dict[str, Any] = {
        "pipeline": "embed", "index": 0, "scheduled_s": at, "sent_s": at + lag, "finished_s": at + took if answered else None,
        "deadline_s": 0.2, "status": None, "reason": None, "outcome": outcome,
    }  # fmt: skip
    return TaskRecord(**{**fields, **changes})


def plan(*pipelines: PipelinePlan, **changes: Any) -> Plan:
    return Plan(pipelines or (PipelinePlan("embed", "poisson:20", 0.2),), seed=1, duration_s=10.0, **changes)


# --- intervals ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_ratio_and_stays_a_probability(counts: tuple[int, int]) -> None:
    k, n = counts
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


def test_wilson_agrees_with_the_published_example() -> None:
    # 15 of 148: Newcombe 1998, table I, method 3.
    low, high = wilson(15, 148)
    assert low == pytest.approx(0.0624, abs=5e-5)
    assert high == pytest.approx(0.1605, abs=5e-5)


@given(st.integers(1, 500), st.integers(2, 20))
def test_wilson_narrows_with_more_tasks(n: int, times: int) -> None:
    narrow, wide = wilson(n * times, 2 * n * times), wilson(n, 2 * n)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_quantile_was_seen_and_lies_in_its_interval(values: list[float], q: float) -> None:
    ordered = np.sort(values)
    value = quantile(ordered, q)
    low, high = quantile_interval(ordered, q)
    assert value in values
    assert low is None or low <= value
    assert high is None or value <= high
    assert np.count_nonzero(ordered <= value) >= q * len(values) - 1e-6


@pytest.mark.parametrize(
    ("n", "q", "low", "high"),
    [
        (10, 0.5, 2, 9),  # the textbook's 95 % interval of a median of ten
        (100, 0.5, 40, 61),
        (367, 0.99, 359, None),  # 0.99^367 = 2.501 %: no rank bounds the p99 from above
        (368, 0.99, 360, 368),  # 0.99^368 = 2.476 %
        (1, 0.5, None, None),
    ],
)
def test_the_ends_of_a_quantile_s_interval_are_these_ranks(n: int, q: float, low: int | None, high: int | None) -> None:
    assert quantile_interval(np.arange(1.0, n + 1), q) == (low, high)


@pytest.mark.parametrize(("n", "q"), [(100, 0.5), (500, 0.95), (1000, 0.99)])
def test_a_quantile_s_interval_holds_the_truth_as_often_as_it_says(n: int, q: float) -> None:
    rng = np.random.default_rng(11)
    truth = -math.log(1 - q)
    held = 0
    for _ in range(1000):
        low, high = quantile_interval(np.sort(rng.standard_exponential(n)), q)
        held += (low is None or low <= truth) and (high is None or truth <= high)
    assert held / 1000 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1000)


# --- the report -----------------------------------------------------------------------------------------------------------


def test_every_task_that_is_not_on_time_stays_in_the_denominator() -> None:
    records = [task(outcome) for outcome in OUTCOMES]
    report = build(records, plan())
    assert report["sent"] == 6
    assert report["on_time_ratio"] == pytest.approx(1 / 6, abs=1e-6)
    assert report["outcomes"] == dict.fromkeys(OUTCOMES, 1)
    assert report["latency_s"]["n"] == 2


def test_the_documented_keys_are_there_over_all_and_per_pipeline() -> None:
    report = build([task()], plan())
    shared = {
        "on_time_ratio", "on_time_interval", "sent", "outcomes", "reasons", "latency_s", "send_lag_s", "rate", "stages",
        "unattributed_share", "cost",
    }  # fmt: skip
    assert set(report) - shared == {
        "schema", "valid", "invalid_reason", "complete", "objective", "url", "seed", "duration_s", "warmup", "generator",
        "pipelines",
    }  # fmt: skip
    assert set(report["pipelines"]["embed"]) - shared == {"arrivals", "deadline_s", "promise"}
    assert shared <= set(report)
    assert shared <= set(report["pipelines"]["embed"])
    assert build.__doc__ is not None
    assert all(key in build.__doc__ for key in (*report, *report["pipelines"]["embed"], *report["latency_s"]))
    json.dumps(report, allow_nan=False)


def test_a_run_without_a_task_has_nulls_and_not_zeros() -> None:
    report = build([], plan())
    assert report["on_time_ratio"] is None
    assert report["latency_s"]["p99"] is None
    assert report["send_lag_s"]["max"] is None
    assert report["valid"]
    json.dumps(report, allow_nan=False)


def test_the_warm_up_is_left_out_and_stated() -> None:
    report = build([task("failed", at=-1.0), task(at=0.0), task()], plan(warmup_s=2.0))
    assert report["sent"] == 2
    assert report["on_time_ratio"] == 1.0
    assert report["warmup"] == {"duration_s": 2.0, "tasks": 1}


def test_pipelines_are_counted_apart() -> None:
    pipelines = (PipelinePlan("embed", "poisson:20", 0.2, cost=3.0), PipelinePlan("classify", "constant:5", 0.5))
    report = build([task(), task(), task("late", pipeline="classify")], plan(*pipelines, cost=7.5))
    assert report["pipelines"]["embed"]["on_time_ratio"] == 1.0
    assert report["pipelines"]["classify"]["outcomes"]["late"] == 1
    assert report["pipelines"]["classify"]["arrivals"] == "constant:5"
    assert [report["cost"], report["pipelines"]["embed"]["cost"], report["pipelines"]["classify"]["cost"]] == [7.5, 3.0, None]


def test_rates_are_per_second_of_the_measured_part() -> None:
    records = [task(), task("late"), task("expired"), task("failed", sent_s=None)]
    assert build(records, plan())["rate"] == {"scheduled": 0.4, "sent": 0.3, "answered": 0.2, "on_time": 0.1}


def test_latency_has_its_interval_and_says_when_the_p99_is_not_firm() -> None:
    few = build([task(took=0.001 * i) for i in range(1, 101)], plan())["latency_s"]
    assert (few["p50"], few["p95"], few["p99"], few["max"]) == (0.05, 0.095, 0.099, 0.1)
    assert few["interval"]["p99"] == [0.097, None]
    assert not few["p99_firm"]
    many = build([task(took=0.001 * i) for i in range(1, 460)], plan())["latency_s"]
    assert many["p99_firm"]
    assert many["interval"]["p99"][1] is not None


def test_a_generator_that_lags_makes_the_run_invalid() -> None:
    fine = build([task(lag=0.01)], plan())
    assert fine["valid"]
    assert fine["invalid_reason"] is None
    lagging = build([task(lag=0.0101)], plan())
    assert not lagging["valid"]
    assert "embed: p99 send lag 10.1 ms is over 5% of the 200 ms deadline" in lagging["invalid_reason"]
    assert lagging["send_lag_s"] == {"p50": 0.0101, "p99": 0.0101, "max": 0.0101}


def test_stages_tell_where_the_time_went() -> None:
    records = [
        task(took=0.1, hops=(ENCODE, POOL)),
        task(took=0.1, hops=(ENCODE, POOL)),
        task("expired", hops=(ENCODE,)),
        task(),
    ]
    report = build(records, plan())
    encode, pool = report["stages"]["encode-a"], report["stages"]["pool-a"]
    assert encode["tasks"] == encode["visits"] == 3
    assert encode["queue_s"] == {"mean": 0.01, "p50": 0.01, "p99": 0.01}
    assert encode["batch_mean"] == 4
    # Of the answered tasks with timing: 50 and 20 ms of 100.
    assert encode["share"] == pytest.approx(0.5)
    assert pool["share"] == pytest.approx(0.2)
    assert report["unattributed_share"] == pytest.approx(0.3)


def test_a_service_visited_twice_by_a_task_counts_the_task_once() -> None:
    stage = build([task(hops=(POOL, POOL))], plan())["stages"]["pool-a"]
    assert (stage["tasks"], stage["visits"]) == (1, 2)


def test_stages_that_never_answered_have_no_share() -> None:
    report = build([task("expired", hops=(ENCODE,))], plan())
    assert report["stages"]["encode-a"]["share"] is None
    assert report["unattributed_share"] is None


def test_branches_that_run_at_once_leave_nothing_unattributed() -> None:
    assert build([task(took=0.06, hops=(ENCODE, ENCODE))], plan())["unattributed_share"] == 0


@pytest.mark.parametrize(
    ("missed", "of", "verdict"),
    [(0, 1000, "kept"), (100, 1000, "broken"), (50, 1000, "undecided"), (0, 10, "undecided")],
)
def test_a_promise_is_judged_by_the_whole_interval(missed: int, of: int, verdict: str) -> None:
    records = [task("late")] * missed + [task()] * (of - missed)
    promise = build(records, plan(PipelinePlan("embed", "poisson:20", 0.2, epsilon=0.05)))["pipelines"]["embed"]["promise"]
    assert promise["verdict"] == verdict
    assert promise["violation"] == pytest.approx(missed / of)
    assert promise["interval"][0] <= promise["violation"] <= promise["interval"][1]


def test_no_promise_where_no_epsilon_is_known() -> None:
    assert build([task()], plan())["pipelines"]["embed"]["promise"] is None


@pytest.mark.parametrize(
    ("objective", "outcomes", "met"),
    [(0.5, ("on_time", "late"), True), (0.51, ("on_time", "late"), False), (0.0, (), False)],
)
def test_the_objective_is_met_by_every_pipeline_or_missed(objective: float, outcomes: tuple[Outcome, ...], met: bool) -> None:
    pipelines = (PipelinePlan("embed", "poisson:20", 0.2), PipelinePlan("classify", "poisson:20", 0.2))
    records = [task(outcome, pipeline="classify") for outcome in outcomes] + [task()] * 100
    assert build(records, plan(*pipelines, objective=objective))["objective"] == {"on_time_ratio": objective, "met": met}


def test_reasons_are_counted_and_the_interruption_stated() -> None:
    records = [task("failed", reason="no_answer"), task("failed", reason="no_answer"), task("cancelled", reason="interrupted")]
    report = build(records, plan(interrupted=True))
    assert report["reasons"] == {"interrupted": 1, "no_answer": 2}
    assert not report["complete"]


endings = st.tuples(st.none() | st.sampled_from([200, 400, 429, 500, 503, 504]), st.none() | st.floats(0, 2), st.booleans())


@given(st.lists(endings, max_size=60))
def test_outcomes_add_up_whatever_happened(tasks: list[tuple[int | None, float | None, bool]]) -> None:
    records = [
        task(classify(status, took, 0.2, given_up=given_up), status=status, finished_s=None if took is None else 1.0 + took)
        for status, took, given_up in tasks
    ]
    report = build(records, plan())
    assert sum(report["outcomes"].values()) == report["sent"] == len(tasks)
    assert report["rate"]["on_time"] <= report["rate"]["answered"] <= report["rate"]["scheduled"]
    json.dumps(report, allow_nan=False)


def test_the_leaves_stay_light() -> None:
    heavy = "{'aiohttp', 'click', 'rich', 'uvloop', 'asyncio', 'orjson', 'pydantic'}"
    code = f"import loadgen.arrivals, loadgen.outcome, loadgen.report, sys; sys.exit(repr({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip() == "set()"
