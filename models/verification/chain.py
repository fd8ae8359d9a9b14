"""The exported stages, run one after the other in this process: tokenising, and cores in however many parts they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.manifest import Manifest, Precision, StageSpec, check_files
from models.session import Array, Session


class Tokenise:
    """A `tokenise` stage with the manifest's parameters."""

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        from tokenizers import Tokenizer  # noqa: PLC0415

        stage = manifest.stage("tokenise")
        self._tokenizer = Tokenizer.from_file(str(check_files(stage, "float32", directory)[0]))
        self._tokenizer.enable_padding(pad_id=int(stage.parameters["pad_id"]))
        self.max_tokens = int(stage.parameters["max_tokens"])

    def __call__(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Token ids and mask, int64 [batch, seq], of texts padded to the longest."""
        found = self._tokenizer.encode_batch(list(texts))
        ids = np.array([encoding.ids for encoding in found], np.int64)
        return ids, np.array([encoding.attention_mask for encoding in found], np.int64)


class Core:
    """A core stage: `name`, or its parts `name-1`, `name-2` and so on."""

    def __init__(self, manifest: Manifest, directory: Path, name: str, precision: Precision) -> None:
        self._parts = [
            (stage, Session(check_files(stage, precision, directory)[0])) for stage in manifest.parts(name)
        ]  # fmt: skip

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Everything the last part gives, by name. Parts find their inputs among what is given and what earlier parts gave."""
        tensors = dict(inputs)
        given: dict[str, Array] = {}
        for stage, session in self._parts:
            outputs = session.run({tensor.name: tensors[tensor.name] for tensor in stage.inputs})
            given = dict(zip([tensor.name for tensor in stage.outputs], outputs, strict=True))
            tensors |= given
        return given


def weights(stage: StageSpec, directory: Path) -> dict[str, Array]:
    """The arrays of a light stage whose one file holds several."""
    with np.load(check_files(stage, "float32", directory)[0], allow_pickle=False) as arrays:
        return dict(arrays)


def refuse_other_width(checkpoint: Checkpoint, manifest: Manifest, width: int, exported: object) -> None:
    """Raise CheckpointError where the checkpoint's hidden states are not as wide as those exported."""
    if width != exported:
        raise CheckpointError(
            f"{checkpoint.source} has hidden states of width {width}, the export of {manifest.source} has {exported}: name the "
            "checkpoint that was exported"
        )
