"""What a person sees: the progress bar while a run is on, and the tables of its report. The one door to rich."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadgen.outcome import OUTCOMES, Outcome

REDRAW_S = 0.5
"""Between two drawings of the bar. Each costs the event loop about a millisecond, which is send lag for whoever is due then."""


async def show_progress(console: Console, total: int, counts: Callable[[], Mapping[Outcome, int]]) -> None:
    """Draw a bar of the tasks that have ended until cancelled.

    Args:
        console: where to draw; must be a terminal.
        total: tasks of the whole schedule.
        counts: tasks per outcome so far.
    """
    columns = (BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} tasks"), TimeElapsedColumn())
    # auto_refresh would draw from a thread, which takes the interpreter from the sender at moments of its own choosing.
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console, auto_refresh=False, transient=True) as bar:
        line = bar.add_task("run", total=total, text="")
        while True:
            now = counts()
            text = ", ".join(f"{n} {outcome}" for outcome, n in now.items())
            bar.update(line, completed=sum(now.values()), text=text)
            bar.refresh()
            await asyncio.sleep(REDRAW_S)


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """The report as tables: one row per pipeline and one for all, then where the time went, then what to mind."""
    console.print(_pipelines(report))
    if report["stages"]:
        console.print(_stages(report))
    for remark in _remarks(report):
        console.print(remark, highlight=False, markup=False)


def _pipelines(report: Mapping[str, Any]) -> Table:
    table = _table(
        "Tasks on time (latency from the scheduled send; lag: p99)",
        "pipeline",
        "sent",
        "on time",
        "95 %",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "lag ms",
    )
    sections = dict(report["pipelines"])
    if len(sections) > 1:
        sections["all"] = report
    for name, section in sections.items():
        latency, interval = section["latency_s"], section["on_time_interval"]
        table.add_row(
            name,
            str(section["sent"]),
            _ratio(section["on_time_ratio"]),
            "-" if interval is None else f"{_ratio(interval[0])}–{_ratio(interval[1])}",
            _ms(latency["p50"]),
            _ms(latency["p95"]),
            _ms(latency["p99"]) + ("" if latency["p99_firm"] or latency["p99"] is None else "?"),
            _ms(section["send_lag_s"]["p99"]),
        )
    return table


def _stages(report: Mapping[str, Any]) -> Table:
    table = _table(
        "Where the time went: mean (p99) per visit",
        "service",
        "tasks",
        "queue ms",
        "compute ms",
        "transfer ms",
        "batch",
        "share",
    )
    for service, stage in report["stages"].items():
        spreads = (stage["queue_s"], stage["compute_s"], stage["transfer_s"])
        times = [f"{_ms(spread['mean'])} ({_ms(spread['p99'])})" for spread in spreads]
        table.add_row(service, str(stage["tasks"]), *times, f"{stage['batch_mean']:.1f}", _share(stage["share"]))
    table.add_row("elsewhere", *[""] * 5, _share(report["unattributed_share"]))
    return table


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _remarks(report: Mapping[str, Any]) -> list[str]:
    """Sentences for what the tables cannot say."""
    remarks = []
    warmup = report["warmup"]
    if warmup["tasks"]:
        remarks.append(f"warm-up excluded: {warmup['tasks']} tasks in {warmup['duration_s']:g} s before the measured part")
    unfirm = [name for name, s in report["pipelines"].items() if not s["latency_s"]["p99_firm"] and s["latency_s"]["n"]]
    if unfirm:
        remarks.append(f"?: too few answers for a p99 of {', '.join(unfirm)}; the report has its interval")
    for name, section in report["pipelines"].items():
        missed = [f"{section['outcomes'][outcome]} {outcome}" for outcome in OUTCOMES[1:] if section["outcomes"][outcome]]
        if missed:
            remarks.append(f"{name}, not on time: {', '.join(missed)}")
        if section["promise"] is not None:
            remarks.append(_promise(name, section["promise"]))
    if report["reasons"]:
        remarks.append("reasons: " + ", ".join(f"{n} {reason}" for reason, n in report["reasons"].items()))
    if not report["complete"]:
        remarks.append("interrupted: the tasks left count as cancelled")
    if not report["valid"]:
        remarks.append(f"INVALID: {report['invalid_reason']}")
    objective = report["objective"]
    if objective is not None:
        remarks.append(f"objective: {objective['on_time_ratio']:g} on time, {'met' if objective['met'] else 'MISSED'}")
    return remarks


def _promise(name: str, promise: Mapping[str, Any]) -> str:
    low, high = promise["interval"]
    return (
        f"{name}: promised at most {promise['epsilon']:g} not on time, measured {promise['violation']:.4f} "
        f"({low:.4f}–{high:.4f}): {promise['verdict']}"
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.1f}"
