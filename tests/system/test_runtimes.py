"""The same testbed file means the same thing under every runtime."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import numpy as np

from tests.system.composed import TESTBED
from tests.system.edge import Edge, running

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "minilm_reference.json").read_text())


def test_processes_and_containers_are_placed_alike_and_give_the_same_answers(
    images: None, minilm: Path, tmp_path: Path
) -> None:
    found = {}
    for runtime in ("processes", "engine"):
        with running(Edge(tmp_path / runtime, minilm.parent, runtime, TESTBED)) as edge:
            edge.settle()
            found[runtime] = placement(edge), [embedding(edge, text) for text in REFERENCE["texts"]]
            # What is left without its orchestrator goes down too.
            daemon = edge.state.read_daemon()
            assert daemon is not None
            os.kill(daemon.pid, signal.SIGKILL)
    assert found["processes"][0] == found["engine"][0]
    # Not bit for bit: a container does not inherit what chooses the BLAS kernel of this machine's processes.
    np.testing.assert_allclose(found["processes"][1], found["engine"][1], rtol=0, atol=1e-6)


def placement(edge: Edge) -> dict[str, list[tuple[str, str]]]:
    """Node and state of every replica, by service."""
    services = edge.status()["services"]
    return {name: sorted((r["node"], r["state"]) for r in service["replicas"]) for name, service in services.items()}


def embedding(edge: Edge, text: str) -> list[float]:
    """What the pipeline says of a text."""
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]}
    found = httpx.post(f"{edge.url}/v2/models/embed/infer", json=body, trust_env=False, timeout=20)
    assert found.status_code == 200, found.text
    values: list[float] = next(each["data"] for each in found.json()["outputs"] if each["name"] == "embedding")
    return values
