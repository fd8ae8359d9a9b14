"""The manifest: what an exported model consists of, as one JSON document beside its files.

Written by `models.export` and `models.profile`; read by the stage that serves a piece of the model and by the orchestrator
that places it. This module is a leaf: it imports neither torch nor onnxruntime, and nothing else of this project.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
BATCH_AXIS = "batch"

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8,
}  # fmt: skip
Tier = Literal["core", "light"]
Weights = Literal["trained", "seeded"]
"""`seeded`: the real architecture with random weights of a stated seed, good for measuring, useless for answers."""
Precision = Literal["float32", "float16", "int8"]
"""What the weights are stored as. What travels between stages is what a stage's tensors say, whatever the precision."""
SHORT_PRECISIONS: Mapping[str, Precision] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""What a precision may be called besides its own name, on the command line and in a testbed."""
GENERATE = "generate"
"""The processor of a core stage that makes tokens one after another; it keeps the tasks of a batch apart itself."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]


class ManifestError(ValueError):
    """A manifest that is missing, malformed, or does not match the files beside it. The message says which and what to do."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Document):
    """One input or output of a stage. An axis is a fixed length or the name of a symbolic one.

    The axis named `batch` counts items and is the one along which a stage may put several tasks together; two tensors of a
    stage that share a symbolic axis share its length.
    """

    name: str = Field(min_length=1, max_length=128)
    datatype: Datatype
    shape: tuple[int | str, ...]
    pad_value: float = 0.0
    """What fills the end of a symbolic axis other than `batch` when tasks of unequal length are batched."""
    default: int | float | None = None
    """Of an input: what every item gets where a request leaves it out; None where it may not."""
    bytes_per_item: int = Field(default=0, ge=0)
    """Bytes of one item (batch = 1) at the model's typical lengths, for the placement's link flows."""

    @property
    def batch_axis(self) -> int | None:
        """Index of the batch axis, or None for a tensor that belongs to a whole task (label texts, say)."""
        return self.shape.index(BATCH_AXIS) if BATCH_AXIS in self.shape else None

    def sized(self, batch: int, length: int) -> tuple[int, ...]:
        """The shape of a batch of so many items whose other symbolic axes all have that length."""
        return tuple(axis if isinstance(axis, int) else batch if axis == BATCH_AXIS else length for axis in self.shape)


class ModelFile(_Document):
    """A file of a stage, relative to the manifest."""

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class ServicePoint(_Document):
    """Measured service time of one batch of `batch` items, each `length` long on the symbolic axis (1 where there is none)."""

    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    samples: int = Field(ge=1)
    mean_s: float = Field(gt=0)
    std_s: float = Field(ge=0)
    p50_s: float = Field(gt=0)
    p95_s: float = Field(gt=0)
    p99_s: float = Field(gt=0)


class ServiceLaw(_Document):
    """Service time of a batch as a straight line in its padded size: t(u) = base_s + per_unit_s u  [s].

    u [units] is the product of the symbolic axes of the stage's first input after padding (batch x seq for an encoder).
    Least squares over the profile's points, weighted by 1/t so that short and long batches count alike. `tail_ratio` is the
    largest p95 / t(u) seen, so t(u) * tail_ratio bounds the 95 % quantile over the profiled range.
    """

    base_s: float = Field(ge=0)
    per_unit_s: float = Field(ge=0)
    tail_ratio: float = Field(ge=1)

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float, float]]) -> ServiceLaw:
        """The law that fits best: least sum of ((t(u_i) - t_i) / t_i)^2 with neither coefficient negative.

        Args:
            points: triples of size u_i [units], mean time t_i [s] and its 95 % quantile [s], all > 0. With a single size the
                slope takes all of the time, which extrapolates to larger batches on the safe side.

        Raises:
            ValueError: no points.
        """
        if not points:
            raise ValueError("no points to fit a service law to")
        weights = [1 / mean**2 for _, mean, _ in points]
        total = sum(weights)
        centre_u = sum(w * u for w, (u, _, _) in zip(weights, points, strict=True)) / total
        centre_t = sum(w * t for w, (_, t, _) in zip(weights, points, strict=True)) / total
        spread = sum(w * (u - centre_u) ** 2 for w, (u, _, _) in zip(weights, points, strict=True))
        shared = sum(w * (u - centre_u) * (t - centre_t) for w, (u, t, _) in zip(weights, points, strict=True))
        # Rounding leaves points of one size a little spread, and no slope can be read from that.
        apart = spread > 1e-12 * total * centre_u**2
        slope = max(shared / spread, 0.0) if apart else 0.0
        base = centre_t - slope * centre_u
        if base < 0 or not apart:
            base = 0.0
            slope = sum(w * u * t for w, (u, t, _) in zip(weights, points, strict=True))
            slope /= sum(w * u * u for w, (u, _, _) in zip(weights, points, strict=True))
        worst = max(tail / (base + slope * u) for u, _, tail in points)
        return cls(base_s=base, per_unit_s=slope, tail_ratio=max(1.0, worst))

    def mean_s(self, units: float) -> float:
        """Expected service time [s] of a batch of `units`."""
        return self.base_s + self.per_unit_s * units

    def tail_s(self, units: float) -> float:
        """95 % quantile of the service time [s] of a batch of `units`."""
        return self.mean_s(units) * self.tail_ratio


class GammaFit(_Document):
    """Service times of tasks of every usual size, one at a time, as a Gamma distribution; fitted by greatest likelihood.

    Density x^(k-1) exp(-x / theta) / (Gamma(k) theta^k) of a service time x [s], with shape k and theta = mean_s / k [s], so
    that the squared coefficient of variation is 1 / k.
    """

    samples: int = Field(ge=2)
    mean_s: float = Field(gt=0)
    shape: float = Field(gt=0)
    distance: float = Field(ge=0, le=1)
    """Kolmogorov-Smirnov distance of the sample from the fit, and"""
    critical: float = Field(ge=0, le=1)
    """the distance that a sample of the fit exceeds once in a hundred times."""
    quantiles_s: tuple[float, ...] = ()
    """Of the sample, at 5 %, 10 %, ... 95 %."""

    @property
    def cv2(self) -> float:
        """Squared coefficient of variation."""
        return 1 / self.shape

    @property
    def rejected(self) -> bool:
        """Whether the times are too far from the fit for chance, at the level of 1 %."""
        return self.distance > self.critical


class GenerationLaw(_Document):
    """Time of an answer made token by token: prefill(batch x prompt tokens) and a step(batch x tokens so far) for each further.

    The points of its profile are whole answers of `tokens` tokens.
    """

    prefill: ServiceLaw
    step: ServiceLaw
    tokens: int = Field(ge=1)


class StageProfile(_Document):
    """What one replica of a stage needs, measured on one machine with `threads` intra-op threads."""

    points: tuple[ServicePoint, ...] = Field(min_length=1)
    law: ServiceLaw
    resident_bytes: int = Field(ge=0)
    """Resident set of a process that serves only this stage, after the largest batch of the profile."""
    load_s: float = Field(ge=0)
    """From opening the files to the end of the first run."""
    disturbed_runs: int = Field(default=0, ge=0)
    """Runs left out of the points because other processes held the CPU meanwhile."""
    threads: int = Field(ge=1)
    cpu: str
    gamma: GammaFit | None = None
    """Of a light stage: how its service time varies from task to task."""
    generation: GenerationLaw | None = None
    """Of a stage that generates."""
    other_threads: tuple[StageProfile, ...] = ()
    """The same with other numbers of threads, where those were measured."""

    @property
    def cv2(self) -> float:
        """Squared coefficient of variation of the service time at one size, mean over the points by their samples."""
        samples = sum(point.samples for point in self.points)
        return math.fsum((point.std_s / point.mean_s) ** 2 * point.samples for point in self.points) / samples

    @property
    def task_cv2(self) -> float:
        """Squared coefficient of variation of the service time from task to task: with their sizes, where that was measured."""
        return self.cv2 if self.gamma is None else self.gamma.cv2


class StageSpec(_Document):
    """One piece of a model: tensors in, tensors out."""

    name: Name
    tier: Tier
    processor: str
    """`onnx`, or the name of one of `services.stage.processors`."""
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    files: Mapping[Precision, tuple[ModelFile, ...]] = Field(default_factory=dict)
    """Files per precision; the first one is what the processor opens. A stage without files has the key float32 with ().

    A graph is `<stem>.<precision>.onnx` (and its weights the same with `.data`); files without a precision in their name are
    listed under each that uses them. `<stem>` is the stage's name, or begins with it where the stage has several graphs.
    """
    parameters: Mapping[str, Any] = Field(default_factory=dict)
    """Constants of the processor: special tokens, longest sequence, pooling mode."""
    max_batch: int = Field(default=1, ge=1)
    """Most items in one batch put together from several tasks; 1 where batching gains nothing."""
    profile: Mapping[Precision, StageProfile] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_unique(self) -> StageSpec:
        for side, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise ValueError(f"stage {self.name!r} has two {side} of the same name: {names}")
        if self.max_batch > 1 and self.processor != GENERATE:
            if any(tensor.batch_axis is None for tensor in (*self.inputs, *self.outputs)):
                raise ValueError(f"stage {self.name!r} has max_batch {self.max_batch}, but a tensor without a batch axis")
            known = {axis for tensor in self.inputs for axis in tensor.shape}
            for axis in (axis for tensor in self.outputs for axis in tensor.shape if isinstance(axis, str)):
                if axis not in known:
                    # A batch's outputs could not be cut apart: nobody knows each task's length along this axis.
                    raise ValueError(f"stage {self.name!r} has max_batch {self.max_batch}, but no input has axis {axis!r}")
        return self

    def units(self, shape: Sequence[int]) -> int:
        """Size [units] of a batch whose first input has this shape; see ServiceLaw."""
        return math.prod(n for axis, n in zip(self.inputs[0].shape, shape, strict=True) if isinstance(axis, str))


class Manifest(_Document):
    """A model as exported: its stages, where it came from, and what made it."""

    format_version: Literal[1] = FORMAT_VERSION
    model: Name
    source: str
    """Hub id, or the name and version of the package or directory the checkpoint was read from; never a path."""
    architecture: str
    """Class of the PyTorch model."""
    family: str = "bert"
    """Which of `models.adapters` cut it, and so how `verify` compares it; `bert` in manifests from before there were others."""
    weights: Weights
    typical_length: Mapping[str, int] = Field(default_factory=dict)
    """Typical length of each symbolic axis other than batch, behind every `bytes_per_item`."""
    versions: Mapping[str, str] = Field(default_factory=dict)
    """Versions of the exporting libraries."""
    tolerances: Mapping[Precision, float] = Field(default_factory=dict)
    """Largest difference `verify` accepts: float32 absolute, the others by each family's own measure (docs/models.md)."""
    stages: tuple[StageSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _stage_names_are_unique(self) -> Manifest:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have the same name: {names}")
        return self

    def stage(self, name: str) -> StageSpec:
        """The stage of that name.

        Raises:
            ManifestError: there is none; the message lists those there are.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ManifestError(f"model {self.model!r} has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}")

    def lengths(self, tensor: TensorSpec) -> tuple[int, ...]:
        """Typical length of each symbolic axis of a tensor but the batch."""
        return tuple(self.typical_length.get(axis, 1) for axis in tensor.shape if isinstance(axis, str) and axis != BATCH_AXIS)

    def parts(self, name: str) -> tuple[StageSpec, ...]:
        """The stage of that name, or where it was cut further its parts `NAME-1`, `NAME-2`, ... in order.

        Raises:
            ManifestError: there is neither.
        """
        by_name = {stage.name: stage for stage in self.stages}
        if name in by_name or f"{name}-1" not in by_name:
            return (self.stage(name),)
        return tuple(by_name[f"{name}-{i}"] for i in range(1, len(by_name) + 1) if f"{name}-{i}" in by_name)


def load(directory: Path) -> Manifest:
    """Read the manifest of an exported model from its directory.

    Raises:
        ManifestError: no manifest there, not JSON, or a field is wrong.
    """
    path = directory / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ManifestError(f"{path}: not there; export the model first (espalier export)") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise ManifestError(f"{path}: {field}: {first['msg']}; export the model again (espalier export)") from None


def save(manifest: Manifest, directory: Path) -> Path:
    """Write the manifest into a model's directory in one step, so that a reader never sees half of it."""
    path = directory / MANIFEST_NAME
    partial = path.with_suffix(".json.partial")
    partial.write_text(manifest.model_dump_json(indent=2) + "\n")
    os.replace(partial, path)
    return path


def check_files(stage: StageSpec, precision: Precision, directory: Path) -> tuple[Path, ...]:
    """Paths of a stage's files, each compared with its size and sha256 first.

    Raises:
        ManifestError: the precision was not exported, or a file is missing, truncated or changed.
    """
    if precision not in stage.files:
        raise ManifestError(
            f"stage {stage.name!r} was not exported as {precision}; it has {', '.join(stage.files) or 'no files at all'}"
        )
    paths = []
    for file in stage.files[precision]:
        path = directory / file.path
        if not path.is_file():
            raise ManifestError(f"{path}: missing; export the model again (espalier export)")
        size = path.stat().st_size
        if size != file.size_bytes:
            raise ManifestError(f"{path}: {size} bytes where the manifest says {file.size_bytes}; copy or export it again")
        if sha256(path) != file.sha256:
            raise ManifestError(f"{path}: sha256 differs from the manifest's; copy or export it again")
        paths.append(path)
    return tuple(paths)


def describe(path: Path, directory: Path) -> ModelFile:
    """The manifest's entry for a file that has just been written."""
    return ModelFile(path=str(path.relative_to(directory)), sha256=sha256(path), size_bytes=path.stat().st_size)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
