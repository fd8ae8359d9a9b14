"""What can go wrong in this folder, as one tree; every message says what to change.

    ModelsError
    ├── CheckpointError            the source named is no checkpoint that can be read
    │   └── UnsupportedCheckpoint  it can be read, but there is no adapter for it, or a part of it has no stage
    ├── NotEnoughSpace             the disk cannot hold the export
    ├── ExportFailed               the exporter or the quantiser broke down, or the directory cannot be written
    ├── StageBroken                ONNX Runtime cannot open or run an exported file
    └── ProfileFailed              the measuring process broke down

`models.manifest.ManifestError` stands apart, because the manifest is a leaf that the services import without this folder.
"""

from __future__ import annotations


class ModelsError(Exception):
    """Any failure of export, verify or profile that a user can do something about."""


class CheckpointError(ModelsError):
    """The source is neither a known name, nor a checkpoint directory, nor a hub id that can be fetched."""


class UnsupportedCheckpoint(CheckpointError):
    """The checkpoint is sound, but this project has no stages for what it contains."""


class NotEnoughSpace(ModelsError):
    """The file system of the output directory is too full."""


class ExportFailed(ModelsError):
    """No ONNX file came out, or it could not be written."""


class StageBroken(ModelsError):
    """ONNX Runtime refuses a file, or what it is given."""


class ProfileFailed(ModelsError):
    """The process that measures a stage gave no answer."""
