"""The one door to ONNX Runtime: graphs on the best provider there is, and the processor that is one graph.

`open_processor` serves a stage that is a single graph; stages of several (a decoder, say) open each with `open_graph`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import ManifestError, StageSpec
from services.dataplane.errors import BadRequest
from services.dataplane.wire import Array

# It would report its use to its maker, from a thread of its own; it looks for this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""In order of preference; the first ones that this build of ONNX Runtime and this machine have are used."""

_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class Graph:
    """An opened ONNX graph. Runs release the GIL, so the event loop goes on beside them."""

    def __init__(self, session: ort.InferenceSession, threads: int) -> None:
        self._session = session
        self._threads = threads
        self.inputs: Mapping[str, np.dtype[Any]] = {
            node.name: np.dtype(_DTYPES.get(node.type, np.object_)) for node in session.get_inputs()
        }
        """Datatype of every input, by name."""
        self.outputs: tuple[str, ...] = tuple(node.name for node in session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """One run; outputs by name, all of them or those named.

        Raises:
            BadRequest: the graph cannot take these values, a token outside its vocabulary, say.
        """
        names = list(self.outputs if outputs is None else outputs)
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except InvalidArgument as error:
            raise BadRequest(f"the model cannot take these values: {error}") from None

    def describe(self) -> dict[str, Any]:
        """Providers in use and threads per run."""
        return {"providers": self._session.get_providers(), "threads": self._threads}


class Session:
    """A stage that is one graph."""

    inline = False

    def __init__(self, graph: Graph, spec: StageSpec) -> None:
        self._graph = graph
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._ranges: Mapping[str, tuple[int, int]] = spec.parameters.get("range", {})

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One run of the graph over a batch; raises BadRequest for values it cannot take, a token it does not know, say."""
        for name, (least, most) in self._ranges.items():
            if inputs[name].min() < least or inputs[name].max() > most:
                raise BadRequest(f"{name} must be between {least} and {most}")
        # By their order: a graph may not call an output what an input is called already, as a part of an encoder's would.
        return dict(zip(self._outputs, self._graph.run(inputs).values(), strict=True))

    def describe(self) -> dict[str, Any]:
        """Providers in use and threads per run."""
        return self._graph.describe()


def open_graph(path: Path, threads: int) -> Graph:
    """Open an ONNX file; its weights are mapped where they lie beside it.

    Raises:
        ManifestError: ONNX Runtime cannot open it.
    """
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
        session = ort.InferenceSession(str(path), options, providers=[p for p in PROVIDERS if p in available])
    except Exception as error:  # ONNX Runtime raises its own classes, which derive from nothing useful
        newer = any(word in str(error) for word in ("Opset", "IR version"))
        remedy = "export the model with a lower --opset, or update ONNX Runtime" if newer else "export the model again"
        raise ManifestError(f"{path.name}: ONNX Runtime cannot open it ({error}); {remedy}") from None
    return Graph(session, threads)


def check_inputs(graph: Graph, path: Path, wanted: set[str]) -> None:
    """Raise ManifestError unless the graph takes exactly these inputs."""
    found = set(graph.inputs)
    if wanted != found:
        raise ManifestError(
            f"{path.name} takes {sorted(found)}, not {sorted(wanted)} as the manifest says; export the model again"
        )


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Session:
    """Open the graph; see `services.stage.processors`."""
    if not files:
        raise ManifestError(f"stage {spec.name!r} has no ONNX file; export the model again (espalier export)")
    graph = open_graph(files[0], threads)
    check_inputs(graph, files[0], {tensor.name for tensor in spec.inputs})
    return Session(graph, spec)
