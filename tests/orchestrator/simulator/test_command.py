"""`espalier simulate` from end to end, on a scenario of two services."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.progress import Progress

from orchestrator.__main__ import main
from orchestrator.errors import UsageError
from orchestrator.scaling.policies import POLICIES
from orchestrator.simulator import command, scenario, study
from orchestrator.simulator.command import Asked, Outcome
from orchestrator.simulator.study import Setting
from tests.orchestrator.simulator.scenarios import TINY, loaded
from tests.orchestrator.simulator.test_world import profiled

KEYS = {
    "policy", "label", "family", "role", "options", "case", "load", "seed", "on_time_ratio", "late_ratio", "epsilon",
    "promised", "cost", "core_cost", "replicas", "starts", "let_out", "outcomes", "pipelines", "late_by_pipeline",
    "epsilon_by_pipeline", "backlog", "virtual_queue", "planned", "series",
}  # fmt: skip
DRAWN = """\
name: drawn
about: the paper's world, for a moment
world:
  paper: {regime: <regime>, nodes: 5, rate: <rate>}
vary: {epsilon: [0.05]}
loads: [0.5]
seeds: 1
duration: <length>
slot: <slot>
placement: {core: spread, standby: 1.0}
policies: [<policies>]
faults: [{node: <node>, at: <at>}]
plots: []
"""


def run(home: Path, *arguments: str, text: str = TINY) -> Result:
    (home / "tiny.yaml").write_text(text)
    return CliRunner().invoke(main, ["simulate", str(home / "tiny.yaml"), "--out", str(home / "out"), *arguments])


def drawn(regime: str, policies: str, node: str = "drawn", rate: int = 20) -> str:
    slot, length, at = ("5ms", "50ms", "20ms") if regime == "milliseconds" else ("500ms", "4s", "2s")
    values = {"regime": regime, "length": length, "slot": slot, "policies": policies, "node": node, "at": at, "rate": rate}
    text = DRAWN
    for name, value in values.items():
        text = text.replace(f"<{name}>", str(value))
    return text


def rows_of(text: str) -> list[dict[str, Any]]:
    outcome = Outcome()
    with Progress(disable=True) as progress:
        command.simulate(study.study_of(loaded(text).scenario), 1, outcome, progress)
    assert outcome.complete
    return outcome.rows


def test_a_scenario_writes_its_report_and_plots(tmp_path: Path) -> None:
    result = run(tmp_path, "--jobs", "1")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"] is True
    assert len(report["rows"]) == report["runs"] == 4 * 2 * 2
    assert all(row.keys() == KEYS for row in report["rows"])
    assert [row["label"] for row in report["rows"]][:4] == [
        "ours", "square_root beta=0.5", "square_root beta=2", "static -shedding",
    ]  # fmt: skip
    assert report["parameters"]["seeds"] == 2
    for row in report["rows"]:
        assert row["on_time_ratio"] + row["late_ratio"] == pytest.approx(1.0)
        assert row["epsilon"] == pytest.approx(0.05)
    # Under one seed and load all meet the same tasks.
    sent = {(row["load"], row["seed"]): sum(row["outcomes"].values()) for row in report["rows"]}
    assert all(sum(row["outcomes"].values()) == sent[row["load"], row["seed"]] for row in report["rows"])
    assert report["plots"] == ["violins.png", "promises.png"]
    assert "16 runs" in result.stderr
    assert "holds" in result.stdout


def test_how_many_processes_there_are_changes_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    short = ("--seeds", "1", "--duration", "2", "--no-plots", "-o", "json")
    alone, together = run(one, "--jobs", "1", *short), run(two, "--jobs", "2", *short)
    assert together.exit_code == 0, together.output
    assert json.loads(alone.stdout) == json.loads(together.stdout)
    assert (one / "out" / "report.json").read_bytes() == (two / "out" / "report.json").read_bytes()


def test_policies_seeds_and_duration_can_be_asked_for(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--policies", "ours,static", "--seeds", "1", "--duration", "2", "--jobs", "1", "--no-plots", "-o", "json"
    )
    report = json.loads(result.stdout)
    assert {row["label"] for row in report["rows"]} == {"ours", "static -shedding"}
    assert {row["seed"] for row in report["rows"]} == {1}


def test_check_exits_1_where_a_claim_fails(tmp_path: Path) -> None:
    wrong = TINY.replace("deadline: 200ms", "deadline: 12ms")
    short = ("--seeds", "1", "--duration", "2", "--policies", "ours", "--jobs", "1", "--no-plots")
    assert run(tmp_path, *short, text=wrong).exit_code == 0
    assert run(tmp_path, *short, "--check", text=wrong).exit_code == 1
    assert run(tmp_path, *short, "--check").exit_code == 0


def test_what_the_user_got_wrong_exits_2_and_says_what_was_meant(tmp_path: Path) -> None:
    result = run(tmp_path, "--policies", "our")
    assert (result.exit_code, result.stderr) == (
        2, "error: the scenario has no policy 'our'; did you mean ours?; it has lyapunov, ours, square_root, static\n",
    )  # fmt: skip
    result = CliRunner().invoke(main, ["simulate", "papr"])
    assert result.exit_code == 2
    assert "did you mean paper?" in result.stderr
    result = run(tmp_path, text=TINY.replace("duration: 4s", "duration: 4"))
    assert result.exit_code == 2
    assert "tiny.yaml:23: duration: 4 has no unit" in result.stderr
    assert run(tmp_path, "--duration", "0.5").exit_code == 2


def test_an_interrupt_leaves_what_is_done_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study.row
    done: list[dict[str, Any]] = []

    def interrupted(*arguments: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(whole(*arguments))
        return done[-1]

    monkeypatch.setattr(study, "row", interrupted)
    result = run(tmp_path, "--jobs", "1", "--duration", "2", "--no-plots")
    assert result.exit_code == 130
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"] is False
    assert len(report["rows"]) == 2


@pytest.mark.parametrize("regime", ["milliseconds", "containers"])
def test_every_policy_decides_in_a_drawn_world(regime: str) -> None:
    rows = rows_of(drawn(regime, ", ".join(POLICIES), rate=20 if regime == "containers" else 1000))
    assert [row["label"] for row in rows] == list(POLICIES)
    assert {row["case"]["epsilon"] for row in rows} == {0.05}
    assert all(sum(row["outcomes"].values()) > 0 for row in rows)
    ours = next(row for row in rows if row["role"] == "ours")
    assert ours["promised"] is not None


def test_the_busiest_node_can_be_lost() -> None:
    (row,) = rows_of(drawn("containers", "static", "busiest"))
    (kept,) = rows_of(drawn("containers", "static").replace("faults: [{node: drawn, at: 2s}]\n", ""))
    assert row["replicas"] < kept["replicas"]


def test_a_policy_that_knows_no_allowance_can_be_given_one() -> None:
    both = "{policy: static, label: plain}, {policy: static, label: spends, spend_standby: true}"
    tight = drawn("containers", both, rate=100).replace("standby: 1.0", "standby: 1.0, beta: 0.0")
    plain, spends = rows_of(tight)
    assert plain["let_out"] == 0
    assert spends["let_out"] > 0


def test_a_testbeds_own_workload_is_a_scenario(tmp_path: Path) -> None:
    plan = profiled(tmp_path)
    made = scenario.of_testbed(plan.testbed, Path("small.yaml"), ["manual", "static"])
    work = study.study_of(made, plan)
    assert work.start is not None
    assert study.settings(made) == (Setting({}, 1.0, 1),)
    row = study.row(work, Setting({}, 1.0, 1), scenario.entries(made)[0], work.start)
    # Of tokenise, encode and pool the file wants 1, 2 and 1 ready.
    assert row["on_time_ratio"] == 1.0
    assert row["replicas"] == pytest.approx(4.0)
    with pytest.raises(UsageError, match=r"no policy 'magic'"):
        scenario.of_testbed(plan.testbed, Path("small.yaml"), ["magic"])


def test_without_matplotlib_the_report_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(tmp_path, "--seeds", "1", "--duration", "2", "--policies", "static", "--jobs", "1")
    assert result.exit_code == 0
    assert "no plots: plots need matplotlib" in result.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["complete"] is True


def test_narrowing_keeps_the_rest_of_the_scenario() -> None:
    read = loaded()
    narrowed, made = command.narrowed(read, study.study_of(read.scenario), Asked(("static",), 3, None))
    assert narrowed.scenario == made.scenario
    assert (narrowed.scenario.seeds, len(narrowed.scenario.policies), narrowed.scenario.duration) == (3, 1, 4.0)
    assert command.estimate(made, 2).startswith("6 runs, 0.0 million task-stages: about 0.1 min with 2 jobs")
