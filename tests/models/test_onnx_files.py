"""Making ONNX files: a weight that a table holds already is stored once, and rotary angles stay exact in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from models import onnx_files
from models.adapters.piece import Graph
from models.errors import ExportFailed
from models.manifest import TensorSpec
from models.session import Session

TABLE = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)


class Head(nn.Module):
    """Logits over a table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 500, bias=False)
        self.head.weight = nn.Parameter(torch.from_numpy(TABLE))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, 16] to [batch, 500]."""
        logits: Tensor = self.head(hidden)
        return logits


def _graph() -> Graph:
    inputs = (TensorSpec(name="hidden", datatype="FP32", shape=("batch", 16)),)
    outputs = (TensorSpec(name="logits", datatype="FP32", shape=("batch", 500)),)
    return Graph(Head(), (torch.zeros(2, 16),), inputs, outputs, shared={"head.weight": "table.npy"})


def test_a_weight_that_a_table_holds_is_stored_once(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", TABLE)
    path = tmp_path / "head.float32.onnx"
    assert onnx_files.write_float32("head", _graph(), onnx_files.DEFAULT_OPSET, path) == (path,)
    assert sum(file.stat().st_size for file in tmp_path.iterdir() if file != path) < TABLE.nbytes + 200
    hidden = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    np.testing.assert_allclose(Session(path).run({"hidden": hidden})[0], hidden @ TABLE.T, atol=1e-4)
    half, *_ = onnx_files.write_float16(path, tmp_path / "head.float16.onnx")
    np.testing.assert_allclose(Session(half).run({"hidden": hidden})[0], hidden @ TABLE.T, atol=0.05)


def test_a_table_that_holds_something_else_is_not_shared(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", TABLE + 1)
    with pytest.raises(ExportFailed, match=r"table\.npy does not hold the weight 'head\.weight'"):
        onnx_files.write_float32("head", _graph(), onnx_files.DEFAULT_OPSET, tmp_path / "head.float32.onnx")


def test_a_table_that_is_not_there_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match=r"table\.npy is not there to be shared"):
        onnx_files.write_float32("head", _graph(), onnx_files.DEFAULT_OPSET, tmp_path / "head.float32.onnx")


def test_rotary_angles_are_exact_in_half_precision(lm_ci: Path) -> None:
    nodes = onnx.load(lm_ci / "generate.float16.onnx", load_external_data=False).graph.node
    makers = {name: node for node in nodes for name in node.output}
    waiting = [node for node in nodes if node.op_type in {"Cos", "Sin"}]
    assert waiting
    while waiting:
        node = waiting.pop()
        to = [attribute.i for attribute in node.attribute if attribute.name == "to"]
        assert to != [onnx.TensorProto.FLOAT16], f"{node.name} rounds what an angle is made of"
        waiting += [makers[name] for name in node.input if name in makers]
