"""The picture of a profile: every stage that was measured is in it, and it is the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import fit, plot
from models.manifest import Manifest, ServiceLaw, ServicePoint, StageProfile, StageSpec, TensorSpec

_X = TensorSpec(name="x", datatype="FP32", shape=("batch", "seq", 4))


def _profile(threads: int = 1, light: bool = False) -> StageProfile:
    point = ServicePoint(batch=1, length=8, samples=5, mean_s=0.1, std_s=0.01, p50_s=0.1, p95_s=0.12, p99_s=0.12)
    gamma = fit.gamma([0.1, 0.2, 0.3, 0.15]) if light else None
    law = ServiceLaw(base_s=0.0, per_unit_s=0.0125, tail_ratio=1.2)
    return StageProfile(points=(point,), law=law, resident_bytes=1, load_s=0.1, threads=threads, cpu="a CPU", gamma=gamma)


def _manifest(**profiles: StageProfile) -> Manifest:
    stages = [
        StageSpec(name=name, tier="light" if each.gamma else "core", processor="x", inputs=(_X,), outputs=(_X,))
        for name, each in profiles.items()
    ]
    measured = [stage.model_copy(update={"profile": {"float32": profiles[stage.name]}}) for stage in stages]
    return Manifest(model="tiny", source="tiny@1", architecture="None", weights="seeded", stages=tuple(measured))


def test_every_stage_has_its_panel(tmp_path: Path) -> None:
    core = _profile().model_copy(update={"other_threads": (_profile(threads=2),)})
    manifest = _manifest(encode=core, pool=_profile(light=True), rank=_profile(light=True), label=_profile(light=True))
    plot.draw(manifest, tmp_path / "first.svg")
    plot.draw(manifest, tmp_path / "second.svg")
    drawn = (tmp_path / "first.svg").read_text()
    for text in ("encode (core)", "pool (light)", "label (light)", "float32, 2 threads, cv² 0.01", "rejected at 1 %"):
        assert f"<!-- {text}" in drawn or text in drawn
    plot.draw(manifest, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    manifest = _manifest(encode=_profile())
    bare = manifest.model_copy(update={"stages": (manifest.stages[0].model_copy(update={"profile": {}}),)})
    with pytest.raises(ValueError, match="no profile to draw"):
        plot.draw(bare, tmp_path / "x.svg")
