"""The one door to ONNX Runtime in this folder, for verifying. Serving and measuring have their own, in `services/stage`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import StageBroken

# It would report its use to its maker, from a thread of its own; it looks for this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

Array = np.ndarray[Any, np.dtype[Any]]


class Session:
    """An ONNX file ready to run on the CPU."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # left alone, the runtime counts the host's cores, not the container's quota
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning halves the speed of a busy machine
        options.enable_cpu_mem_arena = False  # batches vary in shape; the arena would keep the largest of each
        options.log_severity_level = 4  # an error is raised; printing it as well would only repeat it
        self._path = path
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exceptions share no public base class
            raise StageBroken(f"{path.name}: cannot be opened: {error}") from error

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """The outputs, in the file's order.

        Raises:
            StageBroken: the runtime refuses the inputs, or fails.
        """
        try:
            outputs: Sequence[Array] = self._session.run(None, dict(inputs))
        except Exception as error:  # as above
            raise StageBroken(f"{self._path.name}: cannot be run: {error}") from error
        return outputs
