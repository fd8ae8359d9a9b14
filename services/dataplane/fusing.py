"""Several stages of one model as one: what a fused service takes, gives, needs and how long it works.

A fused service computes its members one after another in one process, so no tensor between them crosses a hop. To everybody
else it is a stage like any other; `fuse` makes its `StageSpec`, which the orchestrator puts beside the model's own
(`with_fused`) and the replica serves (`services.stage.processors.fused`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

from models.manifest import (
    GENERATE,
    Manifest,
    ModelFile,
    Precision,
    ServiceLaw,
    ServicePoint,
    StageProfile,
    StageSpec,
    TensorSpec,
)
from services.dataplane.pipeline import agree

FUSED = "fused"
"""The processor of a fused stage."""
MEMBERS = "stages"
"""Its parameter that lists the members, in the order they compute in."""
BARE_BYTES = 52_000_000
"""Resident set of a measuring process before it opens a stage: interpreter, numpy, ONNX Runtime. Fused stages share one."""
_LONGEST_NAME = 63


class CannotFuse(ValueError):
    """These stages cannot be one service; the message says which of them is in the way, and why."""


def name_of(members: Sequence[str]) -> str:
    """Name of the stage that these become: theirs in a row, and where that is too long its beginning and a fingerprint."""
    whole = "-".join(members)
    if len(whole) <= _LONGEST_NAME:
        return whole
    fingerprint = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{whole[: _LONGEST_NAME - len(fingerprint) - 1].rstrip('-')}-{fingerprint}"


def with_fused(manifest: Manifest, members: Sequence[str]) -> Manifest:
    """The model with one stage more, which is these.

    Raises:
        ManifestError: the model lacks one of them.
        CannotFuse: they do not make one chain.
    """
    fused = fuse(manifest, members)
    stages = tuple(stage for stage in manifest.stages if stage.name != fused.name)
    return manifest.model_copy(update={"stages": (*stages, fused)})


def as_exported(manifest: Manifest) -> Manifest:
    """The model without the stages that were put beside its own."""
    return manifest.model_copy(update={"stages": tuple(stage for stage in manifest.stages if stage.processor != FUSED)})


def fuse(manifest: Manifest, members: Sequence[str]) -> StageSpec:
    """The stage that computes these stages of a model one after another.

    Inputs are those that no earlier member makes, outputs all that members make; of two outputs of one name the last counts.

    Raises:
        ManifestError: the model lacks one of them.
        CannotFuse: they do not make one chain.
    """
    stages = tuple(manifest.stage(name) for name in members)
    if len(set(members)) < max(len(members), 2):
        raise CannotFuse("name at least two stages, each of them once")
    for stage in stages:
        if stage.parameters.get("parts", 1) > 1:
            raise CannotFuse(f"stage {stage.name!r} is a part of a decoder, which calls, or is called, for every token")
    inputs, outputs = _tensors(manifest, stages)
    files = _files(stages)
    return StageSpec(
        name=name_of(members),
        tier="core" if any(stage.tier == "core" for stage in stages) else "light",
        processor=FUSED,
        inputs=inputs,
        outputs=outputs,
        files=files,
        parameters={MEMBERS: list(members)},
        max_batch=_max_batch(stages, inputs, outputs),
        profile=_profiles(manifest, stages, inputs[0], files),
    )


def wires(stages: Sequence[StageSpec]) -> list[dict[str, int | None]]:
    """For each member, input -> index of the earlier member that makes it; None: it comes from outside."""
    made: dict[str, int] = {}
    found: list[dict[str, int | None]] = []
    for i, stage in enumerate(stages):
        found.append({tensor.name: made.get(tensor.name) for tensor in stage.inputs})
        made |= {tensor.name: i for tensor in stage.outputs}
    return found


def precision_of(stage: StageSpec, precision: Precision) -> Precision:
    """What a member is served as: light stages know no precision but float32."""
    return precision if stage.tier == "core" or precision in stage.files else "float32"


# --- tensors --------------------------------------------------------------------------------------------------------------


def _tensors(manifest: Manifest, stages: Sequence[StageSpec]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    for i, (stage, sources) in enumerate(zip(stages, wires(stages), strict=True)):
        if i and all(source is None for source in sources.values()):
            before = ", ".join(each.name for each in stages[:i])
            raise CannotFuse(f"stage {stage.name!r} takes nothing that {before} makes: fused stages are one chain")
        for tensor in stage.inputs:
            outside = sources[tensor.name] is None
            known = inputs.setdefault(tensor.name, tensor) if outside else outputs[tensor.name]
            if not agree(known, tensor):
                raise CannotFuse(f"stage {stage.name!r} takes another {tensor.name!r} than the stages before it take or make")
            if outside and i:
                _refuse_gap(manifest, stages[:i], stage, tensor.name)
        outputs |= {tensor.name: tensor for tensor in stage.outputs}
    return tuple(inputs.values()), tuple(outputs.values())


def _refuse_gap(manifest: Manifest, before: Sequence[StageSpec], stage: StageSpec, tensor: str) -> None:
    """A tensor from outside that is made of what members make would have the fused stage wait for itself."""
    made = {each.name for member in before for each in member.outputs}
    others = [each for each in as_exported(manifest).stages if each not in before and each != stage]
    reached: list[StageSpec] = []
    while following := [s for s in others if s not in reached and made & {each.name for each in s.inputs}]:
        reached += following
        made |= {each.name for s in following for each in s.outputs}
    missing = [s.name for s in reached if tensor in {each.name for each in s.outputs}]
    if missing:
        raise CannotFuse(
            f"stage {stage.name!r} takes {tensor!r}, which {' or '.join(missing)} makes of what "
            f"{', '.join(each.name for each in before)} makes: put that stage between them"
        )


def _max_batch(stages: Sequence[StageSpec], inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> int:
    """Most items of several tasks: as many as every core member takes, where all of them can be stacked and cut apart again.

    A light member says 1 because batching gains it nothing; any number of items it takes in any case.
    """
    inside = [tensor for stage in stages for tensor in (*stage.inputs, *stage.outputs)]
    axes = {axis for tensor in inputs for axis in tensor.shape}
    known = all(axis in axes for tensor in outputs for axis in tensor.shape if isinstance(axis, str))
    if not known or any(tensor.batch_axis is None for tensor in inside) or any(s.processor == GENERATE for s in stages):
        return 1
    return min((stage.max_batch for stage in stages if stage.tier == "core"), default=1)


# --- files and profile ----------------------------------------------------------------------------------------------------


def _files(stages: Sequence[StageSpec]) -> dict[Precision, tuple[ModelFile, ...]]:
    """Files of all members, for every precision that they can be served in together."""
    asked = dict.fromkeys(precision for stage in stages for precision in stage.files)
    found: dict[Precision, tuple[ModelFile, ...]] = {}
    for precision in asked:
        served = [precision_of(stage, precision) for stage in stages]
        if all(p in stage.files for stage, p in zip(stages, served, strict=True)):
            found[precision] = tuple(f for stage, p in zip(stages, served, strict=True) for f in stage.files[p])
    return found


def _profiles(
    manifest: Manifest, stages: Sequence[StageSpec], first: TensorSpec, precisions: Iterable[Precision]
) -> dict[Precision, StageProfile]:
    """A profile for every precision in which each core member has one; light members without one count as nothing."""
    found: dict[Precision, StageProfile] = {}
    for precision in precisions:
        parts = {stage.name: stage.profile.get(precision_of(stage, precision)) for stage in stages}
        known = [(stage, part) for stage in stages if (part := parts[stage.name]) is not None]
        if known and all(parts[stage.name] is not None for stage in stages if stage.tier == "core"):
            found[precision] = _profile(manifest, known, first)
    return found


def _profile(manifest: Manifest, parts: Sequence[tuple[StageSpec, StageProfile]], first: TensorSpec) -> StageProfile:
    """The members' profiles added up, at the model's typical lengths.

    A member's law counts in its own units: per unit of the fused stage it has `length_i / length` of them, the ratio of
    the products of both first inputs' typical lengths. Tails of members at worst fall on the same task.
    """
    length = _length(manifest, first)
    means = [part.law.mean_s(_length(manifest, stage.inputs[0])) for stage, part in parts]
    law = ServiceLaw(
        base_s=math.fsum(part.law.base_s for _, part in parts),
        per_unit_s=math.fsum(part.law.per_unit_s * _length(manifest, stage.inputs[0]) / length for stage, part in parts),
        tail_ratio=max(part.law.tail_ratio for _, part in parts),
    )
    mean_s = math.fsum(means)
    spread_s = math.sqrt(math.fsum(part.task_cv2 * mean**2 for (_, part), mean in zip(parts, means, strict=True)))
    heaviest = parts[max(range(len(parts)), key=lambda i: means[i])][1]
    resident = sum(part.resident_bytes for _, part in parts) - (len(parts) - 1) * BARE_BYTES
    point = ServicePoint(
        batch=1, length=1, samples=min(point.samples for _, part in parts for point in part.points), mean_s=mean_s,
        std_s=spread_s, p50_s=mean_s, p95_s=mean_s * law.tail_ratio, p99_s=mean_s * law.tail_ratio,
    )  # fmt: skip
    return heaviest.model_copy(
        update={
            "points": (point,),
            "law": law,
            "resident_bytes": max(resident, *(part.resident_bytes for _, part in parts)),
            "load_s": math.fsum(part.load_s for _, part in parts),
            "disturbed_runs": sum(part.disturbed_runs for _, part in parts),
            "gamma": None,
            "other_threads": (),
        }
    )


def _length(manifest: Manifest, tensor: TensorSpec) -> int:
    """Product of a tensor's symbolic axes but the batch, at typical lengths: units of one item."""
    return math.prod(manifest.lengths(tensor))
