"""What sentence-transformers' own files add to a BERT-like checkpoint: its longest text and how it pools.

A checkpoint without these files is pooled by the mean and normalised, which is what such encoders are mostly trained for.
One that asks for something the stages cannot do is refused: a silently different embedding would be worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from models.checkpoint import Checkpoint
from models.errors import UnsupportedCheckpoint

PoolingMode = Literal["mean", "cls"]
_MODES: dict[str, PoolingMode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_CHAINS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


@dataclass(frozen=True)
class SentenceSettings:
    """How hidden states become an embedding."""

    mode: PoolingMode = "mean"
    normalise: bool = True
    max_tokens: int | None = None
    """Longest text [tokens, special ones included], or None where the checkpoint does not say."""


def read(checkpoint: Checkpoint) -> SentenceSettings:
    """The settings of a checkpoint.

    Raises:
        UnsupportedCheckpoint: a module (a dense projection, say), a pooling mode or a lower-casing that no stage computes.
    """
    transformer = checkpoint.document("sentence_bert_config.json") or {}
    max_tokens = transformer.get("max_seq_length")
    if transformer.get("do_lower_case"):
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: sentence_bert_config.json sets do_lower_case, which no stage does; if the tokenizer does "
            "so already, as that of an uncased model does, set it to false"
        )
    modules = checkpoint.document("modules.json")
    if modules is None:
        return SentenceSettings(max_tokens=max_tokens)
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in _CHAINS:
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: modules.json chains {', '.join(kinds)}; supported: Transformer, Pooling and maybe Normalize"
        )
    pooling = checkpoint.document(f"{modules[1]['path']}/config.json") or {}
    return SentenceSettings(_mode(checkpoint, pooling), "Normalize" in kinds, max_tokens)


def _mode(checkpoint: Checkpoint, pooling: dict[str, Any]) -> PoolingMode:
    asked = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    if len(asked) == 1 and asked[0] in _MODES:
        return _MODES[asked[0]]
    raise UnsupportedCheckpoint(
        f"{checkpoint.source}: its Pooling asks for {', '.join(asked) or 'no mode'}; supported: one of {', '.join(_MODES)}"
    )
