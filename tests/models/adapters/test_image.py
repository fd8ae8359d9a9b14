"""The image processor's settings: read as transformers reads them, and refused where no stage does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.adapters import image
from models.checkpoint import Checkpoint
from models.errors import UnsupportedCheckpoint


def _checkpoint(directory: Path, **settings: Any) -> Checkpoint:
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return Checkpoint(directory, "seen", "seen@1", {})


OLD: dict[str, Any] = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
    "feature_extractor_type": "CLIPFeatureExtractor",
}  # fmt: skip
NEW: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_convert_rgb": False,
    "rescale_factor": 0.5,
    "image_mean": [0, 0, 0],
    "image_std": [1, 1, 1],
}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        (OLD, {}),
        (
            NEW,
            {
                "size": {"shortest_edge": 336},
                "crop": {"height": 336, "width": 336},
                "rescale": 0.5,
                "mean": [0.0] * 3,
                "std": [1.0] * 3,
                "rgb": False,
            },
        ),
        (
            {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False},
            dict.fromkeys(("size", "crop", "rescale", "mean", "std")),
        ),
    ],
    ids=["defaults", "OpenAI's own file", "every field", "nothing done"],
)
def test_settings(settings: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    usual = {
        "size": {"shortest_edge": 224},
        "crop": {"height": 224, "width": 224},
        "resample": 3,
        "rescale": 1 / 255,
        "mean": list(image.MEAN),
        "std": list(image.STD),
        "rgb": True,
    }
    assert image.settings(_checkpoint(tmp_path, **settings)) == {**usual, **changes}


def test_settings_may_lie_in_the_processors_file(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": NEW}))
    assert image.settings(Checkpoint(tmp_path, "seen", "seen@1", {}))["rescale"] == 0.5


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor; supported: CLIPImageProcessor"),
        ({"do_pad": True}, "with do_pad"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"do_center_crop": False}, "does not make the 224 x 224 pixels"),
        ({"crop_size": 112}, "does not make the 224 x 224 pixels"),
    ],
)
def test_what_no_stage_does_is_refused(settings: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=complaint):
        image.preprocess(_checkpoint(tmp_path, **settings), 224)


def test_no_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"no preprocessor_config\.json"):
        image.settings(Checkpoint(tmp_path, "seen", "seen@1", {}))
