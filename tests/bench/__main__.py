"""Runs every bench, prints its figures beside what is aimed at, and writes out/bench/report.json.

Keys of the report: `hop_overhead_s` {p50, p99} [s], the encoder being int8 as in the demo, and `hop_overhead_float32_s`
likewise; `throughput_ratio` (split over one process); `gateway_rps_per_core` [requests per processor second of the gateway];
`http_floor_s` [s]; `overload` {on_time_ratio, perfect_on_time_ratio, ...}; `start_s` [s]; `light_resident_bytes` by stage;
`memory` by testbed {ratio (shared stages over one process per task), ratio_of_stages, ...};
`let_out_RUNTIME_s` and `cold_start_RUNTIME_s`, from order to gateway [s];
`container_hop_ratio` (hop overhead in containers over that of processes; absent where there are no images); `policies` by name
{on_time_ratio, late_ratio, cost, replicas, starts}, live, under one schedule; `parity` {on_time_ratio, replicas, cost, stages},
each {live, simulated}; `simulator` (task-stage events per second); `tick_s` (of the controller); `placement_solve`
(seconds and gap of the integer program); `machine`.
What else stands there says how they came about.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from models.manifest import Precision
from tests.bench import (
    containers,
    gateway,
    hop,
    letting_out,
    memory,
    overload,
    parity,
    policies,
    simulator,
    solve,
    start,
    throughput,
    tick,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "out" / "models" / "minilm"
REPORT = ROOT / "out" / "bench" / "report.json"


def main() -> int:
    """Measure, print, write; 0 when everything could be measured."""
    subprocess.run([sys.executable, "-m", "models", "export", "minilm", "--out", str(MODEL), "--precision", "float32",
                    "--precision", "int8"], check=True)  # fmt: skip
    for name in memory.COMPARED:
        words = ["export", str(memory.TESTBEDS / f"{name}.yaml"), "--models-dir", str(MODEL.parent)]
        subprocess.run([sys.executable, "-m", "orchestrator", *words], check=True)
    console = Console(stderr=True)
    report: dict[str, Any] = {"machine": {"cpus": len(os.sched_getaffinity(0)), "platform": platform.platform()}}
    benches = (
        ("start and light stages", lambda: start.measure(MODEL)),
        ("memory, shared against monoliths", lambda: memory.measure(MODEL.parent)),
        ("hop overhead, int8", lambda: hops(MODEL, "int8")),
        ("hop overhead, float32", lambda: hops(MODEL, "float32")),
        ("HTTP floor", lambda: hop.floor(MODEL)),
        ("gateway", gateway.measure),
        ("throughput", lambda: throughput.measure(MODEL)),
        ("overload", lambda: overload.measure(MODEL)),
        ("letting out, processes", lambda: letting_out.measure(MODEL, "processes")),
        ("containers", lambda: in_containers(MODEL)),
        ("policies", policies.measure),
        ("simulated against live", parity.measure),
        ("simulator", simulator.measure),
        ("controller", tick.measure),
        ("placement", solve.measure),
    )
    for name, bench in benches:
        console.print(f"{name} …")
        figures: dict[str, Any] = uvloop.run(bench())  # type: ignore[no-untyped-call]
        report |= figures
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    console.print(_table(report))
    console.print(f"written to {REPORT.relative_to(ROOT)}")
    return 0


async def hops(model: Path, precision: Precision) -> dict[str, Any]:
    """The overhead under the key it is known by: plain for int8, which the demo serves."""
    figures = await hop.measure(model, precision)
    key = "hop_overhead_s" if precision == "int8" else f"hop_overhead_{precision}_s"
    return {key: figures.pop("overhead_s"), f"hop_{precision}": figures}


async def in_containers(model: Path) -> dict[str, Any]:
    """Nothing where there is no engine with the images (`docker compose build`)."""
    if not containers.possible():
        return {}
    return await containers.measure(model) | await letting_out.measure(model, "engine")


def _table(report: dict[str, Any]) -> Table:
    table = Table("figure", "measured", "aimed at", title="make bench")
    small, large, over = report["hop_overhead_s"], report["hop_overhead_float32_s"], report["overload"]
    kept = f"{over['on_time_ratio']:.3f} / {over['perfect_on_time_ratio']:.3f}"
    rows = [
        ("hop overhead, gateway + 3 stages, int8, p50", f"{small['p50'] * 1e3:.2f} ms", "≤ 3 ms"),
        ("hop overhead, int8, p99", f"{small['p99'] * 1e3:.2f} ms", "≤ 8 ms"),
        ("hop overhead, float32, p50", f"{large['p50'] * 1e3:.2f} ms", ""),
        ("hop overhead, float32, p99", f"{large['p99'] * 1e3:.2f} ms", ""),
        ("HTTP floor, one hop", f"{report['http_floor_s'] * 1e3:.2f} ms", ""),
        ("gateway, requests per processor second", f"{report['gateway_rps_per_core']:.0f}", "≥ 1000"),
        ("throughput, split / one process", f"{report['throughput_ratio']:.3f}", ""),
        (
            "overload, on time / a perfect server",
            kept,
            "≥ 0.78 / 0.83",
        ),
        ("overload, on time from 1 s after it", f"{over['recovered_on_time_ratio']:.3f}", "≥ 0.99"),
        ("start of a pipeline to its first answer", f"{report['start_s']:.2f} s", "≤ 5 s"),
        *(
            (
                f"memory, {name}: shared stages / monoliths (beyond empty processes)",
                f"{found['ratio']:.2f} ({found['ratio_of_stages']:.2f})",
                "",
            )
            for name, found in report["memory"].items()
        ),
        ("idle light stages, resident", f"{max(report['light_resident_bytes'].values()) / 2**20:.0f} MiB", "≤ 80 MiB"),
    ]
    for runtime in ("processes", "engine"):
        if f"let_out_{runtime}_s" in report:
            let_out, cold = report[f"let_out_{runtime}_s"], report[f"cold_start_{runtime}_s"]
            rows.append((f"a standby let out, {runtime}: order to gateway", f"{let_out * 1e3:.0f} ms", "≤ 300 ms"))
            rows.append((f"a replica started from nothing, {runtime}", f"{cold:.2f} s", ""))
    if "container_hop_ratio" in report:
        rows.append(("hop overhead, containers / processes, p50", f"{report['container_hop_ratio']:.2f}", ""))
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(main())
