"""Where a LLaVA-like vision-language model is cut: preprocess | vision | project, chat | tokenise, generate, detokenise.

The vision encoder is CLIP's, and gives its states before any norm, so that one vision service may answer for this model and for
a CLIP of the same weights. `project` makes a token's embedding of each patch, and `generate` puts them where the prompt has its
image tokens, of which `tokenise` makes as many as there are patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.adapters import decoder, image, llama, vision
from models.adapters.piece import Cut, Piece, linear
from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.errors import UnsupportedCheckpoint
from models.manifest import Precision, StageSpec, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TYPICAL_LENGTH: Mapping[str, int] = decoder.TYPICAL_LENGTH
BYTES_PER_ELEMENT: Mapping[str, int] = {**decoder.BYTES_PER_ELEMENT, "image": image.BYTES_PER_IMAGE}
TOLERANCES: Mapping[Precision, float] = decoder.TOLERANCES
_STATES: Mapping[int, str] = {-1: "last_hidden_state", -2: "penultimate_hidden_state"}
"""Layer of the vision encoder, counted from the end -> the output of `vision` that has its states."""
_ACTIVATIONS: Mapping[str, str] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""As transformers calls the projector's activation -> as the processor `project` does."""


def cut(checkpoint: Checkpoint, parts: int = 1) -> Cut:
    """Take a vision-language model apart.

    Raises:
        UnsupportedCheckpoint: its vision encoder is not CLIP's, it looks at a layer that `vision` does not give, there is no
            stage for its projector or decoder, or an encoder or decoder has fewer layers than parts.
        CheckpointError: transformers cannot load it.
    """
    model = load_model(checkpoint, "LlavaForConditionalGeneration")
    config = model.config
    if config.vision_config.model_type != "clip_vision_model":
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: vision encoder {config.vision_config.model_type!r}; supported: clip_vision_model"
        )
    llama.refuse_variants(checkpoint, config.text_config)
    tokenizer = load_tokenizer(checkpoint)
    seen = vision.cut(model.model.vision_tower, parts, penultimate=looks_at(checkpoint, config) == _STATES[-2])
    projector = _project(checkpoint, model, seen[-1].spec)
    embedding = projector.spec.outputs[0]
    token = int(config.image_token_id)
    sequences = decoder.Sequences.of(model, int(config.text_config.max_position_embeddings))
    template = chat_template(checkpoint, tokenizer)
    expansion = {"image_token": {"id": token, "count": embedding.shape[1]}}
    return Cut(
        architecture=type(model).__name__,
        family="llava",
        pieces=(
            image.preprocess(checkpoint, int(config.vision_config.image_size)),
            *seen,
            projector,
            *([decoder.chat(tokenizer, template, "unless_bos")] if template else []),
            decoder.tokenise(tokenizer, sequences.context, sequences.pad, expansion),
            *decoder.generate(model.model.language_model, model.lm_head, sequences, parts, image=(embedding, token)),
            decoder.detokenise(tokenizer),
        ),
        typical_length=TYPICAL_LENGTH,
        bytes_per_element=BYTES_PER_ELEMENT,
        tolerances=TOLERANCES,
    )


def looks_at(checkpoint: Checkpoint, config: Any) -> str:
    """The output of `vision` that the projector takes.

    Raises:
        UnsupportedCheckpoint: several layers, or one that is neither the last nor the one before.
    """
    layer = config.vision_feature_layer
    if isinstance(layer, int) and layer >= 0:
        layer -= int(config.vision_config.num_hidden_layers) + 1  # the first of all hidden states are the embeddings
    if isinstance(layer, list) or layer not in _STATES:
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: vision_feature_layer is {config.vision_feature_layer}; supported: the last two layers"
        )
    return _STATES[layer]


def chat_template(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The conversation's template: the processor's, in whichever file it keeps it, else the tokenizer's."""
    for name in ("chat_template.json", "processor_config.json"):
        template = (checkpoint.document(name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    return decoder.template_of(tokenizer)


def _project(checkpoint: Checkpoint, model: Any, seeing: StageSpec) -> Piece:
    config = model.config
    name = looks_at(checkpoint, config)
    (states,) = (tensor for tensor in seeing.outputs if tensor.name == name)
    if config.projector_hidden_act not in _ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: projector_hidden_act {config.projector_hidden_act!r}; supported: {', '.join(_ACTIVATIONS)}"
        )
    patches = config.vision_feature_select_strategy == "default"
    count = int(states.shape[1]) - (1 if patches else 0)
    layers = model.model.multi_modal_projector
    spec = StageSpec(
        name="project",
        tier="light",
        processor="project",
        inputs=(states,),
        outputs=(
            TensorSpec(name="image_embedding", datatype="FP32", shape=("batch", count, int(config.text_config.hidden_size))),
        ),
        parameters={
            "select": "patches" if patches else "all",
            "activation": _ACTIVATIONS[config.projector_hidden_act],
            "normalise": False,
        },
    )
    return Piece(spec, assets={"project.npz": {**linear(layers.linear_1, 1), **linear(layers.linear_2, 2)}})
