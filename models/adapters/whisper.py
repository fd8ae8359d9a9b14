"""Where a Whisper-like speech model is cut: log_mel | encoder | generate | detokenise.

One window of audio, 30 s for the published models, goes through as one item. Encoder and decoder are core stages of their own:
the encoder is a fixed amount of work, the decoder goes on for as long as there is something to say. The keys and values of
cross-attention are made once for each sequence, by a second graph of `generate`, and are an input of every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.adapters import decoder, layers, text
from models.adapters.piece import Cut, Graph, Piece
from models.checkpoint import Checkpoint, load_model, load_preprocessor, load_tokenizer
from models.errors import UnsupportedCheckpoint
from models.manifest import GENERATE, Precision, StageSpec, TensorSpec

TYPICAL_LENGTH: Mapping[str, int] = {"seq": 1, "new": 32, "total": 32}
BYTES_PER_ELEMENT: Mapping[str, int] = {"audio": 160_000, "text": 150, "finish_reason": 10}
"""5 s of speech as 16-bit WAV."""
TOLERANCES: Mapping[Precision, float] = decoder.TOLERANCES
LANGUAGE = "en"
"""What a multilingual model is told to hear where the checkpoint does not say; detecting it would take a run of its own."""


class EncoderPart(nn.Module):
    """Consecutive layers of the encoder; before the first of all the convolutions, after the last the norm."""

    def __init__(self, encoder: Any, part: range) -> None:
        """Take layers out of an encoder."""
        super().__init__()
        first, last = part.start == 0, part.stop == len(encoder.layers)
        self.convolutions = nn.ModuleList([encoder.conv1, encoder.conv2]) if first else None
        self.positions = encoder.embed_positions if first else None
        self.layers = nn.ModuleList([encoder.layers[i] for i in part])
        self.norm = encoder.layer_norm if last else None

    def forward(self, entering: Tensor) -> Tensor:
        """Hidden states of the part's last layer.

        Args:
            entering: Log-mel features, float32 [batch, mels, frames], or the hidden states of the part before.

        Returns:
            float32 [batch, positions, hidden].
        """
        hidden = entering
        if self.convolutions is not None and self.positions is not None:
            for convolution in self.convolutions:
                hidden = nn.functional.gelu(convolution(hidden))
            hidden = hidden.permute(0, 2, 1) + self.positions.weight
        for layer in self.layers:
            hidden = layer(hidden, None)
        return hidden if self.norm is None else self.norm(hidden)


class Cross(nn.Module):
    """Keys and values of cross-attention, of each layer of a part of the decoder."""

    def __init__(self, model: Any, part: range) -> None:
        """Take the projections out of a decoder."""
        super().__init__()
        self.attention: Any = nn.ModuleList([model.layers[i].encoder_attn for i in part])

    def forward(self, last_hidden_state: Tensor) -> tuple[Tensor, ...]:
        """From float32 [batch, positions, hidden] to a key and a value each, float32 [batch, heads, positions, head_dim]."""
        return tuple(
            _heads(project(last_hidden_state), each)
            for each in self.attention
            for project in (each.k_proj, each.v_proj)
        )  # fmt: skip


class Part(nn.Module):
    """Consecutive layers of the decoder, and after the last of all the norm and the head.

    Self-attention is the model's own. Cross-attention is written out: the model's would compute its keys and values anew.
    """

    def __init__(self, model: Any, part: range, head: Any) -> None:
        """Take layers out of a decoder; `head`, None but for the last part, goes from hidden states to logits."""
        super().__init__()
        self.layers: Any = nn.ModuleList([model.layers[i] for i in part])
        self.norm: Any = model.layer_norm if head is not None else None
        self.head = head
        self.first = part.start

    def forward(self, hidden: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Hidden states, or logits of the last position, and the cache.

        Args:
            hidden: Embeddings with their positions added, or hidden states of the part before, float32 [batch, seq, hidden].
            attention_mask: 1 for a token, 0 for padding, of the cache and the new positions, int64 [batch, total].
            past: Key and value of each layer, float32 [batch, heads, past, head_dim]; then those of cross-attention.

        Returns:
            float32 [batch, seq, hidden] or [batch, vocabulary]; then key and value of each layer, of length total.
        """
        bias = decoder.causal_bias(attention_mask, hidden.shape[1])
        cache = decoder.Past(past[: 2 * len(self.layers)], self.first)
        cross = past[2 * len(self.layers) :]
        for i, layer in enumerate(self.layers):
            # The module, not a copy of its forward: dropout is off and the clamp of half precision does not apply.
            seen, _ = layer.self_attn(layer.self_attn_layer_norm(hidden), past_key_values=cache, attention_mask=bias)
            hidden = hidden + seen
            hidden = hidden + _attend(layer.encoder_attn, layer.encoder_attn_layer_norm(hidden), *cross[2 * i : 2 * i + 2])
            inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden)))
            hidden = hidden + layer.fc2(inner)
        if self.head is not None:
            hidden = self.head(self.norm(hidden[:, -1]))
        return hidden, *cache.present


def _attend(attention: Any, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Cross-attention of float32 [batch, seq, hidden] with keys and values that are there already."""
    query = _heads(attention.q_proj(hidden) * attention.scaling, attention)  # scaled where the model scales
    heard = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    projected: Tensor = attention.out_proj(heard.transpose(1, 2).reshape(hidden.shape))
    return projected


def _heads(tensor: Tensor, attention: Any) -> Tensor:
    """[batch, seq, hidden] as [batch, heads, seq, head_dim]."""
    return tensor.view(tensor.shape[0], -1, attention.num_heads, attention.head_dim).transpose(1, 2)


def cut(checkpoint: Checkpoint, parts: int = 1) -> Cut:
    """Take a speech model apart.

    Raises:
        UnsupportedCheckpoint: it has no decoder that speaks, its window is not that of its feature extractor, or it has fewer
            layers than parts.
        CheckpointError: transformers cannot load it.
    """
    named = checkpoint.config.get("architectures") or ()
    if "WhisperForConditionalGeneration" not in named:
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: {', '.join(named) or 'no architecture named'}; of this family only "
            "WhisperForConditionalGeneration is supported"
        )
    model = load_model(checkpoint, "WhisperForConditionalGeneration")
    tokenizer = load_tokenizer(checkpoint)
    mel = _log_mel(checkpoint, model.config)
    sequences = _sequences(checkpoint, model)
    timestamps = getattr(model.generation_config, "no_timestamps_token_id", None)
    return Cut(
        architecture=type(model).__name__,
        family="whisper",
        pieces=(
            mel,
            *_encoder(model.model.encoder, mel.spec.outputs[0], parts),
            *_generate(model, sequences, parts),
            decoder.detokenise(tokenizer, {"timestamp_begin": int(timestamps) + 1} if timestamps is not None else None),
        ),
        typical_length=TYPICAL_LENGTH,
        bytes_per_element=BYTES_PER_ELEMENT,
        tolerances=TOLERANCES,
    )


def _log_mel(checkpoint: Checkpoint, config: Any) -> Piece:
    extractor = load_preprocessor(checkpoint, "WhisperFeatureExtractor")
    frames = 2 * int(config.max_source_positions)  # the second convolution halves them
    if (extractor.nb_max_frames, extractor.feature_size) != (frames, config.num_mel_bins):
        raise UnsupportedCheckpoint(
            f"{checkpoint.source}: its feature extractor makes {extractor.feature_size} x {extractor.nb_max_frames} features, "
            f"its encoder takes {config.num_mel_bins} x {frames}"
        )
    if extractor.dither:
        raise UnsupportedCheckpoint(f"{checkpoint.source}: its feature extractor dithers; answers would not be repeatable")
    spec = StageSpec(
        name="log_mel",
        tier="light",
        processor="log_mel",
        inputs=(TensorSpec(name="audio", datatype="BYTES", shape=("batch",)),),
        outputs=(TensorSpec(name="input_features", datatype="FP32", shape=("batch", extractor.feature_size, frames)),),
        parameters={
            "sample_rate": int(extractor.sampling_rate),
            "n_fft": int(extractor.n_fft),
            "hop": int(extractor.hop_length),
            "mels": int(extractor.feature_size),
            "seconds": int(extractor.chunk_length),
        },
    )
    return Piece(spec, assets={"log_mel-filters.npy": extractor.mel_filters})


def _sequences(checkpoint: Checkpoint, model: Any) -> decoder.Sequences:
    """How transcriptions begin and end."""
    begins = prefix(checkpoint, model.generation_config, model.config)
    return replace(decoder.Sequences.of(model, int(model.config.max_target_positions)), prefix=tuple(begins))


def prefix(checkpoint: Checkpoint, settings: Any, config: Any) -> list[int]:
    """The tokens every transcription begins with: start, and of a multilingual model language and task; no timestamps.

    Raises:
        UnsupportedCheckpoint: the checkpoint leaves the language open and does not say which token stands for it.
    """
    ids = [int(settings.decoder_start_token_id)]
    languages: Mapping[str, int] | None = getattr(settings, "lang_to_id", None)
    if languages:
        language = getattr(settings, "language", None) or LANGUAGE
        token = language if language in languages else f"<|{language}|>"
        task = getattr(settings, "task", None) or "transcribe"
        if token not in languages or task not in settings.task_to_id:
            raise UnsupportedCheckpoint(f"{checkpoint.source}: generation_config.json has no token for {language} or {task}")
        ids += [int(languages[token]), int(settings.task_to_id[task])]
    else:
        forced = getattr(settings, "forced_decoder_ids", None) or getattr(config, "forced_decoder_ids", None) or []
        ids += [each[1] for each in forced]
        if None in ids:
            raise UnsupportedCheckpoint(
                f"{checkpoint.source}: forced_decoder_ids leave the language open, lang_to_id is missing"
            )
    silent = getattr(settings, "no_timestamps_token_id", None)
    return ids if silent is None or ids[-1] == silent else [*ids, int(silent)]


def _encoder(encoder: Any, features: TensorSpec, parts: int) -> tuple[Piece, ...]:
    positions, width = encoder.embed_positions.weight.shape
    cuts = layers.split(
        [layers.work(layer) for layer in encoder.layers],
        parts,
        before=2 * layers.work(encoder.conv1) + layers.work(encoder.conv2),  # the first works on twice as many positions
    )
    pieces = []
    for i, part in enumerate(cuts):
        name = layers.part_name("encoder", i, parts)
        entering = features if i == 0 else text.states(width, "hidden", positions)
        leaving = text.states(width, "last_hidden_state" if i == parts - 1 else "hidden", positions)
        # A window is long: a batch of several takes as long as one after the other, and much more memory.
        spec = StageSpec(name=name, tier="core", processor="onnx", inputs=(entering,), outputs=(leaving,))
        example = torch.zeros(2, *(int(axis) for axis in entering.shape[1:]))
        pieces.append(Piece(spec, {name: Graph(EncoderPart(encoder, part), (example,))}))
    return tuple(pieces)


def _generate(model: Any, sequences: decoder.Sequences, parts: int) -> tuple[Piece, ...]:
    stack, head, config = model.model.decoder, model.proj_out, model.config
    positions = int(config.max_source_positions)
    size = decoder.Dimensions(
        hidden=int(config.d_model),
        kv_heads=int(config.decoder_attention_heads),
        head_dim=int(config.d_model) // int(config.decoder_attention_heads),
        vocabulary=int(head.weight.shape[0]),
    )
    heard = text.states(size.hidden, axis=positions)
    pieces = []
    for i, part in enumerate(layers.split([layers.work(each) for each in stack.layers], parts, after=layers.work(head))):
        first, last = i == 0, i == parts - 1
        name = layers.part_name(GENERATE, i, parts)
        entering = size.hidden_states("inputs_embeds" if first else "hidden")
        cross = size.cache("cross", positions, part)
        step = Graph(
            Part(stack, part, head if last else None),
            _example(size, part, positions),
            inputs=(entering, decoder.SEEN, *size.cache("past", "past", part), *cross),
            outputs=(size.leaving(last), *size.cache("present", "total", part)),
            shared=decoder.shared(name, stack.embed_tokens, head) if first and last else {},
        )
        once = Graph(Cross(stack, part), (torch.zeros(2, positions, size.hidden),), inputs=(heard,), outputs=cross)
        spec = StageSpec(
            name=name,
            tier="core",
            processor=GENERATE,
            inputs=(heard, *decoder.SAMPLING) if first else (entering, decoder.SEEN, heard),
            outputs=decoder.MADE if first else (size.leaving(last),),
            max_batch=decoder.MAX_BATCH,
            parameters={**decoder.parameters(size, sequences, part, (i + 1, parts)), "encoder": True},
        )
        tables = {"embedding": stack.embed_tokens.weight, "positions": stack.embed_positions.weight} if first else {}
        assets = {f"{name}-{what}.npy": weight.detach().numpy() for what, weight in tables.items()}
        pieces.append(Piece(spec, {name: step, f"{name}-cross": once}, assets))
    return tuple(pieces)


def _example(size: decoder.Dimensions, part: range, positions: int) -> tuple[Tensor, ...]:
    hidden, mask, _, *cache = decoder.example(size, part)
    cross = [torch.zeros(2, size.kv_heads, positions, size.head_dim) for _ in range(2 * len(part))]
    return hidden, mask, *cache, *cross
