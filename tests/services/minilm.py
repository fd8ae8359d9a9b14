"""The real all-MiniLM-L6-v2, served: its stages and a gateway over the pipelines embed, classify and rank."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from models import manifest
from models.manifest import Precision
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Routes
from services.stage.app import Replica
from services.stage.onward import Identity
from services.stage.processors import open_processor
from tests.services import harness

STAGES = ("tokenise", "encode", "pool", "classify", "rank")


def open_replica(directory: Path, stage: str, precision: Precision = "float32") -> Replica:
    """A replica of one of the model's stages."""
    model = manifest.load(directory)
    spec = model.stage(stage)
    own: Precision = precision if precision in spec.files else "float32"
    files = manifest.check_files(spec, own, directory)
    return Replica(model, spec, open_processor(spec, files, 1), Identity(stage, f"{stage}-0", "local"))


def branch(prefix: str, source: str) -> tuple[Step, ...]:
    """Text to embedding: three steps named with a prefix."""
    tokens, hidden = f"{prefix}tokenise", f"{prefix}encode"
    mask, states = f"{tokens}.attention_mask", f"{hidden}.last_hidden_state"
    return (
        Step(id=tokens, service="tokenise", inputs={"text": f"request.{source}"}),
        Step(id=hidden, service="encode", inputs={"input_ids": f"{tokens}.input_ids", "attention_mask": mask}),
        Step(
            id=f"{prefix}pool",
            service="pool",
            inputs={"last_hidden_state": states, "attention_mask": mask},
        ),
    )


def joined(name: str, stage: str, left: str, right: str, inputs: dict[str, str], outputs: tuple[str, ...]) -> Pipeline:
    """Two texts' branches joined in one stage."""
    steps = (*branch(f"{left}-", left), *branch(f"{right}-", right), Step(id=stage, service=stage, inputs=inputs))
    return Pipeline(
        name=name, deadline_s=10.0, epsilon=0.05, steps=steps, outputs={output: f"{stage}.{output}" for output in outputs}
    )


PIPELINES = (
    Pipeline(
        name="embed",
        deadline_s=10.0,
        epsilon=0.05,
        steps=branch("", "text"),
        outputs={"embedding": "pool.embedding", "token_count": "tokenise.token_count"},
    ),
    joined(
        "classify",
        "classify",
        "text",
        "labels",
        {"embedding": "text-pool.embedding", "label_embeddings": "labels-pool.embedding", "labels": "request.labels"},
        ("scores", "label"),
    ),
    joined(
        "rank",
        "rank",
        "query",
        "documents",
        {"query_embedding": "query-pool.embedding", "document_embeddings": "documents-pool.embedding"},
        ("scores", "order"),
    ),
)


@asynccontextmanager
async def served(directory: Path, kept: Path) -> AsyncIterator[tuple[str, dict[str, str]]]:
    """Everything up; yields the gateway's address and each stage's."""
    replicas = [open_replica(directory, stage) for stage in STAGES]
    async with harness.stages(*replicas) as urls:
        services = {
            name: harness.service(name, replica.spec, url, model=replica.model.model)
            for name, replica, url in zip(STAGES, replicas, urls, strict=True)
        }
        routes = Routes(version=1, testbed="test", services=services, pipelines={p.name: p for p in PIPELINES})
        async with harness.gateway(routes, kept) as (url, _):
            yield url, dict(zip(STAGES, urls, strict=True))
