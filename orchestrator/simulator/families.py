"""Worlds drawn by a seed: the paper's, in its own regime of milliseconds and in that of containers.

Six core and nine light services, four types of task over them, edge devices and servers on a random geometric network
(arXiv 2601.19563, Figs. 1 and 2 and Table I). A seed draws topology and parameters; the same seed gives the same world in
every process. Times in seconds, sizes in bytes, rates in tasks/s.

What the paper leaves open, or the simulator has no place for, is decided here:

- Tasks enter at one gateway, on the server nearest to all others. Users are the sum of their arrivals.
- `milliseconds`: a transfer takes b/w along the path, as in the paper's eq. (2), and transfers do not wait for each other. With
  one gateway, the inputs of Table I would otherwise need ten times the bandwidth of Table I. So b/w of the mean output is part
  of a link's latency. The uplink, eq. (1), is a stage at the gateway, with channels to spare.
- `milliseconds`: a light service's rate is drawn anew every millisecond, and a task takes until it has got its work. (One rate
  for a whole task would give an infinite variance; the paper's text allows both.)
- VRAM is left out: a node has no such resource here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.manifest import ServiceLaw, Tier
from orchestrator.core import Node, Service
from orchestrator.costs import Prices
from orchestrator.simulator import laws
from orchestrator.simulator.laws import Gamma, Noise, Recorded
from orchestrator.simulator.world import Delays, Stage, World
from orchestrator.testbed import Section
from services.dataplane.pipeline import REQUEST, Pipeline, Step
from services.dataplane.routes import Link

Floats = NDArray[np.float64]
Regime = Literal["milliseconds", "containers"]

TASKS: Mapping[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    "answering": ((1, ()), (4, (1,)), (8, (4,)), (11, (8,)), (12, (11,))),
    "cross-modal": ((1, ()), (2, ()), (4, (1,)), (5, (2,)), (8, (4, 5)), (10, (8,)), (13, (10,))),
    "classification": ((2, ()), (5, (2,)), (9, (5,)), (11, (9,)), (14, (11,))),
    "driving": ((2, ()), (3, ()), (5, (2,)), (6, (3,)), (7, (6,)), (8, (5, 7)), (10, (8,)), (15, (10,))),
}
"""Fig. 1: type of task -> its steps, each a service and the services whose outputs it takes."""
CORE = frozenset({4, 5, 6, 8, 10, 11})
SERVERS = 0.3
"""Share of the nodes that are servers (Fig. 2: 3 of 10)."""
MB, GB = 10**6, 10**9
SAMPLES = 4096
"""Draws that stand for a law that has no closed form."""


class Paper(Section):
    """The family's parameters."""

    regime: Regime = "containers"
    nodes: int = Field(default=10, ge=3, le=2000)
    rate: float | None = Field(default=None, gt=0)
    """Tasks/s of all types, at load 1; None: what the regime says."""
    rate_per_node: float | None = Field(default=None, gt=0)
    """The same, by node, in place of `rate`."""
    epsilon: float = Field(default=0.05, gt=0, lt=1)
    deadline_factor: float = Field(default=2.4, gt=1)
    """`containers`: deadlines as multiples of what a task takes when nobody waits."""
    start_s: float | None = Field(default=None, ge=0)
    """Until a replica that is started is on standby; None: what the regime says."""


@dataclass(frozen=True, slots=True)
class Case:
    """A world, and what is sent to it at load 1."""

    world: World
    rates: Mapping[str, float]
    """Pipeline -> mean rate [tasks/s]."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What differs between the regimes. Pairs are ranges of a uniform draw."""

    work: tuple[float, float]
    """Of a core service: its mean service time [s], or its work [MB] where rates are drawn."""
    light_work: tuple[float, float]
    speeds: tuple[float, float]
    core_cpus: tuple[float, float]
    light_cpus: tuple[float, float]
    device_cpus: tuple[float, float]
    hop_s: float
    """Latency of a link between neighbours, for each unit of distance."""
    bandwidth: tuple[float, float]
    """Of such a link [bytes/s]."""
    start_s: float
    delays: Delays
    prices: Prices


REGIMES: Mapping[Regime, Scale] = {
    "milliseconds": Scale(
        (2, 16), (0.5, 2), (1, 1), (2, 16), (0.5, 2), (1, 64), 1e-4, (0.1 * GB, 1 * GB), 0.0,
        Delays(routes_s=0.0), Prices(cpu_second=1000.0, standby_fraction=0.1, start=3.3),
    ),
    "containers": Scale(
        (0.008, 0.035), (0.012, 0.036), (0.6, 1), (4, 4), (1, 1), (16, 64), 0.002, (125 * MB, 1250 * MB), 1.0,
        Delays(), Prices(cpu_second=1.0, standby_fraction=0.1, start=1.0),
    ),
}  # fmt: skip
"""`milliseconds` is Table I; its price of a start is that of 2.7 slots of a light replica there, (c^dp)/(c^mt + c^pl).
`containers` keeps the DAGs and the network, at 1 to 10 Gb/s a link, with the service times, starts and prices of containers."""
CONTAINER_RATE = 200.0


def draw(options: Paper, seed: int) -> Case:
    """The world of that seed, and its rates."""
    scale = REGIMES[options.regime]
    rng = laws.stream(seed, f"families/paper/{options.regime}/{options.nodes}")
    nodes = _nodes(rng, options, scale)
    links, typical_s = _links(rng, [node.name for node in nodes], options.regime, scale)
    stages = _stages(rng, options, scale)
    pipelines, rates = _pipelines(rng, options, stages, typical_s)
    gateway = _central([node.name for node in nodes if node.name.startswith("server")], links)
    if options.regime == "milliseconds":
        stages, pipelines = _with_uplinks(rng, stages, pipelines, gateway)
    speeds = {node.name: float(speed) for node, speed in zip(nodes, rng.uniform(*scale.speeds, len(nodes)), strict=True)}
    world = World(nodes, stages, pipelines, links, gateway, speeds, scale.delays, scale.prices)
    return Case(world, rates)


# --- machines -------------------------------------------------------------------------------------------------------------


def _nodes(rng: np.random.Generator, options: Paper, scale: Scale) -> tuple[Node, ...]:
    """Servers first. Cores, memory and GPUs of Table I, but that no device has less than a core replica could use."""
    servers = max(1, round(SERVERS * options.nodes))
    found = []
    for i in range(options.nodes):
        if i < servers:
            cpus, memory, gpus = rng.uniform(128, 256), rng.uniform(64, 128), rng.integers(1024, 2049)
        else:
            cpus, memory, gpus = rng.uniform(*scale.device_cpus), rng.uniform(1, 32), rng.integers(0, 65)
        name = f"server-{i + 1}" if i < servers else f"device-{i + 1 - servers}"
        memory *= 8 if options.regime == "containers" else 1
        found.append(Node(name, round(float(cpus), 1), int(memory * GB), int(gpus) if options.regime == "milliseconds" else 0))
    return tuple(found)


def _links(
    rng: np.random.Generator, names: list[str], regime: Regime, scale: Scale
) -> tuple[dict[tuple[str, str], Link], float]:
    """A link for every pair, along the quickest path of a random geometric network, and the time a typical hop takes [s].

    Nodes lie at random in the unit square and are joined to those within the least radius that joins them all. A path stores
    and forwards: latencies add up, and so do the times per byte. O(n^3), in n^2 vectors.
    """
    n = len(names)
    places = rng.random((n, 2))
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    near = apart <= _least_radius(apart) + 1e-12
    byte_s = 1.0 / rng.uniform(*scale.bandwidth, (n, n))
    byte_s = np.triu(byte_s, 1) + np.triu(byte_s, 1).T
    latency, per_byte = (np.where(near, each, math.inf) for each in (scale.hop_s * apart, byte_s))
    size = 0.7 * MB
    for table in (latency, per_byte):
        np.fill_diagonal(table, 0.0)
    for k in range(n):
        by_latency = latency[:, k, None] + latency[None, k]
        by_byte = per_byte[:, k, None] + per_byte[None, k]
        better = by_latency + size * by_byte < latency + size * per_byte
        latency, per_byte = np.where(better, by_latency, latency), np.where(better, by_byte, per_byte)
    if regime == "milliseconds":
        latency, per_byte = latency + size * per_byte, np.zeros((n, n))
    links = {
        (names[a], names[b]): Link(
            latency_s=float(latency[a, b]), bandwidth_bytes_per_s=1 / per_byte[a, b] if per_byte[a, b] else math.inf
        )
        for a, b in itertools.permutations(range(n), 2)
    }
    typical = float((latency + size * per_byte)[~np.eye(n, dtype=bool)].mean())
    return links, typical


def _central(names: list[str], links: Mapping[tuple[str, str], Link]) -> str:
    return min(names, key=lambda name: sum(link.transfer_s(MB) for (a, _), link in links.items() if a == name))


def _least_radius(apart: Floats) -> float:
    """The longest edge of the minimum spanning tree (Prim)."""
    nearest, joined, longest = apart[0].copy(), np.zeros(len(apart), bool), 0.0
    joined[0] = True
    for _ in range(len(apart) - 1):
        chosen = int(np.where(joined, math.inf, nearest).argmin())
        longest = max(longest, float(nearest[chosen]))
        joined[chosen] = True
        nearest = np.minimum(nearest, apart[chosen])
    return longest


# --- services -------------------------------------------------------------------------------------------------------------


def name_of(number: int) -> str:
    """`core-4`, `light-1`."""
    return f"{'core' if number in CORE else 'light'}-{number}"


def _stages(rng: np.random.Generator, options: Paper, scale: Scale) -> dict[str, Stage]:
    found = {}
    for number in range(1, 16):
        core = number in CORE
        tier: Tier = "core" if core else "light"
        cpus = float(rng.uniform(*(scale.core_cpus if core else scale.light_cpus)))
        memory = float(rng.uniform(1, 4) if core else rng.uniform(0.05, 0.5))
        gpus = int(rng.integers(4, 33)) if core and options.regime == "milliseconds" else 0
        mean_s, noise = _law(rng, options.regime, core, scale)
        output = float(rng.uniform(0.1, 1.0) if core else rng.uniform(0.25, 1.5)) * MB
        found[name_of(number)] = Stage(
            service=Service(name_of(number), tier, round(cpus, 2), int(memory * GB), gpus=gpus),
            law=ServiceLaw(base_s=mean_s, per_unit_s=0.0, tail_ratio=_tail(noise)),
            noise=noise,
            start_s=scale.start_s if options.start_s is None else options.start_s,
            inputs={"x": 0.3 * MB},
            outputs={"y": output},
        )
    return found


def _law(rng: np.random.Generator, regime: Regime, core: bool, scale: Scale) -> tuple[float, Noise]:
    """Mean service time [s], and the noise around it."""
    work = float(rng.uniform(*(scale.work if core else scale.light_work)))
    if regime == "containers":
        return work, Gamma(0.0 if core else 0.5)
    if core:
        return work / float(rng.uniform(8, 32)) * 1e-3, Gamma(0.0)
    times_s = _until_done(rng, work, float(rng.uniform(1, 2)), float(rng.uniform(1, 20)))
    return float(times_s.mean()), Recorded(tuple(times_s.tolist()))


def _until_done(rng: np.random.Generator, work: float, shape: float, scale: float) -> Floats:
    """Times [s] until `work` [MB] is done at a rate [MB/ms] that is drawn anew from a gamma law every millisecond."""
    left, times = np.full(SAMPLES, work), np.zeros(SAMPLES)
    busy = left > 0
    while busy.any():
        rates = rng.gamma(shape, scale, SAMPLES)
        times[busy] += np.minimum(left / rates, 1.0)[busy]
        left = left - rates
        busy &= left > 0
    return times * 1e-3


def _tail(noise: Noise) -> float:
    """95 % quantile over the mean, as a profile has it."""
    factors = noise.factors(laws.stream(0, "families/tail"), SAMPLES)
    return max(1.0, float(np.quantile(factors, 0.95)))


# --- tasks ----------------------------------------------------------------------------------------------------------------


def _pipelines(
    rng: np.random.Generator, options: Paper, stages: Mapping[str, Stage], hop_s: float
) -> tuple[dict[str, Pipeline], dict[str, float]]:
    pipelines, rates = {}, {}
    for name, steps in TASKS.items():
        if options.regime == "milliseconds":
            deadline_s, rate = float(rng.uniform(0.050, 0.100)), float(rng.uniform(0.15, 1.5, 2).sum() * 1000.0)
        else:
            deadline_s = options.deadline_factor * _unloaded_s(steps, stages, hop_s)
            rate = CONTAINER_RATE / len(TASKS)
        made = tuple(
            Step(id=f"s{n}", service=name_of(n), inputs={f"x{p}": f"s{p}.y" for p in before} or {"x": f"{REQUEST}.x"})
            for n, before in steps
        )
        pipelines[name] = Pipeline(
            name=name, deadline_s=deadline_s, epsilon=options.epsilon, steps=made, outputs={"y": f"s{steps[-1][0]}.y"}
        )
        rates[name] = rate
    asked = options.rate if options.rate_per_node is None else options.rate_per_node * options.nodes
    factor = 1.0 if asked is None else asked / sum(rates.values())
    return pipelines, {name: rate * factor for name, rate in rates.items()}


def _unloaded_s(steps: tuple[tuple[int, tuple[int, ...]], ...], stages: Mapping[str, Stage], hop_s: float) -> float:
    """What a task takes when nobody waits, on nodes of middling speed: the longest way through its DAG."""
    ends: dict[int, float] = {}
    for number, before in steps:
        ends[number] = max((ends[p] for p in before), default=0.0) + hop_s + stages[name_of(number)].law.base_s / 0.8
    return ends[steps[-1][0]]


def _with_uplinks(
    rng: np.random.Generator, stages: Mapping[str, Stage], pipelines: Mapping[str, Pipeline], gateway: str
) -> tuple[dict[str, Stage], dict[str, Pipeline]]:
    """Every task passes its type's uplink first: eq. (1), A / (b log2(1 + SNR)), with Nakagami fading.

    Fading of shape m and spread Omega makes the power gain Gamma(m, Omega/m). Table I has A, m and Omega; it does not say b or
    the mean SNR, which are 1 MB/ms and 10 here.
    """
    found, made = dict(stages), {}
    for name, pipeline in pipelines.items():
        size, shape, spread = rng.uniform(0.5, 4), rng.uniform(1.5, 3), rng.uniform(0.5, 1)
        times_s = 1e-3 * size / np.log2(1 + 10.0 * rng.gamma(shape, spread / shape, SAMPLES))
        service = f"uplink-{name}"
        noise = Recorded(tuple(times_s.tolist()))
        law = ServiceLaw(base_s=float(times_s.mean()), per_unit_s=0.0, tail_ratio=_tail(noise))
        found[service] = Stage(Service(service, "core", 0.0, 0, nodes=(gateway,)), law, noise, outputs={"y": 0.0})
        first = Step(id="uplink", service=service, inputs={"x": f"{REQUEST}.x"})
        rest = (
            step.model_copy(update={"inputs": {k: "uplink.y" if v == f"{REQUEST}.x" else v for k, v in step.inputs.items()}})
            for step in pipeline.steps
        )
        made[name] = pipeline.model_copy(update={"steps": (first, *rest)})
    return found, made
