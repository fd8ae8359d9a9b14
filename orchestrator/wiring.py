"""Steps and manifests become pipelines: every input of every step gets its reference, and every edge is checked.

An input that the testbed names comes from there. Any other is wired by tensor name, from the nearest earlier step that outputs
that name; `after` narrows the search to one step and its ancestors. What no step outputs but has a default is taken from the
request, which may leave it out. Both ends of an edge must agree on datatype and shape. A step at the first part of a decoder
that was cut gets the services of the other parts too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from models.manifest import Manifest, StageSpec, TensorSpec, Tier
from orchestrator.marked_yaml import Path, Problem
from orchestrator.testbed import PipelineSection, ServiceSection, StepSection, Testbed, did_you_mean
from services.dataplane import fusing
from services.dataplane.fusing import CannotFuse
from services.dataplane.pipeline import REQUEST, Pipeline, Step, agree, name_of, step_of


@dataclass(frozen=True, slots=True)
class Wiring:
    """A testbed together with what its models turned out to be."""

    pipelines: Mapping[str, Pipeline]
    tiers: Mapping[str, Tier]
    """By service."""
    problems: tuple[Problem, ...]
    """Empty where everything fits; otherwise the rest is not to be used."""
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    """The models, each with a stage more for every fused service of it."""


def wire(testbed: Testbed, manifests: Mapping[str, Manifest]) -> Wiring:
    """Wire every pipeline. `manifests` holds every model of the testbed, by its name there."""
    stages: dict[str, StageSpec] = {}
    manifests, problems = with_fused(testbed, manifests)
    if not problems:
        for name in testbed.services:
            problems += _stage(testbed, name, manifests, stages)
    pipelines: dict[str, Pipeline] = {}
    if not problems:
        for name, section in testbed.pipelines.items():
            wired = _Wires(("pipelines", name), section, stages, testbed.services)
            problems += wired.run()
            if wired.pipeline is not None:
                pipelines[name] = wired.pipeline
    return Wiring(pipelines, {name: stage.tier for name, stage in stages.items()}, tuple(problems), manifests)


def with_fused(testbed: Testbed, manifests: Mapping[str, Manifest]) -> tuple[dict[str, Manifest], list[Problem]]:
    """The models with a stage more for every fused service of the testbed, and what is in the way of that."""
    found, problems = dict(manifests), list[Problem]()
    for name, section in testbed.services.items():
        if section.stages:
            path, model = ("services", name, "stages"), found[section.model]
            unknown = list(_unknown(path, section.model, model, section.stages))
            problems += unknown
            if not unknown:
                try:
                    found[section.model] = fusing.with_fused(model, section.stages)
                except CannotFuse as error:
                    problems.append(Problem(path, str(error)))
    return found, problems


def _unknown(path: Path, name: str, model: Manifest, stages: tuple[str, ...]) -> Iterator[Problem]:
    known = [stage.name for stage in fusing.as_exported(model).stages]
    for i, stage in enumerate(stages):
        if stage not in known:
            yield Problem((*path, i), _no_stage(name, stage, known))


def _no_stage(model: str, stage: str, known: Collection[str]) -> str:
    return f"model {model!r} has no stage {stage!r}" + (did_you_mean(stage, known) or f"; it has {', '.join(known)}")


def _stage(testbed: Testbed, name: str, manifests: Mapping[str, Manifest], stages: dict[str, StageSpec]) -> Iterator[Problem]:
    section = testbed.services[name]
    path = ("services", name)
    known = [stage.name for stage in fusing.as_exported(manifests[section.model]).stages]
    if section.stage not in known and not section.stages:
        yield Problem((*path, "stage"), _no_stage(section.model, section.stage, known))
        return
    stage = manifests[section.model].stage(section.stage)
    if section.precision not in stage.files:
        made = ", ".join(stage.files)
        yield Problem((*path, "precision"), f"stage {stage.name!r} was exported as {made}, not as {section.precision}")
    if section.tier not in (None, stage.tier):
        yield Problem((*path, "tier"), f"the manifest says that {stage.name!r} is {stage.tier}")
    stages[name] = stage


@dataclass(slots=True)
class _Wires:
    """One pipeline under construction, step by step in the order of the file."""

    path: Path
    section: PipelineSection
    stages: Mapping[str, StageSpec]
    services: Mapping[str, ServiceSection]
    steps: dict[str, Step] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    pipeline: Pipeline | None = None
    """The result, where there were no problems."""
    requested: dict[str, TensorSpec] = field(default_factory=dict)
    """What the tensors of the request have to be, from their first use."""

    def run(self) -> list[Problem]:
        """Wire it; returns the problems."""
        for i, step in enumerate(self.section.steps):
            self._wire(i, step)
        if not self.problems:
            self._check_edges()
            self._check_outputs()
        if not self.problems:
            self._build()
        return self.problems

    def _wire(self, i: int, step: StepSection) -> None:
        stage = self.stages[step.service]
        path = (*self.path, "steps", i)
        defaults = {tensor.name: tensor.default for tensor in stage.inputs}
        names = list(defaults)
        for name in step.inputs:
            if name not in names:
                hint = did_you_mean(name, names) or f"; it takes {', '.join(names)}"
                self._complain((*path, "inputs", name), f"service {step.service!r} takes no tensor {name!r}{hint}")
        inputs = dict(step.inputs)
        for name in names:
            if name not in inputs and (source := self._source(step, name)) is not None:
                inputs[name] = f"{source}.{name}"
            elif name not in inputs and defaults[name] is not None:
                inputs[name] = f"{REQUEST}.{name}"
            elif name not in inputs:
                where = f"neither {step.after!r} nor its ancestors give" if step.after else "no earlier step gives"
                self._complain(path, f"{where} the input {name!r} of step {step.id!r}; name it under inputs")
        self.steps[step.id] = Step(
            id=step.id,
            service=step.service,
            inputs={n: inputs[n] for n in names if n in inputs},
            parts=tuple(self._parts((*path, "service"), step.service)),
        )

    def _parts(self, path: Path, service: str) -> Iterator[str]:
        """Services with the further parts of a decoder that was cut, where the step's has the first."""
        stage, section = self.stages[service], self.services[service]
        number, parts = stage.parameters.get("part", 1), stage.parameters.get("parts", 1)
        if number > 1:
            self._complain(path, f"{service!r} is part {number} of a decoder; a step names the first, which calls it")
            return
        if parts > 1 and stage.parameters.get("encoder"):
            self._complain(
                path,
                f"{service!r} is a part of a decoder that attends to an encoder, and such a decoder is served whole only: "
                f"give model {section.model!r} no cut",
            )
            return
        for i in range(2, parts + 1):
            wanted = f"{stage.name.rpartition('-')[0]}-{i}"
            found = [name for name, each in self.services.items() if (each.model, each.stage) == (section.model, wanted)]
            # Of several the one that is stored as the first part is.
            found.sort(key=lambda name: self.services[name].precision != section.precision)
            if not found:
                self._complain(
                    path,
                    f"{service!r} is part 1 of {parts} of a decoder, and no service serves {wanted!r} of {section.model!r}",
                )
                return
            yield found[0]

    def _source(self, step: StepSection, tensor: str) -> str | None:
        """The nearest earlier step that outputs the tensor."""
        allowed = None if step.after is None else self._with_ancestors(step.after)
        for earlier in reversed(self.steps):
            if allowed is not None and earlier not in allowed:
                continue
            if any(output.name == tensor for output in self._stage_of(earlier).outputs):
                return earlier
        return None

    def _with_ancestors(self, step: str) -> set[str]:
        found, left = {step}, [step]
        while left:
            for parent in self.steps[left.pop()].parents - found:
                if parent in self.steps:
                    found.add(parent)
                    left.append(parent)
        return found

    def _check_edges(self) -> None:
        for i, step in enumerate(self.section.steps):
            stage = self._stage_of(step.id)
            for taken in stage.inputs:
                ref = self.steps[step.id].inputs[taken.name]
                path = (*self.path, "steps", i, "inputs", taken.name)
                given = self._given(path, ref, taken)
                if given is not None and not agree(given, taken):
                    self._complain(path, f"{ref} is {_words(given)}, but {step.service!r} takes {_words(taken)}")

    def _build(self) -> None:
        try:
            self.pipeline = Pipeline(
                name=str(self.path[-1]), deadline_s=self.section.deadline, token_deadline_s=self.section.token_deadline,
                epsilon=self.section.epsilon, steps=tuple(self.steps.values()), outputs=self.section.outputs,
            )  # fmt: skip
        except ValidationError:
            # The file's own words hold no cycle (testbed.check), so it came in with the wires added here.
            self._complain((*self.path, "steps"), "unnamed inputs make the steps wait for each other; name them under inputs")

    def _check_outputs(self) -> None:
        for name, ref in self.section.outputs.items():
            path = (*self.path, "outputs", name)
            if step_of(ref) == REQUEST and name_of(ref) not in self.requested:
                self._complain(path, f"{ref} is taken by no step, so the request has no such tensor")
            elif step_of(ref) != REQUEST:
                self._given(path, ref, None)

    def _given(self, path: Path, ref: str, taken: TensorSpec | None) -> TensorSpec | None:
        if step_of(ref) == REQUEST:
            return self.requested.setdefault(name_of(ref), taken) if taken is not None else None
        outputs = {tensor.name: tensor for tensor in self._stage_of(step_of(ref)).outputs}
        if name_of(ref) not in outputs:
            hint = did_you_mean(name_of(ref), outputs) or f"; it gives {', '.join(outputs)}"
            self._complain(path, f"step {step_of(ref)!r} gives no tensor {name_of(ref)!r}{hint}")
        return outputs.get(name_of(ref))

    def _stage_of(self, step: str) -> StageSpec:
        return self.stages[self.steps[step].service]

    def _complain(self, path: Path, message: str) -> None:
        self.problems.append(Problem(path, message))


def _words(tensor: TensorSpec) -> str:
    return f"{tensor.datatype} [{', '.join(map(str, tensor.shape))}]"
