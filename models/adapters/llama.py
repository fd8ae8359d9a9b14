"""Where a Llama-like language model is cut: chat | tokenise | generate | detokenise.

Generating is all the work and the one core stage. The others turn conversations into text, text into tokens and tokens into
text, and are shared by every pipeline that speaks to the model. Qwen2, Qwen3 and Mistral are built of the same layers.
"""

from __future__ import annotations

from typing import Any

from models.adapters import decoder
from models.adapters.piece import Cut
from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.errors import UnsupportedCheckpoint

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies do not depend on how long the text is: a graph holds one set of them."""


def cut(checkpoint: Checkpoint, parts: int = 1) -> Cut:
    """Take a language model apart.

    Raises:
        UnsupportedCheckpoint: it has no head over the vocabulary, a sliding window, or positions that a graph cannot hold; or
            fewer layers than parts.
        CheckpointError: transformers cannot load it.
    """
    named = checkpoint.config.get("architectures") or ()
    if not any(name.endswith("ForCausalLM") for name in named):
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: {', '.join(named) or 'no architecture named'}; of its kind only ...ForCausalLM is supported"
        )
    model = load_model(checkpoint, "AutoModelForCausalLM")
    refuse_variants(checkpoint, model.config)
    tokenizer = load_tokenizer(checkpoint)
    sequences = decoder.Sequences.of(model, int(model.config.max_position_embeddings))
    template = decoder.template_of(tokenizer)
    return Cut(
        architecture=type(model).__name__,
        family="llama",
        pieces=(
            *([decoder.chat(tokenizer, template, "never")] if template else []),
            decoder.tokenise(tokenizer, sequences.context, sequences.pad),
            *decoder.generate(model.model, model.lm_head, sequences, parts),
            decoder.detokenise(tokenizer),
        ),
        typical_length=decoder.TYPICAL_LENGTH,
        bytes_per_element=decoder.BYTES_PER_ELEMENT,
        tolerances=decoder.TOLERANCES,
    )


def refuse_variants(checkpoint: Checkpoint, config: Any) -> None:
    """Raise UnsupportedCheckpoint for a decoder whose graph would give other tokens than the model.

    Args:
        checkpoint: Named in the message.
        config: Of the decoder, as transformers read it.
    """
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedCheckpoint(f"{checkpoint.source}: decoder {config.model_type!r}; supported: {', '.join(MODEL_TYPES)}")
    if window is not None and sliding and window < context:
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: a sliding window of {window} in a context of {context}; the graph attends to everything"
        )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in _ROTARY:
        raise UnsupportedCheckpoint(f"{checkpoint.source}: rotary positions {kind!r}; supported: {', '.join(_ROTARY)}")
