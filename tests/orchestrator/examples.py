"""A small world for tests: a model of three stages, and a testbed that serves it."""

from __future__ import annotations

from pathlib import Path

from models import manifest as manifests
from models.manifest import Manifest, StageSpec, TensorSpec
from orchestrator import testbed as testbeds
from orchestrator.testbed import Loaded

TESTBED = """\
name: small
nodes:
  edge-1: {cpus: 2, memory: 1GiB}
  edge-2: {cpus: 2, memory: 1GiB}
links:
  - {between: [edge-1, edge-2], latency: 1ms, bandwidth: 1Gb/s}
models:
  tiny: {source: minilm, precisions: [float32, int8]}
services:
  tokenise: {model: tiny, stage: tokenise, cpus: 0.1, memory: 64MiB, replicas: 1, standby: 1}
  encode: {model: tiny, stage: encode, cpus: 0.5, memory: 128MiB, replicas: 2}
  pool: {model: tiny, stage: pool, cpus: 0.1, memory: 64MiB}
pipelines:
  embed:
    deadline: 300ms
    epsilon: 0.05
    steps:
      - {id: tokenise, service: tokenise, inputs: {text: request.text}}
      - {id: encode, service: encode}
      - {id: pool, service: pool}
    outputs: {embedding: pool.embedding}
gateway: {port: 0}
control: {slot: 100ms, policy: manual}
workload: {embed: "poisson:20"}
"""


def load(text: str = TESTBED) -> Loaded:
    return testbeds.parse(text, "small.yaml")


def tensor(name: str, datatype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "datatype": datatype, "shape": shape})


MANIFEST = Manifest(
    model="tiny", source="minilm", architecture="BertModel", weights="seeded", typical_length={"seq": 16},
    stages=(
        StageSpec(
            name="tokenise", tier="light", processor="tokenise", files={"float32": ()},
            inputs=(tensor("text", "BYTES", "batch"),),
            outputs=(tensor("input_ids", "INT64", "batch", "seq"), tensor("attention_mask", "INT64", "batch", "seq")),
        ),
        StageSpec(
            name="encode", tier="core", processor="onnx", files={"float32": (), "int8": ()}, max_batch=16,
            inputs=(tensor("input_ids", "INT64", "batch", "seq"), tensor("attention_mask", "INT64", "batch", "seq")),
            outputs=(tensor("last_hidden_state", "FP32", "batch", "seq", 384),),
        ),
        StageSpec(
            name="pool", tier="light", processor="pool", files={"float32": ()},
            inputs=(
                tensor("last_hidden_state", "FP32", "batch", "seq", 384),
                tensor("attention_mask", "INT64", "batch", "seq"),
            ),
            outputs=(tensor("embedding", "FP32", "batch", 384),),
        ),
        StageSpec(
            name="broken", tier="light", processor="pool", files={"float32": ()},
            inputs=(
                tensor("last_hidden_state", "FP32", "batch", "seq", 384),
                tensor("attention_mask", "INT64", "batch", "seq"),
            ),
            outputs=(tensor("embedding", "FP32", "batch", 384),),
        ),
    ),
)  # fmt: skip


def export(directory: Path) -> Path:
    """A models directory that holds the manifest (and none of the files, which fake stages do not open)."""
    home = directory / "models" / "tiny"
    home.mkdir(parents=True)
    manifests.save(MANIFEST, home)
    return home.parent
