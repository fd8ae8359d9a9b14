"""What a person at a terminal sees: tables of a running testbed, and of where its money went. Pure, from status documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table

FILE_WIDTH = 120
"""Columns where stdout is no terminal."""


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for a table in a file."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=FILE_WIDTH)


def status(document: Mapping[str, Any]) -> RenderableType:
    """The page of `espalier status`."""
    table = _table(
        "service", "tier", "ready", "standby", "starting", "draining", "req/s", "queue", "wait ms", "compute ms", "age s"
    )
    for name, service in document["services"].items():
        states, wanted, seen = service["states"], service["wanted"], service["signal"] or {}
        table.add_row(
            name,
            service["tier"],
            f"{states['ready']}/{wanted['ready']}",
            f"{states['standby']}/{wanted['standby']}",
            str(states["starting"]),
            str(states["draining"]),
            _number(seen.get("arrival_rate")),
            _number(seen.get("queue_length"), digits=0),
            _number(seen.get("wait_s"), 1e3),
            _number(seen.get("service_s"), 1e3, digits=2),
            _number(seen.get("age_s")),
        )
    gateway, decision = document["gateway"], document["decision"]
    lines = [
        f"testbed {document['testbed']}: {'ready' if document['ready'] else 'not ready'}, routes {document['version']}, "
        f"gateway {'-' if gateway is None else gateway['url'] + ' (' + gateway['state'] + ')'}, "
        f"cost {document['cost']['total']:.1f}",
        f"decision: {'-' if decision is None else decision['reason']}",
    ]
    if document["problem"]:
        lines.append(f"problem: {document['problem']}")
    if document["update"]:
        lines.append(f"update: {' '.join(filter(None, (document['update']['state'], document['update']['reason'])))}")
    if unusual := [f"{name} {node['state']}" for name, node in document["nodes"].items() if node["state"] != "up"]:
        lines.append(f"nodes: {', '.join(unusual)}")
    if document["slots"]["failed"]:
        lines.append(f"{document['slots']['failed']} of {document['slots']['done']} slots failed; see the orchestrator's log")
    for name, service in document["services"].items():
        lines += [f"{name} on {node}: {n} failures in a row; see the logs" for node, n in service["failures"].items() if n > 1]
    return Group(*lines, table)


def progress(document: Mapping[str, Any]) -> str:
    """One line while it comes up."""
    counts = [f"{name} {s['states']['ready']}/{s['wanted']['ready']}" for name, s in document["services"].items()]
    gateway = document["gateway"]
    return ", ".join([*counts, f"gateway {'-' if gateway is None else gateway['state']}"])


def links(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The table of `espalier probe`: one way each, and what a testbed file would say."""
    table = _table("link", "latency ms", "there", "back", "Mb/s", "there", "back")
    problems = []
    for row in rows:
        name = " - ".join(row["between"])
        if "problem" in row:
            problems.append(f"{name}: {row['problem']}")
            continue
        found = [row, *row["directions"]]
        table.add_row(
            name,
            *(_number(each["latency_s"], 1e3, digits=3) for each in found),
            *(_number(each["bandwidth_bytes_per_s"], 8e-6, digits=0) for each in found),
        )
    return Group(table, *problems)


def pairs(rows: Mapping[str, object]) -> Table:
    """Two columns."""
    table = Table(box=None, show_header=False)
    for key, value in rows.items():
        table.add_row(key, _plain(value))
    return table


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_inside(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def shared(services: Mapping[str, Mapping[str, int]]) -> Table:
    """Which services several pipelines shared, and how often each came by."""
    table = Table(title="Services that pipelines shared: visits computed", title_justify="left", box=SIMPLE)
    table.add_column("service")
    table.add_column("visits", justify="right")
    table.add_column("of them")
    for service, pipelines in services.items():
        parts = ", ".join(f"{pipeline} {visits}" for pipeline, visits in pipelines.items())
        table.add_row(service, str(sum(pipelines.values())), parts)
    return table


def _inside(value: object) -> str:
    return f"({_plain(value)})" if isinstance(value, Mapping) else str(value)


def costs(report: Mapping[str, Any], kinds: Mapping[str, float]) -> Table:
    """What a run cost, by pipeline, and what it was spent on."""
    table = Table(title="Cost of the run", title_justify="left", box=SIMPLE)
    table.add_column("pipeline")
    table.add_column("cost", justify="right")
    for name, section in report["pipelines"].items():
        table.add_row(name, _number(section["cost"]))
    spent = ", ".join(f"{kind} {value:.1f}" for kind, value in kinds.items())
    table.add_row("all", f"{_number(report['cost'])} ({spent})")
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=SIMPLE)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"
