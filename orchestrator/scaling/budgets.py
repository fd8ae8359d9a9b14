"""How a pipeline's deadline and epsilon are shared out among its stages: so that together they cost least.

    P(T > D)  <=  P(compute > C)  +  sum_i P(W_i > d_i),      sum of d_i on every path  <=  D - C(path) - fixed(path)

with W_i the wait at stage i (union bound), and C the 1 - epsilon / 4 quantile of what the path computes, so that three quarters
of epsilon are left for the waits. Where nothing varies C is exact, and they get all of it.

Near saturation the servers that a stage needs beyond its load r are n - r = (m / d_i) ln(gamma / epsilon_i) (1 + cv2) / 2. The
sum of c_i n_i under the two constraints is then least where, with w_i = sqrt(c_i m_i),

    d_i  proportional to  w_i  on a path,      epsilon_i  proportional to  w_i  over the DAG's visits.

On a DAG a stage gets the least that any path through it grants, so that every path keeps its sum. A service that several
pipelines visit takes the tightest of each. Stages whose replicas do not change need no more than their tail asks for, and leave
the rest to the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from orchestrator.scaling.site import Promise

COMPUTE_SHARE = 0.25
"""Of epsilon, for the compute time to be longer than is reckoned with."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a budget depends on, of one service."""

    mean_s: float
    """m [s] of a request."""
    cv2: float
    """Variance of m over its square."""
    cost: float
    """Of a replica, in any unit: cores."""
    wait_s: float | None = None
    """Of a service whose replicas do not change: the wait it cannot be brought below [s]; None: as it is staffed."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a stage may do to a task."""

    wait_s: float
    """d: a longer wait is too long [s]. 0 where the deadline leaves none."""
    epsilon: float
    """Share of requests that may wait longer."""
    even_s: float = 0.0
    """What an even share of the deadline's slack would be, as the data plane reckons (`services.dataplane.letting_out`) [s]."""

    def tightest(self, other: Budget) -> Budget:
        """The smaller of each."""
        return Budget(min(self.wait_s, other.wait_s), min(self.epsilon, other.epsilon), min(self.even_s, other.even_s))


def split(promises: Mapping[str, Promise], stages: Mapping[str, Stage]) -> dict[str, Budget]:
    """The budget of every service that a promise depends on, the tightest where several do.

    Args:
        promises: by pipeline.
        stages: by service; one that is not known is taken as instantaneous, and gets no budget.
    """
    found: dict[str, Budget] = {}
    for promise in promises.values():
        for service, budget in split_one(promise, stages).items():
            found[service] = budget.tightest(found.get(service, budget))
    return found


def split_one(promise: Promise, stages: Mapping[str, Stage]) -> dict[str, Budget]:
    """The budgets of one pipeline's stages."""
    known = [name for name in promise.services if name in stages]
    weights = {name: math.sqrt(max(stages[name].cost * stages[name].mean_s, 1e-18)) for name in known}
    visits = {name: max(1, promise.visits_of(name)) for name in known}
    epsilon = promise.epsilon - compute_epsilon(promise, stages)
    whole = sum(weights[name] * visits[name] for name in known)
    waits, even = dict.fromkeys(known, math.inf), dict.fromkeys(known, math.inf)
    for path, slack_s in zip(promise.paths, slacks_s(promise, stages), strict=True):
        for name, wait_s in _along(path, slack_s, weights, stages).items():
            waits[name] = min(waits[name], wait_s)
            even[name] = min(even[name], slack_s / len(path))
    return {name: Budget(waits[name], epsilon * weights[name] / whole, even[name]) for name in known}


def _along(
    path: tuple[str, ...], slack_s: float, weights: Mapping[str, float], stages: Mapping[str, Stage]
) -> dict[str, float]:
    """Waits of one path. Fixed stages that need less than their share take that, which leaves the others more."""
    steps = [name for name in path if name in weights]
    granted: dict[str, float] = {}
    while True:
        whole = sum(weights[name] for name in steps if name not in granted)
        left_s = max(0.0, slack_s - sum(granted[name] for name in steps if name in granted))
        shares = {name: left_s * weights[name] / whole for name in steps if name not in granted}
        modest = {
            name: wait_s for name, share_s in shares.items() if (wait_s := stages[name].wait_s) is not None and wait_s < share_s
        }
        if not modest:
            return granted | shares
        granted |= modest


def slacks_s(promise: Promise, stages: Mapping[str, Stage]) -> tuple[float, ...]:
    """What the deadline leaves for waits on each path [s]: D less fixed times and the quantile of compute; 0 where nothing."""
    sure = 1.0 - compute_epsilon(promise, stages) / max(1, len(promise.paths))
    fixed_s = promise.fixed_s or (0.0,) * len(promise.paths)
    return tuple(
        max(0.0, promise.deadline_s - way_s - _compute_quantile_s(path, stages, sure))
        for path, way_s in zip(promise.paths, fixed_s, strict=True)
    )


def compute_epsilon(promise: Promise, stages: Mapping[str, Stage]) -> float:
    """Share of epsilon that goes to compute times; none where they do not vary."""
    varies = any(stages[name].cv2 > 0.0 for name in promise.services if name in stages)
    return COMPUTE_SHARE * promise.epsilon if varies else 0.0


def _compute_quantile_s(path: tuple[str, ...], stages: Mapping[str, Stage], probability: float) -> float:
    """Of the sum of what the path's stages compute, taken as independent and the sum as gamma distributed [s]."""
    found = [stages[name] for name in path if name in stages]
    mean_s = math.fsum(stage.mean_s for stage in found)
    variance = math.fsum(stage.cv2 * stage.mean_s**2 for stage in found)
    if mean_s <= 0.0 or variance <= 0.0 or probability >= 1.0:
        return mean_s
    return gamma_quantile(mean_s, variance, probability)


def gamma_quantile(mean: float, variance: float, probability: float) -> float:
    """Quantile of a gamma law, approximately: the cube root is nearly normal (Wilson and Hilferty 1931).

    Within 3 % from .55 to .998 for shapes of 1/2 and more, within 5 % from the median to .999 for shapes down to 1/3, which a
    smaller one is held to be. Above .999 it is too high, by up to 8 % at .9999.
    """
    spread = min(variance / mean**2, 3.0) / 9.0
    z = NormalDist().inv_cdf(probability)
    return mean * max(0.0, 1.0 - spread + z * math.sqrt(spread)) ** 3


def promised(promise: Promise, late: Mapping[str, float], stages: Mapping[str, Stage]) -> float:
    """What the stages' tails say of P(T > D) together: at most 1.

    Args:
        promise: of the pipeline.
        late: v_i of each service at the budgets of `split`.
        stages: as in `split`.
    """
    total = math.fsum(promise.visits_of(name) * late.get(name, 0.0) for name in promise.services)
    return min(1.0, total + compute_epsilon(promise, stages))
