"""The emulated testbed: its model, its file, and one run of it under a policy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from models import manifest
from models.manifest import Manifest, ServiceLaw, ServicePoint, StageProfile, StageSpec, TensorSpec, Tier
from orchestrator.client import Client, connect
from orchestrator.state_dir import StateDir

LENGTH = 8
START_S = 0.6
"""From the order until a stage's process can take a task, beside its warm-up [s]: Python and its modules."""
LIMIT_S = 60.0
STAGES: Mapping[str, tuple[Tier, float, float]] = {
    "prepare": ("light", 0.030, 0.5),
    "encode": ("core", 0.020, 0.0),
    "decide": ("light", 0.050, 0.5),
    "report": ("light", 0.020, 0.5),
}
"""name -> tier, mean service time [s], cv2."""
PIPELINES: Mapping[str, Sequence[str]] = {"ask": ("prepare", "encode", "decide"), "scan": ("prepare", "encode", "report")}
DEADLINE_S, EPSILON = 0.4, 0.05


def export(directory: Path) -> None:
    """Write the model's manifest, with the profile that its laws amount to."""
    directory.mkdir(parents=True)
    stages = tuple(_stage(name, *STAGES[name]) for name in STAGES)
    made = Manifest(model="emulated", source="emulated", architecture="emulated", weights="seeded", stages=stages)
    manifest.save(made, directory)


def _stage(name: str, tier: Tier, mean_s: float, cv2: float) -> StageSpec:
    tensor = TensorSpec(name="x", datatype="FP32", shape=("batch", LENGTH), bytes_per_item=4 * LENGTH)
    spread = mean_s * cv2**0.5
    point = ServicePoint(
        batch=1, length=1, samples=1000, mean_s=mean_s, std_s=spread,
        p50_s=mean_s, p95_s=mean_s + 2 * spread, p99_s=mean_s + 3 * spread,
    )  # fmt: skip
    law = ServiceLaw(base_s=mean_s, per_unit_s=0.0, tail_ratio=max(1.0, 1 + 2 * cv2**0.5))
    profile = StageProfile(
        points=(point,), law=law, resident_bytes=64 << 20, load_s=START_S + 12 * mean_s, threads=1, cpu="emulated"
    )
    return StageSpec(
        name=name, tier=tier, processor="emulated", inputs=(tensor,), outputs=(tensor,), files={"float32": ()},
        parameters={"mean_s": mean_s, "cv2": cv2}, profile={"float32": profile},
    )  # fmt: skip


def testbed(policy: str, options: Mapping[str, Any], workload: Mapping[str, str]) -> dict[str, Any]:
    """The testbed file, as a document."""
    return {
        "name": "boxes",
        "nodes": {f"box-{i}": {"cpus": 5, "memory": "4GiB"} for i in (1, 2, 3)},
        "models": {"emulated": {"source": "emulated"}},
        "services": {
            name: {
                "model": "emulated", "stage": name, "cpus": 1, "memory": "128MiB",
                "replicas": 3, "standby": 0,
            }
            for name, (tier, _, _) in STAGES.items()
        },
        "pipelines": {name: _pipeline(steps) for name, steps in PIPELINES.items()},
        "gateway": {"port": 0},
        "control": {"slot": "500ms", "policy": {"name": policy, "options": dict(options)}},
        "workload": dict(workload),
    }  # fmt: skip


def _pipeline(steps: Sequence[str]) -> dict[str, Any]:
    first, *rest = steps
    return {
        "deadline": f"{DEADLINE_S * 1e3:g}ms",
        "epsilon": EPSILON,
        "steps": [{"id": first, "service": first, "inputs": {"x": "request.x"}}]
        + [{"id": step, "service": step, "inputs": {"x": f"{before}.x"}} for before, step in zip(steps, rest, strict=False)],
        "outputs": {"x": f"{steps[-1]}.x"},
    }


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a live run."""

    report: dict[str, Any]
    """The load generator's."""
    cost: float
    replicas: float
    """Ready replicas of all services, averaged over the run."""
    starts: int
    records: list[dict[str, Any]]


@contextmanager
def up(scratch: Path, policy: str, options: Mapping[str, Any], workload: Mapping[str, str]) -> Iterator[Client]:
    """The testbed, running as processes; everything is gone afterwards."""
    models = scratch / "models"
    if not models.exists():
        export(models / "emulated")
    file, state = scratch / "boxes.yaml", scratch / "state"
    file.write_text(yaml.safe_dump(testbed(policy, options, workload), sort_keys=False))
    command = [sys.executable, "-m", "orchestrator.daemon", str(file), "--state-dir", str(state), "--models-dir", str(models)]
    with (scratch / "orchestrator.log").open("wb") as log:
        daemon = subprocess.Popen([*command, "--stage-module", "tests.bench.emulated"], stdout=log, stderr=log)
    try:
        with _connected(state, daemon) as client:
            for _ in client.watch(LIMIT_S, lambda status: bool(status["ready"])):
                pass
            yield client
            client.shut_down()
        daemon.wait(LIMIT_S)
    finally:
        if daemon.poll() is None:
            # Unlike SIGTERM, which leaves what runs to a successor.
            daemon.send_signal(signal.SIGINT)
            daemon.wait(LIMIT_S)


@contextmanager
def _connected(state: Path, daemon: subprocess.Popen[bytes]) -> Iterator[Client]:
    until = time.monotonic() + LIMIT_S
    while not (state / "orchestrator.json").exists():
        if daemon.poll() is not None or time.monotonic() > until:
            raise RuntimeError((state.parent / "orchestrator.log").read_text()[-2000:])
        time.sleep(0.05)
    with connect(StateDir(state)) as client:
        yield client


def run(policy: str, options: Mapping[str, Any], workload: Mapping[str, str], *, seed: int, duration_s: float) -> Ran:
    """One live run of the testbed under the load generator."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        with up(directory, policy, options, workload) as client:
            status = client.status()
            began, before = time.monotonic(), status["cost"]
            report, records = _load(status["gateway"]["url"], directory, workload, seed, duration_s)
            elapsed_s, after = time.monotonic() - began, client.status()["cost"]
        return Ran(
            report=report,
            cost=after["total"] - before["total"],
            replicas=(after["replicas"] - before["replicas"]) / elapsed_s,
            starts=round(after["starts"] - before["starts"]),
            records=records,
        )


def _load(
    url: str, directory: Path, workload: Mapping[str, str], seed: int, duration_s: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    report, records = directory / "report.json", directory / "records.jsonl"
    command = [sys.executable, "-m", "loadgen", url, "--quiet", "--warmup", "0", "--duration", f"{duration_s:g}"]
    command += ["--seed", str(seed), "--report", str(report), "--records", str(records)]
    for name, spec in workload.items():
        command += ["--pipeline", f"{name}={spec}"]
    subprocess.run(command, check=True, capture_output=True, timeout=duration_s + LIMIT_S)
    return json.loads(report.read_text()), [json.loads(line) for line in records.read_text().splitlines()]
