from __future__ import annotations

import pytest

from loadgen.arrivals import Poisson
from orchestrator import plan as plans
from orchestrator import wiring
from orchestrator.core import Placement, Service, Target
from orchestrator.losses import LossTrial, of_testbed
from orchestrator.placement.baselines import BASELINES
from orchestrator.placement.explain import Beside
from orchestrator.placement.program import Limits
from orchestrator.placement.trials import NOTHING_LOST, withstand
from orchestrator.survey import survey
from tests.bench.placement import PARAMETERS, drawn, measure, within_budget, world_of
from tests.orchestrator.examples import MANIFEST, TESTBED, load


@pytest.mark.parametrize("seed", [1, 2])
def test_the_placement_chosen_keeps_the_level_or_as_much_as_any_and_no_less_than_spread(seed: int) -> None:
    problem = within_budget(drawn(seed, 4, 2, 2, load=0.2, parameters=PARAMETERS))
    trial = LossTrial(world_of(problem), {d.name: Poisson(rate=d.rate) for d in problem.demands}, measured_s=5.0)
    found = withstand(problem, Limits(time_s=4.0, gap=0.05), trial)
    best = max(min(trial(BASELINES[name](problem, 1)).values()) for name in ("spread", "random", "greedy-latency"))
    assert found.best.worst >= min(best, found.level)
    assert found.best.worst >= min(trial(BASELINES["spread"](problem, 1)).values())


def test_the_bench_measures_every_method() -> None:
    problem = within_budget(drawn(1, 4, 2, 2, load=0.2, parameters=PARAMETERS))
    row = measure(problem, chosen_s=2.0, measured_s=2.0, limits=Limits(time_s=4.0, gap=0.05), methods=("spread", "bin-pack"))
    assert set(row["shares"]) == {"chosen", "program", "spread", "bin-pack"}
    assert row["shares"]["bin-pack"]["worst"] < row["shares"]["spread"]["worst"]


def test_what_stands_on_one_node_is_lost_with_it() -> None:
    problem = drawn(3, 4, 2, 2)
    everywhere = {"n0": 3, "n3": 3}
    on_one = Placement({"s0": everywhere, "s1": {"n1": 2}})
    workload = {demand.name: Poisson(rate=4.0) for demand in problem.demands}
    found = LossTrial(world_of(problem), workload, measured_s=5.0)(on_one)
    assert found["n1"] < 0.2
    assert found["n2"] == found[NOTHING_LOST] > 0.95  # nothing stands there
    assert found["n0"] > 0.8


def test_a_testbeds_light_services_start_elsewhere() -> None:
    loaded, manifests = load(TESTBED), {"tiny": MANIFEST}
    made = plans.Plan(loaded, manifests, wiring.wire(loaded.testbed, manifests))
    found = survey(made)
    light = tuple(service for service in made.services().values() if service.tier == "light")
    beside = Beside(light, {s.name: Target(1) for s in light})
    trial = of_testbed(made, found.problem, found.manifests, beside)
    both = Placement({"encode": {"edge-1": 1, "edge-2": 1}})
    assert min(trial(both).values()) > 0.95
    assert trial(Placement({"encode": {"edge-1": 2}}))["edge-1"] == 0.0


def test_light_services_without_room_stay_lost() -> None:
    loaded, manifests = load(TESTBED), {"tiny": MANIFEST}
    made = plans.Plan(loaded, manifests, wiring.wire(loaded.testbed, manifests))
    found = survey(made)
    huge = tuple(Service(s.name, "light", 1.2, s.memory_bytes) for s in made.services().values() if s.tier == "light")
    trial = of_testbed(made, found.problem, found.manifests, Beside(huge, {s.name: Target(1) for s in huge}))
    assert trial(Placement({"encode": {"edge-1": 1, "edge-2": 1}}))["edge-1"] == 0.0
