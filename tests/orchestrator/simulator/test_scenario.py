from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator import lifecycle
from orchestrator.errors import UsageError
from orchestrator.simulator import scenario
from orchestrator.simulator.scenario import ScenarioInvalid
from tests.orchestrator.simulator.scenarios import TINY, loaded

SCENARIOS = lifecycle.ROOT / "deploy" / "scenarios"


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ScenarioInvalid) as caught:
        loaded(text)
    return caught.value.problems


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_scenario_of_the_project_holds_together(path: Path) -> None:
    found = scenario.load(path).scenario
    assert found.name == path.stem
    assert [entry.role for entry in scenario.entries(found)].count("ours") >= 1


def test_the_issues_scenarios_are_all_there() -> None:
    assert {path.stem for path in SCENARIOS.glob("*.yaml")} >= {
        "paper", "paper-containers", "burst", "step", "diurnal", "node-loss", "scale", "frontier", "v-sweep", "stationary",
        "constant",
    }  # fmt: skip
    assert scenario.find("V-sweep", SCENARIOS).stem == "v-sweep"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("policy: square_root", "policy: square_rot", r"tiny.yaml:28: policies\[1\].policy: there is no policy 'square_rot'"),
        ("policy: square_root", "policy: square_rot", r"did you mean square_root\?"),
        ("sweep: {beta:", "sweep: {bta:", r"policies\[1\].sweep.bta: square_root has no option 'bta'; did you mean beta\?"),
        ("slot: 500ms", "slots: 500ms", r"tiny.yaml:25: slots: unknown field; did you mean slot\?"),
        ("slot: 500ms", "slot: 500", r"slot: .*has no unit"),
        ("warmup: 1s", "warmup: 5s", r"tiny.yaml:24: warmup: leaves nothing to measure of 4 s"),
        (
            "service: heavy, after: [first]",
            "service: hevy, after: [first]",
            r"there is no service 'hevy'; did you mean heavy\?",
        ),
        ("after: [first]", "after: [frist]", r"no step 'frist' comes before this one; did you mean first\?"),
        ("poisson:40", "poison:40", r"tiny.yaml:20: workload.task: .*did you mean 'poisson:20'\?"),
        ('{task: "poisson', '{tusk: "poisson', r"workload.tusk: there is no pipeline 'tusk'; did you mean task\?"),
        ("without: [shedding]", "without: [sheding]", r"'sheding' is not one of .*did you mean shedding\?"),
        ("plots: [violins,", "plots: [violin,", r"plots\[0\]: 'violin' is not one of .*did you mean violins\?"),
        ("between: [left, right]", "between: [left, rihgt]", r"there is no node 'rihgt'; did you mean right\?"),
        ("  written:", "  paper: {}\n  written:", "must say exactly one of paper, written and testbed"),
        ("loads:", "vary: {nodes: [3]}\nloads:", "vary: only a world drawn by the seed"),
        ("{policy: static,", "{policy: static, placement: spread,", "needs the scenario's own placement"),
        ("claim: promise", "claim: promis", r"'promis' is not one of .*did you mean promise\?"),
        ("loads: [1.0, 2.0]", "loads: [0.0]", r"loads\[0\]: 0.0 is out of range"),
        ("plots:", "faults: [{node: nowhere, at: 9s}]\nplots:", r"faults\[0\].at: comes after the 4 s"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_what_was_meant(old: str, new: str, said: str) -> None:
    assert TINY.replace(old, new) != TINY
    assert any(re.search(said, problem) for problem in problems(TINY.replace(old, new)))


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    told = problems(TINY.replace("slot: 500ms", "slot: 9s").replace("policy: static", "policy: statc"))
    assert [line.split(":")[1] for line in told] == ["25", "29"]


def test_a_file_that_is_not_there_or_no_mapping_is_told() -> None:
    with pytest.raises(ScenarioInvalid, match="cannot be read: No such file"):
        scenario.load(Path("nowhere.yaml"))
    with pytest.raises(ScenarioInvalid, match="must be a mapping"):
        loaded("- just\n- a list\n")
    with pytest.raises(UsageError, match=r"no scenario 'papr'; did you mean paper\?"):
        scenario.find("papr", SCENARIOS)


def test_sweeps_are_written_out_and_every_entry_has_a_name_of_its_own() -> None:
    entries = scenario.entries(loaded().scenario)
    assert [entry.label for entry in entries] == ["ours", "square_root beta=0.5", "square_root beta=2", "static -shedding"]
    assert [entry.family for entry in entries] == ["ours", "square_root", "square_root", "static -shedding"]
    assert [entry.role for entry in entries] == ["ours", "baseline", "baseline", "baseline"]
    assert entries[1].options == {"beta": 0.5}
    assert entries[3].ingredients.name == "earliest_deadline_first+standby+let_out"
    with pytest.raises(ScenarioInvalid, match="two entries are called 'ours'"):
        loaded(TINY.replace("{policy: static,", "{policy: static, label: ours,"))


def test_roles_follow_from_names_where_none_is_given() -> None:
    text = TINY.replace("  - {policy: lyapunov, label: ours, role: ours}", "  - lyapunov\n  - no_lyapunov\n  - oracle")
    assert [entry.role for entry in scenario.entries(loaded(text).scenario)][:3] == ["ours", "ablation", "limit"]
