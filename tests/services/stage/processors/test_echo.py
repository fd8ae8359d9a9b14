"""The echo: what came in goes out under the outputs' names."""

from __future__ import annotations

import numpy as np
import pytest

from models.manifest import ManifestError, StageSpec, TensorSpec
from services.stage.processors import open_processor

A = TensorSpec(name="a", datatype="FP32", shape=("batch", 2))
B = TensorSpec(name="b", datatype="BYTES", shape=("batch",))


def spec(*outputs: TensorSpec) -> StageSpec:
    return StageSpec(name="echo", tier="light", processor="echo", inputs=(A, B), outputs=outputs)


def test_outputs_are_the_inputs_at_their_places() -> None:
    echo = open_processor(spec(A.model_copy(update={"name": "x"}), B.model_copy(update={"name": "y"})), (), 1)
    a, b = np.ones((1, 2), np.float32), np.array([b"t"], object)
    outputs = echo.run({"b": b, "a": a})
    assert list(outputs) == ["x", "y"]
    assert outputs["x"] is a
    assert outputs["y"] is b
    assert echo.describe() == {}


@pytest.mark.parametrize(
    "outputs", [(A,), (B, A), (A, B, A.model_copy(update={"name": "c"}))], ids=["fewer", "swapped", "more"]
)
def test_outputs_unlike_the_inputs_do_not_open(outputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(ManifestError, match="an echo's outputs must be like its inputs"):
        open_processor(spec(*outputs), (), 1)
