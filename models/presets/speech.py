"""Speech models: a Whisper of the real architecture with seeded weights that listens to a shorter window, and its tokenizer.

`asr-ci` is for tests, and has three layers so that it can be cut in three. `asr-demo`'s encoder takes a CPU some 0.1 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.presets import vocabulary

SEED = 0
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>")
"""Numbered after the text's own tokens, as Whisper's are. The first ends a text, and pads as well."""

PLACES = 32.0
"""How much larger the decoder's positions are than its other weights. Its head is its own table of tokens, so that a random one
would repeat what was said last; with positions that count it says some twenty different tokens in 32."""


@dataclass(frozen=True)
class Size:
    """Of encoder and decoder alike."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    context: int
    seconds: int
    """Of audio."""
    spread: float
    """Standard deviation of the weights."""


SIZES: Mapping[str, Size] = {
    "asr-ci": Size(480, 64, 128, 3, 4, 96, 2, 0.2),
    "asr-demo": Size(4096, 384, 1536, 4, 6, 448, 10, 0.1),
}


def build(name: str, directory: Path) -> None:
    """Write one of SIZES as `save_pretrained` does."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    size = SIZES[name]
    tokenizer = vocabulary.train(size.vocabulary - len(SPECIAL), ())
    tokenizer.add_special_tokens(list(SPECIAL))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    config = transformers.WhisperConfig(
        vocab_size=size.vocabulary,
        d_model=size.hidden,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=size.intermediate,
        decoder_ffn_dim=size.intermediate,
        max_source_positions=50 * size.seconds,
        max_target_positions=size.context,
        init_std=size.spread,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any = transformers.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        model.model.decoder.embed_positions.weight *= PLACES
    model.generation_config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=[tokenizer.token_to_id(sign) for sign in "#*"],
        begin_suppress_tokens=[tokenizer.token_to_id("Ġ"), end],
        lang_to_id={token: ids[token] for token in ("<|en|>", "<|de|>")},
        task_to_id={"translate": ids["<|translate|>"], "transcribe": ids["<|transcribe|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        is_multilingual=True,
    )
    model.save_pretrained(directory)
    extractor: Any = transformers.WhisperFeatureExtractor  # typed, its constructor would be an untyped call
    extractor(feature_size=config.num_mel_bins, chunk_length=size.seconds).save_pretrained(directory)
    vocabulary.save(tokenizer, directory, {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]})
