"""Writes a checkpoint as ONNX stages with a manifest, and decides whether there is anything to write.

What an unchanged export rests on (source, versions, opset, this exporter's own code, files) is in the manifest, so finding out
that nothing is to be done needs neither torch nor transformers. How the files get into the directory is `models.directory`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import get_args

import numpy as np

from models import adapters, directory, onnx_files
from models.adapters.piece import Asset, Cut, Graph, Piece
from models.checkpoint import Checkpoint, resolve
from models.directory import Report
from models.errors import ExportFailed, UnsupportedCheckpoint
from models.manifest import (
    ITEM_BYTES,
    Manifest,
    ManifestError,
    ModelFile,
    Precision,
    StageSpec,
    TensorSpec,
    Weights,
    check_files,
    describe,
    load,
)

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_LIBRARIES = ("onnx", "onnxruntime", "onnxscript", "tokenizers", "torch", "transformers")
_SPARE_BYTES = 32 << 20
_SMALLER = {"float16": onnx_files.write_float16, "int8": onnx_files.write_int8}
"""Precision -> what makes it from the float32 file."""
_DISK_PER_WEIGHT_BYTE: Mapping[Precision, float] = {"float32": 1.1, "float16": 0.6, "int8": 2.0}
"""Disk needed while exporting, per byte of the weights in float32. The quantiser keeps a second float32 copy for a while, and
leaves tables that are looked up in as they are."""


@dataclass(frozen=True)
class Exported:
    """What an export came to."""

    manifest: Manifest
    directory: Path
    written: bool
    """False where what was there is up to date."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asks for."""

    precisions: tuple[Precision, ...] = ("float32",)
    opset: int = onnx_files.DEFAULT_OPSET
    weights: Weights | None = None
    """What to say of the weights; None leaves it to the checkpoint."""
    parts: int = 1
    """Into how many each core encoder and decoder is cut."""
    force: bool = False
    """Write even where nothing has changed."""


def export(
    source: str,
    out: Path,
    wanted: Wanted,
    report: Report = lambda _: None,
    made: Callable[[int, int], object] = lambda _, __: None,
) -> Exported:
    """Make the directory `out` hold the stages of a checkpoint.

    Precisions that an otherwise unchanged export already holds are kept, so asking for one more takes nothing away.

    Args:
        source: As `checkpoint.resolve` takes it.
        out: Made where it is missing. Files in it that are not an export's are left alone.
        wanted: Precisions, opset, and so on.
        report: Told in a few words what is being done.
        made: Told how many of the graphs have been written, and of how many.

    Raises:
        CheckpointError: the source cannot be read, has no adapter, or is not exported in that precision or number of parts.
        NotEnoughSpace: the disk is too full.
        ExportFailed: the exporter broke down, or the directory cannot be written.
    """
    checkpoint = resolve(source, report)
    if out.resolve() == checkpoint.directory:
        raise ExportFailed(f"{out}: is the checkpoint itself; name another directory with --out")
    adapter = adapters.adapter_for(checkpoint)
    with directory.locked(out, report):
        there = unchanged(out, checkpoint, wanted)
        held = exported_precisions(there) if there is not None else set()
        if there is not None and not wanted.force and held.issuperset(wanted.precisions):
            return Exported(there, out, written=False)
        precisions = tuple(p for p in PRECISIONS if p in held.union(wanted.precisions))
        directory.check_space(out, needed_bytes(checkpoint.float32_bytes, 0, precisions))
        report(f"loading {checkpoint.source}")
        cut = adapter(checkpoint, wanted.parts)
        _refuse_precisions(checkpoint, cut, precisions)
        directory.check_space(out, needed_bytes(*_sizes(cut), precisions))
        with directory.scratch(out) as scratch:
            stages = Writer(cut, precisions, wanted.opset, scratch, report, made).stages()
            manifest = _manifest(checkpoint, cut, wanted, precisions, stages)
            directory.replace(manifest, scratch, out)
    return Exported(manifest, out, written=True)


def unchanged(out: Path, checkpoint: Checkpoint, wanted: Wanted) -> Manifest | None:
    """The manifest there, if a new export would come out the same (but perhaps for further precisions)."""
    try:
        manifest = load(out)
        for stage in manifest.stages:
            for precision in stage.files:
                check_files(stage, precision, out)
    except ManifestError:
        return None
    same = (
        manifest.source == checkpoint.source
        and manifest.model == checkpoint.name
        and manifest.weights == (wanted.weights or checkpoint.weights)
        and manifest.versions == versions(wanted.opset, wanted.parts)
    )
    return manifest if same else None


def versions(opset: int, parts: int) -> dict[str, str]:
    """What decides the bytes of an export besides the checkpoint: libraries, operator set, cuts, this exporter's own code."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {**found, "opset": str(opset), "parts": str(parts), "exporter": _own_code()}


def exported_precisions(manifest: Manifest) -> set[Precision]:
    """Precisions in which the model can be served: those of its core stages."""
    return {precision for stage in manifest.stages if stage.tier == "core" for precision in stage.files}


def needed_bytes(float32_bytes: int, asset_bytes: int, precisions: Sequence[Precision]) -> int:
    """Disk space an export takes while it runs [bytes].

    Args:
        float32_bytes: The graphs' weights in float32 [bytes].
        asset_bytes: Files that are the same in every precision (a table of embeddings) [bytes].
        precisions: In which it is exported; float32 is made in any case.
    """
    graphs = float32_bytes * sum(_DISK_PER_WEIGHT_BYTE[p] for p in {"float32", *precisions})
    return int(graphs) + asset_bytes + _SPARE_BYTES


def _sizes(cut: Cut) -> tuple[int, int]:
    """Weights of all graphs as float32, and all assets [bytes]. What two graphs share is in the file of each."""
    graphs = sum(_weights_bytes(graph) for piece in cut.pieces for graph in piece.graphs.values())
    return graphs, sum(_asset_bytes(asset) for piece in cut.pieces for asset in piece.assets.values())


def _weights_bytes(graph: Graph) -> int:
    return sum(ITEM_BYTES["FP32"] * weight.numel() for weight in (*graph.module.parameters(), *graph.module.buffers()))


def _asset_bytes(asset: Asset) -> int:
    if isinstance(asset, bytes):
        return len(asset)
    return asset.nbytes if isinstance(asset, np.ndarray) else sum(array.nbytes for array in asset.values())


def _own_code() -> str:
    """Fingerprint of the code that shapes an export, so that changing it makes old exports stale."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (here / "export.py", here / "onnx_files.py", here / "sentence.py", *sorted((here / "adapters").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _refuse_precisions(checkpoint: Checkpoint, cut: Cut, precisions: Sequence[Precision]) -> None:
    missing = [precision for precision in precisions if precision not in cut.tolerances]
    if missing:
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: {cut.family} has no stages in {', '.join(missing)}; supported: {', '.join(cut.tolerances)}"
        )


def _manifest(
    checkpoint: Checkpoint, cut: Cut, wanted: Wanted, precisions: Sequence[Precision], stages: tuple[StageSpec, ...]
) -> Manifest:
    return Manifest(
        model=checkpoint.name,
        source=checkpoint.source,
        architecture=cut.architecture,
        family=cut.family,
        weights=wanted.weights or checkpoint.weights,
        typical_length=cut.typical_length,
        versions=versions(wanted.opset, wanted.parts),
        tolerances={p: cut.tolerances[p] for p in precisions},
        stages=stages,
    )


@dataclass(frozen=True)
class Writer:
    """Writes the pieces of one cut into a folder."""

    cut: Cut
    precisions: Sequence[Precision]
    opset: int
    folder: Path
    report: Report
    made: Callable[[int, int], object]

    def stages(self) -> tuple[StageSpec, ...]:
        """Every stage of the cut, its files written and described."""
        total = len(self.precisions) * sum(len(piece.graphs) for piece in self.cut.pieces)
        self.made(0, total)
        done = count(1)
        return tuple(self._stage(piece, lambda: self.made(next(done), total)) for piece in self.cut.pieces)

    def _stage(self, piece: Piece, one_more: Callable[[], object]) -> StageSpec:
        assets = tuple(self._asset(name, content) for name, content in piece.assets.items())
        graphs = [self._graph(piece.spec, stem, graph, one_more) for stem, graph in piece.graphs.items()]
        precisions: Sequence[Precision] = self.precisions if graphs else ("float32",)
        files = {p: (*(file for graph in graphs for file in graph[p]), *assets) for p in precisions}
        sizes = {
            "inputs": tuple(_sized(tensor, self.cut) for tensor in piece.spec.inputs),
            "outputs": tuple(_sized(tensor, self.cut) for tensor in piece.spec.outputs),
        }
        return piece.spec.model_copy(update={"files": files, **sizes})

    def _asset(self, name: str, content: Asset) -> ModelFile:
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, np.ndarray):
            np.save(path, np.ascontiguousarray(content), allow_pickle=False)
        else:
            np.savez(path, allow_pickle=False, **content)
        return describe(path, self.folder)

    def _graph(
        self, spec: StageSpec, stem: str, graph: Graph, one_more: Callable[[], object]
    ) -> dict[Precision, tuple[ModelFile, ...]]:
        """Write a stage's ONNX files; float32 is made in any case, because the others are made from it."""
        whole = replace(graph, inputs=graph.inputs or spec.inputs, outputs=graph.outputs or spec.outputs)
        self.report(f"exporting {stem} as float32")
        path = self.folder / f"{stem}.float32.onnx"
        written: dict[Precision, tuple[Path, ...]] = {"float32": onnx_files.write_float32(stem, whole, self.opset, path)}
        for precision in self.precisions:
            if precision != "float32":
                self.report(f"making {stem} {precision}")
                written[precision] = _SMALLER[precision](path, self.folder / f"{stem}.{precision}.onnx")
            one_more()
        if "float32" not in self.precisions:
            for each in written["float32"]:
                each.unlink()
        return {p: tuple(describe(each, self.folder) for each in written[p]) for p in self.precisions}


def _sized(tensor: TensorSpec, cut: Cut) -> TensorSpec:
    """The tensor with `bytes_per_item` at the model's typical lengths."""
    size = cut.bytes_per_element[tensor.name] if tensor.datatype == "BYTES" else ITEM_BYTES[tensor.datatype]
    for axis in tensor.shape:
        size *= axis if isinstance(axis, int) else cut.typical_length.get(axis, 1)
    return tensor.model_copy(update={"bytes_per_item": size})
