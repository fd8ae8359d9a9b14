from __future__ import annotations

from pathlib import Path

import pytest

from loadgen import arrivals
from models import manifest as manifests
from models.manifest import ServiceLaw, ServicePoint, StageProfile
from orchestrator import plan as plans
from orchestrator.errors import SetupFailed
from orchestrator.simulator.laws import Gamma
from orchestrator.simulator.run import run
from orchestrator.simulator.world import LAUNCH_S, of_testbed
from tests.orchestrator import examples
from tests.orchestrator.simulator.worlds import chain, stage, world

POINT = ServicePoint(batch=1, length=16, samples=50, mean_s=0.01, std_s=0.002, p50_s=0.01, p95_s=0.013, p99_s=0.015)
PROFILE = StageProfile(
    points=(POINT,), law=ServiceLaw(base_s=0.002, per_unit_s=0.0005, tail_ratio=1.3), resident_bytes=1, load_s=0.25, threads=1,
    cpu="any",
)  # fmt: skip


def profiled(directory: Path) -> plans.Plan:
    """The small testbed with a profile for every stage."""
    home = examples.export(directory) / "tiny"
    stages = tuple(spec.model_copy(update={"profile": dict.fromkeys(spec.files, PROFILE)}) for spec in examples.MANIFEST.stages)
    manifests.save(examples.MANIFEST.model_copy(update={"stages": stages}), home)
    return plans.make(examples.load(), home.parent)


def test_a_world_is_what_testbed_and_profiles_say(tmp_path: Path) -> None:
    plan = profiled(tmp_path)
    made = of_testbed(plan.testbed, plan.manifests, plan.wiring)
    encode = made.stages["encode"]
    assert encode.law == PROFILE.law
    assert isinstance(encode.noise, Gamma)
    assert encode.noise.cv2 == pytest.approx(0.04)
    assert (encode.lengths, encode.max_batch, encode.slots, encode.start_s) == ((16,), 16, 1, LAUNCH_S + 0.25)
    assert made.links["edge-2", "edge-1"].latency_s == pytest.approx(0.001)
    assert made.gateway_node == "edge-1"
    assert made.services == plan.services()


def test_without_a_profile_the_error_says_what_to_do(tmp_path: Path) -> None:
    plan = plans.make(examples.load(), examples.export(tmp_path))
    with pytest.raises(SetupFailed, match=r"service 'tokenise'.*espalier profile"):
        of_testbed(plan.testbed, plan.manifests, plan.wiring)


def test_a_testbeds_own_workload_can_be_simulated(tmp_path: Path) -> None:
    plan = profiled(tmp_path)
    policy = plan.policy()
    row = run(
        of_testbed(plan.testbed, plan.manifests, plan.wiring), "manual", policy,
        {name: arrivals.parse(spec) for name, spec in plan.testbed.workload.items()},
        initial=plan.place(plan.testbed.targets(), None), duration_s=5.0, slot_s=plan.testbed.control.slot, seed=1,
    ).row  # fmt: skip
    assert row.on_time_ratio == 1.0
    # Of tokenise, encode and pool the file wants 1, 2 and 1 ready.
    assert row.replicas == pytest.approx(4.0)


def test_a_world_with_dangling_names_is_refused() -> None:
    with pytest.raises(ValueError, match="uses service 'b'"):
        world([stage("a", 0.1)], [chain("p", "a", "b")])
    with pytest.raises(ValueError, match="no node 'elsewhere'"):
        world([stage("a", 0.1)], [chain("p", "a")], gateway_node="elsewhere")
