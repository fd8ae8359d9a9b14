from __future__ import annotations

import pytest

from loadgen import arrivals
from models.manifest import ServiceLaw, ServicePoint, StageProfile
from orchestrator import wiring
from orchestrator.errors import UsageError
from orchestrator.placement.survey import Survey, mean_rate, survey
from tests.orchestrator.examples import MANIFEST, TESTBED, load

LAW = ServiceLaw(base_s=0.004, per_unit_s=0.001, tail_ratio=1.5)
POINT = ServicePoint(batch=1, length=16, samples=9, mean_s=0.02, std_s=0.0, p50_s=0.02, p95_s=0.03, p99_s=0.03)
PROFILE = StageProfile(points=(POINT,), law=LAW, resident_bytes=1, load_s=0.1, threads=1, cpu="any")


def survey_of(text: str = TESTBED, rates: dict[str, float] | None = None, *, profiled: bool = True) -> Survey:
    manifest = MANIFEST
    if profiled:
        stages = [s.model_copy(update={"profile": {"float32": PROFILE}}) if s.name == "encode" else s for s in manifest.stages]
        manifest = manifest.model_copy(update={"stages": tuple(stages)})
    testbed = load(text).testbed
    return survey(testbed, {"tiny": manifest}, wiring.wire(testbed, {"tiny": manifest}).pipelines, rates)


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
    assert [a.split(":")[0] for a in found.assumptions] == [f"{s} has no profile" for s in ("tokenise", "encode", "pool")]


def test_light_stages_become_delay_on_the_edges_around_the_core() -> None:
    demand = survey_of().problem.demands[0]
    assert [(v.id, v.service) for v in demand.visits] == [("encode", "encode")]
    assert [(e.source, e.target, e.delay_s) for e in demand.edges] == [(None, "encode", 0.002), ("encode", None, 0.002)]
    assert demand.entry == {"edge-1": 1.0}


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
    ("spec", "rate"),
    [("poisson:20", 20.0), ("constant:10", 10.0), ("gamma:20,cv2=4", 20.0), ("mmpp:5@8s,40@2s", 12.0),
     ("step:10@20s,30@20s", 20.0), ("diurnal:20,amplitude=0.8,period=60s", 20.0)],
)  # fmt: skip
def test_mean_rates(spec: str, rate: float) -> None:
    assert mean_rate(arrivals.parse(spec)) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("rates", "message"), [({"embd": 1.0}, "no pipeline 'embd'"), ({"embed": -1.0}, "must not be negative")]
)
def test_bad_demands_are_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        survey_of(rates=rates)
