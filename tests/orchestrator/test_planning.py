from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.__main__ import main
from tests.orchestrator.examples import TESTBED, export


class Terminal:
    """A user with a testbed file and its exported models."""

    def __init__(self, home: Path) -> None:
        self.home, self.models = home, export(home)
        self.testbed = home / "small.yaml"
        self.testbed.write_text(TESTBED)

    def plan(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["plan", str(self.testbed), "--models-dir", str(self.models), *arguments])

    def document(self, *arguments: str) -> dict[str, Any]:
        result = self.plan(*arguments, "-o", "json")
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path)


def test_a_plan_is_a_table_of_services_and_nodes(terminal: Terminal) -> None:
    assert terminal.plan().stdout.splitlines() == [
        "service   edge-1  edge-2",
        "encode    1       1",
        "tokenise  1       0+1",
        "pool      -       1",
    ]


def test_explained_it_says_why(terminal: Terminal) -> None:
    said = terminal.plan("--explain").stdout
    assert "how: integer program, within the gap asked for; at most 0.00% above the best possible" in said
    assert "encode: 2 replicas (20 tasks/s, 20% utilised); load or file asks for 2, diversity for 2 nodes" in said
    assert "load still carried without: edge-1 100%, edge-2 100% (at least 50% promised: kept)" in said
    assert "binding: replicas (encode); diversity (encode)" in said
    assert "assumed: encode has no profile: 20 ms a task taken" in said


def test_explained_it_says_what_every_cut_costs(terminal: Terminal) -> None:
    said = terminal.plan("--explain").stdout
    assert "cuts of embed: 2, with 2.5 ms of hops to 24 ms of work (deadline 300 ms)" in said
    assert "  tokenise | encode: 0 B cross in 1 ms, beside 2 ms (assumed) and 20 ms (assumed) of work; keep it: fused" in said
    assert "cuts of embed: 2, with 5.5 ms of hops to 24 ms of work" in terminal.plan("--explain", "--hop", "2.5ms").stdout
    assert "2 has no unit" in terminal.plan("--hop", "2").output


def test_as_json_it_has_everything(terminal: Terminal) -> None:
    found = terminal.document()
    assert found["ready"]["encode"] == {"edge-1": 1, "edge-2": 1}
    assert found["standby"] == {"tokenise": {"edge-2": 1}}
    assert found["how"] == "optimal"
    assert found["survives"]
    assert found["hop_s"] == 0.001
    assert [cut["between"] for cut in found["cuts"]] == [["tokenise", "encode"], ["encode", "pool"]]
    assert found["carried_without"] == {"edge-1": 1.0, "edge-2": 1.0}


def test_a_saved_plan_can_be_kept(terminal: Terminal) -> None:
    saved = terminal.home / "plans" / "plan.json"
    first = terminal.document("--save", str(saved))
    assert json.loads(saved.read_text()) == first
    assert terminal.document("--keep", str(saved))["ready"] == first["ready"]


def test_a_picture_lies_beside_a_saved_plan_or_where_it_is_wanted(terminal: Terminal) -> None:
    saved, drawn = terminal.home / "plan.json", terminal.home / "drawn" / "here.svg"
    assert terminal.plan("--save", str(saved)).exit_code == 0
    assert terminal.plan("--picture", str(drawn)).exit_code == 0
    assert saved.with_suffix(".svg").read_text() == drawn.read_text()
    assert drawn.read_text().startswith("<?xml")


def test_losses_can_be_simulated(terminal: Terminal) -> None:
    found = terminal.document("--check-losses")
    trials = found["trials"]
    assert trials["chosen"] in [tried["name"] for tried in trials["tried"]]
    assert all(tried["on_time_without"].keys() == {"edge-1", "edge-2"} for tried in trials["tried"])
    assert trials["level"] >= 0.5
    said = terminal.plan("--check-losses", "--explain").stdout
    assert "simulated, program: cost" in said
    assert "on time after any loss asked for: kept)" in said


def test_more_demand_needs_more_replicas(terminal: Terminal) -> None:
    # 100 tasks/s at 50 and 80 % need 3 replicas; half of it at 95 % needs 2 on whichever node is left.
    assert terminal.document("--demand", "embed=100")["ready"]["encode"] == {"edge-1": 2, "edge-2": 2}


def test_a_demand_too_large_ends_with_2_and_the_relaxation(terminal: Terminal) -> None:
    result = terminal.plan("--demand", "embed=1000")
    assert result.exit_code == 2
    assert "what is in the way: capacity. The smallest relaxation: capacity (cpus of edge-" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--demand", "embd=1"), "there is no pipeline 'embd'; did you mean embed?"),
        (("--demand", "embed=fast"), "write PIPELINE=RATE"),
        (("--kappa", "3"), "in the way: diversity"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_change(terminal: Terminal, arguments: tuple[str, ...], message: str) -> None:
    result = terminal.plan(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_that_is_no_plan_is_refused(terminal: Terminal) -> None:
    result = terminal.plan("--keep", str(terminal.testbed))
    assert result.exit_code == 2
    assert "not a saved plan" in result.stderr
