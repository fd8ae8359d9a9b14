"""Runs a stage on made-up inputs before it is ready: first runs are slow, and their times are the first service law."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

from models.manifest import BATCH_AXIS, ServiceLaw, StageSpec
from services.stage import examples
from services.stage.processors import Exemplary, Processor

SHORT, LONG = 8, 64
"""Lengths of the symbolic axes tried, no longer than the model's typical ones: two points make a line."""
FEW, MORE = 1, 2
"""Items tried instead where a stage knows only batches and takes milliseconds for each: 64 images could take a minute."""
RUNS = 5


def warm_up(spec: StageSpec, processor: Processor, typical_length: Mapping[str, int]) -> ServiceLaw:
    """Run the stage until its times mean something, and fit its law to them.

    Two sizes along every symbolic axis but batch, or along batch where there is no other. Medians of a few runs each, after one
    that does not count. What cannot be made up, the processor makes itself.
    """
    other = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str) and axis != BATCH_AXIS}
    points = []
    for length in (SHORT, LONG) if other or processor.inline else (FEW, MORE):
        axes = {axis: min(length, typical_length.get(axis, length)) for axis in other} or {BATCH_AXIS: length}
        inputs = {tensor.name: examples.filled(tensor, axes) for tensor in spec.inputs}
        if isinstance(processor, Exemplary):
            inputs |= processor.example(axes.get(BATCH_AXIS, 1))
        units = spec.units(inputs[spec.inputs[0].name].shape)
        usual = usual_s(partial(processor.run, inputs), RUNS)
        points.append((float(units), usual, usual))
    return ServiceLaw.fit(points)


def usual_s(work: Callable[[], object], runs: int) -> float:
    """Median time [s] of so many runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
