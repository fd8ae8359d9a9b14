"""What runs is what the program placed: core services where it says, and as many as it says."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from click.testing import CliRunner

from orchestrator.__main__ import main
from tests.system.edge import TESTBED, Edge, running

NODES = """nodes:
  edge-1: {cpus: 8, memory: 8GiB}
  edge-2: {cpus: 8, memory: 8GiB}
  far: {cpus: 8, memory: 8GiB}

links:
  - {between: [edge-1, far], latency: 80ms, bandwidth: 1Gbps}
  - {between: [edge-2, far], latency: 80ms, bandwidth: 1Gbps}
"""


def test_core_replicas_run_where_the_program_puts_them_also_after_an_update(minilm: Path, tmp_path: Path) -> None:
    text = re.sub(r"nodes:\n(  edge.*\n)+", NODES, TESTBED.read_text()).replace("control: {policy: manual}\n", "")
    # The file asks for one encoder; that one node may be lost takes a second.
    text = text.replace("memory: 512MiB, replicas: 2", "memory: 512MiB, replicas: 1").replace("poisson:20", "poisson:5")
    testbed = tmp_path / "placed.yaml"
    testbed.write_text(text)
    with running(Edge(tmp_path, minilm.parent, testbed=testbed)) as edge:
        edge.up()
        edge.settle()
        assert sorted(placed(edge).values()) == [1, 1], "one each on two nodes"
        assert placed(edge) == planned(edge, testbed)
        # Of 20 ms each, as is assumed of a model without a profile.
        testbed.write_text(text.replace("poisson:5", "poisson:120"))
        edge.up()
        edge.settle()
        assert placed(edge).total() == sum(planned(edge, testbed).values()) > 2


def placed(edge: Edge) -> Counter[str]:
    """Encoders at work, by node."""
    replicas = edge.status()["services"]["encode"]["replicas"]
    return Counter(replica["node"] for replica in replicas if replica["state"] == "ready")


def planned(edge: Edge, testbed: Path) -> dict[str, int]:
    """Encoders, as `espalier plan` would have them."""
    saved = edge.home / "plan.json"
    asked = ["plan", str(testbed), "--models-dir", str(edge.models), "--save", str(saved)]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    found: dict[str, int] = json.loads(saved.read_text())["ready"]["encode"]
    return found
