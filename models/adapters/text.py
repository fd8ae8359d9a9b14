"""What every family that reads text shares: its `tokenise` stage and the tensors between tokens and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.adapters.piece import Piece
from models.manifest import StageSpec, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = TensorSpec(name="text", datatype="BYTES", shape=("batch",))
MASK = TensorSpec(name="attention_mask", datatype="INT64", shape=("batch", "seq"))


def input_ids(pad_id: int) -> TensorSpec:
    """Token ids of a batch of texts."""
    return TensorSpec(name="input_ids", datatype="INT64", shape=("batch", "seq"), pad_value=pad_id)


def states(width: int, name: str = "last_hidden_state", axis: str | int = "seq") -> TensorSpec:
    """One vector per position of each item."""
    return TensorSpec(name=name, datatype="FP32", shape=("batch", axis, width))


def tokenise(
    tokenizer: PreTrainedTokenizerFast, max_tokens: int, pad_id: int, further: Mapping[str, Any] | None = None
) -> Piece:
    """The light stage from text to token ids, padded at the end to the longest of the task.

    Args:
        tokenizer: The checkpoint's own.
        max_tokens: Longest text [tokens, special ones included].
        pad_id: What fills a shorter text.
        further: More parameters of the processor.
    """
    spec = StageSpec(
        name="tokenise",
        tier="light",
        processor="tokenise",
        inputs=(TEXT,),
        outputs=(input_ids(pad_id), MASK, TensorSpec(name="token_count", datatype="INT64", shape=("batch",))),
        parameters={"max_tokens": max_tokens, "pad_id": pad_id, "truncate": False, **(further or {})},
    )
    return Piece(spec, assets={"tokenizer.json": tokenizer_json(tokenizer)})


def tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """The tokenizer with neither padding nor truncation: the stage pads by batch and refuses what is too long."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str()).encode()


def pad_id_of(tokenizer: PreTrainedTokenizerFast, config: Any) -> int:
    """The id that fills short texts: the tokenizer's, else the model's, else 0."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
    return int(found or 0)
