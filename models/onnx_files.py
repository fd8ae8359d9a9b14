"""The one place where ONNX files are made: from a PyTorch module, and from a float32 file its int8 twin.

The rest of the folder need not know which exporter, which opset's quirks, or how noisy either library is.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.adapters.piece import Graph
from models.errors import ExportFailed

DEFAULT_OPSET = 23
"""The first with a standard Attention operator: 40 % fewer nodes. 20 is the fall-back for runtimes without it."""
OPSETS = (20, 21, 22, 23)
_EXTERNAL_BYTES = 1024
"""A weight smaller than this stays in the graph's own file."""


def write_float32(name: str, graph: Graph, opset: int, path: Path) -> tuple[Path, ...]:
    """Trace a module at symbolic shapes and write it; weights go into a file beside it, which runtimes map, not copy.

    Args:
        name: What to call it in a message.
        graph: The module, one example of its inputs, and the tensors' names and symbolic axes.
        opset: Version of the ONNX operator set.
        path: Of the ONNX file.

    Returns:
        The files written, the one to open first.

    Raises:
        ExportFailed: the module does not trace at symbolic shapes, or an operator is not in the opset.
    """
    import torch  # noqa: PLC0415

    with _quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                graph.module.eval(),
                graph.example,
                path,
                input_names=[tensor.name for tensor in graph.inputs],
                output_names=_output_names(graph),
                dynamic_shapes=_symbolic(graph),
                opset_version=opset,
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises some forty classes, none of them public
            raise ExportFailed(f"{name}: torch.onnx.export at opset {opset}: {error}") from error
        _share(name, graph.shared, path)
    return _files(path)


def write_float16(float32: Path, path: Path) -> tuple[Path, ...]:
    """Make every weight and the arithmetic half precision; inputs and outputs stay as they are, cast inside.

    Where the CPU has no half kernel for an operator, ONNX Runtime itself casts around it when it opens the file.

    Args:
        float32: The ONNX file to read.
        path: Of the ONNX file to write.

    Returns:
        The files written, the one to open first.

    Raises:
        ExportFailed: the converter broke down.
    """
    import onnx  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    with _quiet():
        try:
            whole = onnx.load(float32)
            # The converter has to know every tensor's type; left to infer them itself, it fails where weights pass 2 GiB.
            typed = onnx.shape_inference.infer_shapes(onnx.load(float32, load_external_data=False))
            del whole.graph.value_info[:]
            whole.graph.value_info.extend(typed.graph.value_info)
            model = convert_float_to_float16(
                whole, keep_io_types=True, disable_shape_infer=True, node_block_list=_angles(whole.graph.node)
            )
            _keep_exact(model.graph.node)
            data = path.name + ".data"
            onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=_EXTERNAL_BYTES)
        except Exception as error:  # as above: whatever onnx and onnxruntime raise
            raise ExportFailed(f"{float32.name}: cannot be made float16: {error}") from error
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
                use_external_data_format=True,  # weights in a file of their own are mapped, not copied
            )
        except Exception as error:  # as above: whatever onnx and onnxruntime raise
            raise ExportFailed(f"{float32.name}: cannot be quantised: {error}") from error
    return _files(path)


def _angles(nodes: Sequence[Any]) -> list[str]:
    """Names of the nodes that make rotary angles: a position times a frequency has no room in half precision."""
    makers = {name: node for node in nodes for name in node.output}
    waiting = [node for node in nodes if node.op_type in {"Cos", "Sin"}]
    found: dict[str, None] = {}
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found[node.name] = None
            waiting += [makers[name] for name in node.input if name in makers]
    return list(found)


def _keep_exact(nodes: Sequence[Any]) -> None:
    """Pass tensors between float32 nodes as they are; the converter makes them half on the way, and float32 again."""
    makers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        for i, name in enumerate(node.input):
            back = makers.get(name)
            down = makers.get(back.input[0]) if back is not None and back.name.endswith("_cast_to_fp32_node") else None
            if down is not None and down.name.endswith("_cast_to_fp16_node"):
                node.input[i] = down.input[0]


def _output_names(graph: Graph) -> list[str]:
    """The tensors' names; what goes in and comes out under one name is told apart in the file, where names are unique."""
    taken = {tensor.name for tensor in graph.inputs}
    return [f"{tensor.name}_out" if tensor.name in taken else tensor.name for tensor in graph.outputs]


def _symbolic(graph: Graph) -> tuple[Any, ...]:
    """Symbolic axes of each argument of the module, as torch.export wants them: those of `*past` are one tuple of their own."""
    axes = [{i: a for i, a in enumerate(tensor.shape) if isinstance(a, str)} for tensor in graph.inputs]
    kinds = [parameter.kind for parameter in inspect.signature(graph.module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(axes)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*axes[:named], tuple(axes[named:]))


def _share(name: str, shared: Mapping[str, str], path: Path) -> None:
    """Let weights of a file that has just been written point into the .npy files beside it that hold the same.

    Raises:
        ExportFailed: the exporter has changed or renamed such a weight, or its file is not there.
    """
    import onnx  # noqa: PLC0415

    if not shared:
        return
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for weight, file in shared.items():
        tensor = weights.get(weight)
        try:
            table: Any = np.load(path.with_name(file), mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise ExportFailed(f"{name}: {file} is not there to be shared: {error}") from error
        if tensor is None or tensor.raw_data != table.tobytes():
            raise ExportFailed(f"{name}: {file} does not hold the weight {weight!r}")
        tensor.ClearField("raw_data")
        place = {"location": file, "offset": str(table.offset), "length": str(table.nbytes)}
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items())
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx would add to it
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=_EXTERNAL_BYTES)


def _files(path: Path) -> tuple[Path, ...]:
    data = path.with_name(path.name + ".data")
    if not data.exists():
        return (path,)
    data.chmod(path.stat().st_mode)  # onnx makes it readable to its maker alone, and a stage's container runs as somebody else
    return path, data


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
