"""Measures what a replica of each exported stage needs on this machine, and writes it into the manifest.

Each stage, precision and number of threads is measured in a process of its own, `python -m services.stage.measure`: what a
stage computes is `services`' business, a floor up, and a command is all that is known of it here. That process carries no web
server; the resident set of a replica is larger by that. Core stages are measured at every size of a grid, and their service
law is fitted; light ones besides on tasks of every usual size, and how their time varies is fitted by a Gamma distribution.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from models import directory, fit
from models.directory import Report
from models.errors import ProfileFailed
from models.manifest import (
    BATCH_AXIS,
    GENERATE,
    GammaFit,
    GenerationLaw,
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

CPU_SHARE = 0.9
"""A run in which the process had the CPU for less than this share of the time counts as disturbed by others."""
MEASURE = "services.stage.measure"
_UNAVAILABLE = 4
"""Exit status of that command where the stage needs a package that is not installed."""
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Grid:
    """Where to measure: every batch at every length, each in so many rounds."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] = (16, 48, 128)
    rounds: int = 5
    threads: tuple[int, ...] = (1,)
    """Intra-op threads of the replica; the first is what the manifest's other readers take."""
    tasks: int = 300
    """Of varied sizes, for the distribution of a light stage."""
    tokens: int = 32
    """Most tokens of an answer, where a stage generates."""


QUICK = Grid(batches=(1, 4), lengths=(16, 48), rounds=3, tasks=100, tokens=8)
"""A few seconds, for trying things out. Fewer samples, stated in every point."""


@dataclass(frozen=True)
class Run:
    """How long one run took, as the measuring process says."""

    wall_s: float
    cpu_s: float
    first_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What the measuring process answered; see `services.stage.measure.Measurement`."""

    load_s: float
    resident_bytes: int
    runs: Sequence[Sequence[Run]]
    varied: Sequence[Run]


class Unavailable(Exception):
    """The stage needs a package that is not installed here."""


def profile(out: Path, grid: Grid, report: Report = lambda _: None, left_out: Report = lambda _: None) -> Manifest:
    """Measure every stage of an export in every precision, and save the result in its manifest.

    Args:
        out: Directory of the export.
        grid: Where to measure. Lengths beyond the model's longest input and batches beyond a stage's largest are left out.
        report: Told what is being done.
        left_out: Told of each stage that is not measured, and why: it needs a package that is not installed, or other stages.

    Returns:
        The manifest as saved.

    Raises:
        ManifestError: no export there, or a file differs from its sha256.
        ProfileFailed: a measuring process broke down, or the directory was exported anew meanwhile.
    """
    manifest = load(out)
    measured = {stage.name: _profile_stage(manifest, stage, out, grid, report, left_out) for stage in manifest.stages}
    # Another export may have come in while we measured; its files are not the ones measured.
    with directory.locked(out, report):
        if load(out) != manifest:
            raise ProfileFailed(f"{out}: the manifest changed while its stages were measured; profile it again")
        stages = [stage.model_copy(update={"profile": measured[stage.name]}) for stage in manifest.stages]
        profiled = manifest.model_copy(update={"stages": tuple(stages)})
        save(profiled, out)
    return profiled


def undisturbed(runs: Sequence[Run]) -> list[Run]:
    """The runs that had the CPU to themselves; where none had, the least disturbed.

    The law is the stage's own: what its neighbours take from it is for those to see who know the neighbours. One stall among
    five runs would otherwise pass for the stage's 95 % quantile.
    """
    alone = [run for run in runs if run.cpu_s >= CPU_SHARE * run.wall_s]
    return alone or [max(runs, key=lambda run: run.cpu_s / run.wall_s)]


def _profile_stage(
    manifest: Manifest, stage: StageSpec, out: Path, grid: Grid, report: Report, left_out: Report
) -> dict[Precision, StageProfile]:
    profiles: dict[Precision, StageProfile] = {}
    if _continues_a_decoder(stage):
        left_out(f"{stage.name}: a part of a cut decoder works only beside the others")
        return profiles
    for precision in stage.files:
        files = [str(path.resolve()) for path in check_files(stage, precision, out)]
        try:
            # A light stage is work for the event loop: it has no threads.
            counts = grid.threads if stage.tier == "core" else (1,)
            each = [_measure(manifest, stage, precision, files, threads, grid, report) for threads in counts]
        except Unavailable as error:
            left_out(f"{stage.name}: {error}")
            continue
        profiles[precision] = each[0].model_copy(update={"other_threads": tuple(each[1:])})
    return profiles


def _continues_a_decoder(stage: StageSpec) -> bool:
    return stage.processor == GENERATE and int(stage.parameters.get("parts", 1)) > 1


def _points(manifest: Manifest, stage: StageSpec, grid: Grid) -> list[tuple[int, int]]:
    """Pairs (batch, length), smallest first, within what the stage can take."""
    stated = [int(each.parameters["max_tokens"]) for each in manifest.stages if each.processor == "tokenise"]
    longest = min(stated, default=None)
    has_length = any(isinstance(axis, str) and axis != BATCH_AXIS for axis in stage.inputs[0].shape)
    lengths = sorted({min(length, longest or length) for length in grid.lengths}) if has_length else [1]
    batches = [batch for batch in sorted(set(grid.batches)) if batch <= stage.max_batch] or [1]
    return sorted(product(batches, lengths), key=lambda point: (point[0] * point[1], point))


def _measure(
    manifest: Manifest, stage: StageSpec, precision: Precision, files: Sequence[str], threads: int, grid: Grid, report: Report
) -> StageProfile:
    report(f"measuring {stage.name} as {precision}" + (f" with {threads} threads" if threads > 1 else ""))
    points = _points(manifest, stage, grid)
    generates = stage.processor == GENERATE
    tokens = min(grid.tokens, manifest.typical_length.get("new", grid.tokens)) if generates else 0
    found = _in_fresh_process(
        stage.name,
        {
            "spec": stage.model_dump_json(exclude={"profile"}),
            "files": files,
            "typical_length": dict(manifest.typical_length),
            "threads": threads,
            "rounds": grid.rounds,
            "points": points,
            "tasks": grid.tasks if stage.tier == "light" else 0,
            "tokens": tokens,
        },
    )
    kept = [undisturbed(runs) for runs in found.runs]
    summaries = [_summary(point, [run.wall_s for run in runs]) for point, runs in zip(points, kept, strict=True)]
    sizes = [stage.units(stage.inputs[0].sized(*point)) for point in points]
    return StageProfile(
        points=tuple(summaries),
        law=ServiceLaw.fit([(size, each.mean_s, each.p95_s) for size, each in zip(sizes, summaries, strict=True)]),
        resident_bytes=found.resident_bytes,
        load_s=found.load_s,
        disturbed_runs=sum(map(len, found.runs)) - sum(map(len, kept)),
        threads=threads,
        cpu=_cpu_name(),
        gamma=_gamma(found.varied) if found.varied else None,
        generation=_generation(stage, points, kept, tokens) if generates else None,
    )


def _gamma(runs: Sequence[Run]) -> GammaFit | None:
    try:
        return fit.gamma([run.wall_s for run in undisturbed(runs)])
    except ValueError:  # every run but one was disturbed
        return None


def _generation(
    stage: StageSpec, points: Sequence[tuple[int, int]], kept: Sequence[Sequence[Run]], tokens: int
) -> GenerationLaw:
    """A prompt is read in one run; a step attends to the tokens so far, on average half of the answer besides the prompt."""
    reads, steps = [], []
    for (batch, length), runs in zip(points, kept, strict=True):
        first, step = ([getattr(run, name) for run in runs] for name in ("first_s", "step_s"))
        reads.append(
            (stage.units(stage.inputs[0].sized(batch, length)), float(np.mean(first)), float(np.quantile(first, 0.95)))
        )
        if tokens > 1:
            steps.append((batch * (length + tokens / 2), float(np.mean(step)), float(np.quantile(step, 0.95))))
    return GenerationLaw(prefill=ServiceLaw.fit(reads), step=ServiceLaw.fit(steps or reads), tokens=tokens)


def _in_fresh_process(stage: str, job: Mapping[str, Any]) -> Measured:
    command = [sys.executable, "-m", MEASURE]
    # From the folder that holds the packages, so that -m finds it wherever we were started.
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, cwd=_ROOT, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == _UNAVAILABLE:
            raise Unavailable(last)
        raise ProfileFailed(f"{stage}: the measuring process ended with status {done.returncode}: {last}")
    answer = json.loads(done.stdout)
    runs = [[Run(**run) for run in each] for each in answer["runs"]]
    return Measured(answer["load_s"], answer["resident_bytes"], runs, [Run(**run) for run in answer["varied"]])


def _summary(point: tuple[int, int], times_s: Sequence[float]) -> ServicePoint:
    """Quantiles are interpolated; of fewer than 100 samples the 99 % one is little more than the largest.

    The standard deviation is the unbiased one, since on a busy machine there may be two or three samples left; of one it is 0.
    """
    batch, length = point
    p50_s, p95_s, p99_s = np.quantile(times_s, [0.5, 0.95, 0.99])
    return ServicePoint(
        batch=batch,
        length=length,
        samples=len(times_s),
        mean_s=float(np.mean(times_s)),
        std_s=float(np.std(times_s, ddof=1)) if len(times_s) > 1 else 0.0,
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
