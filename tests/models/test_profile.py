"""Profiling: the law as mathematics, the measuring as plumbing. How long anything takes is not asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from models.errors import ProfileFailed
from models.export import export
from models.manifest import Manifest, ServiceLaw, StageSpec, TensorSpec, describe, load, save
from models.profile import Grid, Run, _generation, _summary, profile, undisturbed
from tests.models.conftest import EVERY, keep

_sizes = st.lists(st.integers(1, 4096), min_size=2, max_size=15, unique=True)
_times = st.floats(1e-5, 10)
_points = st.lists(st.tuples(st.integers(1, 4096), _times, st.floats(1, 5)), min_size=1, max_size=15)
SMALL = Grid(batches=(1, 2, 64), lengths=(8, 500), rounds=2, threads=(1, 2), tasks=20)


@given(base_s=st.floats(0, 1), per_unit_s=st.floats(1e-6, 1), sizes=_sizes)
def test_the_law_recovers_the_line_it_was_given(base_s: float, per_unit_s: float, sizes: list[int]) -> None:
    times = [base_s + per_unit_s * size for size in sizes]
    law = ServiceLaw.fit([(size, time, time) for size, time in zip(sizes, times, strict=True)])
    # The coefficients themselves where the sizes tell them apart; the times they predict always.
    if max(sizes) >= 2 * min(sizes):
        assert law.base_s == pytest.approx(base_s, rel=1e-6, abs=1e-6 * max(times))
        assert law.per_unit_s == pytest.approx(per_unit_s, rel=1e-6, abs=1e-6 * max(times))
    assert [law.mean_s(size) for size in sizes] == pytest.approx(times, rel=1e-6)
    assert law.tail_ratio == pytest.approx(1, rel=1e-6)


@given(points=_points)
def test_no_coefficient_is_negative_and_the_tail_bounds_every_point(points: list[tuple[int, float, float]]) -> None:
    measured = [(size, time, time * ratio) for size, time, ratio in points]
    law = ServiceLaw.fit(measured)
    assert min(law.base_s, law.per_unit_s) >= 0
    assert all(law.tail_s(size) >= p95_s * (1 - 1e-9) for size, _, p95_s in measured)


@given(points=_points, nudge=st.tuples(st.floats(-0.1, 0.1), st.floats(-0.1, 0.1)))
def test_no_other_non_negative_line_fits_better(points: list[tuple[int, float, float]], nudge: tuple[float, float]) -> None:
    assume(len({size for size, _, _ in points}) > 1)
    sizes, times = np.array([point[:2] for point in points]).T

    def loss(base_s: float, per_unit_s: float) -> float:
        return float((((base_s + per_unit_s * sizes) / times - 1) ** 2).sum())

    law = ServiceLaw.fit(points)
    other = max(0.0, law.base_s + nudge[0] * times.mean()), max(0.0, law.per_unit_s + nudge[1] * (times / sizes).mean())
    assert loss(law.base_s, law.per_unit_s) <= loss(*other) + 1e-9


def test_a_single_size_gives_a_line_through_the_origin() -> None:
    law = ServiceLaw.fit([(4, 0.1, 0.2), (4, 0.1, 0.1)])
    assert (law.base_s, law.per_unit_s, law.tail_ratio) == pytest.approx((0.0, 0.025, 2.0))


@pytest.mark.parametrize(
    ("shares", "kept"),
    [
        ([1.0, 1.0, 0.5, 1.1], [1.0, 2.0, 4.0]),  # a stall is left out; more CPU than wall time means several threads
        ([0.2, 0.8, 0.3], [2.0]),  # a machine that is never idle: take the best there is
    ],
)
def test_runs_that_others_disturbed_are_left_out(shares: list[float], kept: list[float]) -> None:
    runs = [Run(wall_s=i + 1.0, cpu_s=(i + 1.0) * share) for i, share in enumerate(shares)]
    assert [run.wall_s for run in undisturbed(runs)] == kept


def test_the_spread_of_a_few_runs_is_not_made_smaller_by_their_being_few() -> None:
    assert _summary((1, 8), [1.0, 3.0]).std_s == pytest.approx(2**0.5)
    assert _summary((1, 8), [1.0]).std_s == 0


def test_an_answer_is_a_prompt_read_and_tokens_one_by_one() -> None:
    sequences = TensorSpec(name="input_ids", datatype="INT64", shape=("batch", "seq"))
    stage = StageSpec(name="generate", tier="core", processor="generate", inputs=(sequences,), outputs=(sequences,))
    points = [(1, 10), (2, 10), (2, 100)]
    runs = [[Run(1.0, 1.0, first_s=0.1 + 0.01 * b * n, step_s=0.02 + 0.001 * b * (n + 4))] * 2 for b, n in points]
    law = _generation(stage, points, runs, tokens=8)
    assert (law.tokens, law.prefill.base_s, law.prefill.per_unit_s) == pytest.approx((8, 0.1, 0.01))
    assert (law.step.base_s, law.step.per_unit_s) == pytest.approx((0.02, 0.001))


def test_a_profile_lands_in_the_manifest_and_an_export_that_is_up_to_date_keeps_it(
    tiny_bert: Path, exported_copy: Path
) -> None:
    manifest = profile(exported_copy, SMALL)
    assert load(exported_copy) == manifest
    encode = manifest.stage("encode")
    assert set(encode.profile) == set(EVERY.precisions)
    for found in encode.profile.values():
        # 64 is beyond the stage's largest batch, 500 beyond the model's longest text.
        assert [(point.batch, point.length) for point in found.points] == [(1, 8), (2, 8), (1, 72), (2, 72)]
        assert all(point.samples >= 1 for point in found.points)
        assert all(point.p50_s <= point.p95_s <= point.p99_s for point in found.points)
        assert found.threads == 1
        assert found.cpu
        assert found.gamma is None
        assert [other.threads for other in found.other_threads] == [2]
    for stage in manifest.stages:
        if stage.tier == "light":
            (light,) = stage.profile.values()
            assert light.gamma is not None
            assert 2 <= light.gamma.samples <= SMALL.tasks
            assert not light.other_threads
    again = export(str(tiny_bert), exported_copy, EVERY)
    assert (again.written, again.manifest) == (False, manifest)


def test_a_file_that_does_not_open_fails_with_the_runtimes_message(exported_copy: Path) -> None:
    path = exported_copy / "encode.float32.onnx"
    path.write_bytes(b"not a model")
    manifest = load(exported_copy)
    stages = [
        stage.model_copy(update={"files": {"float32": (describe(path, exported_copy),)}}) if stage.name == "encode" else stage
        for stage in manifest.stages
    ]
    save(manifest.model_copy(update={"stages": tuple(stages)}), exported_copy)
    with pytest.raises(
        ProfileFailed, match=r"encode: the measuring process ended with status 1: .*encode\.float32\.onnx: .*cannot open it"
    ):
        profile(exported_copy, SMALL)
    assert not load(exported_copy).stage("encode").profile


def test_a_manifest_that_changed_meanwhile_is_left_alone(exported_copy: Path) -> None:
    keep(exported_copy, "pool")
    changed = load(exported_copy).model_copy(update={"weights": "trained"})
    with pytest.raises(ProfileFailed, match="profile it again"):
        profile(exported_copy, SMALL, lambda _: save(changed, exported_copy))
    assert load(exported_copy) == changed


def test_a_stage_that_lacks_a_package_is_left_out_and_the_rest_measured(
    exported_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(exported_copy, "tokenise", "pool")
    # A package of this name, found first, stands for one that is not installed.
    (tmp_path / "tokenizers.py").write_text("raise ModuleNotFoundError('No module named tokenizers')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said: list[str] = []
    manifest = profile(exported_copy, SMALL, left_out=said.append)
    assert said == ["tokenise: No module named tokenizers"]
    assert not manifest.stage("tokenise").profile
    assert manifest.stage("pool").profile


def test_a_part_of_a_cut_decoder_is_left_out(tmp_path: Path) -> None:
    x = TensorSpec(name="hidden", datatype="FP32", shape=("batch", "seq", 4))
    parameters = {"part": 2, "parts": 2}
    part = StageSpec(name="generate-2", tier="core", processor="generate", inputs=(x,), outputs=(x,), parameters=parameters)
    save(Manifest(model="tiny", source="tiny@1", architecture="None", weights="seeded", stages=(part,)), tmp_path)
    said: list[str] = []
    assert not profile(tmp_path, SMALL, left_out=said.append).stage("generate-2").profile
    assert said == ["generate-2: a part of a cut decoder works only beside the others"]
