"""What a run's records say: pure statistics, and the one dictionary that becomes the report.

A leaf, pure. Denominators are all scheduled tasks of the measured part of the run, whatever became of them. Numbers drawn
from few tasks come with an interval and say when they are not firm. `build` documents the report key by key.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loadgen.outcome import OUTCOMES, Hop, TaskRecord

SCHEMA = 1
"""Version of the report's keys; it grows when one changes its meaning or goes."""

CONFIDENCE = 0.95
_Z = 1.959963984540054
"""Normal quantile of (1 + CONFIDENCE) / 2."""

LAG_SHARE = 0.05
"""Share of the deadline that the p99 send lag may reach before the run is invalid."""

QUANTILES: Mapping[str, float] = {"p50": 0.50, "p95": 0.95, "p99": 0.99}

_P99_FIRM = 459
"""Tasks after which 0 misses show P(miss) < 1 % with 99 % confidence: 0.99^459 < 0.01 (MLPerf's early-stopping rule)."""


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What was asked of one pipeline."""

    name: str
    arrivals: str
    """Canonical specification of the arrival process; see loadgen.arrivals."""
    deadline_s: float
    epsilon: float | None = None
    """Promised violation probability, where the server tells one."""
    cost: float | None = None
    """Cost of serving it in the testbed's unit, where the caller knows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked of the run, and what the caller adds to its report."""

    pipelines: tuple[PipelinePlan, ...]
    seed: int
    duration_s: float
    warmup_s: float = 0.0
    url: str | None = None
    """None in a simulation."""
    cost: float | None = None
    objective: float | None = None
    """Least on-time ratio that every pipeline must reach."""
    interrupted: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Copied under `generator`: versions, machine, bounds."""


def build(records: Sequence[TaskRecord], plan: Plan) -> dict[str, Any]:
    """The report of a run: a pure function of its records and its plan. Times in seconds, rates in tasks/s.

    At the top level over all pipelines, and again under `pipelines.NAME`:

        on_time_ratio       on_time / sent; null when nothing was scheduled
        on_time_interval    [low, high] of it, Wilson, 95 %. It takes tasks as independent; in a queue misses come in clumps,
                            and the truth is wider
        sent                tasks scheduled in the measured part: the denominator, never-sent ones included
        outcomes            tasks per outcome: on_time, late, expired, rejected, failed, cancelled; they add up to `sent`
        reasons             tasks per reason, of those that have one: the server's word, or the generator's
                            (`not_sent`, `no_answer`, `connect_failed`, `disconnected`, `broken_answer`, `bad_answer`,
                            `interrupted`, or `http_STATUS` where the server gave none)
        latency_s           p50, p95, p99, mean, max over the n answered tasks (on_time and late), counted from the
                            *scheduled* send; null when there are none
          .interval         per quantile [low, high], 95 %, by order statistics; an end is null where n is too small for one
          .p99_firm         whether n >= 459; below, read the interval and not the point
        send_lag_s          p50, p99, max: how late the generator itself sent; null when nothing was sent
        rate                scheduled, sent, answered, on_time: tasks of each kind per second; on_time is the goodput
        stages.SERVICE      over all tasks that carry timing:
          .queue_s .compute_s .transfer_s     each mean, p50, p99 per visit
          .tasks .visits .batch_mean          tasks that came by, visits they made, items computed together
          .share            its part of the answered tasks' mean latency; null when none was answered
        unattributed_share  the part that no stage accounts for: gateway, network, generator. Branches that run at once count
                            each, so shares can add up to more than 1; this is then 0
        cost                in the testbed's cost unit, as the caller gave it; null when unknown

    Under `pipelines.NAME` only:

        arrivals            canonical specification of the arrival process
        deadline_s          relative to the scheduled send
        promise             null when no epsilon is known; else epsilon, violation (1 - on_time_ratio), its interval, and
                            verdict: kept (high <= epsilon), broken (low > epsilon) or undecided

    At the top level only:

        schema              version of these keys
        valid               false when a pipeline's p99 send lag exceeds 5 % of its deadline: the numbers are not the server's
        invalid_reason      which pipeline, and what to change; null when valid
        complete            false when the run was interrupted
        objective           null, or on_time_ratio and met: whether every pipeline reached it
        url, seed, duration_s   what was asked
        warmup              duration_s and tasks of the part before 0, which is in no number above
        generator           versions, machine and bounds, as the caller gave them

    Args:
        records: every task, in any order; those scheduled before 0 are the warm-up.
        plan: what was asked; a pipeline without records has zeros and nulls.
    """
    measured = [record for record in records if record.scheduled_s >= 0]
    by_name: dict[str, list[TaskRecord]] = {pipeline.name: [] for pipeline in plan.pipelines}
    for record in measured:
        by_name[record.pipeline].append(record)
    sections = {p.name: _pipeline_section(by_name[p.name], p, plan.duration_s) for p in plan.pipelines}
    late = _lagging(sections)
    return {
        "schema": SCHEMA,
        **_section(measured, plan.duration_s, plan.cost),
        "valid": not late,
        "invalid_reason": "; ".join(late) or None,
        "complete": not plan.interrupted,
        "objective": _objective(plan.objective, sections),
        "url": plan.url,
        "seed": plan.seed,
        "duration_s": plan.duration_s,
        "warmup": {"duration_s": plan.warmup_s, "tasks": len(records) - len(measured)},
        "generator": dict(plan.facts),
        "pipelines": sections,
    }


# --- statistics -----------------------------------------------------------------------------------------------------------


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a probability from `successes` in `n` > 0 independent trials.

        (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n),   p = successes/n,   z = 1.96

    Never leaves [0, 1] and always holds p, unlike the textbook's p ± z sqrt(p(1-p)/n). Source: Wilson 1927.
    """
    p, z2 = successes / n, _Z * _Z
    centre = p + z2 / (2 * n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At p = 0 and 1 an end is exactly p; rounding may put it a hair to the wrong side.
    return min(p, max(0.0, (centre - half) / (1 + z2 / n))), max(p, min(1.0, (centre + half) / (1 + z2 / n)))


def quantile(ordered: NDArray[np.float64], q: float) -> float:
    """The q-quantile of ascending values, shape (n,), n > 0: the ceil(n q)-th of them, so always one that was seen."""
    return float(ordered[max(1, math.ceil(len(ordered) * q - 1e-9)) - 1])


def quantile_interval(ordered: NDArray[np.float64], q: float) -> tuple[float | None, float | None]:
    """95 % interval of the q-quantile, whatever the distribution, from ascending independent values of shape (n,).

    The number B of values below the true quantile is Binomial(n, q). The ends are the order statistics x_(l), x_(u) with
    l the largest rank such that P(B < l) <= 2.5 %, and u the smallest such that P(B >= u) <= 2.5 %. An end that no rank
    reaches, because n is too small, is None. Source: David and Nagaraja 2003, section 7.1.
    """
    n = len(ordered)
    below = _binomial_cdf(n, q)
    tail = (1 - CONFIDENCE) / 2
    low = int(np.searchsorted(below, tail, side="right"))
    high = int(np.searchsorted(below, 1 - tail, side="left")) + 1
    return (float(ordered[low - 1]) if low >= 1 else None, float(ordered[high - 1]) if high <= n else None)


def _binomial_cdf(n: int, q: float) -> NDArray[np.float64]:
    """P(B <= k) for k = 0..n of B ~ Binomial(n, q), 0 < q < 1, shape (n + 1,); in logarithms, since q^n underflows."""
    k = np.arange(1, n + 1)
    logs = n * math.log1p(-q) + np.concatenate(([0.0], np.cumsum(np.log((n - k + 1) / k) + math.log(q / (1 - q)))))
    cdf: NDArray[np.float64] = np.cumsum(np.exp(logs))
    return cdf


# --- sections -------------------------------------------------------------------------------------------------------------


def _section(records: Sequence[TaskRecord], duration_s: float, cost: float | None) -> dict[str, Any]:
    counts = Counter(record.outcome for record in records)
    answered = [record for record in records if record.outcome in {"on_time", "late"}]
    lags = [record.send_lag_s for record in records if record.send_lag_s is not None]
    n, on_time = len(records), counts["on_time"]
    stages, rest = _stages(records, answered)
    return {
        "on_time_ratio": _round(on_time / n) if n else None,
        "on_time_interval": _pair(wilson(on_time, n)) if n else None,
        "sent": n,
        "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES},
        "reasons": dict(sorted(Counter(record.reason for record in records if record.reason is not None).items())),
        "latency_s": _latency([record.latency_s for record in answered if record.latency_s is not None]),
        "send_lag_s": _lag(lags),
        "rate": {
            "scheduled": _round(n / duration_s),
            "sent": _round(len(lags) / duration_s),
            "answered": _round(len(answered) / duration_s),
            "on_time": _round(on_time / duration_s),
        },
        "stages": stages,
        "unattributed_share": rest,
        "cost": cost,
    }


def _pipeline_section(records: Sequence[TaskRecord], pipeline: PipelinePlan, duration_s: float) -> dict[str, Any]:
    section = _section(records, duration_s, pipeline.cost)
    return {
        **section,
        "arrivals": pipeline.arrivals,
        "deadline_s": pipeline.deadline_s,
        "promise": _promise(pipeline.epsilon, section),
    }


def _promise(epsilon: float | None, section: Mapping[str, Any]) -> dict[str, Any] | None:
    if epsilon is None or section["on_time_ratio"] is None:
        return None
    low, high = (_round(1 - end) for end in reversed(section["on_time_interval"]))
    verdict = "kept" if high <= epsilon else "broken" if low > epsilon else "undecided"
    violation = _round(1 - section["on_time_ratio"])
    return {"epsilon": epsilon, "violation": violation, "interval": [low, high], "verdict": verdict}


def _latency(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        empty = dict.fromkeys((*QUANTILES, "mean", "max"))
        return {**empty, "n": 0, "interval": {name: [None, None] for name in QUANTILES}, "p99_firm": False}
    ordered = np.sort(values)
    return {
        **{name: _round(quantile(ordered, q)) for name, q in QUANTILES.items()},
        "mean": _round(float(ordered.mean())),
        "max": _round(float(ordered[-1])),
        "n": len(ordered),
        "interval": {name: _pair(quantile_interval(ordered, q)) for name, q in QUANTILES.items()},
        "p99_firm": len(ordered) >= _P99_FIRM,
    }


def _lag(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("p50", "p99", "max"))
    ordered = np.sort(values)
    return {
        "p50": _round(quantile(ordered, 0.50)),
        "p99": _round(quantile(ordered, 0.99)),
        "max": _round(float(ordered[-1])),
    }


def _stages(records: Iterable[TaskRecord], answered: Sequence[TaskRecord]) -> tuple[dict[str, Any], float | None]:
    """Per service where the time went, and the share of the answered tasks' latency that no service accounts for."""
    visits: dict[str, list[Hop]] = {}
    tasks: Counter[str] = Counter()
    for record in records:
        tasks.update({hop.service for hop in record.hops})
        for hop in record.hops:
            visits.setdefault(hop.service, []).append(hop)
    timed = [record for record in answered if record.hops]
    latency_s = math.fsum(record.latency_s for record in timed if record.latency_s is not None)
    spent = dict.fromkeys(visits, 0.0)
    for record in timed:
        for hop in record.hops:
            spent[hop.service] += hop.total_s
    shares = {service: _round(spent[service] / latency_s) if latency_s > 0 else None for service in visits}
    stages = {service: {**_visits(hops), "tasks": tasks[service], "share": shares[service]} for service, hops in visits.items()}
    rest = _round(max(0.0, 1 - math.fsum(spent.values()) / latency_s)) if latency_s > 0 else None
    return stages, rest


def _visits(hops: Sequence[Hop]) -> dict[str, Any]:
    return {
        "queue_s": _spread([hop.queue_s for hop in hops]),
        "compute_s": _spread([hop.compute_s for hop in hops]),
        "transfer_s": _spread([hop.transfer_s for hop in hops]),
        "batch_mean": _round(float(np.mean([hop.batch for hop in hops]))),
        "visits": len(hops),
    }


def _spread(values: ArrayLike) -> dict[str, float]:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return {
        "mean": _round(float(ordered.mean())),
        "p50": _round(quantile(ordered, 0.50)),
        "p99": _round(quantile(ordered, 0.99)),
    }


def _lagging(sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence per pipeline whose tasks were sent too late for its numbers to mean the server."""
    return [
        f"{name}: p99 send lag {lag * 1e3:.1f} ms is over {LAG_SHARE:.0%} of the {section['deadline_s'] * 1e3:g} ms deadline; "
        "lower the rate, or give the generator a core of its own"
        for name, section in sections.items()
        if (lag := section["send_lag_s"]["p99"]) is not None and lag > LAG_SHARE * section["deadline_s"]
    ]


def _objective(ratio: float | None, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    if ratio is None:
        return None
    met = all(section["on_time_ratio"] is not None and section["on_time_ratio"] >= ratio for section in sections.values())
    return {"on_time_ratio": ratio, "met": met}


def _round(value: float) -> float:
    """To the microsecond, or the millionth: finer digits are noise and make reports hard to compare."""
    return round(value, 6)


def _pair(ends: tuple[float | None, float | None]) -> list[float | None]:
    return [None if end is None else _round(end) for end in ends]
