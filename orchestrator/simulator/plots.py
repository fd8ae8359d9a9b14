"""Pictures of a report, as PNG files beside it. Everything comes from the report's rows.

matplotlib is no dependency of the orchestrator: it is in the extra `dev`, and is imported only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import SetupFailed
from orchestrator.simulator import report
from orchestrator.simulator.report import Mean, Row
from orchestrator.simulator.scenario import Plot, Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = {"ours": "#c0392b", "baseline": "#34495e", "ablation": "#e59866", "limit": "#27ae60"}
"""By role: one glance tells ours from the rest."""
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*Xh<>p"
WIDTH = 7.0
"""Of a panel [inches]."""
LEAST_SHARE = 1e-4
"""The shortest bar on a logarithmic scale."""


def draw(scenario: Scenario, rows: Sequence[Row], directory: Path) -> list[Path]:
    """The scenario's plots of these rows; those for which the rows have nothing are left out.

    Raises:
        SetupFailed: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise SetupFailed("plots need matplotlib, which is in the extra dev: pip install matplotlib") from None
    written = []
    for name in scenario.plots:
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if not _PLOTS[name](figure, scenario, rows):
            continue
        figure.suptitle(f"{scenario.name}: {_TITLES[name]}", fontsize=11)
        path = directory / f"{name}.png"
        # Without metadata, since that would hold the version of the library.
        figure.savefig(path, dpi=120, metadata={"Software": None})
        written.append(path)
    return written


_TITLES: Mapping[Plot, str] = {
    "violins": "every seed a dot, means as lines",
    "loads": "means over seeds, 95 % intervals",
    "cases": "means over seeds, 95 % intervals",
    "frontier": "on-time ratio against cost, by each policy's knob",
    "v-sweep": "cost and virtual queue over V",
    "promises": "what was promised, what the policy reckoned with, what was measured",
    "response": "mean of all seeds, slot by slot",
}


def violins(figure: Figure, scenario: Scenario, rows: Sequence[Row]) -> bool:
    """On-time ratio and cost of every policy over the seeds, a panel for each load."""
    loads = sorted({row["load"] for row in rows})
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure.set_size_inches(2 * WIDTH, max(2.5, 0.28 * len(labels) + 1.0) * len(loads))
    panels = figure.subplots(len(loads), 2, squeeze=False, sharey=True)
    for line, load in zip(panels, loads, strict=True):
        for axes, key, title in zip(line, ("on_time_ratio", "cost"), ("on-time ratio", "cost"), strict=True):
            for place, label in enumerate(labels):
                group = [row for row in rows if row["label"] == label and row["load"] == load and row[key] is not None]
                _violin(axes, [row[key] for row in group], place, COLOURS[group[0]["role"]] if group else "")
            axes.set_title(f"{title}, load {load:g}", fontsize=9)
            axes.set_yticks(range(len(labels)), labels, fontsize=8)
            axes.grid(axis="x", alpha=0.3)
        line[0].invert_yaxis()
    return bool(rows)


def _violin(axes: Axes, values: list[float], place: int, colour: str) -> None:
    if not values:
        return
    if len(values) > 2 and max(values) > min(values):
        body = axes.violinplot([values], [place], orientation="horizontal", widths=0.8, showextrema=False)
        for part in body["bodies"]:  # type: ignore[attr-defined]
            part.set_facecolor(colour)
            part.set_alpha(0.35)
    axes.plot(values, [place] * len(values), ".", color=colour, markersize=3, alpha=0.7)
    axes.plot([sum(values) / len(values)], [place], "|", color=colour, markersize=14, markeredgewidth=2)


def loads(figure: Figure, scenario: Scenario, rows: Sequence[Row]) -> bool:
    """On-time ratio and cost over the load, with bands of 95 %."""
    return _curves(figure, rows, lambda row: float(row["load"]), "load")


def cases(figure: Figure, scenario: Scenario, rows: Sequence[Row]) -> bool:
    """The same over the field that varies, where it is a number."""
    if len(scenario.vary) != 1:
        return False
    field = next(iter(scenario.vary))
    return _curves(figure, rows, lambda row: float(row["case"][field]), field, log=True)


def _curves(figure: Figure, rows: Sequence[Row], at: Callable[[Row], float], name: str, *, log: bool = False) -> bool:
    """Costs are over those of ours under the same seed: between seeds they differ more than between policies."""
    figure.set_size_inches(2 * WIDTH, 5.5)
    left, right = figure.subplots(1, 2)
    ours = {_setting(row): row["cost"] for row in rows if row["role"] == "ours"}
    relative = all(_setting(row) in ours for row in rows)
    paid = [{**row, "cost": row["cost"] / ours[_setting(row)]} for row in rows] if relative else rows
    for number, ((label,), group) in enumerate(report.grouped(paid, "label").items()):
        places = sorted({at(row) for row in group})
        for axes, key in ((left, "on_time_ratio"), (right, "cost")):
            points = [(x, report.means([row for row in group if at(row) == x], key)) for x in places]
            _band(axes, [(x, mean) for x, mean in points if mean is not None], label, group[0]["role"], number)
    left.set_ylim(*_within(left.get_ylim()))
    left.set_ylabel("on-time ratio")
    right.set_ylabel("cost over that of ours" if relative else "cost")
    for axes in (left, right):
        axes.set_xlabel(name)
        if log:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return bool(rows)


def _setting(row: Row) -> tuple[str, float, int]:
    return report.case_of(row), row["load"], row["seed"]


def _within(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits of an axis of ratios: intervals of means may reach beyond what a ratio can be."""
    return max(0.0, limits[0]), min(1.005, limits[1])


def _band(axes: Axes, points: list[tuple[float, Mean]], label: str, role: str, number: int) -> None:
    """A curve; only ours and the limit with their intervals as a band, the others' as bars, so that all can be told apart."""
    x, style = [at for at, _ in points], _style(role, number)
    middle = [mean.mean for _, mean in points]
    low = [mean.mean if mean.low is None else mean.low for _, mean in points]
    high = [mean.mean if mean.high is None else mean.high for _, mean in points]
    axes.plot(x, middle, label=label, **style)
    if role == "ours":
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    else:
        spread = [[m - b for m, b in zip(middle, low, strict=True)], [t - m for m, t in zip(middle, high, strict=True)]]
        axes.errorbar(x, middle, yerr=spread, fmt="none", ecolor=style["color"], elinewidth=0.6, capsize=2, alpha=0.5)


def _style(role: str, number: int) -> dict[str, Any]:
    """Ours in one colour and thick; of the others each its own."""
    shades = ("#1f4e79", "#7d3c98", "#117864", "#9a7d0a", "#566573", "#5dade2", "#a04000", "#1a5276")
    return {
        "color": COLOURS[role] if role in ("ours", "limit") else shades[number % len(shades)],
        "linestyle": "-" if role == "ours" else LINES[number % len(LINES)],
        "linewidth": 2.4 if role == "ours" else 1.2,
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
    }


def frontier(figure: Figure, scenario: Scenario, rows: Sequence[Row]) -> bool:
    """What each family's knob buys, the frontier as a line. On-time ratios are spread as the late ones' logarithms."""
    settings = list(report.grouped(rows, "case", "load").items())
    figure.set_size_inches(1.5 * WIDTH, 5.5 * max(1, len(settings)))
    panels = figure.subplots(max(1, len(settings)), 1, squeeze=False)
    for axes, ((case, load), group) in zip(panels[:, 0], settings, strict=False):
        for number, (family, (role, points)) in enumerate(report.frontiers(group).items()):
            style = _style(role, number)
            axes.plot([cost for _, cost in points], [max(1 - ratio, LEAST_SHARE) for ratio, _ in points], label=family, **style)
            for each in report.grouped([row for row in group if row["family"] == family], "label").values():
                ratio, cost = report.means(each, "on_time_ratio"), report.means(each, "cost")
                if ratio is not None and cost is not None:
                    axes.plot([cost.mean], [max(1 - ratio.mean, LEAST_SHARE)], style["marker"], color=style["color"], alpha=0.3)
        axes.set_yscale("log")
        axes.invert_yaxis()
        axes.set_yticks([0.1, 0.05, 0.02, 0.01, 0.005, 0.001], ["0.9", "0.95", "0.98", "0.99", "0.995", "0.999"])
        axes.minorticks_off()
        axes.set_title(", ".join(filter(None, [case, f"load {load:g}"])), fontsize=9)
        axes.set_xlabel("cost")
        axes.set_ylabel("on-time ratio")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return bool(rows)


def v_sweep(figure: Figure, scenario: Scenario, rows: Sequence[Row]) -> bool:
    """Cost above its limit, and the virtual queue, over V, both on logarithmic scales, with the slopes fitted."""
    option = next((claim.option for claim in scenario.claims if claim.claim == "v_sweep"), "v")
    points = report.sweep(rows, option)
    if len(points) < 3:
        return False
    figure.set_size_inches(2 * WIDTH, 4.5)
    left, right = figure.subplots(1, 2)
    limit, cost_slope = report.excess(points)
    above = [(v, cost - limit) for v, cost, _ in points if cost > limit]
    queues = [(v, queue) for v, _, queue in points if queue > 0]
    for axes, pairs, fitted, title in (
        (left, above, cost_slope, f"cost above its limit of {limit:.4g}"),
        (right, queues, report.slope(queues), "virtual queue [tasks]"),
    ):
        if pairs:
            axes.loglog(*zip(*pairs, strict=True), "o-", color=COLOURS["ours"])
        axes.set_title(f"{title}: V^{'?' if fitted is None else format(fitted, '.2f')}", fontsize=10)
        axes.set_xlabel("V")
        axes.grid(alpha=0.3, which="both")
    return True


def promises(figure: Figure, scenario: Scenario, rows: Sequence[Row]) -> bool:
    """For every policy that reckons with a bound: epsilon, the bound, and what was measured, by load and pipeline."""
    told = [row for row in rows if row["promised"]]
    settings = list(report.grouped(told, "label", "case", "load").items())
    if not settings:
        return False
    pipelines = list(told[0]["promised"])
    figure.set_size_inches(2 * WIDTH, 2.6 * math.ceil(len(settings) / 2) + 0.6)
    panels = figure.subplots(math.ceil(len(settings) / 2), 2, squeeze=False, sharey=True).ravel()
    for axes, ((label, case, load), group) in zip(panels, settings, strict=False):
        bars = {
            "epsilon": [group[0]["epsilon_by_pipeline"].get(name, 0.0) for name in pipelines],
            "reckoned with": [_average([row["promised"].get(name) for row in group]) for name in pipelines],
            "measured": [_average([row["late_by_pipeline"].get(name) for row in group]) for name in pipelines],
        }
        for number, (what, heights) in enumerate(bars.items()):
            places = [i + 0.27 * (number - 1) for i in range(len(pipelines))]
            colour = ("#b2babb", "#5d6d7e", COLOURS["ours"])[number]
            axes.bar(places, [max(height, LEAST_SHARE) for height in heights], 0.25, label=what, color=colour)
        axes.set_yscale("log")
        axes.set_ylim(LEAST_SHARE, 1)
        axes.set_xticks(range(len(pipelines)), pipelines, fontsize=8)
        axes.set_title(", ".join(filter(None, [label, case, f"load {load:g}"])), fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return True


def _average(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def response(figure: Figure, scenario: Scenario, rows: Sequence[Row]) -> bool:
    """Over time: replicas at work, standbys, and the share of late tasks, averaged over seeds; at the first case and load."""
    told = [row for row in rows if row.get("series")]
    if not told:
        return False
    (_, group), *_ = report.grouped(told, "case", "load").items()
    figure.set_size_inches(1.6 * WIDTH, 9)
    panels = figure.subplots(3, 1, sharex=True)
    for number, ((label,), each) in enumerate(report.grouped(group, "label").items()):
        times = each[0]["series"]["t"]
        style = {**_style(each[0]["role"], number), "marker": ""}
        sums = {
            key: [sum(row["series"][key][i] for row in each) for i in range(len(times))]
            for key in ("ready", "standby", "ended", "late")
        }
        panels[0].plot(times, [ready / len(each) for ready in sums["ready"]], label=label, **style)
        panels[1].plot(times, [standby / len(each) for standby in sums["standby"]], **style)
        late = [late / ended if ended else math.nan for late, ended in zip(sums["late"], sums["ended"], strict=True)]
        panels[2].plot(times, late, **style)
    panels[2].axhline(group[0]["epsilon"], color="black", linewidth=0.8, linestyle=":")
    for axes, title in zip(
        panels, ("replicas at work", "standbys, and replicas that load", "late, of what ended in the slot"), strict=True
    ):
        axes.set_ylabel(title, fontsize=9)
        axes.grid(alpha=0.3)
        for loss in scenario.faults:
            axes.axvline(loss.at, color="black", linewidth=0.8)
    panels[2].set_xlabel("time [s]")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return True


_PLOTS: Mapping[Plot, Callable[[Figure, Scenario, Sequence[Row]], bool]] = {
    "violins": violins,
    "loads": loads,
    "cases": cases,
    "frontier": frontier,
    "v-sweep": v_sweep,
    "promises": promises,
    "response": response,
}
