"""What every cut of a pipeline costs, and what fusing the two stages around it would save or lose.

A cut is where tensors leave one replica for another: between two steps of a chain, or by way of the gateway where branches
meet. `of_pipelines` weighs each against the work on both sides; nothing is decided by it: whoever writes the testbed may fuse
the stages there (`services: {NAME: {stages: [...]}}`). Times are of one task of one item at typical lengths, without any wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.manifest import GENERATE, Manifest, Precision, StageSpec
from services.dataplane import fusing
from services.dataplane.fusing import CannotFuse
from services.dataplane.pipeline import REQUEST, Pipeline, Segment, Step, name_of, segments, step_of
from services.dataplane.routes import Link

SEQ, NEW = "seq", "new"
"""Axes of a decoder's prompt and of its answer."""
PROCESS_BYTES = 64 * 2**20
"""What a replica holds before it opens a stage: interpreter, web server, numpy (`make bench`: light_resident_bytes)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A service, as it stands on either side of a cut."""

    model: Manifest
    members: tuple[str, ...]
    """Its stages: one, but for a service that is fused already."""
    stage: StageSpec
    precision: Precision
    work_s: float
    """Mean time of one task alone [s]."""
    memory_bytes: int
    """Of one replica."""
    nodes: tuple[str, ...]
    """Where its ready replicas are, each as often as there are of them."""
    measured: bool = True
    """Whether `work_s` is from a profile; else it was assumed."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What stands around the cuts."""

    parts: Mapping[str, Part]
    """By service."""
    gateway: str
    """Node of the gateway."""
    hop_s: float
    """Time of a hop beside links, waits and work [s]: HTTP and two event loops."""
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    """Both directions; a pair that is missing is at no distance."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Demand by pipeline [tasks/s]."""
    utilisation: float = 0.8
    """Most load of a replica."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut, and what it would be to fuse the stages on its two sides."""

    pipeline: str
    source: str
    target: str
    """Steps before and behind it."""
    services: tuple[str, str]
    bytes_per_task: float
    """What crosses, with what is only passed on to later steps."""
    link_s: float
    """Time on links [s], from each replica of the source to the nearest of the target."""
    hop_s: float
    """Overhead of the hop [s]."""
    work_s: tuple[float, float]
    """Of the two stages [s]."""
    measured: tuple[bool, bool]
    """Whether that is from a profile."""
    by_gateway: bool
    """The tensors go through the gateway, where branches meet or part."""
    shared: Mapping[str, tuple[str, ...]]
    """service -> pipelines that use it without this cut: they would still need one of its own."""
    memory_bytes: float | None
    """Memory of all replicas more (or less, if negative) if the two were one; None where they cannot be."""
    loses: tuple[str, ...]
    """What the two could no longer do for themselves if they are fused, in words,"""
    stops: tuple[str, ...]
    """and what the busier of them could no longer do at all: batches and streams, which are worth more than a hop."""
    obstacle: str | None
    """Why they cannot be fused, None where they can."""

    @property
    def saves_s(self) -> float:
        """Time per task that fusing saves [s]."""
        return self.hop_s + self.link_s

    @property
    def splitting_loses(self) -> bool:
        """Whether the hop takes longer than the shorter of the two stages, and fusing neither doubles nor stops anything."""
        return self.obstacle is None and not self.shared and not self.stops and self.saves_s > min(self.work_s)


def of_pipelines(pipelines: Iterable[Pipeline], ground: Ground) -> tuple[Cut, ...]:
    """Every cut of these pipelines, in the order that tasks come by them."""
    known = tuple(pipelines)
    found = [(pipeline, edge) for pipeline in known for edge in _edges(pipeline)]
    visits = {(p.name, step.id): step.service for p in known for step in p.steps}
    cuts = [_cut(pipeline, edge, found, visits, ground) for pipeline, edge in found]
    inside = [cut for pipeline in known for step in pipeline.steps for cut in _inside(pipeline, step, ground)]
    order = {pipeline.name: i for i, pipeline in enumerate(known)}
    return tuple(sorted([*cuts, *inside], key=lambda cut: order[cut.pipeline]))


@dataclass(frozen=True, slots=True)
class _Edge:
    source: Step
    target: Step
    refs: tuple[str, ...]
    by_gateway: bool


def _edges(pipeline: Pipeline) -> list[_Edge]:
    """Cuts inside each chain, and from chain to chain by way of the gateway."""
    cut, found = segments(pipeline), list[_Edge]()
    for segment in cut:
        for parent in sorted(segment.parents):
            refs = tuple(ref for ref in segment.sends if step_of(ref) in _ids(cut[parent]))
            found.append(_Edge(_step(cut[parent], refs), segment.steps[0], refs, by_gateway=True))
        pairs = zip(segment.steps, segment.steps[1:], segment.keeps, strict=False)
        found += [_Edge(source, target, refs, by_gateway=False) for source, target, refs in pairs]
    return found


def _ids(segment: Segment) -> list[str]:
    return [step.id for step in segment.steps]


def _step(segment: Segment, refs: Sequence[str]) -> Step:
    """The last step of a chain that makes one of these."""
    made = {step_of(ref) for ref in refs}
    return next(step for step in reversed(segment.steps) if step.id in made)


def _cut(
    pipeline: Pipeline,
    edge: _Edge,
    every: Sequence[tuple[Pipeline, _Edge]],
    visits: Mapping[tuple[str, str], str],
    ground: Ground,
) -> Cut:
    services = (edge.source.service, edge.target.service)
    source, target = (ground.parts[name] for name in services)
    size = math.fsum(_bytes(ref, pipeline, ground.parts) for ref in edge.refs)
    alike = [(p, e) for p, e in every if (e.source.service, e.target.service) == services]
    shared = _shared(services, alike, visits)
    fused, obstacle = _fused(services, source, target)
    return Cut(
        pipeline=pipeline.name,
        source=edge.source.id,
        target=edge.target.id,
        services=services,
        bytes_per_task=size,
        link_s=_link_s(edge, source, target, size, ground),
        hop_s=ground.hop_s,
        work_s=(source.work_s, target.work_s),
        measured=(source.measured, target.measured),
        by_gateway=edge.by_gateway,
        shared=shared,
        memory_bytes=None if fused is None else _memory(services, shared, [p.name for p, _ in alike], ground),
        loses=() if fused is None else tuple(_losses(services, source, target)),
        stops=() if fused is None else tuple(_stops(source, target, fused)),
        obstacle=obstacle,
    )


def _inside(pipeline: Pipeline, step: Step, ground: Ground) -> Iterable[Cut]:
    """Cuts through a decoder: its first part calls every other one for the prompt, and again for each further token."""
    first = ground.parts[step.service]
    for name in step.parts:
        part = ground.parts[name]
        calls = first.model.typical_length.get(NEW, 1)
        length = max(1, first.model.typical_length.get(SEQ, 1))
        # The prompt's states go over together, then one token's at a time; what comes back is as large at most.
        size = float(part.stage.inputs[0].bytes_per_item) * (1 + (calls - 1) / length)
        yield Cut(
            pipeline=pipeline.name,
            source=step.id,
            target=f"{step.id} in {name}",
            services=(step.service, name),
            bytes_per_task=size,
            link_s=calls * _nearest_s(first, part, size / calls, ground),
            hop_s=calls * ground.hop_s,
            work_s=(first.work_s, part.work_s),
            measured=(first.measured, part.measured),
            by_gateway=False,
            shared={},
            memory_bytes=None,
            loses=(),
            stops=(),
            obstacle="parts of one decoder; export it with a smaller cut",
        )


def _bytes(ref: str, pipeline: Pipeline, parts: Mapping[str, Part]) -> float:
    """Bytes of a reference in a task of one item; a tensor of the request is as large as whoever takes it says."""
    if step_of(ref) == REQUEST:
        taken = [
            (step.service, name) for step in pipeline.steps for name, source in step.inputs.items() if source == ref
        ]  # fmt: skip
        sizes = [t.bytes_per_item for service, name in taken for t in parts[service].stage.inputs if t.name == name]
    else:
        service = next(step.service for step in pipeline.steps if step.id == step_of(ref))
        sizes = [t.bytes_per_item for t in parts[service].stage.outputs if t.name == name_of(ref)]
    return float(max(sizes, default=0))


def _link_s(edge: _Edge, source: Part, target: Part, size: float, ground: Ground) -> float:
    """Time on links [s], by the gateway where that is the way."""
    if edge.by_gateway and source.nodes and target.nodes:
        back = math.fsum(_way_s(node, ground.gateway, size, ground) for node in source.nodes) / len(source.nodes)
        return back + min(_way_s(ground.gateway, node, size, ground) for node in target.nodes)
    return _nearest_s(source, target, size, ground)


def _nearest_s(source: Part, target: Part, size: float, ground: Ground) -> float:
    """Mean over the source's replicas of the time on the link to the nearest of the target's [s]."""
    if not source.nodes or not target.nodes:
        return 0.0
    return math.fsum(min(_way_s(a, b, size, ground) for b in target.nodes) for a in source.nodes) / len(source.nodes)


def _way_s(a: str, b: str, size: float, ground: Ground) -> float:
    link = ground.links.get((a, b)) if a != b else None
    return 0.0 if link is None else link.transfer_s(size)


# --- what fusing would be -------------------------------------------------------------------------------------------------


def _shared(
    services: tuple[str, str], alike: Sequence[tuple[Pipeline, _Edge]], visits: Mapping[tuple[str, str], str]
) -> dict[str, tuple[str, ...]]:
    """Pipelines with a visit to either service that would not be fused with one to the other."""
    # Where branches through one service join, only one of them can end in the join.
    joined = {(p.name, e.target.id): (p.name, e.source.id) for p, e in reversed(alike)}
    covered = (set(joined.values()), set(joined))
    found = {}
    for service, mine in zip(services, covered, strict=True):
        others = dict.fromkeys(name for (name, step), used in visits.items() if used == service and (name, step) not in mine)
        if others:
            found[service] = tuple(others)
    return found


def _fused(services: tuple[str, str], source: Part, target: Part) -> tuple[StageSpec | None, str | None]:
    if services[0] == services[1]:
        return None, "they are the same service"
    if source.model.model != target.model.model or source.model.source != target.model.source:
        return None, "they are stages of two models"
    if source.stage.tier == target.stage.tier == "core" and source.precision != target.precision:
        return None, f"one is served as {source.precision}, the other as {target.precision}"
    try:
        return fusing.fuse(source.model, (*source.members, *target.members)), None
    except CannotFuse as error:
        return None, str(error)


def _memory(services: tuple[str, str], shared: Mapping[str, Any], pipelines: Iterable[str], ground: Ground) -> float:
    """Memory of the fused replicas, less that of the replicas that nobody needs any more [bytes].

    `pipelines` are those with this cut, each as often as its tasks come by it.

    As many fused ones as there are of the busier service; where one stays for others, as many as these pipelines' load asks
    for, at least one.
    """
    source, target = (ground.parts[name] for name in services)
    both = source.memory_bytes + target.memory_bytes - PROCESS_BYTES
    load = math.fsum(ground.rates.get(name, 0.0) for name in pipelines) * (source.work_s + target.work_s)
    needed = max(1, math.ceil(load / ground.utilisation - 1e-9))
    freed = {name: len(ground.parts[name].nodes) for name in services if name not in shared}
    copies = needed if shared else max(needed, *freed.values())
    return copies * both - math.fsum(count * ground.parts[name].memory_bytes for name, count in freed.items())


def _losses(services: tuple[str, str], source: Part, target: Part) -> Iterable[str]:
    counts = [len(source.nodes), len(target.nodes)]
    if source.stage.tier != target.stage.tier:
        light = services[0] if source.stage.tier == "light" else services[1]
        yield f"{light} is no longer scaled by itself"
    elif counts[0] != counts[1]:
        yield f"they are no longer scaled apart ({counts[0]} and {counts[1]} replicas now)"


def _stops(source: Part, target: Part, fused: StageSpec) -> Iterable[str]:
    most = max((part.stage.max_batch for part in (source, target) if part.stage.tier == "core"), default=1)
    if GENERATE in (source.stage.processor, target.stage.processor):
        yield "answers would no longer stream"
    if fused.max_batch < most:
        yield f"batches would be of at most {fused.max_batch} instead of {most}"


# --- saying it ------------------------------------------------------------------------------------------------------------


def document(cut: Cut) -> dict[str, Any]:
    """A cut as JSON values."""
    return {
        "pipeline": cut.pipeline,
        "between": [cut.source, cut.target],
        "services": list(cut.services),
        "by_gateway": cut.by_gateway,
        "bytes_per_task": cut.bytes_per_task,
        "hop_s": cut.hop_s,
        "link_s": cut.link_s,
        "work_s": list(cut.work_s),
        "work_measured": list(cut.measured),
        "splitting_loses": cut.splitting_loses,
        "fused": {
            "obstacle": cut.obstacle,
            "saves_s": cut.saves_s if cut.obstacle is None else None,
            "memory_bytes": cut.memory_bytes,
            "shared": {service: list(pipelines) for service, pipelines in cut.shared.items()},
            "loses": list(cut.loses),
            "stops": list(cut.stops),
        },
    }


def lines(cuts: Sequence[Cut], pipelines: Iterable[Pipeline], ground: Ground) -> list[str]:
    """Every pipeline's cuts as text."""
    said: list[str] = []
    for pipeline in pipelines:
        mine = [cut for cut in cuts if cut.pipeline == pipeline.name]
        if not mine:
            continue
        lost_s = math.fsum(cut.saves_s for cut in mine)
        work_s = math.fsum(ground.parts[name].work_s for step in pipeline.steps for name in step.services)
        said.append(
            f"cuts of {pipeline.name}: {len(mine)}, with {_ms(lost_s)} of hops to {_ms(work_s)} of work "
            f"(deadline {_ms(pipeline.deadline_s)})"
        )
        said += [f"  {_line(cut)}" for cut in mine]
    return said


def _line(cut: Cut) -> str:
    way = ", by the gateway" if cut.by_gateway else ""
    on_links = f" + {_ms(cut.link_s)} on links" if cut.link_s else ""
    crosses = f"{_size(cut.bytes_per_task)} cross{way} in {_ms(cut.hop_s)}{on_links}"
    assumed = ["" if known else " (assumed)" for known in cut.measured]
    work = f"beside {_ms(cut.work_s[0])}{assumed[0]} and {_ms(cut.work_s[1])}{assumed[1]} of work"
    return f"{cut.source} | {cut.target}: {crosses}, {work}; {_verdict(cut)}"


def _verdict(cut: Cut) -> str:
    if cut.obstacle is not None or cut.memory_bytes is None:
        return f"cannot be fused: {cut.obstacle}"
    more = f"{_size(abs(cut.memory_bytes))} {'more' if cut.memory_bytes > 0 else 'less'}" if cut.memory_bytes else "no more"
    fused = f"{_ms(cut.saves_s)} less a task, {more} memory"
    if cut.loses:
        fused += f"; {'; '.join(cut.loses)}"
    if cut.shared:
        users = "; ".join(f"{service} is shared with {', '.join(others)}" for service, others in cut.shared.items())
        return f"keep it: {users} (fused: {fused})"
    if cut.stops:
        return f"keep it: fused, {' and '.join(cut.stops)} ({fused})"
    return f"splitting loses here (fused: {fused})" if cut.splitting_loses else f"worth its hop (fused: {fused})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(count: float) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
