"""Between a task's tensors and a batch's: check against the manifest, pad and stack, cut apart again. Pure numpy.

Symbolic axes do all of it: tasks are stacked along `batch`, and every other symbolic axis is padded to the longest task and cut
back to each task's own length in the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from models.manifest import BATCH_AXIS, StageSpec, TensorSpec
from services.dataplane import wire
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import Array, Message

MAX_ITEMS = 256
"""Longest batch axis of one task: one task must not hold a worker for seconds."""


def bind(spec: StageSpec, message: Message, take: Mapping[str, str]) -> tuple[dict[str, Array], dict[str, int]]:
    """The stage's inputs out of a request, each checked against the manifest; what has a default may be left out.

    Args:
        spec: the stage.
        message: the request.
        take: input name -> name of the tensor in the request.

    Returns:
        Inputs by name, and the length of every symbolic axis.

    Raises:
        BadRequest: an input is missing, unknown or of the wrong type or shape.
        TooLarge: more items than MAX_ITEMS.
    """
    inputs: dict[str, Array] = {}
    axes: dict[str, int] = {}
    for wanted in spec.inputs:
        source = take.get(wanted.name)
        tensor = message.tensor(source) if source is not None else None
        if tensor is None and wanted.default is not None:
            continue
        if tensor is None:
            given = ", ".join(t.name for t in message.tensors) or "none"
            raise BadRequest(f"input {wanted.name!r} of stage {spec.name!r} is missing; the request has {given}")
        if tensor.datatype != wanted.datatype:
            raise BadRequest(f"input {wanted.name!r} must be {wanted.datatype}, not {tensor.datatype}")
        _check_shape(wanted, tensor.array.shape, axes)
        inputs[wanted.name] = tensor.array
    for left_out in (tensor for tensor in spec.inputs if tensor.name not in inputs):
        inputs[left_out.name] = wire.filled(left_out, axes)
    if axes.get(BATCH_AXIS, 1) > MAX_ITEMS:
        raise TooLarge(f"{axes[BATCH_AXIS]} items in one request; the limit is {MAX_ITEMS}: send several requests")
    return inputs, axes


def _check_shape(wanted: TensorSpec, shape: tuple[int, ...], axes: dict[str, int]) -> None:
    expected = [axes.get(axis, axis) if isinstance(axis, str) else axis for axis in wanted.shape]
    fits = len(shape) == len(expected) and all(isinstance(e, str) or e == n for e, n in zip(expected, shape, strict=True))
    if not fits:
        raise BadRequest(f"input {wanted.name!r} must have shape {expected}, not {list(shape)}")
    for axis, length in zip(wanted.shape, shape, strict=True):
        if isinstance(axis, str):
            if axes.get(axis, length) != length:
                raise BadRequest(f"input {wanted.name!r} must have the same length along both axes {axis!r}, not {list(shape)}")
            if length == 0:
                raise BadRequest(f"input {wanted.name!r} is empty: axis {axis!r} has length 0")
            axes[axis] = length


def symbolic_lengths(spec: StageSpec, axes: Mapping[str, int]) -> tuple[int, ...]:
    """Lengths of the first input's symbolic axes other than batch: what the service law counts beside the items."""
    return tuple(axes[axis] for axis in spec.inputs[0].shape if isinstance(axis, str) and axis != BATCH_AXIS)


def stack(specs: Sequence[TensorSpec], tasks: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Inputs of a batch: the tasks' one after another along the batch axis, the other axes padded to the longest."""
    if len(tasks) == 1:
        return dict(tasks[0])
    return {spec.name: _stack_one(spec, [task[spec.name] for task in tasks]) for spec in specs}


def _stack_one(spec: TensorSpec, arrays: Sequence[Array]) -> Array:
    axis = spec.batch_axis
    if axis is None:
        raise ValueError(f"tensor {spec.name!r} has no batch axis")  # the manifest does not let such a stage batch
    longest = [max(lengths) for lengths in zip(*(array.shape for array in arrays), strict=True)]
    longest[axis] = sum(array.shape[axis] for array in arrays)
    stacked = np.full(longest, b"" if spec.datatype == "BYTES" else spec.pad_value, dtype=arrays[0].dtype)
    start = 0
    for array in arrays:
        place = [slice(0, n) for n in array.shape]
        place[axis] = slice(start, start + array.shape[axis])
        stacked[tuple(place)] = array
        start += array.shape[axis]
    return stacked


def unstack(
    specs: Sequence[TensorSpec], outputs: Mapping[str, Array], tasks: Sequence[Mapping[str, int]]
) -> list[dict[str, Array]]:
    """A batch's outputs cut apart: for each task (given by the lengths of its symbolic axes) its own rows, unpadded."""
    if len(tasks) == 1:
        return [dict(outputs)]
    results: list[dict[str, Array]] = [{} for _ in tasks]
    for spec in specs:
        axis = spec.batch_axis
        start = 0
        for task, result in zip(tasks, results, strict=True):
            place = [slice(0, task[a]) if isinstance(a, str) else slice(None) for a in spec.shape]
            if axis is not None:
                place[axis] = slice(start, start + task[BATCH_AXIS])
            result[spec.name] = outputs[spec.name][tuple(place)]
            start += task[BATCH_AXIS]
    return results
