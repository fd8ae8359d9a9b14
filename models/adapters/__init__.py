"""Which architectures can be cut into stages, and by what.

A plain dict from the `model_type` of config.json to a module. A new family is a new file and a new row here. The file is
imported when its adapter is called, because adapters import torch and looking up a name should not.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol

from models.adapters.piece import Cut
from models.checkpoint import Checkpoint
from models.errors import UnsupportedCheckpoint


class Adapter(Protocol):
    """Takes checkpoints of one family apart."""

    def __call__(self, checkpoint: Checkpoint, parts: int = 1) -> Cut:
        """Cut a checkpoint into stages, and every core encoder and decoder of it at layer boundaries into `parts`.

        Raises:
            UnsupportedCheckpoint: a variant that would come out wrong, or fewer layers than parts.
            CheckpointError: transformers cannot load it.
        """


CLASSIFIER = "ForSequenceClassification"
ADAPTERS: Mapping[str, str] = {
    "bert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "distilbert": "bert",
    "clip": "clip",
    "whisper": "whisper",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "llava": "llava",
}
"""model_type -> module of this package whose `cut` is the adapter. A text encoder with a head for classifying has its own."""


def adapter_for(checkpoint: Checkpoint) -> Adapter:
    """The function that cuts this checkpoint.

    Raises:
        UnsupportedCheckpoint: no adapter for its architecture; the message lists those there are.
    """
    kind = str(checkpoint.config.get("model_type"))
    architectures = checkpoint.config.get("architectures") or ()
    if kind not in ADAPTERS:
        named = ", ".join(architectures) or "no architecture named"
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: model_type {kind!r} ({named}) is not supported; supported: {', '.join(ADAPTERS)}"
        )
    module = ADAPTERS[kind]
    if module == "bert" and any(name.endswith(CLASSIFIER) for name in architectures):
        module = "classifier"

    def cut(checkpoint: Checkpoint, parts: int = 1) -> Cut:
        adapter: Adapter = importlib.import_module(f"models.adapters.{module}").cut
        return adapter(checkpoint, parts)

    return cut
