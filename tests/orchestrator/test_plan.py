from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from models import manifest as manifests
from orchestrator import plan as plans
from orchestrator import survey
from orchestrator.errors import SetupFailed, TestbedInvalid, UsageError
from orchestrator.plan import Plan
from tests.orchestrator.examples import MANIFEST, TESTBED, export, load


def plan(home: Path, text: str = TESTBED) -> Plan:
    return plans.make(load(text), home / "models")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    export(tmp_path)
    return tmp_path


def test_a_model_that_is_not_exported_is_a_failed_set_up(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="export the model first"):
        plan(tmp_path)


def test_a_file_that_does_not_fit_its_models_is_invalid(home: Path) -> None:
    with pytest.raises(TestbedInvalid, match="has no stage 'pol'"):
        plan(home, TESTBED.replace("stage: pool,", "stage: pol,"))


def test_between_two_plans_stand_the_services_of_both_and_the_pipelines_of_the_old(home: Path) -> None:
    new = TESTBED.replace(
        "  pool: {model: tiny, stage: pool, cpus: 0.1, memory: 64MiB}",
        "  mean: {model: tiny, stage: pool, cpus: 0.2, memory: 64MiB}",
    ).replace("{id: pool, service: pool}", "{id: pool, service: mean}")
    new = new.replace("stage: encode, cpus: 0.5", "stage: encode, cpus: 0.25")
    both = plans.between(plan(home), plan(home, new))
    assert set(both.services()) == {"tokenise", "encode", "pool", "mean"}
    assert both.services()["encode"].cpus == 0.25, "the new shape of what both have"
    assert [step.service for step in both.map().pipelines["embed"].steps] == ["tokenise", "encode", "pool"]
    assert both.testbed.targets()["mean"].replicas == 1


def fused(name: str, stages: str) -> str:
    """The testbed with the service `pool` replaced by a fused one, and only that in the pipeline behind `tokenise`."""
    text = TESTBED.replace("  pool: {model: tiny, stage: pool,", f"  {name}: {{model: tiny, stages: {stages},")
    text = text.replace("      - {id: encode, service: encode}\n", "")
    return text.replace("service: pool}", f"service: {name}, inputs: {{attention_mask: tokenise.attention_mask}}}}")


def test_what_was_fused_is_still_known_while_it_is_replaced(home: Path) -> None:
    text = fused("joint", "[encode, pool]")
    both = plans.between(plan(home, text), plan(home, TESTBED))
    assert both.stage("joint").name == "encode-pool"
    assert both.stage("pool").name == "pool"
    assert [step.service for step in both.map().pipelines["embed"].steps] == ["tokenise", "joint"]


@pytest.mark.parametrize(("old", "new"), [("name: small", "name: other"), ("gateway: {port: 0}", "gateway: {port: 9}")])
def test_what_cannot_change_while_it_is_up_is_refused(home: Path, old: str, new: str) -> None:
    with pytest.raises(UsageError, match=r"cannot change while the testbed is up; take it down first"):
        plans.between(plan(home), plan(home, TESTBED.replace(old, new)))


def test_a_service_that_would_speak_other_tensors_needs_another_name(home: Path) -> None:
    before = plan(home)
    stages = tuple(
        stage.model_copy(update={"outputs": stage.inputs}) if stage.name == "pool" else stage for stage in MANIFEST.stages
    )
    after = Plan(before.loaded, {"tiny": MANIFEST.model_copy(update={"stages": stages})}, before.wiring)
    with pytest.raises(UsageError, match="service 'pool' would take or give other tensors"):
        plans.between(before, after)


def test_the_same_model_exported_again_may_replace_it(home: Path) -> None:
    before = plan(home)
    manifests.save(MANIFEST.model_copy(update={"weights": "trained"}), home / "models" / "tiny")
    assert plans.between(before, plan(home)).services() == before.services()


def test_nothing_is_placed_on_a_node_that_is_absent(home: Path) -> None:
    made = replace(plan(home), placed={"encode": {"edge-1": 2, "edge-2": 1}}, absent=frozenset({"edge-1"}))
    assert [node.name for node in made.present()] == ["edge-2"]
    assert set(made.nodes()) == {"edge-1", "edge-2"}, "what still runs there has its capacity"
    assert made.targets()["encode"].replicas == 1, "what was placed elsewhere stays; the rest waits for a new placement"
    assert {node for row in made.place(made.targets(), None).ready.values() for node in row} == {"edge-2"}
    assert [node.name for node in made.site().nodes] == ["edge-2"]
    assert made.site().placed == {"encode": {"edge-2": 1}}


def test_a_core_service_of_which_nothing_is_left_goes_where_there_is_room(home: Path) -> None:
    made = replace(plan(home), placed={"encode": {"edge-1": 3}}, absent=frozenset({"edge-1"}))
    assert made.targets()["encode"].replicas == 2, "as many as the file says"
    assert made.site().placed == {}


def test_where_every_node_is_absent_all_are_planned_with(home: Path) -> None:
    made = replace(plan(home), absent=frozenset({"edge-1", "edge-2"}))
    assert len(made.present()) == 2


def test_the_problem_of_a_testbed_has_only_the_nodes_that_are_there(home: Path) -> None:
    made = replace(plan(home), absent=frozenset({"edge-1"}))
    problem = survey.survey(made).problem
    assert [node.name for node in problem.nodes] == ["edge-2"]
    assert all(demand.entry == {"edge-2": 1.0} for demand in problem.demands)
    assert problem.parameters.kappa == 1, "nothing can survive the loss of the only node"
    assert survey.survey(plan(home)).problem.parameters.kappa == 2
