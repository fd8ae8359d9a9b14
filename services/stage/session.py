"""The one door to ONNX Runtime: a session over a stage's graph, on the best provider there is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.manifest import ManifestError, StageSpec
from services.dataplane.errors import BadRequest
from services.dataplane.wire import Array

# It would report its use to its maker, from a thread of its own; it looks for this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""In order of preference; the first ones that this build of ONNX Runtime and this machine have are used."""


class Session:
    """An ONNX graph. Runs release the GIL, so the event loop goes on beside them."""

    inline = False

    def __init__(self, session: ort.InferenceSession, spec: StageSpec, threads: int) -> None:
        self._session = session
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._ranges: Mapping[str, tuple[int, int]] = spec.parameters.get("range", {})
        self._threads = threads

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One run of the graph over a batch; raises BadRequest for values it cannot take, a token it does not know, say."""
        for name, (least, most) in self._ranges.items():
            if inputs[name].min() < least or inputs[name].max() > most:
                raise BadRequest(f"{name} must be between {least} and {most}")
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))
        except InvalidArgument as error:
            raise BadRequest(f"the model cannot take these values: {error}") from None

    def describe(self) -> dict[str, Any]:
        """Providers in use and threads per run."""
        return {"providers": self._session.get_providers(), "threads": self._threads}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Session:
    """Open the graph; see `services.stage.processors`."""
    if not files:
        raise ManifestError(f"stage {spec.name!r} has no ONNX file; export the model again (espalier export)")
    options = ort.SessionOptions()
    # Never leave these to ONNX Runtime: it counts the host's cores, not the container's quota, and its spinning threads
    # take half of a shared box (measured: encoders at half speed beside a busy neighbour).
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Inputs of every length would each leave their own largest buffers in the arena for good.
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    available = set(ort.get_available_providers())
    try:
        session = ort.InferenceSession(str(files[0]), options, providers=[p for p in PROVIDERS if p in available])
    except Exception as error:  # ONNX Runtime raises its own classes, which derive from nothing useful
        raise ManifestError(f"{files[0].name}: ONNX Runtime cannot open it ({error}); export the model again") from None
    wanted, found = {tensor.name for tensor in spec.inputs}, {node.name for node in session.get_inputs()}
    if wanted != found:
        raise ManifestError(
            f"{files[0].name} takes {sorted(found)}, not {sorted(wanted)} as the manifest says; export the model again"
        )
    return Session(session, spec, threads)
