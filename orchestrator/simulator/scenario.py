"""A scenario file: what world, what load, which policies, how often, and what is claimed. One file is one experiment.

`load` reads it or raises `ScenarioInvalid` with every mistake as `file:line: field: problem; did you mean X?`, as testbed files
are read. docs/scenarios.md has the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from loadgen import arrivals
from models.manifest import Name, Tier
from orchestrator import marked_yaml
from orchestrator.errors import TestbedInvalid, UsageError
from orchestrator.marked_yaml import Problem
from orchestrator.scaling.policies import POLICIES
from orchestrator.simulator.families import Paper
from orchestrator.simulator.ingredients import Ingredients
from orchestrator.simulator.initial import Method
from orchestrator.testbed import (
    CostsSection,
    Duration,
    LinkSection,
    NodeSection,
    Section,
    Size,
    Testbed,
    did_you_mean,
    sentences,
    translate,
)

Ingredient = Literal["shedding", "earliest_deadline_first", "standby", "let_out"]
Plot = Literal["violins", "loads", "frontier", "v-sweep", "promises", "response", "cases"]
Role = Literal["ours", "baseline", "ablation", "limit"]
OURS = "lyapunov"
LIMITS = frozenset({"oracle"})
ABLATIONS = frozenset({"no_lyapunov", "mean_delay"})


class ScenarioInvalid(TestbedInvalid):
    """A scenario file with mistakes, each as `file:line: field: problem`."""


# --- worlds written out ---------------------------------------------------------------------------------------------------


class WrittenNode(NodeSection):
    """A node, and how fast it is."""

    speed: float = Field(default=1.0, gt=0)
    """Service times are divided by it."""


class WrittenService(Section):
    """A service as deployed, and how it behaves."""

    tier: Tier
    cpus: float = Field(ge=0)
    memory: Size = Field(default=0, ge=0)
    mean: Duration = Field(gt=0)
    """Of the time to compute one task that is alone, on a node of speed 1."""
    per_task: Duration = Field(default=0.0, ge=0)
    """What every further task of a batch adds; at most `mean`."""
    cv2: float = Field(default=0.0, ge=0)
    max_batch: int = Field(default=1, ge=1)
    slots: int = Field(default=1, ge=1)
    queue_capacity: int = Field(default=256, ge=1)
    start: Duration = Field(default=1.0, ge=0)
    replicas: int = Field(default=1, ge=1)
    standby: int = Field(default=0, ge=0)
    floor: int = Field(default=1, ge=1)
    nodes: tuple[Name, ...] = ()
    input: Size = Field(default=0, ge=0)
    """Bytes that it takes from a request."""
    output: Size = Field(default=0, ge=0)
    """Bytes that it puts out."""


class WrittenStep(Section):
    """A visit to a service, after others; the request where there are none."""

    id: Name
    service: Name
    after: tuple[Name, ...] = ()


class WrittenPipeline(Section):
    """A DAG of steps; what no other step takes is the answer."""

    deadline: Duration = Field(gt=0)
    epsilon: float = Field(gt=0, lt=1)
    steps: tuple[WrittenStep, ...] = Field(min_length=1)


class Written(Section):
    """A world in the file itself."""

    nodes: Mapping[Name, WrittenNode] = Field(min_length=1)
    links: tuple[LinkSection, ...] = ()
    services: Mapping[Name, WrittenService] = Field(min_length=1)
    pipelines: Mapping[Name, WrittenPipeline] = Field(min_length=1)
    gateway: Name | None = None
    costs: CostsSection = CostsSection()


class WorldSection(Section):
    """Exactly one of them."""

    paper: Paper | None = None
    """Drawn by the seed (`families`)."""
    written: Written | None = None
    testbed: Path | None = None
    """A testbed file, from the scenario's directory; its models must be profiled."""

    @model_validator(mode="after")
    def _one(self) -> WorldSection:
        if sum(each is not None for each in (self.paper, self.written, self.testbed)) != 1:
            raise ValueError("must say exactly one of paper, written and testbed")
        return self


# --- the experiment -------------------------------------------------------------------------------------------------------


def _named(value: object) -> object:
    return {"policy": value} if isinstance(value, str) else value


class PolicySection(Section):
    """Who decides, with which options, over which data plane. A bare name will do."""

    policy: str
    label: str | None = None
    """What tables and plots call it; default: the policy, its options and what it goes without."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    sweep: Mapping[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Options that take several values: one entry for each combination."""
    without: tuple[Ingredient, ...] = ()
    """Rules of the data plane that are off."""
    spend_standby: bool = False
    """The data plane may let out every standby: for policies that know no allowance of their own."""
    placement: Method | None = None
    """Who places the core tier, where it is not the scenario's method."""
    role: Role | None = None
    """Default: by the policy's name."""


class PlacementSection(Section):
    """How much runs at the beginning; see `initial.Sizing`. Left out where the world says itself how many replicas it has."""

    core: Method = "program"
    margin: float = Field(default=1.0, gt=0)
    kappa: int = Field(default=2, ge=1)
    gamma: float = Field(default=0.5, ge=0, le=1)
    beta: float = Field(default=1.0, ge=0)
    standby: float = Field(default=0.5, ge=0)


class LossSection(Section):
    """The loss of a node."""

    node: str
    """A name; `busiest`: the one with most cores at work on it in the beginning; `drawn`: any, by the seed. Never the gateway's
    node, unless it is named."""
    at: Duration = Field(ge=0)
    back: Duration | None = Field(default=None, gt=0)


class ClaimSection(Section):
    """Something the report holds against what was measured (`report.verdicts`)."""

    claim: Literal["on_time", "cheapest", "frontier", "promise", "recovery", "steady", "v_sweep", "not_below"]
    load: float | None = None
    """Only at this load."""
    at_least: float | None = Field(default=None, ge=0, le=1)
    levels: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    at: Duration | None = None
    """When the step comes."""
    slots: int = 5
    after: float = 0.2
    """Share of the run that may be restless."""
    option: str = "v"
    label: str | None = None
    """Of the policy that is compared with."""
    slack: float = Field(default=0.01, ge=0)


class Scenario(Section):
    """The whole file. See `load`."""

    name: Name
    about: str = Field(min_length=1)
    world: WorldSection
    vary: Mapping[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Fields of `world.paper` that take several values: one case for each combination."""
    workload: str | Mapping[Name, str] = "poisson:1"
    """Arrivals by pipeline, in tasks/s; or one law for all, whose rates are multiples of each pipeline's own mean rate."""
    loads: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0,), min_length=1)
    """By which the workload is multiplied."""
    seeds: int = Field(default=10, ge=1)
    """Runs with seeds 1 to so many."""
    duration: Duration = Field(gt=0)
    """The warm-up included."""
    warmup: Duration = Field(default=0.0, ge=0)
    slot: Duration = Field(gt=0)
    metric_lag: Duration = Field(default=0.0, ge=0)
    placement: PlacementSection | None = None
    policies: tuple[Annotated[PolicySection, BeforeValidator(_named)], ...] = Field(min_length=1)
    faults: tuple[LossSection, ...] = ()
    plots: tuple[Plot, ...] = ("violins",)
    claims: tuple[ClaimSection, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy as it runs: one combination of options."""

    policy: str
    label: str
    family: str
    """The label without what a sweep varies."""
    role: Role
    options: Mapping[str, Any]
    ingredients: Ingredients
    spend_standby: bool
    placement: Method | None


def entries(scenario: Scenario) -> tuple[Entry, ...]:
    """All policies of a scenario, sweeps written out, in the order of the file."""
    return tuple(entry for section in scenario.policies for entry in _entries(section))


def _entries(section: PolicySection) -> Iterator[Entry]:
    off = Ingredients(**{name: name not in section.without for name in Ingredients.__slots__})
    fixed = [f"{key}={_short(value)}" for key, value in section.options.items() if not isinstance(value, Mapping)]
    family = section.label or " ".join([section.policy, *fixed, *(f"-{name}" for name in section.without)])
    if section.placement is not None and section.label is None:
        family += f" on {section.placement}"
    default: Role = "limit" if section.policy in LIMITS else "ablation" if section.policy in ABLATIONS else "baseline"
    role = section.role or ("ours" if section.policy == OURS and not section.without else default)
    for values in itertools.product(*section.sweep.values()):
        swept = dict(zip(section.sweep, values, strict=True))
        label = " ".join([family, *(f"{key}={_short(value)}" for key, value in swept.items())])
        options = {**section.options, **swept}
        yield Entry(section.policy, label, family, role, options, off, section.spend_standby, section.placement)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def cases(scenario: Scenario) -> tuple[Mapping[str, Any], ...]:
    """What varies of the world: one mapping of fields for each case, an empty one where nothing does."""
    return tuple(dict(zip(scenario.vary, values, strict=True)) for values in itertools.product(*scenario.vary.values()))


def paper_of(scenario: Scenario, case: Mapping[str, Any]) -> Paper:
    """The family's parameters in a case."""
    return Paper.model_validate({**(scenario.world.paper or Paper()).model_dump(), **case})


# --- reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """A scenario file that holds together."""

    scenario: Scenario
    path: Path
    sha256: str


def find(name: str, directory: Path) -> Path:
    """The file of a scenario, by path or by its name in `directory`.

    Raises:
        UsageError: there is none.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    there = sorted(file.stem for file in directory.glob("*.yaml"))
    if name.lower() not in there:
        raise UsageError(f"there is no scenario {name!r}{did_you_mean(name, there)}; there are {', '.join(there)}")
    return directory / f"{name.lower()}.yaml"


def is_scenario(text: str) -> bool:
    """Whether a file means to be a scenario, and not a testbed: only scenarios have policies."""
    data = marked_yaml.read(text).data
    return isinstance(data, dict) and not {"policies", "world"}.isdisjoint(data)


def load(path: Path) -> Loaded:
    """Read and check a scenario file.

    Raises:
        ScenarioInvalid: with every mistake found.
    """
    return parse(read(path), path)


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        ScenarioInvalid: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ScenarioInvalid([f"{path}: cannot be read: {reason}"]) from None


def parse(text: str, path: Path) -> Loaded:
    """As `load`, of text that was read from `path`."""
    marked = marked_yaml.read(text)
    problems, scenario = list(marked.problems), None
    if not isinstance(marked.data, dict):
        problems = problems or [Problem((), "must be a mapping with name, world, policies, duration and slot", 1)]
    else:
        try:
            scenario = Scenario.model_validate(marked.data)
        except ValidationError as error:
            problems += [_in_file(problem) for problem in translate(error, marked.data, Scenario)]
    if scenario is not None:
        problems += check(scenario)
    if problems or scenario is None:
        raise ScenarioInvalid(sentences(problems, marked, str(path)))
    return Loaded(scenario, path, hashlib.sha256(text.encode()).hexdigest())


def _in_file(problem: Problem) -> Problem:
    """Validators before a field leave marks in its path that no file has."""
    return dataclasses.replace(problem, path=tuple(part for part in problem.path if not str(part).startswith("function-")))


def of_testbed(testbed: Testbed, path: Path, policies: Sequence[str]) -> Scenario:
    """A testbed file's own workload as a scenario.

    Raises:
        UsageError: it has none, or a policy is not known.
    """
    if not testbed.workload:
        raise UsageError(f"{path} has no workload; add one")
    scenario = Scenario(
        name=testbed.name, about=f"the workload of {path}", world=WorldSection(testbed=path.resolve()),
        workload=testbed.workload, seeds=1, duration=_natural(testbed), slot=f"{testbed.control.slot}s",
        policies=tuple(PolicySection(policy=name) for name in policies), plots=(),
    )  # fmt: skip
    if problems := check(scenario):
        raise UsageError("; ".join(problem.message for problem in problems))
    return scenario


def _natural(testbed: Testbed) -> str:
    lengths = [arrivals.natural_s(arrivals.parse(spec)) for spec in testbed.workload.values()]
    return f"{max([length for length in lengths if length], default=60.0)}s"


# --- what no single field can tell ----------------------------------------------------------------------------------------


def check(scenario: Scenario) -> list[Problem]:
    """Names, options, arrivals and times; all problems, in the order of the file."""
    return [
        *_written(scenario),
        *_vary(scenario),
        *_workload(scenario),
        *_times(scenario),
        *_policies(scenario),
        *_faults(scenario),
    ]


def _written(scenario: Scenario) -> Iterator[Problem]:
    written = scenario.world.written
    if written is None:
        return
    here: marked_yaml.Path = ("world", "written")
    for i, link in enumerate(written.links):
        for node in link.between:
            yield from _known((*here, "links", i, "between"), "node", node, written.nodes)
    if written.gateway is not None:
        yield from _known((*here, "gateway"), "node", written.gateway, written.nodes)
    for name, service in written.services.items():
        if service.per_task > service.mean:
            yield Problem((*here, "services", name, "per_task"), f"is more than the {service.mean:g} s of a task alone")
        for node in service.nodes:
            yield from _known((*here, "services", name, "nodes"), "node", node, written.nodes)
    for name, pipeline in written.pipelines.items():
        done: list[str] = []
        for i, step in enumerate(pipeline.steps):
            path = (*here, "pipelines", name, "steps", i)
            yield from _known((*path, "service"), "service", step.service, written.services)
            if step.id in done:
                yield Problem((*path, "id"), f"there is already a step {step.id!r}")
            for parent in step.after:
                if parent not in done:
                    yield Problem(
                        (*path, "after"), f"no step {parent!r} comes before this one{did_you_mean(parent, done)}"
                    )  # fmt: skip
            done.append(step.id)


def _known(path: marked_yaml.Path, kind: str, name: str, known: Mapping[str, object]) -> Iterator[Problem]:
    if name not in known:
        yield Problem(path, f"there is no {kind} {name!r}{did_you_mean(name, known)}")


def _vary(scenario: Scenario) -> Iterator[Problem]:
    if not scenario.vary:
        return
    if scenario.world.paper is None:
        yield Problem(("vary",), "only a world drawn by the seed (world.paper) has fields that can vary")
        return
    fields = list(Paper.model_fields)
    for name, values in scenario.vary.items():
        if name not in fields:
            yield Problem(
                ("vary", name), f"unknown field{did_you_mean(name, fields) or '; there are ' + ', '.join(fields)}"
            )  # fmt: skip
            continue
        for i, value in enumerate(values):
            try:
                Paper.model_validate({name: value})
            except ValidationError as error:
                yield Problem(("vary", name, i), error.errors()[0]["msg"])


def _workload(scenario: Scenario) -> Iterator[Problem]:
    specs = scenario.workload
    for pipeline, spec in {"": specs}.items() if isinstance(specs, str) else specs.items():
        path = ("workload", pipeline) if pipeline else ("workload",)
        if pipeline and scenario.world.written is not None:
            yield from _known(path, "pipeline", pipeline, scenario.world.written.pipelines)
        try:
            arrivals.parse(spec)
        except ValueError as error:
            yield Problem(path, str(error))
    if isinstance(specs, str) and scenario.world.paper is None:
        yield Problem(("workload",), "must name the arrivals of every pipeline: only world.paper has mean rates of its own")


def _times(scenario: Scenario) -> Iterator[Problem]:
    if scenario.warmup >= scenario.duration:
        yield Problem(("warmup",), f"leaves nothing to measure of {scenario.duration:g} s")
    if scenario.slot > scenario.duration:
        yield Problem(("slot",), f"is longer than the {scenario.duration:g} s that are simulated")


def _policies(scenario: Scenario) -> Iterator[Problem]:
    for i, section in enumerate(scenario.policies):
        path: marked_yaml.Path = ("policies", i)
        if section.policy not in POLICIES:
            hint = did_you_mean(section.policy, POLICIES) or f"; there are {', '.join(POLICIES)}"
            yield Problem((*path, "policy"), f"there is no policy {section.policy!r}{hint}")
            continue
        fields = [f.name for f in dataclasses.fields(POLICIES[section.policy]) if f.name != "site"]  # type: ignore[arg-type]
        for part in ("options", "sweep"):
            for name in getattr(section, part):
                if name not in fields:
                    hint = did_you_mean(name, fields) or f"; there are {', '.join(fields)}"
                    yield Problem((*path, part, name), f"{section.policy} has no option {name!r}{hint}")
        if section.placement is not None and scenario.placement is None:
            yield Problem((*path, "placement"), "needs the scenario's own placement, which says how much is placed")
    labels = [entry.label for entry in entries(scenario)]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield Problem(("policies",), f"two entries are called {label!r}; give one a label")


def _faults(scenario: Scenario) -> Iterator[Problem]:
    known = scenario.world.written.nodes if scenario.world.written is not None else None
    for i, loss in enumerate(scenario.faults):
        if known is not None and loss.node not in ("busiest", "drawn"):
            yield from _known(("faults", i, "node"), "node", loss.node, known)
        if loss.at >= scenario.duration:
            yield Problem(("faults", i, "at"), f"comes after the {scenario.duration:g} s that are simulated")
        if loss.back is not None and loss.back <= loss.at:
            yield Problem(("faults", i, "back"), "comes before the loss")
