"""Which architectures can be cut into stages, and by what.

A plain dict from the `model_type` of config.json to a function. A new family is a new file and a new row here. Rows import
their file when called, because adapters import torch and looking up a name should not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models.adapters.piece import Cut
from models.checkpoint import Checkpoint
from models.errors import UnsupportedCheckpoint

Adapter = Callable[[Checkpoint], Cut]


def _bert(checkpoint: Checkpoint) -> Cut:
    from models.adapters import bert  # noqa: PLC0415

    return bert.cut(checkpoint)


ADAPTERS: Mapping[str, Adapter] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}


def adapter_for(checkpoint: Checkpoint) -> Adapter:
    """The function that cuts this checkpoint.

    Raises:
        UnsupportedCheckpoint: no adapter for its architecture; the message lists those there are.
    """
    kind = str(checkpoint.config.get("model_type"))
    if kind not in ADAPTERS:
        named = ", ".join(checkpoint.config.get("architectures") or ()) or "no architecture named"
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: model_type {kind!r} ({named}) is not supported; supported: {', '.join(ADAPTERS)}"
        )
    return ADAPTERS[kind]
