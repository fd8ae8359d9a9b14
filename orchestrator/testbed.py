"""The one file for a testbed: nodes, links, services, pipelines, control and workload, checked whole before anything starts.

`load` reads it or raises `TestbedInvalid` with *every* mistake as `file:line: field: problem; did you mean X?`. What only the
exported models can tell (tensors along every edge, tiers) is checked by `orchestrator.wiring` once they are there.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from loadgen import arrivals
from models.manifest import SHORT_PRECISIONS, Name, Precision, Tier
from orchestrator import core, marked_yaml, units
from orchestrator.costs import Prices
from orchestrator.errors import Infeasible, TestbedInvalid
from orchestrator.marked_yaml import Problem
from orchestrator.placement import greedy
from services.dataplane import fusing
from services.dataplane.pipeline import REQUEST, name_of, step_of
from services.dataplane.routes import Link

Duration = Annotated[float, BeforeValidator(units.duration_s)]
Size = Annotated[int, BeforeValidator(units.size_bytes)]
Bandwidth = Annotated[float, BeforeValidator(units.bytes_per_s)]
MISSING = "is missing"
EVERYWHERE = "all"
"""In place of the gateway's node."""


def _in_full(value: Any) -> Any:
    return SHORT_PRECISIONS.get(value, value) if isinstance(value, str) else value


StoredAs = Annotated[Precision, BeforeValidator(_in_full)]


class Section(BaseModel):
    """A part of a file that a person writes: nothing in it is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeSection(Section):
    """A machine. In the processes runtime, nodes are shares of this one."""

    cpus: float = Field(gt=0)
    memory: Size = Field(gt=0)
    gpus: int = Field(default=0, ge=0)


class LinkSection(Section):
    """What lies between two nodes, the same in both directions."""

    between: tuple[Name, Name]
    latency: Duration = Field(ge=0)
    bandwidth: Bandwidth = Field(gt=0)


class ModelSection(Section):
    """A foundation model, exported as stages into a directory of its own."""

    source: str = Field(min_length=1)
    precisions: tuple[StoredAs, ...] = Field(default=("float32",), min_length=1)
    cut: int = Field(default=1, ge=1)
    """Parts that every core stage is cut into, at layer boundaries; above 1 their stages are `NAME-1`, `NAME-2`, ..."""


class ServiceSection(Section):
    """A stage as deployed, or several stages of one model fused into one."""

    model: Name
    stage: Name
    """Of a fused service the name of what its stages become (`services.dataplane.fusing`)."""
    stages: tuple[Name, ...] = ()
    """The stages of a fused service, in the order they compute in."""
    tier: Tier | None = None
    """Checked against the manifest where it is given."""
    precision: StoredAs = "float32"
    cpus: float = Field(gt=0)
    """What placement reserves for one replica at work."""
    cpu_limit: float | None = Field(default=None, ge=0.01)
    """What one replica may use at most; see `cpus_at_most`."""
    memory: Size = Field(gt=0)
    gpus: int = Field(default=0, ge=0)
    """Of one loaded replica."""
    replicas: int = Field(default=1, ge=1)
    standby: int = Field(default=0, ge=0)
    floor: int = Field(default=1, ge=1)
    """Ready replicas that no transition goes below."""
    nodes: tuple[Name, ...] = ()
    """Where it may run; empty: anywhere."""
    queue_capacity: int = Field(default=256, ge=1)
    max_batch: int | None = Field(default=None, ge=1)
    drain_grace: Duration = Field(default=10.0, gt=0)
    """How long a replica that is told to stop may finish what it has."""

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_fused(cls, data: Any) -> Any:
        stages = data.get("stages") if isinstance(data, dict) else None
        if not isinstance(stages, list | tuple) or "stage" in data or not all(isinstance(name, str) for name in stages):
            return data
        return {**data, "stage": fusing.name_of(stages)} if stages else data

    @property
    def members(self) -> tuple[str, ...]:
        """The stages that a replica opens: one, but for a fused service."""
        return self.stages or (self.stage,)

    @property
    def cpus_at_most(self) -> float:
        """Cores that one replica may use.

        A core where nothing is said: a quota as small as a light stage's reservation would stall it for most of every 100 ms.
        """
        return max(1.0, self.cpus) if self.cpu_limit is None else self.cpu_limit


class StepSection(Section):
    """One visit to a service; inputs that are not named are wired by tensor name (`orchestrator.wiring`)."""

    id: Name
    service: Name
    inputs: Mapping[str, str] = Field(default_factory=dict)
    after: Name | None = None
    """Look for unnamed inputs only in this step and its ancestors."""


class PipelineSection(Section):
    """A DAG of steps that answers one type of task."""

    deadline: Duration = Field(gt=0)
    epsilon: float = Field(gt=0, lt=1)
    token_deadline: Duration | None = Field(default=None, gt=0)
    """Of a streamed answer: longest time from one token to the next, once the first is there."""
    steps: tuple[StepSection, ...] = Field(min_length=1)
    outputs: Mapping[str, str] = Field(min_length=1)


class GatewaySection(Section):
    """The door of the testbed."""

    node: Name | None = None
    """Where it runs; the first node where none is given. `all`: on every node, where the runtime has real ones."""
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    """0: any free one."""


class CostsSection(Section):
    """Prices, in the testbed's cost unit."""

    cpu_second: float = Field(default=1.0, ge=0)
    """A core reserved for a ready or draining replica, per second."""
    standby_fraction: float = Field(default=0.1, ge=0, le=1)
    """What a standby replica costs of the same replica at work."""
    start: float = Field(default=1.0, ge=0)
    """One start of a replica."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class PolicySection(Section):
    """Who decides how many replicas there are; a name alone stands for it with its defaults."""

    name: str = "lyapunov"
    """One of `orchestrator.scaling.policies.POLICIES`."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Its parameters; the others are its defaults."""


class ControlSection(Section):
    """How the orchestrator works."""

    policy: Annotated[PolicySection, BeforeValidator(_named)] = PolicySection()
    slot: Duration = Field(default=1.0, ge=0.05)
    port: int = Field(default=0, ge=0, le=65535)
    """Of the control plane, on the loopback interface; 0: any free one, kept across restarts."""
    stale_after: Duration = Field(default=5.0, gt=0)
    """A signal older than this is stale: nothing is taken away on its word."""
    start_timeout: Duration = Field(default=60.0, gt=0)
    """A replica that is not loaded by then is killed and counts as failed."""
    node_grace: Duration = Field(default=15.0, gt=0)
    """A node that has not been there for so long is planned without: its core services are placed anew."""
    node_return: Duration = Field(default=30.0, ge=0)
    """A node that was planned without is taken back after it has stayed for so long."""
    surge: int = Field(default=1, ge=0, le=1)
    """1: a node may be one replica over its capacity while a new one takes over from an old one; 0: never."""
    costs: CostsSection = CostsSection()


class Testbed(Section):
    """The whole file. See `load`."""

    __test__ = False

    name: Name
    nodes: Mapping[Name, NodeSection] = Field(min_length=1)
    links: tuple[LinkSection, ...] = ()
    models: Mapping[Name, ModelSection] = Field(min_length=1)
    services: Mapping[Name, ServiceSection] = Field(min_length=1)
    pipelines: Mapping[Name, PipelineSection] = Field(min_length=1)
    gateway: GatewaySection = GatewaySection()
    control: ControlSection = ControlSection()
    workload: Mapping[Name, str] = Field(default_factory=dict)
    """pipeline -> arrivals, as `loadgen.arrivals` reads them (`poisson:20`, `step:10@20s,30@20s`)."""

    @property
    def gateway_nodes(self) -> tuple[str, ...]:
        """The nodes with a gateway; tasks are taken to come in evenly over them."""
        if self.gateway.node == EVERYWHERE and EVERYWHERE not in self.nodes:
            return tuple(self.nodes)
        return (self.gateway.node or next(iter(self.nodes)),)

    @property
    def gateway_node(self) -> str:
        """The node the gateway runs on; of several the first."""
        return self.gateway_nodes[0]

    def core_nodes(self) -> tuple[core.Node, ...]:
        """The nodes as the decision modules take them."""
        return tuple(core.Node(name, node.cpus, node.memory, node.gpus) for name, node in self.nodes.items())

    def core_services(self, tiers: Mapping[str, Tier]) -> tuple[core.Service, ...]:
        """The services as the decision modules take them; tiers from the manifests, by service."""
        return tuple(
            core.Service(name, tiers[name], s.cpus, s.memory, s.floor, s.nodes, s.gpus) for name, s in self.services.items()
        )

    def targets(self) -> dict[str, core.Target]:
        """Replicas the file asks for."""
        return {name: core.Target(s.replicas, s.standby) for name, s in self.services.items()}

    def latencies_s(self) -> dict[tuple[str, str], float]:
        """(node, node) -> latency [s], both ways; a pair that is missing is at no distance."""
        both = [(link.between, link.latency) for link in self.links]
        return {pair: latency for (a, b), latency in both for pair in ((a, b), (b, a))}

    def link_table(self) -> dict[tuple[str, str], Link]:
        """(from, to) -> link, both ways."""
        found = [(s.between, Link(latency_s=s.latency, bandwidth_bytes_per_s=s.bandwidth)) for s in self.links]
        return {pair: link for (a, b), link in found for pair in ((a, b), (b, a))}

    def prices(self) -> Prices:
        """What things cost."""
        return Prices(**self.control.costs.model_dump())

    def flows(self) -> frozenset[tuple[str, str]]:
        """Pairs of services that pass tensors on in some pipeline, by the order of its steps."""
        lines = [[step.service for step in pipeline.steps] for pipeline in self.pipelines.values()]
        return frozenset((a, b) for line in lines for a, b in itertools.pairwise(line) if a != b)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A testbed file that holds together."""

    testbed: Testbed
    marked: marked_yaml.Marked
    path: str
    text: str
    sha256: str

    def complain(self, problems: Iterable[Problem]) -> TestbedInvalid:
        """The error for problems found later, in the file's own terms."""
        return TestbedInvalid(sentences(problems, self.marked, self.path))


def load(path: Path) -> Loaded:
    """Read and check a testbed file.

    Raises:
        TestbedInvalid: with every mistake found.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise TestbedInvalid([f"{path}: cannot be read: {reason}"]) from None
    return parse(text, str(path))


def parse(text: str, path: str) -> Loaded:
    """As `load`, of text that was read from `path`."""
    marked = marked_yaml.read(text)
    problems = list(marked.problems)
    testbed: Testbed | None = None
    if not isinstance(marked.data, dict):
        problems = problems or [Problem((), "must be a mapping with name, nodes, models, services and pipelines", 1)]
    else:
        try:
            testbed = Testbed.model_validate(marked.data)
        except ValidationError as error:
            problems += translate(error, marked.data, Testbed)
    if testbed is not None:
        problems += check(testbed)
    if problems or testbed is None:
        raise TestbedInvalid(sentences(problems, marked, path))
    return Loaded(testbed, marked, path, text, hashlib.sha256(text.encode()).hexdigest())


# --- what no single field can tell ----------------------------------------------------------------------------------------


def check(testbed: Testbed) -> list[Problem]:
    """Cross references, pipelines, workload and capacity; all problems, in the order of the file."""
    problems = [
        *_links(testbed),
        *_services(testbed),
        *(problem for name in testbed.pipelines for problem in _pipeline(testbed, name)),
        *_gateway(testbed),
        *_workload(testbed),
    ]
    # Whether it all fits is worth asking only of services that make sense one by one.
    return problems or list(_capacity(testbed))


def _links(testbed: Testbed) -> Iterator[Problem]:
    seen: set[frozenset[str]] = set()
    for i, link in enumerate(testbed.links):
        path = ("links", i, "between")
        for node in link.between:
            if node not in testbed.nodes:
                yield Problem(path, f"there is no node {node!r}{did_you_mean(node, testbed.nodes)}")
        if link.between[0] == link.between[1]:
            yield Problem(path, f"links {link.between[0]!r} to itself; a node needs no link to itself")
        elif frozenset(link.between) in seen:
            yield Problem(path, f"{' and '.join(link.between)} are linked already; one link serves both directions")
        seen.add(frozenset(link.between))


def _services(testbed: Testbed) -> Iterator[Problem]:
    for name, service in testbed.services.items():
        path = ("services", name)
        model = testbed.models.get(service.model)
        if model is None:
            hint = did_you_mean(service.model, testbed.models)
            yield Problem((*path, "model"), f"there is no model {service.model!r}{hint}")
        elif service.precision not in model.precisions and service.precision != "float32":
            made = ", ".join(model.precisions)
            yield Problem((*path, "precision"), f"model {service.model!r} is exported as {made} only; add it to its precisions")
        if service.stages:
            yield from _fused((*path, "stages"), service)
        for node in service.nodes:
            if node not in testbed.nodes:
                yield Problem((*path, "nodes"), f"there is no node {node!r}{did_you_mean(node, testbed.nodes)}")
        if service.cpu_limit is not None and service.cpu_limit < service.cpus:
            yield Problem((*path, "cpu_limit"), f"{service.cpu_limit:g} is less than the {service.cpus:g} cpus it reserves")
        if service.floor > service.replicas:
            yield Problem((*path, "floor"), f"{service.floor} is more than the {service.replicas} replicas asked for")
        yield from _too_big(testbed, name, service)


def _fused(path: marked_yaml.Path, service: ServiceSection) -> Iterator[Problem]:
    if service.stage != fusing.name_of(service.stages):
        yield Problem(path, f"there is also stage: {service.stage}; name one stage, or the stages that are fused")
    elif len(service.stages) == 1:
        yield Problem(path, f"one stage has nothing to be fused with; write stage: {service.stage}")
    for i, name in enumerate(service.stages):
        if name in service.stages[:i]:
            yield Problem((*path, i), f"{name!r} is there already")


def _too_big(testbed: Testbed, name: str, service: ServiceSection) -> Iterator[Problem]:
    allowed = {n: node for n, node in testbed.nodes.items() if not service.nodes or n in service.nodes}
    if not allowed:
        return
    most_cpus = max(allowed, key=lambda n: allowed[n].cpus)
    if service.cpus > allowed[most_cpus].cpus:
        yield Problem(
            ("services", name, "cpus"),
            f"one replica needs {service.cpus:g}, but the largest node it may use, {most_cpus}, "
            f"has {allowed[most_cpus].cpus:g}",
        )
    most_memory = max(allowed, key=lambda n: allowed[n].memory)
    if service.memory > allowed[most_memory].memory:
        needs, has = greedy.mebibytes(service.memory), greedy.mebibytes(allowed[most_memory].memory)
        yield Problem(
            ("services", name, "memory"),
            f"one replica needs {needs}, but the largest node it may use, {most_memory}, has {has}",
        )
    most_gpus = max(allowed, key=lambda n: allowed[n].gpus)
    if service.gpus > allowed[most_gpus].gpus:
        yield Problem(
            ("services", name, "gpus"),
            f"one replica needs {service.gpus}, but no node it may use has more than {allowed[most_gpus].gpus}",
        )


def _pipeline(testbed: Testbed, name: str) -> Iterator[Problem]:
    pipeline = testbed.pipelines[name]
    ids = [step.id for step in pipeline.steps]
    for i, step in enumerate(pipeline.steps):
        path = ("pipelines", name, "steps", i)
        if step.service not in testbed.services:
            hint = did_you_mean(step.service, testbed.services)
            yield Problem((*path, "service"), f"there is no service {step.service!r}{hint}")
        if step.id == REQUEST:
            yield Problem((*path, "id"), f"{REQUEST!r} stands for the request; call the step something else")
        elif step.id in ids[:i]:
            yield Problem((*path, "id"), f"there is already a step {step.id!r}")
        if step.after is not None and step.after not in ids[:i]:
            hint = did_you_mean(step.after, ids[:i])
            yield Problem((*path, "after"), f"no step {step.after!r} comes before this one{hint}")
        for tensor, ref in step.inputs.items():
            yield from _reference((*path, "inputs", tensor), ref, ids)
    for output, ref in pipeline.outputs.items():
        yield from _reference(("pipelines", name, "outputs", output), ref, ids)
    cycle = _cycle(pipeline.steps)
    if cycle:
        yield Problem(("pipelines", name, "steps"), f"the steps wait for each other in a cycle: {' -> '.join(cycle)}")


def _reference(path: marked_yaml.Path, ref: str, ids: Sequence[str]) -> Iterator[Problem]:
    if ref.count(".") != 1 or not name_of(ref) or not step_of(ref):
        yield Problem(path, f"{ref!r} must be {REQUEST}.NAME or STEP.OUTPUT")
    elif step_of(ref) not in {REQUEST, *ids}:
        yield Problem(path, f"there is no step {step_of(ref)!r}{did_you_mean(step_of(ref), [REQUEST, *ids])}")


def _cycle(steps: Sequence[StepSection]) -> list[str]:
    """Steps of a cycle among what the file says outright, the first one again at the end; empty where there is none."""
    waits = {s.id: [*(step_of(ref) for ref in s.inputs.values()), *([s.after] if s.after else [])] for s in steps}
    done: set[str] = set()

    def visit(step: str, way: list[str]) -> list[str]:
        if step in way:
            return [*way[way.index(step) :], step]
        if step in done or step not in waits:
            return []
        found = next((cycle for parent in waits[step] if (cycle := visit(parent, [*way, step]))), [])
        done.add(step)
        return found

    return next((cycle for step in waits if (cycle := visit(step, []))), [])


def _gateway(testbed: Testbed) -> Iterator[Problem]:
    node = testbed.gateway.node
    if node is not None and node != EVERYWHERE and node not in testbed.nodes:
        yield Problem(("gateway", "node"), f"there is no node {node!r}{did_you_mean(node, testbed.nodes)}")


def _workload(testbed: Testbed) -> Iterator[Problem]:
    for pipeline, spec in testbed.workload.items():
        path = ("workload", pipeline)
        if pipeline not in testbed.pipelines:
            yield Problem(path, f"there is no pipeline {pipeline!r}{did_you_mean(pipeline, testbed.pipelines)}")
        try:
            arrivals.parse(spec)
        except ValueError as error:
            yield Problem(path, str(error))


def _capacity(testbed: Testbed) -> Iterator[Problem]:
    tiers: dict[str, Tier] = {name: service.tier or "light" for name, service in testbed.services.items()}
    try:
        greedy.place(testbed.core_services(tiers), testbed.core_nodes(), testbed.targets())
    except Infeasible as error:
        yield Problem(("services",), str(error))


# --- saying it ------------------------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest of the known names, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def sentences(problems: Iterable[Problem], marked: marked_yaml.Marked, path: str) -> list[str]:
    """Problems as `file:line: field: problem`, in the order of the file."""
    placed = [(problem.line or marked.line(problem.path), problem) for problem in problems]
    placed.sort(key=lambda pair: pair[0])
    return [f"{path}:{line}: {dotted(problem.path)}: {problem.message}" for line, problem in placed]


def dotted(path: marked_yaml.Path) -> str:
    """`pipelines.embed.steps[1].service`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "document"


def translate(error: ValidationError, data: Any, model: type[BaseModel]) -> list[Problem]:
    """Pydantic's complaints in our words; a field that is missing only because it is misspelt is one problem, not two."""
    problems = [_translate(detail, data, model) for detail in error.errors(include_url=False)]
    meant = {(*problem.path[:-1], problem.message.rpartition("did you mean ")[2].rstrip("?")) for problem in problems}
    return [problem for problem in problems if not (problem.message == MISSING and problem.path in meant)]


def _translate(detail: ErrorDetails, data: Any, model: type[BaseModel]) -> Problem:
    path = tuple(part for part in detail["loc"] if part != "[key]")
    context, said = detail.get("ctx", {}), _uncapital(detail["msg"])
    # Quantities are read before they are checked; quote them as they were written.
    given = _short(detail["input"] if detail["loc"] != path or detail["type"] == "missing" else _at(data, path))
    match detail["type"]:
        case "extra_forbidden":
            message = _unknown_field(path, data, model)
        case "missing":
            message = MISSING
        case "value_error":
            message = str(context["error"])
        case "literal_error":
            words = [word.strip("' ") for word in context["expected"].replace(" or ", ",").split(",")]
            message = f"{given} is not one of {', '.join(words)}{did_you_mean(str(detail['input']), words)}"
        case "string_pattern_mismatch":
            message = f"{given} must be lower-case letters, digits, - and _, and start with a letter"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            message = f"{given} is out of range: {said}"
        case _:
            message = f"{given}: {said}"
    return Problem(path, message)


def _unknown_field(path: marked_yaml.Path, data: Any, model: type[BaseModel]) -> str:
    fields, taken = _fields_at(model, path[:-1]), _at(data, path[:-1])
    near = did_you_mean(str(path[-1]), [field for field in fields if field not in taken])
    return f"unknown field{near or '; there are ' + ', '.join(fields)}"


def _uncapital(message: str) -> str:
    return message[:1].lower() + message[1:]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _at(data: Any, path: marked_yaml.Path) -> Any:
    for part in path:
        data = data[part]
    return data


def _fields_at(model: type[BaseModel], path: marked_yaml.Path) -> list[str]:
    """Fields the schema has at a path, by walking the types of its fields."""
    kind: Any = model
    for part in path:
        kind = kind.model_fields[str(part)].annotation if _is_model(kind) else _value_type(kind)
        while typing.get_origin(kind) is types.UnionType:
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
    return list(kind.model_fields) if _is_model(kind) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _value_type(kind: Any) -> Any:
    arguments = [argument for argument in typing.get_args(kind) if argument is not Ellipsis]
    return arguments[-1]
