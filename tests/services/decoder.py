"""A decoder small enough to be written by hand: one head of attention over its own inputs, as a real ONNX file.

Its weights are random but strong, so that every token and every position counts. `reference` computes the same without a cache,
one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.manifest import Manifest, StageSpec, TensorSpec, describe
from services.dataplane.wire import Array

VOCABULARY, WIDTH, CONTEXT, IMAGE_TOKENS, POSITIONS = 48, 8, 64, 3, 5
EOS, PAD, IMAGE_TOKEN = 24, 0, 2
_SCALE = np.float32(1 / np.sqrt(WIDTH))


def weights() -> tuple[Array, Array, Array]:
    """Embedding (vocabulary, d), head (d, vocabulary), the waves of the positions (d,)."""
    rng = np.random.default_rng(7)
    embedding = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    head = (3.0 * rng.normal(size=(WIDTH, VOCABULARY))).astype(np.float32)
    return embedding, head, (3 * rng.normal(size=WIDTH)).astype(np.float32)


def learned_positions() -> Array:
    return np.random.default_rng(8).normal(size=(CONTEXT, WIDTH)).astype(np.float32)


def stage(*, encoder: bool = False, image: bool = False, max_batch: int = 4, **parameters: Any) -> StageSpec:
    """The stage without its files."""
    prompt = (
        (TensorSpec(name="last_hidden_state", datatype="FP32", shape=("batch", POSITIONS, WIDTH)),)
        if encoder
        else tuple(TensorSpec(name=name, datatype="INT64", shape=("batch", "seq")) for name in ("input_ids", "attention_mask"))
    )
    if image:
        prompt += (TensorSpec(name="image_embedding", datatype="FP32", shape=("batch", IMAGE_TOKENS, WIDTH)),)
    options: list[tuple[str, Any, float]] = [
        ("max_tokens", "INT64", 8), ("temperature", "FP32", 0), ("top_p", "FP32", 1), ("seed", "INT64", 0),
    ]  # fmt: skip
    return StageSpec(
        name="generate",
        tier="core",
        processor="generate",
        inputs=(
            *prompt,
            *(TensorSpec(name=name, datatype=kind, shape=("batch",), default=value) for name, kind, value in options),
        ),
        outputs=(
            TensorSpec(name="output_ids", datatype="INT64", shape=("batch", "new")),
            TensorSpec(name="output_count", datatype="INT64", shape=("batch",)),
            TensorSpec(name="finish_reason", datatype="BYTES", shape=("batch",)),
        ),
        parameters={
            "layers": 1, "kv_heads": 1, "head_dim": WIDTH, "hidden": WIDTH, "vocabulary": VOCABULARY, "eos": [EOS], "pad": PAD,
            "context": CONTEXT, "max_tokens": 8, "encoder": encoder, "image_token": IMAGE_TOKEN if image else None,
            "prefix": [5, 6] if encoder else [], **parameters,
        },
        max_batch=max_batch,
    )  # fmt: skip


def write(directory: Path, *, encoder: bool = False, **options: Any) -> tuple[StageSpec, tuple[Path, ...]]:
    """Write the decoder's files; the stage with them, and their paths."""
    embedding, _, _ = weights()
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / "generate.float32.onnx"]
    onnx.save(_step(encoder), files[0])
    if encoder:
        files.append(directory / "generate-cross.float32.onnx")
        onnx.save(_cross(), files[-1])
        files.append(directory / "generate-positions.npy")
        np.save(files[-1], learned_positions())
    files.append(directory / "generate-embedding.npy")
    np.save(files[-1], embedding)
    spec = stage(encoder=encoder, **options)
    return spec.model_copy(update={"files": {"float32": tuple(describe(path, directory) for path in files)}}), tuple(files)


def manifest(spec: StageSpec) -> Manifest:
    """A model of this one stage."""
    return Manifest(model="tiny", source="made in a test", architecture="none", weights="seeded", stages=(spec,))


def reference(
    prompt: Sequence[int], count: int, *, image: Array | None = None, states: Array | None = None, suppress: Sequence[int] = ()
) -> list[int]:
    """Greedy tokens of one sequence, all computed anew for each of them; ends after EOS."""
    ids = list(prompt)
    made: list[int] = []
    while len(made) < count and EOS not in made:
        scores = logits(ids, image=image, states=states)
        scores[list(suppress)] = -np.inf
        made.append(int(np.argmax(scores)))
        ids.append(made[-1])
    return made


def logits(ids: Sequence[int], *, image: Array | None = None, states: Array | None = None) -> Array:
    """Of the token after `ids`."""
    embedding, head, place = weights()
    x = embedding[list(ids)].copy()
    if image is not None:
        x[np.flatnonzero(np.array(ids) == IMAGE_TOKEN)[:IMAGE_TOKENS]] = image
    if states is not None:
        x += learned_positions()[: len(ids)]
    else:
        x += np.sin(np.arange(len(ids), dtype=np.float32)[:, None] * place)
    out = x[-1] + _attend(x[-1], x)
    if states is not None:
        out = out + _attend(out, states * 2)
    return np.asarray(out @ head)


def _attend(query: Array, keys: Array) -> Array:
    scores = keys @ query / np.sqrt(WIDTH)
    shares = np.exp(scores - scores.max())
    return np.asarray((shares / shares.sum()) @ keys)


class _Graph:
    """Nodes one after another, each named by its output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, kind: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        name = to or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def cast(self, source: str, kind: int) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [source], [name], to=kind))
        return name

    def attend(self, query: str, keys: str, values: str, bias: str) -> str:
        scores = self("Mul", self("MatMul", query, self("Transpose", keys, perm=[0, 1, 3, 2])), self.constant(_SCALE))
        return self("MatMul", self("Softmax", self("Add", scores, bias), axis=-1), values)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _info(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _model(g: _Graph, inputs: list[Any], outputs: list[Any]) -> Any:
    graph = helper.make_graph(g.nodes, "tiny", inputs, outputs, g.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _step(encoder: bool) -> Any:
    g = _Graph()
    _, head, place = weights()
    x = "inputs_embeds"
    if not encoder:
        position = g("Unsqueeze", g.cast("position_ids", TensorProto.FLOAT), g.constant([2]))
        x = g("Add", x, g("Sin", g("Mul", position, g.constant(place))))
    row = g("Unsqueeze", x, g.constant([1]))
    for what in ("key", "value"):
        g("Concat", f"past_0_{what}", row, to=f"present_0_{what}", axis=2)
    total, new = (g("Gather", g("Shape", name), g.constant(2)) for name in ("present_0_key", row))
    zero, one = g.constant(0), g.constant(1)
    columns = g("Range", zero, total, one)
    query = g("Unsqueeze", g("Range", g("Sub", total, new), total, one), one_axis := g.constant([1]))
    seen = g("And", g("LessOrEqual", columns, query), g.cast(g("Unsqueeze", "attention_mask", one_axis), TensorProto.BOOL))
    bias = g("Where", g("Unsqueeze", seen, one_axis), g.constant(np.float32(0)), g.constant(np.float32(-3e4)))
    out = g("Add", row, g.attend(row, "present_0_key", "present_0_value", bias))
    if encoder:
        out = g("Add", out, g.attend(out, "cross_0_key", "cross_0_value", g.constant(np.float32(0))))
    last = g("Gather", g("Squeeze", out, one_axis), g.constant(-1), axis=1)
    g("MatMul", last, g.constant(head), to="logits")
    cache = ("batch", 1, "past", WIDTH)
    inputs = [_info("inputs_embeds", "batch", "seq", WIDTH), _info("attention_mask", "batch", "total", kind=TensorProto.INT64)]
    if not encoder:
        inputs.append(_info("position_ids", "batch", "seq", kind=TensorProto.INT64))
    inputs += [_info(f"past_0_{what}", *cache) for what in ("key", "value")]
    if encoder:
        inputs += [_info(f"cross_0_{what}", "batch", 1, "positions", WIDTH) for what in ("key", "value")]
    outputs = [_info("logits", "batch", VOCABULARY)]
    outputs += [_info(f"present_0_{what}", "batch", 1, "total", WIDTH) for what in ("key", "value")]
    return _model(g, inputs, outputs)


def _cross() -> Any:
    g = _Graph()
    doubled = g("Mul", "last_hidden_state", g.constant(np.float32(2)))
    for what in ("key", "value"):
        g("Unsqueeze", doubled, g.constant([1]), to=f"cross_0_{what}")
    shape = ("batch", 1, "positions", WIDTH)
    return _model(
        g,
        [_info("last_hidden_state", "batch", "positions", WIDTH)],
        [_info(f"cross_0_{what}", *shape) for what in ("key", "value")],
    )
