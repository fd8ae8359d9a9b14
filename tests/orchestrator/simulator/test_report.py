from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from orchestrator.simulator import report
from orchestrator.simulator.report import Mean, Verdict
from orchestrator.simulator.scenario import ClaimSection
from tests.orchestrator.simulator.scenarios import loaded, row


def judged(claim: dict[str, Any], rows: list[dict[str, Any]]) -> list[Verdict]:
    return report.verdicts([ClaimSection.model_validate(claim)], rows)


def verdict(claim: dict[str, Any], rows: list[dict[str, Any]]) -> Verdict:
    (found,) = judged(claim, rows)
    return found


def test_intervals_are_students() -> None:
    mean = Mean.of([1.0, 2.0, 3.0])
    assert mean is not None
    # t of 2 degrees of freedom at 97.5 %: 4.302653; sd 1.
    assert mean.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert Mean.of([1.0]) == Mean(1.0, None, None, 1)
    assert Mean.of([]) is None
    assert mean.text(2) == "2.00 ±2.48"


def test_means_are_by_case_load_and_policy() -> None:
    rows = [row("ours", 0.9, 10.0), row("ours", 1.0, 20.0, seed=2), row("ours", 0.5, 5.0, load=2.0), row("hpa", 0.8, 8.0)]
    lines = report.summary(rows)
    assert [(line["load"], line["label"]) for line in lines] == [(1.0, "ours"), (2.0, "ours"), (1.0, "hpa")]
    assert lines[0]["on_time_ratio"]["mean"] == pytest.approx(0.95)
    assert lines[0]["promised"] is None
    assert report.reckoned([row("ours", 1.0, 1.0, promised={"a": 0.01, "b": 0.03})]) == Mean(0.03, None, None, 1)


def test_on_time_is_held_against_the_level_or_the_limit() -> None:
    claim = {"claim": "on_time", "load": 1.0, "at_least": 0.95}
    assert verdict(claim, [row("ours", 0.96, 1.0)]).holds is True
    assert verdict(claim, [row("ours", 0.90, 1.0)]).holds is False
    limit = row("oracle", 0.905, 1.0, role="limit")
    assert verdict(claim, [row("ours", 0.90, 1.0), limit]).holds is True
    assert verdict(claim, [row("ours", 0.89, 1.0), limit]).holds is False
    # A limit that does better than the level asks for no more than the level.
    assert verdict(claim, [row("ours", 0.96, 1.0), row("oracle", 1.0, 1.0, role="limit")]).holds is True
    assert verdict(claim, [row("hpa", 0.9, 1.0)]).holds is None
    assert verdict(claim, [row("ours", 0.96, 1.0, load=2.0)]).holds is None


def test_cheapest_looks_only_at_baselines_that_are_on_time_as_often() -> None:
    claim = {"claim": "cheapest"}
    cheap_and_late, dear = row("hpa", 0.8, 1.0, core_cost=2.0), row("kpa", 0.99, 12.0, core_cost=2.0)
    assert verdict(claim, [row("ours", 0.95, 10.0, core_cost=2.0), cheap_and_late, dear]).holds is True
    lost = verdict(claim, [row("ours", 0.95, 12.0, core_cost=2.0), cheap_and_late, row("ray", 0.95, 10.0, core_cost=2.0)])
    assert lost.holds is False
    assert lost.measured == "ours 12 at 0.9500, ray 10: ratio 1.200 (1.250 of the light tier)"
    assert verdict(claim, [row("ours", 0.95, 10.0), row("part", 0.99, 1.0, role="ablation")]).holds is True


def test_frontiers_drop_what_is_not_worth_it_and_run_straight_between() -> None:
    rows = [row("hpa u=1", 0.9, 10.0), row("hpa u=2", 0.95, 20.0), row("hpa u=3", 0.94, 25.0)]
    role, points = report.frontiers(rows)["hpa"]
    assert (role, points) == ("baseline", [(0.9, 10.0), (0.95, 20.0)])
    assert report.cost_at(points, 0.925) == pytest.approx(15.0)
    assert report.cost_at(points, 0.5) == 10.0
    assert report.cost_at(points, 0.96) is None
    assert report.cost_at([], 0.5) is None


def test_the_frontier_is_judged_level_by_level() -> None:
    rows = [row("ours v=1", 0.90, 8.0), row("ours v=2", 0.99, 30.0), row("hpa u=1", 0.9, 10.0), row("hpa u=2", 0.95, 11.0)]
    found = judged({"claim": "frontier", "levels": [0.9, 0.95, 0.99, 0.999]}, rows)
    assert [each.holds for each in found] == [True, False, True, None]
    assert "ratio 0.800" in found[0].measured
    assert "no baseline reaches it" in found[2].measured
    assert judged({"claim": "frontier", "levels": [0.95]}, rows[2:])[0].holds is False


def test_a_promise_is_kept_or_not() -> None:
    kept = verdict({"claim": "promise"}, [row("ours", 0.96, 1.0, promised={"p": 0.01})])
    assert kept.holds is True
    assert kept.measured == "0.0400, epsilon 0.05; reckoned with 0.0100 for the worst pipeline"
    assert verdict({"claim": "promise"}, [row("ours", 0.94, 1.0)]).holds is False


def series(late: list[int], changed: list[int] | None = None) -> dict[str, list[float]]:
    n = len(late)
    return {"t": [float(i) for i in range(n)], "ended": [100.0] * n, "late": list(map(float, late)),
            "changed": list(map(float, changed or [0] * n))}  # fmt: skip


def test_recovery_counts_slots_until_the_last_bad_one() -> None:
    claim = {"claim": "recovery", "at": "3s", "slots": 2}
    # What ended from 3 s to 4 s is seen at 4 s: that is the first slot after the step.
    assert verdict(claim, [row("ours", 1.0, 1.0, series=series([0, 0, 0, 9, 9, 9, 0, 0, 0]))]).measured == "2 slots"
    assert verdict(claim, [row("ours", 1.0, 1.0, series=series([0, 0, 0, 0, 9, 9, 0, 0, 0]))]).holds is True
    assert verdict(claim, [row("ours", 1.0, 1.0, series=series([0, 0, 0, 0, 9, 0, 9, 0, 0]))]).holds is False
    assert verdict(claim, [row("ours", 1.0, 1.0, series=series([0] * 9))]).measured == "0 slots"
    assert verdict(claim, [row("ours", 1.0, 1.0)]).holds is None


def test_steady_forgives_only_the_beginning() -> None:
    claim = {"claim": "steady", "after": 0.25}
    early, late = series([0] * 8, [3, 1, 0, 0, 0, 0, 0, 0]), series([0] * 8, [0, 0, 0, 0, 0, 0, 1, 0])
    assert verdict(claim, [row("ours", 1.0, 1.0, series=early)]).holds is True
    assert verdict(claim, [row("ours", 1.0, 1.0, series=early), row("ours", 1.0, 1.0, series=late)]).holds is False


def test_slopes_over_v_are_those_of_powers() -> None:
    rows = [row("ours", 1.0, 5.0 + 3.0 / v, options={"v": v}, virtual_queue=0.2 * v) for v in (1.0, 2.0, 5.0, 10.0)]
    cost, queue = judged({"claim": "v_sweep"}, rows)
    assert (cost.holds, queue.holds) == (True, True)
    assert "limit 5; the excess falls as V^-1.00" in cost.measured
    assert "as V^1.00" in queue.measured
    cubic = [{**each, "virtual_queue": each["options"]["v"] ** 3} for each in rows]
    assert judged({"claim": "v_sweep"}, cubic)[1].holds is False
    assert judged({"claim": "v_sweep"}, rows[:2])[0].holds is None
    assert report.slope([(1.0, 1.0)]) is None


def test_placements_are_compared_by_label() -> None:
    claim = {"claim": "not_below", "label": "spread"}
    assert verdict(claim, [row("ours", 0.95, 1.0), row("spread", 0.955, 1.0)]).holds is True
    assert verdict(claim, [row("ours", 0.90, 1.0), row("spread", 0.955, 1.0)]).holds is False
    assert verdict(claim, [row("ours", 0.90, 1.0)]).holds is None


def test_a_report_says_when_it_is_incomplete_and_what_failed() -> None:
    said = report.document(loaded(), [row("ours", 0.80, 1.0, case={"nodes": 8})], runs=4)
    assert said["complete"] is False
    assert {"scenario", "sha256", "parameters", "rows", "summary", "verdicts", "plots", "runs", "about"} <= said.keys()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table(said))
    text = console.export_text()
    assert "incomplete: 1 of 4 runs" in text
    assert "FAILS  nodes=8, load 1: on time at least 0.9: 0.8000" in text
