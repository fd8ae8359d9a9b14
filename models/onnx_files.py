"""The one place where ONNX files are made: from a PyTorch module, and from a float32 file its int8 twin.

The rest of the folder need not know which exporter, which opset's quirks, or how noisy either library is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from models.adapters.piece import Graph
from models.errors import ExportFailed
from models.manifest import StageSpec

DEFAULT_OPSET = 23
"""The first with a standard Attention operator: 40 % fewer nodes. 20 is the fall-back for runtimes without it."""
OPSETS = (20, 21, 22, 23)


def write_float32(spec: StageSpec, graph: Graph, opset: int, path: Path) -> tuple[Path, ...]:
    """Trace a module at symbolic shapes and write it; weights go into a file beside it, which runtimes map, not copy.

    Args:
        spec: Gives the tensors' names and their symbolic axes.
        graph: The module and one example of its inputs.
        opset: Version of the ONNX operator set.
        path: Of the ONNX file.

    Returns:
        The files written, the one to open first.

    Raises:
        ExportFailed: the module does not trace at symbolic shapes, or an operator is not in the opset.
    """
    import torch  # noqa: PLC0415

    axes = tuple({i: a for i, a in enumerate(tensor.shape) if isinstance(a, str)} for tensor in spec.inputs)
    with _quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                graph.module.eval(),
                graph.example,
                path,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=axes,
                opset_version=opset,
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises some forty classes, none of them public
            raise ExportFailed(f"stage {spec.name!r}: torch.onnx.export at opset {opset}: {error}") from error
    return _files(path)


def write_int8(float32: Path, path: Path) -> tuple[Path, ...]:
    """Quantise the weights of a float32 file to int8, one scale per channel; activations are quantised as they come.

    Args:
        float32: The ONNX file to read.
        path: Of the ONNX file to write.

    Returns:
        The files written, the one to open first.

    Raises:
        ExportFailed: the quantiser broke down.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    with _quiet():
        try:
            quantize_dynamic(
                float32,
                path,
                per_channel=True,  # one scale per tensor costs MiniLM four times the error
                weight_type=QuantType.QInt8,
                # Left to choose, the quantiser rewrites the standard Attention into its own QAttention: an invalid model.
                op_types_to_quantize=["MatMul"],
            )
        except Exception as error:  # as above: whatever onnx and onnxruntime raise
            raise ExportFailed(f"{float32.name}: cannot be quantised: {error}") from error
    return _files(path)


def _files(path: Path) -> tuple[Path, ...]:
    data = path.with_name(path.name + ".data")
    return (path, data) if data.exists() else (path,)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' chatter from the user: progress lines, hints to install torchvision, their own deprecations."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
