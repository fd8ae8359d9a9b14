"""What came of a scenario: rows, their means with intervals, and what is claimed held against what was measured.

Everything is a function of the rows (JSON objects, see `study`), so that a report can be made of saved rows again. A verdict is
computed, never assumed: claim, what was measured, and whether it holds; None where the rows do not tell.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from scipy.special import stdtrit

from orchestrator.simulator.scenario import ClaimSection, Loaded

Row = Mapping[str, Any]
CONFIDENCE = 0.95
SUMMED = ("on_time_ratio", "late_ratio", "cost", "replicas", "starts", "backlog")
COMPARED = frozenset({"baseline"})
"""Roles that ours is compared with; ablations are ours with a part missing, limits know the future."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean over seeds, with its interval of 95 % by Student's t; no interval of a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """Of at least one value; None of none."""
        n = len(values)
        if n == 0:
            return None
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean, None, None, 1)
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    def text(self, digits: int) -> str:
        """`0.9512 ±0.0031`."""
        spread = "" if self.high is None else f" ±{self.high - self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Something claimed, what was measured of it, and whether it holds; None where it was not measured."""

    claim: str
    measured: str
    holds: bool | None


def means(rows: Iterable[Row], key: str) -> Mean | None:
    """Of one quantity over rows; those without it are left out."""
    return Mean.of([float(row[key]) for row in rows if row.get(key) is not None])


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by these keys, in the order of their first appearance; a case is told by its text."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(case_of(row) if key == "case" else row[key] for key in keys), []).append(row)
    return found


def case_of(row: Row) -> str:
    """`nodes=32`; empty where nothing varies."""
    return ", ".join(f"{key}={value}" for key, value in row["case"].items())


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over seeds, by case, load and policy."""
    return [
        {"case": case, "load": load, "label": label, "role": group[0]["role"]}
        | {key: None if (mean := means(group, key)) is None else asdict(mean) for key in SUMMED}
        | {"promised": None if (mean := reckoned(group)) is None else asdict(mean)}
        for (case, load, label), group in grouped(rows, "case", "load", "label").items()
    ]


def reckoned(rows: Iterable[Row]) -> Mean | None:
    """The share of late tasks that the policy reckoned with, of the pipeline that has the most; None of one that does not."""
    return Mean.of([max(row["promised"].values()) for row in rows if row["promised"]])


def document(loaded: Loaded, rows: Sequence[Row], *, runs: int, plots: Sequence[str] = ()) -> dict[str, Any]:
    """The report as one JSON object; docs/scenarios.md has its keys. `runs` is how many rows there should be."""
    return {
        "scenario": loaded.scenario.name,
        "about": loaded.scenario.about,
        "sha256": loaded.sha256,
        "parameters": json.loads(loaded.scenario.model_dump_json()),
        "complete": len(rows) == runs,
        "runs": runs,
        "rows": list(rows),
        "summary": summary(rows),
        "verdicts": [asdict(verdict) for verdict in verdicts(loaded.scenario.claims, rows)],
        "plots": list(plots),
    }


def table(report: Mapping[str, Any]) -> RenderableType:
    """The report as a person reads it: means over seeds with 95 % intervals, and the verdicts below."""
    made = Table(box=SIMPLE)
    several = any(line["case"] for line in report["summary"])
    for heading in (*(["case"] if several else []), "policy"):
        made.add_column(heading, no_wrap=True)
    for heading in ("load", "on time", "late", "promised", "cost", "replicas", "starts"):
        made.add_column(heading, justify="right")
    for line in report["summary"]:
        found = {key: None if line[key] is None else Mean(**line[key]) for key in (*SUMMED, "promised")}
        spread = ["-" if (mean := found[key]) is None else mean.text(4) for key in ("on_time_ratio", "late_ratio")]
        plain = [
            "-" if (mean := found[key]) is None else f"{mean.mean:.{digits}f}"
            for key, digits in (("promised", 4), ("cost", 1), ("replicas", 2), ("starts", 1))
        ]
        made.add_row(*([line["case"]] if several else []), line["label"], f"{line['load']:g}", *spread, *plain)
    said = [f"{_mark(verdict['holds'])}  {verdict['claim']}: {verdict['measured']}" for verdict in report["verdicts"]]
    if not report["complete"]:
        said.append(f"incomplete: {len(report['rows'])} of {report['runs']} runs")
    return Group(made, *said)


def _mark(holds: bool | None) -> str:
    return "not measured" if holds is None else "holds" if holds else "FAILS"


# --- claims ---------------------------------------------------------------------------------------------------------------


def verdicts(claims: Sequence[ClaimSection], rows: Sequence[Row]) -> list[Verdict]:
    """All claims of a scenario, held against its rows."""
    return [verdict for claim in claims for verdict in _JUDGES[claim.claim](claim, _at(claim, rows))]


def _at(claim: ClaimSection, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if claim.load is None or row["load"] == claim.load]


def _ours(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["role"] == "ours"]


def on_time(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """Ours is on time at least so often, or within `slack` of the clairvoyant limit where that is lower."""
    wanted = 0.95 if claim.at_least is None else claim.at_least
    found = []
    for (case, load), group in _settings(claim, rows):
        said = f"{_where(case, load)}: on time at least {wanted:g}"
        mean = means(_ours(group), "on_time_ratio")
        limit = means([row for row in group if row["role"] == "limit"], "on_time_ratio")
        if mean is None:
            found.append(Verdict(said, "ours was not run", None))
            continue
        bar = wanted if limit is None else min(wanted, limit.mean - claim.slack)
        against = "" if limit is None else f" (the clairvoyant limit: {limit.text(4)})"
        found.append(Verdict(said, f"{mean.text(4)}{against}", mean.mean >= bar))
    return found


def not_below(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """Ours is on time no less often than the policy of that label, within `slack`."""
    found = []
    for (case, load), group in _settings(claim, rows):
        said = f"{_where(case, load)}: on time no less than {claim.label}"
        ours, other = (means(each, "on_time_ratio") for each in (_ours(group), [r for r in group if r["label"] == claim.label]))
        if ours is None or other is None:
            found.append(Verdict(said, "not both were run", None))
        else:
            found.append(Verdict(said, f"{ours.text(4)} against {other.text(4)}", ours.mean >= other.mean - claim.slack))
    return found


def cheapest(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """No baseline that is on time as often as ours costs less."""
    found = []
    for (case, load), group in _settings(claim, rows):
        said = f"{_where(case, load)}: cost no higher than that of any baseline that is on time as often"
        ours = _ours(group)
        ratio, cost = means(ours, "on_time_ratio"), means(ours, "cost")
        if ratio is None or cost is None:
            found.append(Verdict(said, "ours was not run", None))
            continue
        rivals = {}
        for (label,), each in grouped([r for r in group if r["role"] in COMPARED], "label").items():
            reached, paid = means(each, "on_time_ratio"), means(each, "cost")
            if reached is not None and paid is not None and reached.mean >= ratio.mean:
                rivals[label] = paid.mean
        if not rivals:
            found.append(Verdict(said, f"ours {cost.mean:.4g} at {ratio.mean:.4f}; no baseline is on time as often", True))
            continue
        best = min(rivals, key=lambda label: rivals[label])
        told = f"ours {cost.mean:.4g} at {ratio.mean:.4f}, {best} {_compared(cost.mean, rivals[best], group)}"
        found.append(Verdict(said, told, cost.mean <= rivals[best]))
    return found


def frontier(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """At every on-time level, ours costs no more than the best baseline, each at the knob that reaches the level."""
    found = []
    for (case, load), group in _settings(claim, rows):
        curves = frontiers(group)
        for level in claim.levels:
            said = f"{_where(case, load)}: at {level:g} on time, cost no higher than the best baseline's"
            costs = {family: cost_at(points, level) for family, (_, points) in curves.items()}
            roles = {family: role for family, (role, _) in curves.items()}
            ours = min((c for f, c in costs.items() if roles[f] == "ours" and c is not None), default=None)
            rivals = {f: c for f, c in costs.items() if roles[f] in COMPARED and c is not None}
            best = min(rivals, key=lambda family: rivals[family], default=None)
            if ours is None and best is None:
                found.append(Verdict(said, "nobody reaches it", None))
            elif ours is None:
                found.append(Verdict(said, f"ours does not reach it; {best} {rivals[str(best)]:.4g}", False))
            elif best is None:
                found.append(Verdict(said, f"ours {ours:.4g}; no baseline reaches it", True))
            else:
                told = f"ours {ours:.4g}, {best} {_compared(ours, rivals[best], group)}"
                found.append(Verdict(said, told, ours <= rivals[best]))
    return found


def _compared(ours: float, other: float, rows: Sequence[Row]) -> str:
    """The other's cost and what ours is of it: in all, and without the core tier, which costs everybody the same."""
    core = means(rows, "core_cost")
    light = "" if core is None or other <= core.mean else f" ({(ours - core.mean) / (other - core.mean):.3f} of the light tier)"
    return f"{other:.4g}: ratio {ours / other:.3f}{light}"


def frontiers(rows: Sequence[Row]) -> dict[str, tuple[str, list[tuple[float, float]]]]:
    """By family, its role and what its knob buys: (on-time ratio, cost), means over seeds, ascending; only what is worth it.

    A point is left out where another of the family is on time as often for less.
    """
    found: dict[str, tuple[str, list[tuple[float, float]]]] = {}
    for (family,), group in grouped(rows, "family").items():
        points = []
        for each in grouped(group, "label").values():
            ratio, cost = means(each, "on_time_ratio"), means(each, "cost")
            if ratio is not None and cost is not None:
                points.append((ratio.mean, cost.mean))
        kept = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)]
        found[family] = (group[0]["role"], sorted(set(kept)))
    return found


def cost_at(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Cost at an on-time level, along straight lines between the points of a frontier; None beyond its last."""
    if not points or points[-1][0] < level:
        return None
    above = next(i for i, (ratio, _) in enumerate(points) if ratio >= level)
    if above == 0:
        return points[0][1]
    (r0, c0), (r1, c1) = points[above - 1], points[above]
    return c0 + (c1 - c0) * (level - r0) / (r1 - r0)


def promise(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """The share of late tasks that was measured is no more than epsilon; what the policy reckoned with is told beside it."""
    found = []
    for (case, load), group in _settings(claim, rows):
        said = f"{_where(case, load)}: late no more often than epsilon"
        ours = _ours(group)
        late, epsilon = means(ours, "late_ratio"), means(ours, "epsilon")
        if late is None or epsilon is None:
            found.append(Verdict(said, "ours was not run", None))
            continue
        bound = reckoned(ours)
        beside = "" if bound is None else f"; reckoned with {bound.mean:.4f} for the worst pipeline"
        found.append(Verdict(said, f"{late.text(4)}, epsilon {epsilon.mean:g}{beside}", late.mean <= epsilon.mean))
    return found


def recovery(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """After a step in the load, the share of late tasks is back under epsilon within so many slots."""
    found = []
    for (case, load), group in _settings(claim, rows):
        said = f"{_where(case, load)}: back under epsilon within {claim.slots} slots of the step"
        ours = [row for row in _ours(group) if row.get("series")]
        if not ours or claim.at is None:
            found.append(Verdict(said, "ours was not run with its series", None))
            continue
        slots = slots_above(ours, claim.at, window=4 * claim.slots)
        told = f"{slots} slots" if slots < 4 * claim.slots else f"not within {slots} slots"
        found.append(Verdict(said, told, slots <= claim.slots))
    return found


def slots_above(rows: Sequence[Row], at_s: float, window: int) -> int:
    """Slots from a step until the last of the `window` after it in which more than epsilon of the tasks that ended were late.

    Tasks of all rows count together. A slot is told at its end: the one that begins with the step is the first.
    """
    last = 0
    times = rows[0]["series"]["t"]
    first = next((i for i, t in enumerate(times) if t > at_s + 1e-9), len(times))
    for number, i in enumerate(range(first, min(first + window, len(times))), start=1):
        ended, late = (sum(row["series"][key][i] for row in rows) for key in ("ended", "late"))
        if late > rows[0]["epsilon"] * ended:
            last = number
    return last


def steady(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """Under a constant load no service has another number of replicas at the end of a slot than at its beginning."""
    found = []
    for (case, load), group in _settings(claim, rows):
        said = f"{_where(case, load)}: no replica changes in the last {1 - claim.after:.0%} of the run"
        ours = [row["series"] for row in _ours(group) if row.get("series")]
        if not ours:
            found.append(Verdict(said, "ours was not run with its series", None))
            continue
        changes = [sum(series["changed"][math.ceil(claim.after * len(series["t"])) :]) for series in ours]
        found.append(Verdict(said, f"{sum(changes):g} changes in {len(changes)} runs", not any(changes)))
    return found


def v_sweep(claim: ClaimSection, rows: Sequence[Row]) -> list[Verdict]:
    """Cost falls towards its limit as 1/V, and the virtual queue grows as V: slopes on logarithmic scales of -1 and +1.

    The queue in question is that of broken promises: what real backlogs are worth does not hang on V in the controller.
    """
    points = sweep(rows, claim.option)
    if len(points) < 3:
        return [Verdict("cost falls as 1/V and the virtual queue grows as V", "fewer than three values of V were run", None)]
    floor, cost_slope = excess(points)
    queue_slope = slope([(v, queue) for v, _, queue in points if queue > 0])
    falls = all(later <= earlier * 1.01 for (_, earlier, _), (_, later, _) in itertools.pairwise(points))
    grows = all(later >= earlier * 0.99 for (_, _, earlier), (_, _, later) in itertools.pairwise(points))
    return [
        Verdict(
            "cost falls towards its limit no slower than 1/V",
            f"{points[0][1]:.4g} to {points[-1][1]:.4g}, limit {floor:.4g}; the excess falls as V^{_number(cost_slope)}",
            falls and cost_slope is not None and cost_slope <= -0.7,
        ),
        Verdict(
            "the virtual queue grows no faster than V",
            f"{points[0][2]:.3g} to {points[-1][2]:.3g} tasks, as V^{_number(queue_slope)}",
            grows and queue_slope is not None and queue_slope <= 1.3,
        ),
    ]


def sweep(rows: Sequence[Row], option: str) -> list[tuple[float, float, float]]:
    """(V, mean cost, mean virtual queue) of the policies that were run with several V, ascending."""
    found: dict[float, list[Row]] = {}
    for row in _ours(rows):
        if option in row["options"]:
            found.setdefault(float(row["options"][option]), []).append(row)
    points = [(v, means(group, "cost"), means(group, "virtual_queue")) for v, group in sorted(found.items())]
    return [(v, cost.mean, queue.mean) for v, cost, queue in points if cost is not None and queue is not None]


def excess(points: Sequence[tuple[float, float, float]]) -> tuple[float, float | None]:
    """The limit a of cost = a + b/V by least squares, and the slope of log(cost - a) over log V where that is above 0."""
    inverse = [1 / v for v, _, _ in points]
    costs = [cost for _, cost, _ in points]
    x, y = math.fsum(inverse) / len(points), math.fsum(costs) / len(points)
    spread = math.fsum((i - x) ** 2 for i in inverse)
    b = math.fsum((i - x) * (c - y) for i, c in zip(inverse, costs, strict=True)) / spread
    limit = y - b * x
    return limit, slope([(v, cost - limit) for v, cost, _ in points if cost > limit])


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of log y over log x by least squares; None of fewer than two points. All above 0."""
    if len(points) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mx, my = (math.fsum(values) / len(logs) for values in zip(*logs, strict=True))
    return math.fsum((x - mx) * (y - my) for x, y in logs) / math.fsum((x - mx) ** 2 for x, _ in logs)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def _settings(claim: ClaimSection, rows: Sequence[Row]) -> list[tuple[tuple[str, float], list[Row]]]:
    found = [((str(case), float(load)), group) for (case, load), group in grouped(rows, "case", "load").items()]
    return found or [(("", 1.0 if claim.load is None else claim.load), [])]


def _where(case: str, load: float) -> str:
    return f"{case}, load {load:g}" if case else f"load {load:g}"


_JUDGES: Mapping[str, Callable[[ClaimSection, Sequence[Row]], list[Verdict]]] = {
    "on_time": on_time,
    "not_below": not_below,
    "cheapest": cheapest,
    "frontier": frontier,
    "promise": promise,
    "recovery": recovery,
    "steady": steady,
    "v_sweep": v_sweep,
}
