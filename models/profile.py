"""Measures what a replica of each exported stage needs on this machine, and writes it into the manifest.

Each stage and precision is measured in a process of its own (`models.measure`), which carries no web server: the resident set
of a replica is larger by that. Stages without an ONNX file are left out: their code is `services`', a floor up, and they are so
short that a replica learns their service time from its first tasks.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from models import directory
from models.directory import Report
from models.errors import ProfileFailed
from models.manifest import (
    BATCH_AXIS,
    Datatype,
    Manifest,
    Precision,
    ServiceLaw,
    ServicePoint,
    StageProfile,
    StageSpec,
    check_files,
    load,
    save,
)
from models.measure import Input, Job, Measurement, Run

_DTYPES: Mapping[Datatype, str] = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
CPU_SHARE = 0.9
"""A run in which the process had the CPU for less than this share of the time counts as disturbed by others."""
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Grid:
    """Where to measure: every batch at every length, each in so many rounds."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] = (16, 48, 128)
    rounds: int = 5
    threads: int = 1


QUICK = Grid(batches=(1, 4), lengths=(16, 48), rounds=3)
"""A few seconds, for trying things out. Fewer samples, stated in every point."""


def profile(out: Path, grid: Grid, report: Report = lambda _: None) -> Manifest:
    """Measure every ONNX stage of an export in every precision, and save the result in its manifest.

    Args:
        out: Directory of the export.
        grid: Where to measure. Lengths beyond the model's longest input and batches beyond a stage's largest are left out.
        report: Told what is being done.

    Returns:
        The manifest as saved.

    Raises:
        ManifestError: no export there, or a file differs from its sha256.
        ProfileFailed: a measuring process broke down, or the directory was exported anew meanwhile.
    """
    manifest = load(out)
    longest = _longest(manifest)
    measured = {stage.name: _profile_stage(stage, out, grid, longest, report) for stage in manifest.stages}
    # Another export may have come in while we measured; its files are not the ones measured.
    with directory.locked(out, report):
        if load(out) != manifest:
            raise ProfileFailed(f"{out}: the manifest changed while its stages were measured; profile it again")
        stages = [stage.model_copy(update={"profile": measured[stage.name]}) for stage in manifest.stages]
        profiled = manifest.model_copy(update={"stages": tuple(stages)})
        save(profiled, out)
    return profiled


def undisturbed(runs: Sequence[Run]) -> list[float]:
    """Durations [s] of the runs that had the CPU to themselves; where none had, of the least disturbed.

    The law is the stage's own: what its neighbours take from it is for those to see who know the neighbours. One stall among
    five runs would otherwise pass for the stage's 95 % quantile.
    """
    alone = [run.wall_s for run in runs if run.cpu_s >= CPU_SHARE * run.wall_s]
    return alone or [max(runs, key=lambda run: run.cpu_s / run.wall_s).wall_s]


def _longest(manifest: Manifest) -> int | None:
    """The model's longest input, by whichever of its stages states one."""
    stated = [int(stage.parameters["max_tokens"]) for stage in manifest.stages if "max_tokens" in stage.parameters]
    return min(stated, default=None)


def _profile_stage(
    stage: StageSpec, out: Path, grid: Grid, longest: int | None, report: Report
) -> dict[Precision, StageProfile]:
    if stage.processor != "onnx":
        return {}
    profiles = {}
    for precision in stage.files:
        report(f"measuring {stage.name} as {precision}")
        path = check_files(stage, precision, out)[0].resolve()
        profiles[precision] = _measure(stage, path, _points(stage, grid, longest), grid)
    return profiles


def _points(stage: StageSpec, grid: Grid, longest: int | None) -> list[tuple[int, int]]:
    """Pairs (batch, length), smallest first, within what the stage can take."""
    has_length = any(isinstance(axis, str) and axis != BATCH_AXIS for axis in stage.inputs[0].shape)
    lengths = sorted({min(length, longest or length) for length in grid.lengths}) if has_length else [1]
    batches = [batch for batch in sorted(set(grid.batches)) if batch <= stage.max_batch] or [1]
    return sorted(product(batches, lengths), key=lambda point: (point[0] * point[1], point))


def _measure(stage: StageSpec, path: Path, points: Sequence[tuple[int, int]], grid: Grid) -> StageProfile:
    inputs = [Input(each.name, _DTYPES[each.datatype], each.shape) for each in stage.inputs]
    measurement = _in_fresh_process(Job(str(path), grid.threads, grid.rounds, inputs, points))
    kept = [undisturbed(runs) for runs in measurement.runs]
    found = [_summary(point, times) for point, times in zip(points, kept, strict=True)]
    sizes = [stage.units(inputs[0].size(*point)) for point in points]
    return StageProfile(
        points=tuple(found),
        law=ServiceLaw.fit([(size, each.mean_s, each.p95_s) for size, each in zip(sizes, found, strict=True)]),
        resident_bytes=measurement.resident_bytes,
        load_s=measurement.load_s,
        disturbed_runs=sum(map(len, measurement.runs)) - sum(map(len, kept)),
        threads=grid.threads,
        cpu=_cpu_name(),
    )


def _in_fresh_process(job: Job) -> Measurement:
    command = [sys.executable, "-m", "models.measure"]
    # From the folder that holds this package, so that -m finds it wherever we were started.
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, cwd=_ROOT, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ProfileFailed(f"{Path(job.path).name}: the measuring process ended with status {done.returncode}: {last}")
    answer = json.loads(done.stdout)
    return Measurement(**{**answer, "runs": [[Run(**run) for run in runs] for runs in answer["runs"]]})


def _summary(point: tuple[int, int], times_s: Sequence[float]) -> ServicePoint:
    """Quantiles are interpolated; of fewer than 100 samples the 99 % one is little more than the largest."""
    batch, length = point
    p50_s, p95_s, p99_s = np.quantile(times_s, [0.5, 0.95, 0.99])
    return ServicePoint(
        batch=batch,
        length=length,
        samples=len(times_s),
        mean_s=float(np.mean(times_s)),
        std_s=float(np.std(times_s)),
        p50_s=float(p50_s),
        p95_s=float(p95_s),
        p99_s=float(p99_s),
    )


def _cpu_name() -> str:
    """The processor's own name where the kernel tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
