"""Warming up: which inputs a stage is tried on, and that its first law comes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from models.manifest import StageSpec, TensorSpec
from services.dataplane.errors import BadRequest
from services.dataplane.wire import DTYPES, Array
from services.stage.warm import LONG, RUNS, SHORT, warm_up


class Recorder:
    """A processor that remembers what it was run on, and does as much work as it is told."""

    inline = True

    def __init__(self, work: Callable[[Mapping[str, Array]], None] = lambda _: None) -> None:
        self.inputs: list[Mapping[str, Array]] = []
        self._work = work

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.inputs.append(inputs)
        self._work(inputs)
        return {}

    def describe(self) -> dict[str, Any]:
        return {}


def spec(*tensors: TensorSpec) -> StageSpec:
    return StageSpec(name="s", tier="light", processor="echo", inputs=tensors, outputs=tensors)


def tensor(name: str, datatype: Any, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape)


@pytest.mark.parametrize(
    ("sentence", "tensors", "short", "long"),
    [
        (
            "an encoder is tried on one short and one long text",
            (tensor("ids", "INT64", "batch", "seq"), tensor("mask", "INT64", "batch", "seq")),
            {"ids": (1, SHORT), "mask": (1, SHORT)},
            {"ids": (1, LONG), "mask": (1, LONG)},
        ),
        (
            "a stage that knows only batches is tried on a small and a large one",
            (tensor("text", "BYTES", "batch"),),
            {"text": (SHORT,)},
            {"text": (LONG,)},
        ),
        (
            "an axis that only the second input has counts too",
            (tensor("x", "FP32", "batch", 4), tensor("labels", "BYTES", "labels")),
            {"x": (1, 4), "labels": (SHORT,)},
            {"x": (1, 4), "labels": (LONG,)},
        ),
        ("fixed shapes stay what they are", (tensor("x", "FP16", 2, 3),), {"x": (2, 3)}, {"x": (2, 3)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_tried(sentence: str, tensors: tuple[TensorSpec, ...], short: dict[str, Any], long: dict[str, Any]) -> None:
    del sentence
    recorder = Recorder()
    law = warm_up(spec(*tensors), recorder, {})
    shapes = [{name: array.shape for name, array in inputs.items()} for inputs in recorder.inputs]
    assert shapes == [short] * (RUNS + 1) + [long] * (RUNS + 1)
    assert law.base_s >= 0
    assert law.per_unit_s >= 0
    assert law.mean_s(SHORT) > 0


class Heavy(Recorder):
    """As `Recorder`, for the worker's threads."""

    inline = False


class Album(Heavy):
    """As `Heavy`, and it takes nothing but its own pictures."""

    def example(self, items: int) -> dict[str, Array]:
        pictures = np.empty(items, dtype=object)
        pictures[:] = b"picture"
        return {"image": pictures}


def test_a_heavy_stage_that_knows_only_batches_is_tried_on_one_item_and_on_two() -> None:
    recorder = Heavy()
    warm_up(spec(tensor("pixels", "FP32", "batch", 3, 2, 2)), recorder, {})
    assert [inputs["pixels"].shape[0] for inputs in recorder.inputs] == [1] * (RUNS + 1) + [2] * (RUNS + 1)


def test_what_cannot_be_made_up_comes_from_the_processor_and_the_rest_is_made_up() -> None:
    album = Album()
    warm_up(spec(tensor("image", "BYTES", "batch"), tensor("scale", "FP32", "batch")), album, {})
    assert [inputs["image"].tolist() for inputs in album.inputs[:: RUNS + 1]] == [[b"picture"], [b"picture"] * 2]
    assert [inputs["scale"].tolist() for inputs in album.inputs[:: RUNS + 1]] == [[1], [1, 1]]


@pytest.mark.parametrize("datatype", list(DTYPES))
def test_inputs_are_of_their_type_and_not_nothing(datatype: str) -> None:
    recorder = Recorder()
    warm_up(spec(tensor("x", datatype, "batch")), recorder, {})
    array = recorder.inputs[0]["x"]
    assert array.dtype == DTYPES[datatype]
    assert all(bool(element) for element in array.tolist())


def test_the_law_tells_a_stage_whose_work_grows_from_one_whose_does_not() -> None:
    def grow(inputs: Mapping[str, Array]) -> None:
        for _ in range(inputs["ids"].size * 20):
            np.sum(inputs["ids"])

    ids = tensor("ids", "INT64", "batch", "seq")
    growing = warm_up(spec(ids), Recorder(grow), {})
    assert growing.mean_s(LONG) > 4 * growing.mean_s(SHORT)


def test_a_slow_first_run_is_not_in_the_law() -> None:
    first: set[int] = set()

    def slow_at_first(inputs: Mapping[str, Array]) -> None:
        size = inputs["ids"].size
        rounds = 300 if size in first else 300_000
        first.add(size)
        for _ in range(rounds):
            size += 1

    law = warm_up(spec(tensor("ids", "INT64", "batch", "seq")), Recorder(slow_at_first), {})
    # The first run takes about 10 ms, the others 10 µs.
    assert law.mean_s(LONG) < 1e-3


def test_a_stage_that_cannot_be_run_says_so_before_it_is_ready() -> None:
    def refuse(_: Mapping[str, Array]) -> None:
        raise BadRequest("no")

    with pytest.raises(BadRequest):
        warm_up(spec(tensor("ids", "INT64", "batch", "seq")), Recorder(refuse), {})


def test_no_length_over_the_models_typical_one_is_tried() -> None:
    recorder = Recorder()
    warm_up(spec(tensor("ids", "INT64", "batch", "seq")), recorder, {"seq": 16})
    assert {inputs["ids"].shape for inputs in recorder.inputs} == {(1, SHORT), (1, 16)}
