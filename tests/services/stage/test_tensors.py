"""Binding a request to a stage's inputs, and that a batch cut apart is what each task would have got alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import StageSpec, TensorSpec
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import DTYPES, Array, Message, Tensor
from services.stage.tensors import MAX_ITEMS, bind, stack, symbolic_lengths, unstack

IDS = TensorSpec(name="ids", datatype="INT64", shape=("batch", "seq"), pad_value=7)
MASK = TensorSpec(name="mask", datatype="INT64", shape=("batch", "seq"))
STATES = TensorSpec(name="states", datatype="FP32", shape=("batch", "seq", 3), pad_value=-1.5)
POOLED = TensorSpec(name="pooled", datatype="FP32", shape=("batch", 3))
ENCODE = StageSpec(name="encode", tier="core", processor="onnx", inputs=(IDS, MASK), outputs=(STATES, POOLED), max_batch=8)


def message(**arrays: tuple[str, Array]) -> Message:
    return Message(tuple(Tensor(name, datatype, array) for name, (datatype, array) in arrays.items()))


def int64(*shape: int) -> tuple[str, Array]:
    return "INT64", np.ones(shape, np.int64)


TAKE = {"ids": "ids", "mask": "mask"}


# --- bind -----------------------------------------------------------------------------------------------------------------


def test_inputs_are_taken_by_reference_and_their_axes_measured() -> None:
    given_ids, given_mask = int64(2, 5), int64(2, 5)
    sent = message(**{"tokenise.ids": given_ids, "tokenise.mask": given_mask, "request.other": int64(9)})
    inputs, axes = bind(ENCODE, sent, {"ids": "tokenise.ids", "mask": "tokenise.mask"})
    assert inputs["ids"] is given_ids[1]
    assert inputs["mask"] is given_mask[1]
    assert axes == {"batch": 2, "seq": 5}
    assert symbolic_lengths(ENCODE, axes) == (5,)


def test_one_tensor_may_serve_two_inputs() -> None:
    inputs, _ = bind(ENCODE, message(x=int64(1, 4)), {"ids": "x", "mask": "x"})
    assert inputs["ids"] is inputs["mask"]


@pytest.mark.parametrize(
    ("sent", "take", "because"),
    [
        ({"ids": int64(2, 5)}, TAKE, "input 'mask' of stage 'encode' is missing; the request has ids"),
        ({}, TAKE, "input 'ids' of stage 'encode' is missing; the request has none"),
        ({"ids": int64(2, 5), "mask": int64(2, 5)}, {"ids": "ids"}, "input 'mask' of stage 'encode' is missing"),
        ({"ids": int64(2, 5), "mask": int64(2, 5)}, {"ids": "ids", "mask": "m"}, "input 'mask' of stage 'encode' is missing"),
        ({"ids": ("INT32", np.ones((2, 5), "i4")), "mask": int64(2, 5)}, TAKE, "input 'ids' must be INT64, not INT32"),
        ({"ids": int64(2), "mask": int64(2, 5)}, TAKE, r"input 'ids' must have shape \['batch', 'seq'\], not \[2\]"),
        ({"ids": int64(2, 5, 1), "mask": int64(2, 5)}, TAKE, r"input 'ids' must have shape .* not \[2, 5, 1\]"),
        ({"ids": int64(), "mask": int64(2, 5)}, TAKE, r"input 'ids' must have shape .* not \[\]"),
        ({"ids": int64(2, 5), "mask": int64(2, 4)}, TAKE, r"input 'mask' must have shape \[2, 5\], not \[2, 4\]"),
        ({"ids": int64(2, 5), "mask": int64(1, 5)}, TAKE, r"input 'mask' must have shape \[2, 5\], not \[1, 5\]"),
        ({"ids": int64(0, 5), "mask": int64(0, 5)}, TAKE, "input 'ids' is empty: axis 'batch' has length 0"),
        ({"ids": int64(2, 0), "mask": int64(2, 0)}, TAKE, "input 'ids' is empty: axis 'seq' has length 0"),
    ],
)
def test_requests_that_do_not_fit_the_stage_are_refused(
    sent: dict[str, tuple[str, Array]], take: dict[str, str], because: str
) -> None:
    with pytest.raises(BadRequest, match=because):
        bind(ENCODE, message(**sent), take)


def one_input(shape: tuple[int | str, ...]) -> StageSpec:
    tensor = TensorSpec(name="x", datatype="INT64", shape=shape)
    return StageSpec(name="s", tier="light", processor="echo", inputs=(tensor,), outputs=(tensor,))


@pytest.mark.parametrize(
    ("shape", "given_shape", "fits"),
    [
        (("batch", 3), (2, 3), True),
        (("batch", 3), (2, 4), False),
        (("batch", "seq", "seq"), (2, 4, 4), True),
        (("batch", "seq", "seq"), (2, 4, 5), False),
        ((), (), True),
        ((), (1,), False),
        ((0,), (0,), True),
    ],
)
def test_fixed_and_repeated_axes(shape: tuple[int | str, ...], given_shape: tuple[int, ...], fits: bool) -> None:
    sent = message(x=int64(*given_shape))
    if fits:
        bind(one_input(shape), sent, {"x": "x"})
    else:
        with pytest.raises(BadRequest, match="input 'x' must have"):
            bind(one_input(shape), sent, {"x": "x"})


def test_a_task_of_too_many_items_is_too_large() -> None:
    spec = one_input(("batch",))
    _, axes = bind(spec, message(x=int64(MAX_ITEMS)), {"x": "x"})
    assert axes == {"batch": MAX_ITEMS}
    with pytest.raises(TooLarge, match=f"{MAX_ITEMS + 1} items in one request; the limit is {MAX_ITEMS}"):
        bind(spec, message(x=int64(MAX_ITEMS + 1)), {"x": "x"})


@pytest.mark.parametrize(
    ("shape", "lengths"), [(("batch",), ()), (("batch", "a", 3, "b"), (5, 6)), ((3, "b", "batch"), (6,)), ((3,), ())]
)
def test_symbolic_lengths_are_those_of_the_first_input_in_its_order(
    shape: tuple[int | str, ...], lengths: tuple[int, ...]
) -> None:
    assert symbolic_lengths(one_input(shape), {"batch": 4, "a": 5, "b": 6}) == lengths


# --- stack and unstack ----------------------------------------------------------------------------------------------------


def test_a_batch_is_stacked_and_padded_at_the_end() -> None:
    tasks = [
        {"ids": np.array([[1, 2, 3]]), "mask": np.array([[1, 1, 1]])},
        {"ids": np.array([[4], [5]]), "mask": np.array([[1], [1]])},
    ]
    stacked = stack(ENCODE.inputs, tasks)
    assert stacked["ids"].tolist() == [[1, 2, 3], [4, 7, 7], [5, 7, 7]]
    assert stacked["mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert stacked["ids"].dtype == np.int64


def test_texts_are_padded_with_the_empty_text() -> None:
    spec = TensorSpec(name="texts", datatype="BYTES", shape=("batch", "docs"))
    one, two = np.array([[b"a", b"b"]], object), np.array([[b"c"]], object)
    assert stack((spec,), [{"texts": one}, {"texts": two}])["texts"].tolist() == [[b"a", b"b"], [b"c", b""]]


def test_the_batch_axis_need_not_be_the_first() -> None:
    spec = TensorSpec(name="x", datatype="FP32", shape=("seq", "batch"), pad_value=9)
    tasks = [{"x": np.zeros((1, 2), np.float32)}, {"x": np.ones((2, 1), np.float32)}]
    stacked = stack((spec,), tasks)
    assert stacked["x"].tolist() == [[0, 0, 1], [9, 9, 1]]
    first, second = unstack((spec,), stacked, [{"seq": 1, "batch": 2}, {"seq": 2, "batch": 1}])
    assert first["x"].tolist() == [[0, 0]]
    assert second["x"].tolist() == [[1], [1]]


def test_a_single_task_is_neither_copied_nor_cut() -> None:
    task = {"ids": np.ones((1, 3), np.int64)}
    assert stack((IDS,), [task])["ids"] is task["ids"]
    outputs = {"states": np.ones((1, 3, 3), np.float32)}
    (own,) = unstack((STATES,), outputs, [{"batch": 1, "seq": 3}])
    assert own["states"] is outputs["states"]


def test_a_tensor_without_a_batch_axis_cannot_be_stacked() -> None:
    spec = TensorSpec(name="labels", datatype="BYTES", shape=("labels",))
    tasks = [{"labels": np.array([b"a"], object)}] * 2
    with pytest.raises(ValueError, match="'labels' has no batch axis"):
        stack((spec,), tasks)


@st.composite
def _batches(draw: st.DrawFn) -> tuple[TensorSpec, list[dict[str, int]], list[Array]]:
    datatype = draw(st.sampled_from(["INT64", "FP32", "BYTES", "BOOL"]))
    others: list[int | str] = draw(st.lists(st.sampled_from(["seq", "patch", 2, 3]), max_size=3))
    axes_of_x: list[int | str] = ["batch", *others]
    shape = tuple(draw(st.permutations(axes_of_x)))
    spec = TensorSpec(name="x", datatype=datatype, shape=shape, pad_value=draw(st.sampled_from([0.0, 1.0, -3.0])))
    tasks, arrays = [], []
    for number in range(draw(st.integers(1, 4))):
        axes = {axis: draw(st.integers(1, 4)) for axis in ("batch", "seq", "patch")}
        lengths = tuple(axes[axis] if isinstance(axis, str) else axis for axis in shape)
        count = int(np.prod(lengths))
        array: Array = np.empty(count, DTYPES[datatype])
        array[:] = [f"{number}:{i}".encode() if datatype == "BYTES" else 100 * number + i for i in range(count)]
        tasks.append(axes)
        arrays.append(array.reshape(lengths))
    return spec, tasks, arrays


@settings(max_examples=120, deadline=None)
@given(_batches())
def test_what_is_stacked_and_cut_apart_is_what_went_in(batch: tuple[TensorSpec, list[dict[str, int]], list[Array]]) -> None:
    spec, tasks, arrays = batch
    stacked = stack((spec,), [{"x": array} for array in arrays])
    again = unstack((spec,), stacked, tasks)
    for array, own in zip(arrays, again, strict=True):
        assert own["x"].shape == array.shape
        assert own["x"].dtype == array.dtype
        assert own["x"].tolist() == array.tolist()


@settings(max_examples=80, deadline=None)
@given(_batches())
def test_everything_between_the_tasks_is_padding(batch: tuple[TensorSpec, list[dict[str, int]], list[Array]]) -> None:
    spec, _, arrays = batch
    stacked = stack((spec,), [{"x": array} for array in arrays])["x"]
    axis = spec.batch_axis
    assert axis is not None
    assert stacked.shape[axis] == sum(array.shape[axis] for array in arrays)
    for other in set(range(stacked.ndim)) - {axis}:
        assert stacked.shape[other] == max(array.shape[other] for array in arrays)
    filling: Any = b"" if spec.datatype == "BYTES" else np.array(spec.pad_value).astype(stacked.dtype).item()
    values = sorted(map(str, stacked.ravel().tolist()))
    own = [value for array in arrays for value in array.ravel().tolist()]
    assert values == sorted(map(str, [*own, *[filling] * (stacked.size - len(own))]))


def test_outputs_of_the_whole_model_run_equal_those_of_each_task_alone() -> None:
    # A stand-in for an encoder that honours its mask: sums over the axis that is padded.
    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        kept = (inputs["ids"] * inputs["mask"]).astype(np.float32)
        states = np.repeat(kept[:, :, None], 3, axis=2)
        return {"states": states, "pooled": states.sum(axis=1)}

    rng = np.random.default_rng(3)
    tasks = [
        {"ids": rng.integers(0, 99, (items, length)), "mask": np.ones((items, length), np.int64)}
        for items, length in ((1, 5), (3, 2), (2, 9))
    ]
    axes = [dict(zip(("batch", "seq"), task["ids"].shape, strict=True)) for task in tasks]
    together = unstack(ENCODE.outputs, run(stack(ENCODE.inputs, tasks)), axes)
    for task, own in zip(tasks, together, strict=True):
        alone = run(task)
        assert own["pooled"].tolist() == alone["pooled"].tolist()
        assert own["states"].tolist() == alone["states"].tolist()
