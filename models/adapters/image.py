"""The light stage from a picture's file to pixel values, with the settings of the checkpoint's own image processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.adapters.piece import Piece
from models.checkpoint import Checkpoint
from models.errors import UnsupportedCheckpoint
from models.manifest import StageSpec, TensorSpec

PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP's image processor takes where the file does not say."""
_BICUBIC = 3
BYTES_PER_IMAGE = 40_000
"""A photo as JPEG, of the size that such a model looks at or somewhat larger."""


def preprocess(checkpoint: Checkpoint, side: int) -> Piece:
    """The stage `preprocess`.

    Args:
        checkpoint: Whose preprocessor_config.json, or the part of processor_config.json about images, is read.
        side: Height and width [pixels] that the vision encoder takes.

    Raises:
        UnsupportedCheckpoint: another kind of processor, padding, or pictures that do not come out at that size.
    """
    found = settings(checkpoint)
    if _output_side(found) != side:
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: its image processor (size {found['size']}, crop {found['crop']}) does not make the "
            f"{side} x {side} pixels that its vision encoder takes"
        )
    spec = StageSpec(
        name="preprocess",
        tier="light",
        processor="image",
        inputs=(TensorSpec(name="image", datatype="BYTES", shape=("batch",)),),
        outputs=(TensorSpec(name="pixel_values", datatype="FP32", shape=("batch", 3, side, side)),),
        parameters=found,
    )
    return Piece(spec)


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Parameters of the processor `image`; a step that is off is None.

    Raises:
        UnsupportedCheckpoint: as `preprocess`.
    """
    document = checkpoint.document("preprocessor_config.json")
    if document is None:
        document = (checkpoint.document("processor_config.json") or {}).get("image_processor")
    if document is None:
        raise UnsupportedCheckpoint(f"{checkpoint.source}: no preprocessor_config.json, which says how pictures are prepared")
    kind = document.get("image_processor_type") or document.get("feature_extractor_type") or PROCESSORS[0]
    if kind not in PROCESSORS or document.get("do_pad"):
        padding = " with do_pad" if document.get("do_pad") else ""
        raise UnsupportedCheckpoint(f"{checkpoint.source}: image processor {kind}{padding}; supported: {PROCESSORS[0]}")
    resizes, crops = document.get("do_resize", True), document.get("do_center_crop", True)
    normalises = document.get("do_normalize", True)
    return {
        "size": _size(checkpoint, document.get("size", {"shortest_edge": 224})) if resizes else None,
        "crop": _square(document.get("crop_size", 224)) if crops else None,
        "resample": int(document.get("resample", _BICUBIC)),
        "rescale": float(document.get("rescale_factor", 1 / 255)) if document.get("do_rescale", True) else None,
        "mean": [float(each) for each in document.get("image_mean", MEAN)] if normalises else None,
        "std": [float(each) for each in document.get("image_std", STD)] if normalises else None,
        "rgb": bool(document.get("do_convert_rgb", True)),
    }


def _size(checkpoint: Checkpoint, stated: Any) -> dict[str, int]:
    if isinstance(stated, int):
        return {"shortest_edge": stated}
    if set(stated) not in ({"shortest_edge"}, {"height", "width"}):
        raise UnsupportedCheckpoint(f"{checkpoint.source}: image size {stated}; supported: shortest_edge, or height and width")
    return {name: int(pixels) for name, pixels in stated.items()}


def _square(stated: Any) -> dict[str, int]:
    return {"height": stated, "width": stated} if isinstance(stated, int) else {name: int(n) for name, n in stated.items()}


def _output_side(found: Mapping[str, Any]) -> int | None:
    """Height and width of what comes out, or None where they differ or depend on the picture."""
    last = found["crop"] or found["size"] or {}
    return last.get("height") if last.get("height") == last.get("width") else None
