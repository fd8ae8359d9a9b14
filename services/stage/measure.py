"""A fresh process that opens one stage and nothing else, so that its memory and load time are that stage's own.

`python -m services.stage.measure` reads a Job as JSON from stdin and writes a Measurement as JSON to stdout. `models.profile`
starts it: what a stage computes is known here, a floor up from there, and reached only by this command. It times and reports;
what the numbers mean is decided there.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil

from models.manifest import BATCH_AXIS, StageSpec
from services.dataplane.wire import Array
from services.stage import examples
from services.stage.processors import Exemplary, Processor, open_processor

MOST_RUNS_PER_ROUND = 10
ROUND_S = 0.1
"""A point that runs faster than this is run several times a round, so that short runs get more samples than long ones."""
UNAVAILABLE = 4
"""Exit status: the stage needs a package that is not installed here."""


@dataclass(frozen=True)
class Job:
    """What to measure."""

    spec: str
    """The StageSpec, as JSON."""
    files: Sequence[str]
    typical_length: Mapping[str, int]
    threads: int
    rounds: int
    points: Sequence[tuple[int, int]]
    """Pairs (batch, length), smallest first."""
    tasks: int = 0
    """How many tasks of varied sizes to run besides, one by one."""
    tokens: int = 0
    """Tokens of an answer, where the stage generates."""
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """How long one run took."""

    wall_s: float
    cpu_s: float
    """CPU time of all threads; less than the wall time where the process was kept waiting."""
    first_s: float = 0.0
    """Of an answer of several tokens: until the first, which reads the prompt."""
    step_s: float = 0.0
    """Mean time of a further token."""


@dataclass(frozen=True)
class Measurement:
    """What was measured."""

    load_s: float
    """From opening the files to the end of the first run."""
    resident_bytes: int
    """Resident set after every point was run once, the largest last."""
    runs: Sequence[Sequence[Run]]
    """The runs of each point, its first left out."""
    varied: Sequence[Run] = field(default_factory=list)
    """One run of each task of varied sizes, after one that does not count."""


def measure(job: Job) -> Measurement:
    """Run every point once to warm up, then in rounds, so that a disturbance falls on all points and not on one.

    Raises:
        ManifestError: the stage's files cannot be opened.
        TaskError: it refuses a made-up task.
    """
    spec = StageSpec.model_validate_json(job.spec)
    began = time.perf_counter()
    processor = open_processor(spec, tuple(Path(path) for path in job.files), job.threads)
    works = [_work(spec, processor, job, *point) for point in job.points]
    first = [works[0]()]
    load_s = time.perf_counter() - began
    first += [work() for work in works[1:]]
    resident_bytes = psutil.Process().memory_info().rss
    counts = [min(MOST_RUNS_PER_ROUND, max(1, math.floor(ROUND_S / run.wall_s))) for run in first]
    runs: list[list[Run]] = [[] for _ in works]
    turns = list(zip(runs, works, counts, strict=True))
    for _ in range(job.rounds):
        turns.reverse()  # down, up, down: a short run right after the longest would pay for its cold caches
        for kept, work, count in turns:
            kept += [work() for _ in range(count)]
    return Measurement(load_s, resident_bytes, runs, _varied(spec, processor, job))


def _work(spec: StageSpec, processor: Processor, job: Job, batch: int, length: int) -> Callable[[], Run]:
    """What to time at one point."""
    if job.tokens:
        return lambda: _answer(processor, job, batch, length)
    first = {axis: length for axis in spec.inputs[0].shape if isinstance(axis, str)}
    inputs = examples.task(spec, {**job.typical_length, **first, BATCH_AXIS: batch})
    if isinstance(processor, Exemplary):
        inputs |= processor.example(batch)
    return lambda: _run(processor, inputs)


def _run(processor: Processor, inputs: Mapping[str, Array]) -> Run:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    processor.run(inputs)
    return Run(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _answer(processor: Processor, job: Job, batch: int, length: int) -> Run:
    """A whole answer, token by token: a prompt of that length read by each of that many sequences, and continued."""
    from services.stage.processors.generate import Generate  # noqa: PLC0415  it brings the decoder's arithmetic

    if not isinstance(processor, Generate):
        raise TypeError(f"{type(processor).__name__} does not generate")
    rows = [processor.made_up(length, job.typical_length) for _ in range(batch)]
    began, cpu_s = time.perf_counter(), time.process_time()
    answer = processor.prefill(rows)
    first_s = time.perf_counter() - began
    for _ in range(job.tokens - 1):
        answer = processor.step(answer)
    wall_s = time.perf_counter() - began
    step_s = (wall_s - first_s) / max(1, job.tokens - 1)
    return Run(wall_s, time.process_time() - cpu_s, first_s, step_s)


def _varied(spec: StageSpec, processor: Processor, job: Job) -> list[Run]:
    rng = np.random.default_rng(job.seed)
    tasks = [examples.varied(spec, job.typical_length, rng) for _ in range(job.tasks)]
    for each in tasks[:1]:
        processor.run(each)
    return [_run(processor, each) for each in tasks]


def main() -> int:
    """Answer the one job on stdin."""
    try:
        json.dump(asdict(measure(Job(**json.load(sys.stdin)))), sys.stdout)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
