from __future__ import annotations

import asyncio
import sys

import pytest

from models.manifest import ServiceLaw, ServicePoint, StageProfile
from orchestrator import plan as plans
from orchestrator import wiring
from orchestrator.core import Observation, Placement, ServiceObservation, Target
from orchestrator.errors import Infeasible, UsageError
from orchestrator.survey import Survey, core_placement, settled, survey
from tests.orchestrator.examples import MANIFEST, TESTBED, load

LAW = ServiceLaw(base_s=0.004, per_unit_s=0.001, tail_ratio=1.5)
POINT = ServicePoint(batch=1, length=16, samples=9, mean_s=0.02, std_s=0.0, p50_s=0.02, p95_s=0.03, p99_s=0.03)
PROFILE = StageProfile(points=(POINT,), law=LAW, resident_bytes=1, load_s=0.1, threads=1, cpu="any")


def plan_of(text: str, *, profiled: bool = True) -> plans.Plan:
    manifest = MANIFEST
    if profiled:
        stages = [s.model_copy(update={"profile": {"float32": PROFILE}}) if s.name == "encode" else s for s in manifest.stages]
        manifest = manifest.model_copy(update={"stages": tuple(stages)})
    loaded, manifests = load(text), {"tiny": manifest}
    return plans.Plan(loaded, manifests, wiring.wire(loaded.testbed, manifests))


def survey_of(text: str = TESTBED, rates: dict[str, float] | None = None, *, profiled: bool = True) -> Survey:
    return survey(plan_of(text, profiled=profiled), rates)


def test_core_services_are_placed_and_light_ones_are_a_reserve() -> None:
    found = survey_of().problem
    assert [h.service.name for h in found.services] == ["encode"]
    assert found.services[0].least == 2
    assert found.reserve == (0.2, 192.0, 0.0)


def test_service_times_come_from_the_profile_at_typical_lengths() -> None:
    hosted = survey_of().problem.services[0]
    assert hosted.service_s == pytest.approx(0.004 + 16 * 0.001)
    assert hosted.throughput == pytest.approx(50.0)


def test_what_has_no_profile_is_assumed_and_named() -> None:
    found = survey_of(profiled=False)
    assert found.problem.services[0].service_s == 0.020
    assert found.manifests["tiny"].stage("encode").profile["float32"].law.mean_s(2 * 16) == pytest.approx(0.040)
    assert [a.split(":")[0] for a in found.assumptions] == [f"{s} has no profile" for s in ("tokenise", "encode", "pool")]


def test_links_go_both_ways() -> None:
    found = survey_of().problem
    assert found.latencies_s == {("edge-1", "edge-2"): 0.001, ("edge-2", "edge-1"): 0.001}
    assert set(found.bandwidths.values()) == {125e6}


def test_demand_is_the_workloads_mean_or_what_is_given() -> None:
    assert survey_of().problem.demands[0].rate == 20.0
    assert survey_of(rates={"embed": 7.0}).problem.demands[0].rate == 7.0
    quiet = survey_of(TESTBED.replace('workload: {embed: "poisson:20"}\n', ""))
    assert quiet.problem.demands == ()
    assert any("no workload" in assumption for assumption in quiet.assumptions)


@pytest.mark.parametrize(
    ("rates", "message"), [({"embd": 1.0}, "no pipeline 'embd'"), ({"embed": -1.0}, "must not be negative")]
)
def test_bad_demands_are_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        survey_of(rates=rates)


async def test_where_nothing_flows_far_greedy_is_taken_without_the_solver() -> None:
    found = await core_placement(survey_of(TESTBED.replace("latency: 1ms", "latency: 0ms")), gap=0.05)
    assert (found.by, found.placement.ready) == ("greedy", {"encode": {"edge-1": 1, "edge-2": 1}})
    assert "within 5% of the least" in found.reason


FAR = TESTBED.replace("latency: 1ms", "latency: 60ms").replace("replicas: 2}", "replicas: 3}")


async def test_where_links_are_long_the_program_places() -> None:
    found = await core_placement(survey_of(FAR, {"embed": 60.0}), gap=0.0)
    assert found.by == "program"
    assert sum(found.placement.ready["encode"].values()) == 3


async def test_the_solver_is_not_loaded_into_the_process_that_asks() -> None:
    code = (
        "import asyncio, sys; from tests.orchestrator.test_survey import FAR, core_placement, survey_of;"
        "found = asyncio.run(core_placement(survey_of(FAR, {'embed': 60.0}), gap=0.0));"
        "print(found.by, [name for name in ('cvxpy', 'scipy', 'highspy') if name in sys.modules])"
    )
    asked = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    said, _ = await asked.communicate()
    assert said.decode().split(maxsplit=1) == ["program", "[]\n"]


# Nothing survives the loss of the only node where it may run.
PINNED = TESTBED.replace("replicas: 2}", "replicas: 2, nodes: [edge-2]}")


async def test_what_the_program_cannot_place_is_placed_greedily_and_says_why() -> None:
    found = await core_placement(survey_of(PINNED))
    assert found.by == "greedy"
    assert "no placement keeps every rule" in found.reason


async def test_a_solver_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.survey.LOAD_LIMIT_S", 0.0)
    found = await core_placement(survey_of(PINNED), limit_s=0.001)
    assert (found.by, found.reason.rpartition(": ")[2]) == ("greedy", "TimeoutError")


async def test_what_has_no_room_at_all_is_infeasible() -> None:
    with pytest.raises(Infeasible):
        await core_placement(survey_of(rates={"embed": 1000.0}))


async def test_what_runs_stays_at_the_start_of_a_successor() -> None:
    running = Placement({"encode": {"edge-1": 1, "edge-2": 1}})
    assert (await core_placement(survey_of(), running)).placement == running


# --- the plan of a running testbed ------------------------------------------------------------------------------------------


def auto(text: str) -> str:
    return text.replace("policy: manual", "policy: lyapunov")


async def test_a_plan_is_settled_for_its_workload_and_the_first_decision_follows_it() -> None:
    made = await settled(plan_of(auto(FAR).replace("poisson:20", "poisson:60")))
    placed = made.placed["encode"]
    assert made.targets()["encode"] == Target(sum(placed.values()))
    assert made.site().targets == made.targets()
    policy = made.policy()
    seen = Observation(0.0, {name: ServiceObservation({}) for name in made.testbed.services}, {})
    _, decision = policy.step(policy.initial(), seen)
    assert decision.desired is not None
    assert decision.desired.ready["encode"] == placed


async def test_replicas_grow_with_the_workload_but_never_below_the_files() -> None:
    assert (await settled(plan_of(auto(TESTBED)))).targets()["encode"].replicas == 2
    busy = await settled(plan_of(auto(TESTBED).replace("poisson:20", "poisson:120")))
    assert busy.targets()["encode"].replicas > 2


@pytest.mark.parametrize(
    "text",
    [
        auto(TESTBED).replace("poisson:20", "poisson:9000"),
        TESTBED,
    ],
    ids=["a workload that does not fit", "scaled by hand"],
)
async def test_where_the_program_has_no_say_the_files_replicas_are_placed_greedily(text: str) -> None:
    made = await settled(plan_of(text))
    assert not made.placed
    assert made.targets() == made.testbed.targets()
