"""What every decoder with a key-value cache shares: its graph, the tensors of its stages, and what ends a sequence.

One graph does prefill, chunked prefill and step. It takes embeddings rather than tokens, so that text and images enter by the
same door, and the keys and values of everything seen before, of length 0 at first. A decoder is cut between layers; the
cache of a part stays with it, and only hidden states travel. Serving runs the loop: `services.stage.processors.generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.adapters import layers, text
from models.adapters.piece import Asset, Graph, Piece
from models.manifest import GENERATE, Precision, StageSpec, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASKED = -3e4
"""Added to the score of a key that must not be seen: softmax makes 0 of it, and with a score added it still fits float16."""
MAX_BATCH = 8
"""Sequences in one step. On a CPU 8 take twice the time of one."""
MAX_TOKENS = 128
"""New tokens where a request does not say how many."""
TYPICAL_LENGTH: Mapping[str, int] = {"seq": 64, "new": 32, "total": 96}
BYTES_PER_ELEMENT: Mapping[str, int] = {"messages": 300, "text": 250, "finish_reason": 10}
TOLERANCES: Mapping[Precision, float] = {"float32": 1e-4, "float16": 0.01, "int8": 0.05}
"""float32: of the logits, absolute. The others: 1 - cosine of the logits; which token is the likeliest may change with any."""

Pair = tuple[Tensor, Tensor]


class Past:
    """The cache of a part's layers as its attention modules see it: what was seen before, and what they add to it.

    The library's own caches number layers from 0 over the whole model; here the part's first layer is number `first`.
    """

    def __init__(self, pairs: Sequence[Tensor], first: int) -> None:
        self._pairs = pairs
        self._first = first
        self.present: list[Tensor] = []
        """Key and value of each layer that has been computed, one after the other."""

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> Pair:
        """Everything the layer may attend to, given the new positions' key and value, [batch, heads, seq, head_dim]."""
        at = 2 * (layer - self._first)
        whole = (torch.cat([self._pairs[at], key], dim=2), torch.cat([self._pairs[at + 1], value], dim=2))
        self.present += whole
        return whole


def causal_bias(attention_mask: Tensor, seq: int) -> Tensor:
    """What is added to the scores of the last `seq` positions: 0 where a key may be seen, MASKED where not.

    Args:
        attention_mask: 1 for a token, 0 for padding, int64 [batch, total].
        seq: New positions, the last of the total.

    Returns:
        float32 [batch, 1, seq, total].
    """
    total = attention_mask.shape[1]
    keys, queries = torch.arange(total), torch.arange(seq) + (total - seq)
    seen = (keys[None, :] <= queries[:, None])[None, None] & (attention_mask[:, None, None, :] == 1)
    return torch.where(seen, 0.0, MASKED)


class Part(nn.Module):
    """Consecutive layers of a Llama-like decoder, and after the last of all the norm and the head.

    Masks are built here because the library's mask builder does not trace at symbolic shapes.
    """

    def __init__(self, model: Any, part: range, head: Any) -> None:
        """Take layers out of a model.

        Args:
            model: The decoder without its head.
            part: Which layers.
            head: Of the last part: from hidden states to logits; None for the others.
        """
        super().__init__()
        self.layers = nn.ModuleList([model.layers[i] for i in part])
        self.rotary = model.rotary_emb
        self.norm: Any = model.norm if head is not None else None
        self.head = head
        self.first = part.start

    def forward(self, hidden: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Hidden states, or logits of the last position, and the cache.

        Args:
            hidden: Embeddings, or hidden states of the part before, float32 [batch, seq, hidden].
            attention_mask: 1 for a token, 0 for padding, of the cache and the new positions, int64 [batch, total].
            position_ids: Of the new positions, padding not counted, int64 [batch, seq].
            past: Key and value of each layer, float32 [batch, kv_heads, past, head_dim].

        Returns:
            float32 [batch, seq, hidden] or [batch, vocabulary]; then as `past`, of length total.
        """
        bias = causal_bias(attention_mask, hidden.shape[1])
        angles = self.rotary(hidden, position_ids)
        cache = Past(past, self.first)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=bias, position_embeddings=angles, past_key_values=cache)
        if self.head is not None:
            hidden = self.head(self.norm(hidden[:, -1]))
        return hidden, *cache.present


@dataclass(frozen=True)
class Sequences:
    """What a checkpoint says about the sequences it makes."""

    eos: tuple[int, ...]
    """Any of them ends a sequence."""
    pad: int
    """Fills a sequence that ended before others of its batch."""
    context: int
    """Most positions, prompt and new tokens together."""
    prefix: tuple[int, ...] = ()
    """Tokens every sequence begins with, given rather than made."""
    suppress: tuple[int, ...] = ()
    """Never made."""
    begin_suppress: tuple[int, ...] = ()
    """Not made as the first token."""

    @classmethod
    def of(cls, model: Any, context: int) -> Sequences:
        """From a model's generation_config.json, or where it has none from its config.json.

        Preferences (temperature, penalties, number of beams) are left out: a request states its own, and greedy is the default.
        """
        settings = model.generation_config
        ends = settings.eos_token_id
        eos = tuple(int(each) for each in (ends if isinstance(ends, list) else [] if ends is None else [ends]))
        pad = settings.pad_token_id
        return cls(
            eos=eos,
            pad=int(pad) if pad is not None else eos[0] if eos else 0,
            context=context,
            suppress=tuple(settings.suppress_tokens or ()),
            begin_suppress=tuple(settings.begin_suppress_tokens or ()),
        )


@dataclass(frozen=True)
class Dimensions:
    """Of a decoder's tensors."""

    hidden: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def cache(self, when: str, axis: str | int, part: range) -> tuple[TensorSpec, ...]:
        """Key and value of each layer of a part, numbered from 0: `past` or `present`, or those of cross-attention."""
        shape = ("batch", self.kv_heads, axis, self.head_dim)
        return tuple(
            TensorSpec(name=f"{when}_{i}_{kind}", datatype="FP32", shape=shape)
            for i in range(len(part))
            for kind in ("key", "value")
        )

    def hidden_states(self, name: str = "hidden") -> TensorSpec:
        """One vector per new position."""
        return text.states(self.hidden, name)

    def leaving(self, last: bool) -> TensorSpec:
        """What leaves a part."""
        return TensorSpec(name="logits", datatype="FP32", shape=("batch", self.vocabulary)) if last else self.hidden_states()


SEEN = TensorSpec(name="attention_mask", datatype="INT64", shape=("batch", "total"))
POSITIONS = TensorSpec(name="position_ids", datatype="INT64", shape=("batch", "seq"))
SAMPLING = (
    TensorSpec(name="max_tokens", datatype="INT64", shape=("batch",), default=MAX_TOKENS),
    TensorSpec(name="temperature", datatype="FP32", shape=("batch",), default=0.0),
    TensorSpec(name="top_p", datatype="FP32", shape=("batch",), default=1.0),
    TensorSpec(name="seed", datatype="INT64", shape=("batch",), default=0),
)
MADE = (
    TensorSpec(name="output_ids", datatype="INT64", shape=("batch", "new")),
    TensorSpec(name="output_count", datatype="INT64", shape=("batch",)),
    TensorSpec(name="finish_reason", datatype="BYTES", shape=("batch",)),
)


def generate(
    model: Any,
    head: Any,
    sequences: Sequences,
    parts: int,
    *,
    image: tuple[TensorSpec, int] | None = None,
) -> tuple[Piece, ...]:
    """The core stage `generate` of a Llama-like decoder, or its parts `generate-1` to `generate-N`.

    Args:
        model: The decoder without its head.
        head: From hidden states to logits.
        sequences: How sequences begin and end.
        parts: Into how many it is cut.
        image: Where images come into the prompt: the tensor they come in, and the token whose embedding they replace.

    Raises:
        UnsupportedCheckpoint: fewer layers than parts.
    """
    config = model.config
    heads = int(config.num_attention_heads)
    size = Dimensions(
        hidden=int(config.hidden_size),
        kv_heads=int(config.num_key_value_heads or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=int(head.weight.shape[0]),
    )
    pieces = []
    for i, part in enumerate(layers.split([layers.work(each) for each in model.layers], parts, after=layers.work(head))):
        first, last = i == 0, i == parts - 1
        name = layers.part_name(GENERATE, i, parts)
        entering = size.hidden_states("inputs_embeds" if first else "hidden")
        graph = Graph(
            Part(model, part, head if last else None),
            example(size, part),
            inputs=(entering, SEEN, POSITIONS, *size.cache("past", "past", part)),
            outputs=(size.leaving(last), *size.cache("present", "total", part)),
            shared=shared(name, model.embed_tokens, head) if first and last else {},
        )
        prompt = (text.input_ids(sequences.pad), text.MASK, *([image[0]] if image is not None else []), *SAMPLING)
        spec = StageSpec(
            name=name,
            tier="core",
            processor=GENERATE,
            inputs=prompt if first else (entering, SEEN, POSITIONS),
            outputs=MADE if first else (size.leaving(last),),
            max_batch=MAX_BATCH,
            parameters={
                **parameters(size, sequences, part, (i + 1, parts)),
                "encoder": False,
                **({"image_token": image[1]} if image is not None else {}),
            },
        )
        assets: dict[str, Asset] = {f"{name}-embedding.npy": _array(model.embed_tokens.weight)} if first else {}
        pieces.append(Piece(spec, {name: graph}, assets))
    return tuple(pieces)


def parameters(size: Dimensions, sequences: Sequences, part: range, number: tuple[int, int]) -> dict[str, Any]:
    """What the processor of a part has to know; `number` is which part of how many, counted from 1."""
    return {
        "layers": len(part),
        "kv_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden": size.hidden,
        "vocabulary": size.vocabulary,
        "eos": list(sequences.eos),
        "pad": sequences.pad,
        "context": sequences.context,
        "prefix": list(sequences.prefix),
        "suppress": list(sequences.suppress),
        "begin_suppress": list(sequences.begin_suppress),
        "max_tokens": MAX_TOKENS,
        "part": number[0],
        "parts": number[1],
    }


def shared(name: str, embedding: Any, head: Any) -> dict[str, str]:
    """The head's weight, where it is the table of embeddings: both may be a good part of a small model."""
    return {"head.weight": f"{name}-embedding.npy"} if head.weight is embedding.weight else {}


def tokenise(tokenizer: PreTrainedTokenizerFast, context: int, pad: int, further: Mapping[str, Any] | None = None) -> Piece:
    """The light stage from text to token ids; a text whose special tokens are written out already is marked as such.

    Args:
        tokenizer: The checkpoint's own.
        context: Most positions; one is left for the first new token.
        pad: What fills a shorter text.
        further: More parameters of the processor.
    """
    piece = text.tokenise(tokenizer, context - 1, pad, further)
    special = TensorSpec(name="add_special_tokens", datatype="INT64", shape=("batch",), default=1)
    return Piece(piece.spec.model_copy(update={"inputs": (*piece.spec.inputs, special)}), assets=piece.assets)


def template_of(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The conversation's template that the tokenizer carries; of several by name the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def chat(tokenizer: PreTrainedTokenizerFast, template: str, rule: str) -> Piece:
    """The light stage from a conversation to the text that the checkpoint was trained to go on with.

    Args:
        tokenizer: Whose special tokens the template may name.
        template: Jinja.
        rule: `never` where the template writes all special tokens, `unless_bos` where it may leave the first to the tokenizer.
    """
    spec = StageSpec(
        name="chat",
        tier="light",
        processor="chat",
        inputs=(TensorSpec(name="messages", datatype="BYTES", shape=("batch",)),),
        outputs=(text.TEXT, TensorSpec(name="add_special_tokens", datatype="INT64", shape=("batch",))),
        parameters={
            "special_tokens": {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
            "add_generation_prompt": True,
            "special_tokens_rule": rule,
        },
    )
    return Piece(spec, assets={"chat_template.jinja": template.encode()})


def detokenise(tokenizer: PreTrainedTokenizerFast, further: Mapping[str, Any] | None = None) -> Piece:
    """The light stage from token ids to text, special tokens left out."""
    spec = StageSpec(
        name="detokenise",
        tier="light",
        processor="detokenise",
        inputs=MADE[:2],
        outputs=(text.TEXT,),
        parameters=dict(further or {}),
    )
    return Piece(spec, assets={"tokenizer.json": text.tokenizer_json(tokenizer)})


def example(size: Dimensions, part: range) -> tuple[Tensor, ...]:
    """Two sequences to trace with, the second padded: 3 new positions after a cache of 4."""
    batch, seq, past = 2, 3, 4
    mask = torch.ones(batch, past + seq, dtype=torch.int64)
    mask[1, :2] = 0
    cache = [torch.zeros(batch, size.kv_heads, past, size.head_dim) for _ in range(2 * len(part))]
    positions = torch.arange(past, past + seq).expand(batch, seq)
    return torch.zeros(batch, seq, size.hidden), mask, positions, *cache


def _array(weight: Tensor) -> Any:
    return weight.detach().numpy()
