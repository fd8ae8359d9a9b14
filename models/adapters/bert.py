"""Where a BERT-like sentence encoder is cut: tokenise | encode | pool | classify, rank.

Encoding is all the work (some 80 times the rest), so it is the one core stage and everything around it is light. Hidden
states cross the link between `encode` and `pool`, which keeps the encoder free for other heads. `classify` and `rank` compare
embeddings with each other and need no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models import sentence
from models.adapters.piece import Cut, Graph, Piece
from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.errors import UnsupportedCheckpoint
from models.manifest import Precision, StageSpec, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_BATCH = 16
"""On a CPU a larger batch of an encoder gains nothing and keeps urgent tasks waiting."""
TYPICAL_LENGTH: Mapping[str, int] = {"seq": 48, "labels": 4, "queries": 1, "documents": 8}
BYTES_PER_ELEMENT: Mapping[str, int] = {"text": 200, "labels": 20, "label": 20}
"""48 word pieces make about 200 bytes of English."""
TOLERANCES: Mapping[Precision, float] = {"float32": 1e-4, "int8": 0.04}
"""Over the worst of `verify`'s texts. MiniLM as int8 loses 0.01 on ordinary text, but up to 0.03 on an empty or one-word text
batched with long ones: activations share one scale per batch. Leaving out the worst matrices costs 40 % of the speed."""


class Encoder(nn.Module):
    """Embeddings and every layer of a BERT-like model, written out for the exporter.

    Same arithmetic as the model's own forward with token types all zero; only the attention mask is built here, because the
    library's mask builder does not trace at symbolic shapes.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embeddings = model.embeddings
        self.layers = model.encoder.layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states of the last layer.

        Args:
            input_ids: Token ids, int64 [batch, seq].
            attention_mask: 1 for a token, 0 for padding, int64 [batch, seq].

        Returns:
            float32 [batch, seq, hidden]; what stands at padding is without meaning.
        """
        hidden: Tensor = self.embeddings(input_ids=input_ids)
        bias = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        bias = bias.expand(-1, 1, hidden.shape[1], -1)  # ONNX Runtime's CPU Attention does not broadcast the query axis
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden


def cut(checkpoint: Checkpoint) -> Cut:
    """Take a BERT-like checkpoint apart.

    Raises:
        UnsupportedCheckpoint: it is a decoder, has relative positions, or pools in a way that no stage computes.
        CheckpointError: transformers cannot load it.
    """
    _refuse_variants(checkpoint)
    settings = sentence.read(checkpoint)
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    hidden = int(model.config.hidden_size)
    pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else model.config.pad_token_id or 0)
    tokenise = Piece(
        _tokenise(_max_tokens(model, settings.max_tokens), pad_id),
        assets={"tokenizer.json": _tokenizer_json(tokenizer)},
    )
    encode = Piece(
        _encode(hidden, pad_id, int(model.config.vocab_size)),
        graph=Graph(Encoder(model), _example(int(model.config.vocab_size))),
    )
    light = (_pool(hidden, settings), _classify(hidden), _rank(hidden))
    return Cut(
        architecture=type(model).__name__,
        pieces=(tokenise, encode, *(Piece(spec) for spec in light)),
        typical_length=TYPICAL_LENGTH,
        bytes_per_element=BYTES_PER_ELEMENT,
        tolerances=TOLERANCES,
    )


def _refuse_variants(checkpoint: Checkpoint) -> None:
    positions = checkpoint.config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise UnsupportedCheckpoint(f"{checkpoint.source}: position_embedding_type {positions!r}; supported: absolute")
    if checkpoint.config.get("is_decoder"):
        raise UnsupportedCheckpoint(f"{checkpoint.source}: is_decoder is set; only encoders can be cut here")


def _max_tokens(model: Any, stated: int | None) -> int:
    """Longest text [tokens]. RoBERTa counts positions from after the padding id, and so has room for fewer."""
    positions = int(model.config.max_position_embeddings)
    if model.embeddings.position_embeddings.padding_idx is not None:
        positions -= int(model.embeddings.position_embeddings.padding_idx) + 1
    return min(positions, stated or positions)


def _tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """The tokenizer with neither padding nor truncation: the stage pads by batch and refuses what is too long."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str()).encode()


def _example(vocabulary: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(2 * 8).reshape(2, 8) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # a mask of ones only could be folded away
    return ids, mask


def _ids(pad_id: int) -> TensorSpec:
    return TensorSpec(name="input_ids", datatype="INT64", shape=("batch", "seq"), pad_value=pad_id)


def _mask() -> TensorSpec:
    return TensorSpec(name="attention_mask", datatype="INT64", shape=("batch", "seq"))


def _hidden(width: int) -> TensorSpec:
    return TensorSpec(name="last_hidden_state", datatype="FP32", shape=("batch", "seq", width))


def _tokenise(max_tokens: int, pad_id: int) -> StageSpec:
    return StageSpec(
        name="tokenise",
        tier="light",
        processor="tokenise",
        inputs=(TensorSpec(name="text", datatype="BYTES", shape=("batch",)),),
        outputs=(_ids(pad_id), _mask(), TensorSpec(name="token_count", datatype="INT64", shape=("batch",))),
        parameters={"max_tokens": max_tokens, "pad_id": pad_id, "truncate": False},
    )


def _encode(hidden: int, pad_id: int, vocabulary: int) -> StageSpec:
    return StageSpec(
        name="encode",
        tier="core",
        processor="onnx",
        inputs=(_ids(pad_id), _mask()),
        outputs=(_hidden(hidden),),
        max_batch=MAX_BATCH,
        # ONNX counts a negative index from the end, so that a wrong token would get an answer.
        parameters={"range": {"input_ids": [0, vocabulary - 1]}},
    )


def _pool(hidden: int, settings: sentence.SentenceSettings) -> StageSpec:
    return StageSpec(
        name="pool",
        tier="light",
        processor="pool",
        inputs=(_hidden(hidden), _mask()),
        outputs=(TensorSpec(name="embedding", datatype="FP32", shape=("batch", hidden)),),
        parameters={"mode": settings.mode, "normalise": settings.normalise},
    )


def _classify(hidden: int) -> StageSpec:
    return StageSpec(
        name="classify",
        tier="light",
        processor="classify",
        inputs=(
            TensorSpec(name="embedding", datatype="FP32", shape=("batch", hidden)),
            TensorSpec(name="label_embeddings", datatype="FP32", shape=("labels", hidden)),
            TensorSpec(name="labels", datatype="BYTES", shape=("labels",)),
        ),
        outputs=(
            TensorSpec(name="scores", datatype="FP32", shape=("batch", "labels")),
            TensorSpec(name="label", datatype="BYTES", shape=("batch",)),
        ),
    )


def _rank(hidden: int) -> StageSpec:
    return StageSpec(
        name="rank",
        tier="light",
        processor="rank",
        inputs=(
            TensorSpec(name="query_embedding", datatype="FP32", shape=("queries", hidden)),
            TensorSpec(name="document_embeddings", datatype="FP32", shape=("documents", hidden)),
        ),
        outputs=(
            TensorSpec(name="scores", datatype="FP32", shape=("queries", "documents")),
            TensorSpec(name="order", datatype="INT64", shape=("queries", "documents")),
        ),
    )
