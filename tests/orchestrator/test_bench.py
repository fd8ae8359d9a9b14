from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import bench
from orchestrator.bench import Options
from tests.orchestrator.examples import load


def stage(visits: int, mean_s: float) -> dict[str, object]:
    return {"visits": visits, "compute_s": {"mean": mean_s}}


def test_the_cost_is_split_by_the_compute_seconds_each_pipeline_used() -> None:
    """embed used 100 x 10 ms + 100 x 1 ms, classify 200 x 10 ms + 200 x 1 ms: one third and two thirds."""
    report = {
        "on_time_ratio": 1.0,
        "pipelines": {
            "embed": {"sent": 100, "stages": {"encode": stage(100, 0.010), "pool": stage(100, 0.001)}},
            "classify": {"sent": 100, "stages": {"encode": stage(200, 0.010), "pool": stage(200, 0.001)}},
        },
    }
    charged = bench.charge(report, 60.0)
    assert charged["cost"] == 60.0
    assert charged["on_time_ratio"] == 1.0
    assert {name: section["cost"] for name, section in charged["pipelines"].items()} == {
        "embed": pytest.approx(20.0), "classify": pytest.approx(40.0),
    }  # fmt: skip


def test_where_nothing_was_computed_no_pipeline_is_charged() -> None:
    charged = bench.charge({"pipelines": {"embed": {"stages": {}}}}, 5.0)
    assert (charged["cost"], charged["pipelines"]["embed"]["cost"]) == (5.0, None)


def test_a_service_is_shared_where_several_pipelines_came_by() -> None:
    report = {
        "pipelines": {
            "embed": {"stages": {"encode": stage(100, 0.01), "pool": stage(100, 0.001)}},
            "classify": {"stages": {"encode": stage(40, 0.01)}},
        }
    }
    assert bench.shared(report) == {"encode": {"embed": 100, "classify": 40}}


def test_the_load_generator_gets_the_workload_of_the_testbed() -> None:
    options = Options(warmup_s=2.0, seed=7, objective=0.95, duration_s=None, records=None, as_json=False)
    argv = bench.command(load().testbed, "http://gateway", Path("r.json"), options)
    assert argv[1:] == [
        "-m", "loadgen", "http://gateway", "--report", "r.json", "--seed", "7", "--warmup", "2",
        "--pipeline", "embed=poisson:20", "--objective", "0.95",
    ]  # fmt: skip
