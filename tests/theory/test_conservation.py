"""What holds of every run, whatever it is of: no task is lost or counted twice, and a run can be had again bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from loadgen import arrivals
from orchestrator.core import Target
from orchestrator.simulator import run as simulations
from orchestrator.simulator.faults import LinkFault, Loss, Silence
from orchestrator.simulator.run import Run
from tests.orchestrator.simulator.worlds import chain, fork, meshed, simulate, stage, static, world

ROOT = Path(__file__).resolve().parents[2]
LOAD = {"line": "poisson:90", "fork": "mmpp:20@2s,250@1s"}
TARGETS = {name: Target(3, standby=1) for name in "abcd"}


def eventful(seed: int = 1) -> Run:
    """Chains and joins over links, overload in bursts, short queues, batches, standbys let out, and faults of every kind."""
    names = {"a": (0.012, 0.5), "b": (0.02, 1.0), "c": (0.01, 0.0), "d": (0.015, 0.3)}
    stages = [
        stage(name, mean_s, cv2, queue_capacity=6, max_batch=4, start_s=0.7, inputs={"x": 2e4, "y": 2e4}, outputs={"x": 5e4})
        for name, (mean_s, cv2) in names.items()
    ]
    pipelines = [chain("line", "a", "b", "d", deadline_s=0.2), fork("fork", "a", "b", "c", deadline_s=0.15)]
    where = world(stages, pipelines, nodes=3, cpus=6.0, links=meshed(3, 0.001, 2e7))
    few = static(where, {}).place(dict.fromkeys(TARGETS, Target(2)), None)
    return simulate(
        where, LOAD, TARGETS, duration_s=12, initial=few, seed=seed, keep_records=True, silences=[Silence(8.0, 9.5)],
        losses=[Loss("n1", 6.0, back=9.0)], link_faults=[LinkFault("n0", "n2", 3.0, 4.0, cut=True)],
    )  # fmt: skip


def test_every_task_sent_ends_in_exactly_one_outcome() -> None:
    run = eventful()
    sent = simulations.arrival_times({name: arrivals.parse(spec) for name, spec in LOAD.items()}, 1, 12.0)
    assert {name: sum(counts.values()) for name, counts in run.row.pipelines.items()} == {n: len(t) for n, t in sent.items()}
    ends = Counter((record.pipeline, record.index) for record in run.records)
    assert set(ends.values()) == {1}
    assert sum(run.row.outcomes.values()) == len(run.records)
    # The run is of the kind that could lose count: almost everything that can happen did.
    assert all(run.row.outcomes[outcome] for outcome in ("on_time", "expired", "rejected"))
    assert run.row.starts
    assert run.row.let_out


def test_outcome_and_times_of_every_record_agree() -> None:
    for record in eventful().records:
        if record.outcome == "on_time":
            assert record.latency_s is not None
            assert 0 < record.latency_s <= record.deadline_s
            assert sum(hop.compute_s for hop in record.hops) > 0
        else:
            assert record.finished_s is None


def test_a_run_comes_out_the_same_in_every_process() -> None:
    script = (
        "import json; from tests.theory.test_conservation import eventful; run = eventful();"
        "print(json.dumps([run.row.as_dict(), run.events, [r.as_dict() for r in run.records]]))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    here = eventful()
    assert json.loads(said[0])[:2] == [here.row.as_dict(), here.events]


def test_another_seed_is_another_run() -> None:
    assert eventful(1).row.outcomes != eventful(2).row.outcomes
