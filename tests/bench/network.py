"""What knowing the network is worth: four boxes, one of them behind slow links, the same load three times.

    python -m tests.bench.network

Blind, the testbed file has no links, so one place is as good as another. Then the links that `espalier probe` measured are
written into it: once with the stages held where they were, so that only routing knows, and once free. Writes
out/bench/network.json: bytes over the slow links beyond what passes without load, latency and on-time ratio of each. Needs an
engine with the images, and six minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator import probe, testbed
from tests.system.boxed import Boxes

RATE, MEASURED_S, IDLE_S, DEADLINE_S = 12.0, 40.0, 15.0, 1.0
FAR, OTHERS, BANDWIDTH = "box-2", ("box-1", "box-3", "box-4"), "1Mb/s"
"""The largest is behind slow links. Tasks come in at box-1, which has no room for an encoder."""
TESTBED = """\
name: network
nodes:
  box-1: {cpus: 0.5, memory: 4GiB}
  box-2: {cpus: 8, memory: 4GiB}
  box-3: {cpus: 2, memory: 4GiB}
  box-4: {cpus: 2, memory: 4GiB}
models:
  minilm: {source: minilm, precisions: [float32]}
services:
  tokenise: {model: minilm, stage: tokenise, cpus: 0.1, memory: 128MiB, nodes: [box-1]}
  encode: {model: minilm, stage: encode, cpus: 1, memory: 512MiB, replicas: 2, floor: 2%(encode)s}
  pool: {model: minilm, stage: pool, cpus: 0.1, memory: 128MiB, replicas: 2%(pool)s}
pipelines:
  embed:
    deadline: 1s
    epsilon: 0.05
    steps:
      - {id: tokenise, service: tokenise, inputs: {text: request.text}}
      - {id: encode, service: encode}
      - {id: pool, service: pool}
    outputs: {embedding: pool.embedding, token_count: tokenise.token_count}
gateway: {node: box-1, port: 8080}
control: {policy: manual}
workload:
  embed: "poisson:12"
"""
SERVICES = ("encode", "pool")
REPORT = Path(__file__).parents[2] / "out" / "bench" / "network.json"


def main(models: Path) -> int:
    """Measure the three; 0 when all were."""
    console, found = Console(stderr=True), {}
    with tempfile.TemporaryDirectory() as home:
        boxes, blind = Boxes(Path(home), models), Path(home) / "blind.yaml"
        blind.write_text(TESTBED % dict.fromkeys(SERVICES, ""))
        try:
            boxes.grow(4)
            for box in OTHERS:
                boxes.script("shape", FAR, box, "--bandwidth", BANDWIDTH)
            found["blind"] = _measured(boxes, blind, "blind", links=True)
            measured = probe.links(found["blind"].pop("links"))
            held = {service: f", nodes: [{', '.join(nodes)}]" for service, nodes in found["blind"]["nodes"].items()}
            for name, where in (("routing", held), ("both", dict.fromkeys(SERVICES, ""))):
                knowing, plain = Path(home) / f"{name}.yaml", testbed.parse(TESTBED % where, name)
                knowing.write_text(probe.with_links(plain.text, plain.testbed, measured))
                found[name] = _measured(boxes, knowing, name)
        finally:
            boxes.down()
    base = found["blind"]
    for name in ("routing", "both"):
        found[name]["bytes_ratio"] = found[name]["slow_bytes"] / base["slow_bytes"]
        found[name]["p95_ratio"] = found[name]["p95_s"] / base["p95_s"]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(found, indent=2) + "\n")
    console.print_json(json.dumps(found))
    return 0


def _measured(boxes: Boxes, file: Path, stack: str, *, links: bool = False) -> dict[str, Any]:
    """Deploy, measure without load and with it, remove."""
    boxes.deploy(file, stack)
    before = _slow_bytes(boxes)
    time.sleep(IDLE_S)
    idle = (_slow_bytes(boxes) - before) / IDLE_S
    before = _slow_bytes(boxes)
    with boxes.load(boxes.home, RATE, MEASURED_S, DEADLINE_S) as load:
        ran = load.finish()
    slow = _slow_bytes(boxes) - before - idle * MEASURED_S
    embed = ran.report["pipelines"]["embed"]
    found: dict[str, Any] = {
        "slow_bytes": max(0.0, slow), "slow_bytes_per_task": max(0.0, slow) / load.tasks, "idle_bytes_per_s": idle,
        "p50_s": embed["latency_s"]["p50"], "p95_s": embed["latency_s"]["p95"], "on_time": embed["on_time_ratio"],
        "nodes": {service: sorted(boxes.nodes(service)) for service in SERVICES},
    }  # fmt: skip
    if links:
        found["links"] = json.loads(boxes.espalier("probe", "/etc/espalier/testbed.yaml", "-o", "json"))["links"]
    boxes.remove()
    return found


def _slow_bytes(boxes: Boxes) -> float:
    """What has passed the slow links so far, both ways, by the counters of their shapers [bytes]."""
    total = 0
    for box, peer in [pair for other in OTHERS for pair in ((other, FAR), (FAR, other))]:
        shown = subprocess.run(
            ["docker", "exec", boxes.container(box), "tc", "-s", "class", "show", "dev", "eth0"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        (sent,) = re.findall(rf"class htb 1:{16 + int(peer.removeprefix('box-'))} .*\n\s*Sent (\d+) bytes", shown)
        total += int(sent)
    return float(total)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/models").resolve()))
