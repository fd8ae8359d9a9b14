"""Work that takes time and no processor: a wait drawn from a gamma law; what came in goes out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import StageSpec
from services.dataplane.wire import Array


class Emulated:
    """`mean_s` [s] and `cv2` (variance over mean squared; 0: always the same) come from the stage's parameters."""

    inline = False

    def __init__(self, mean_s: float, cv2: float, names: tuple[tuple[str, str], ...]) -> None:
        self._mean_s, self._cv2, self._names = mean_s, cv2, names
        self._rng = np.random.default_rng()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Wait, and hand the inputs back under the outputs' names."""
        time.sleep(self._mean_s * self._rng.gamma(1 / self._cv2, self._cv2) if self._cv2 else self._mean_s)
        return {output: inputs[name] for name, output in self._names}

    def describe(self) -> dict[str, Any]:
        """The law."""
        return {"mean_s": self._mean_s, "cv2": self._cv2}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Emulated:
    """See `services.stage.processors`."""
    del files, threads
    names = tuple((i.name, o.name) for i, o in zip(spec.inputs, spec.outputs, strict=True))
    return Emulated(float(spec.parameters["mean_s"]), float(spec.parameters["cv2"]), names)
