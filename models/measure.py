"""A fresh process that serves one ONNX file and nothing else, so that its memory and load time are that file's own.

`python -m models.measure` reads a Job as JSON from stdin and writes a Measurement as JSON to stdout; `models.profile` calls it.
It times and reports; what the numbers mean is decided there.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from models.session import Array, Session

MOST_RUNS_PER_ROUND = 10
ROUND_S = 0.1
"""A point that runs faster than this is run several times a round, so that short runs get more samples than long ones."""


@dataclass(frozen=True)
class Input:
    """An input of the file, filled with ones: the time of dense arithmetic does not depend on the values."""

    name: str
    dtype: str
    """As numpy names it."""
    shape: Sequence[int | str]
    """`batch` stands for the point's batch, any other symbolic axis for its length."""

    def size(self, batch: int, length: int) -> list[int]:
        """The shape at one point."""
        return [axis if isinstance(axis, int) else batch if axis == "batch" else length for axis in self.shape]

    def fill(self, batch: int, length: int) -> Array:
        """The tensor at one point."""
        return np.ones(self.size(batch, length), self.dtype)


@dataclass(frozen=True)
class Job:
    """What to measure."""

    path: str
    threads: int
    rounds: int
    inputs: Sequence[Input]
    points: Sequence[tuple[int, int]]
    """Pairs (batch, length), smallest first."""


@dataclass(frozen=True)
class Run:
    """How long one run took."""

    wall_s: float
    cpu_s: float
    """CPU time of all threads; less than the wall time where the process was kept waiting."""


@dataclass(frozen=True)
class Measurement:
    """What was measured."""

    load_s: float
    """From opening the file to the end of the first run."""
    resident_bytes: int
    """Resident set after every point was run once, the largest last."""
    runs: Sequence[Sequence[Run]]
    """The runs of each point, its first left out."""


def measure(job: Job) -> Measurement:
    """Run every point once to warm up, then in rounds, so that a disturbance falls on all points and not on one."""
    began = time.perf_counter()
    session = Session(Path(job.path), job.threads)
    tensors = [{each.name: each.fill(*point) for each in job.inputs} for point in job.points]
    first = [_run(session, tensors[0])]
    load_s = time.perf_counter() - began
    first += [_run(session, each) for each in tensors[1:]]
    resident_bytes = psutil.Process().memory_info().rss
    counts = [min(MOST_RUNS_PER_ROUND, max(1, math.floor(ROUND_S / run.wall_s))) for run in first]
    runs: list[list[Run]] = [[] for _ in tensors]
    turns = list(zip(runs, tensors, counts, strict=True))
    for _ in range(job.rounds):
        turns.reverse()  # down, up, down: a short run right after the longest would pay for its cold caches
        for kept, each, count in turns:
            kept += [_run(session, each) for _ in range(count)]
    return Measurement(load_s, resident_bytes, runs)


def _run(session: Session, tensors: dict[str, Array]) -> Run:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    session.run(tensors)
    return Run(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def main() -> None:
    """Answer the one job on stdin."""
    document = json.load(sys.stdin)
    job = Job(**{**document, "inputs": [Input(**each) for each in document["inputs"]]})
    json.dump(asdict(measure(job)), sys.stdout)


if __name__ == "__main__":
    main()
