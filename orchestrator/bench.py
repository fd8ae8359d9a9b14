"""`espalier bench`: the testbed's workload against its gateway, what serving it cost, and which services were shared.

The load is sent by `python -m loadgen` in a process of its own, so that its clock is nobody else's; this module reads the cost
counter around it and adds `cost` and `shared` to the report.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.client import Client
from orchestrator.errors import RunFailed
from orchestrator.testbed import Testbed

COST_KINDS = ("replicas", "standby", "starts")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beyond the testbed."""

    warmup_s: float
    seed: int
    objective: float | None
    duration_s: float | None
    records: Path | None
    as_json: bool
    gateway: str | None = None
    """Where to send it; None: to the address the orchestrator knows."""


@dataclass(frozen=True, slots=True)
class Result:
    """A run that has ended."""

    exit_code: int
    report: dict[str, Any] | None
    """None where the load generator could not even begin."""
    spent: Mapping[str, float]
    """Cost of the run by kind."""


def run(testbed: Testbed, client: Client, options: Options) -> Result:
    """Send the workload and account for it.

    Raises:
        RunFailed: the gateway is not ready.
    """
    status = client.status()
    if status["gateway"] is None or status["gateway"]["state"] != "ready":
        raise RunFailed("the gateway is not ready; see espalier status")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "report.json"
        before = client.status()["cost"]
        argv = command(testbed, options.gateway or status["gateway"]["url"], path, options)
        # As JSON, the one report on stdout is ours, which has the cost.
        exit_code = _run(argv, subprocess.DEVNULL if options.as_json else None)
        after = client.status()["cost"]
        if not path.exists():
            return Result(exit_code or RunFailed.exit_code, None, {})
        report = json.loads(path.read_text())
    spent = {kind: after[kind] - before[kind] for kind in COST_KINDS}
    charged = charge(report, sum(spent.values()))
    return Result(exit_code, {**charged, "shared": shared(charged)}, spent)


def _run(argv: Sequence[str], stdout: int | None) -> int:
    with subprocess.Popen(argv, stdout=stdout) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal told the load generator as well, and it writes down what it has measured before it ends.
            return process.wait()


def command(testbed: Testbed, url: str, report: Path, options: Options) -> list[str]:
    """Command line of the load generator."""
    argv = [sys.executable, "-m", "loadgen", url, "--report", str(report), "--seed", str(options.seed)]
    argv += ["--warmup", f"{options.warmup_s:g}"]
    for pipeline, arrivals in testbed.workload.items():
        argv += ["--pipeline", f"{pipeline}={arrivals}"]
    for option, value in (
        ("--duration", options.duration_s),
        ("--objective", options.objective),
        ("--records", options.records),
    ):
        if value is not None:
            argv += [option, str(value)]
    return argv


def charge(report: Mapping[str, Any], cost: float) -> dict[str, Any]:
    """The report with `cost`, and each pipeline's part of it in proportion to the compute seconds its tasks used.

    The counter runs from before the load generator starts until after it ends, so warm-up and the wait for the last
    answers are in it: the testbed has to be paid for then, too.
    """
    used = {name: compute_s(section["stages"].values()) for name, section in report["pipelines"].items()}
    total = sum(used.values())
    pipelines = {
        name: {**section, "cost": cost * (used[name] / total) if total else None}
        for name, section in report["pipelines"].items()
    }
    return {**report, "cost": cost, "pipelines": pipelines}


def shared(report: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Service -> pipeline -> visits that its replicas reported, of every service that several pipelines came by."""
    visits: dict[str, dict[str, int]] = {}
    for pipeline, section in report["pipelines"].items():
        for service, stage in section["stages"].items():
            visits.setdefault(service, {})[pipeline] = stage["visits"]
    return {service: by_pipeline for service, by_pipeline in visits.items() if len(by_pipeline) > 1}


def compute_s(stages: Iterable[Mapping[str, Any]]) -> float:
    """Compute seconds over all visits to these stages."""
    return math.fsum(stage["visits"] * stage["compute_s"]["mean"] for stage in stages)
