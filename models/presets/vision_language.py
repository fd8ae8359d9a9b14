"""Models that see and speak: a LLaVA whose vision tower is the catalogue's CLIP and whose decoder is its language model.

Weight for weight, so that one vision service answers for both. Only the projector between the two has weights of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.presets import clip, language, vocabulary

SEED = 0
MADE_OF: Mapping[str, tuple[str, str]] = {
    "vlm-ci": ("clip-tiny", "lm-ci"),
    "vlm-demo": ("clip-small", "lm-demo"),
    "vlm-vitb32": ("clip-vitb32", "lm-demo"),
}


def build(name: str, directory: Path) -> None:
    """Write one of MADE_OF as `save_pretrained` does."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    sees, speaks = MADE_OF[name]
    eyes, decoder = clip.model(sees), language.model(speaks)
    seen = eyes.config.vision_config
    config = transformers.LlavaConfig(
        vision_config=seen,
        text_config=decoder.config,
        image_token_index=language.SPECIAL.index(language.IMAGE),
        image_seq_length=(seen.image_size // seen.patch_size) ** 2,
        vision_feature_layer=-1,  # where CLIP's own head reads, so that one encoder serves both
        vision_feature_select_strategy="default",
    )
    model: Any = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(eyes.vision_model.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            torch.nn.init.normal_(layer.bias, std=layer.in_features**-0.5)
    model.generation_config = decoder.generation_config
    model.save_pretrained(directory)
    language.save_tokenizer(speaks, directory)
    vocabulary.write_json(directory / "preprocessor_config.json", clip.image_processor(clip.SIZES[sees]))
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": language.IMAGE,
        "patch_size": seen.patch_size,
        "num_additional_image_tokens": 1,  # the class token, which the select strategy takes away again
        "vision_feature_select_strategy": "default",
    }
    vocabulary.write_json(directory / "processor_config.json", processor)
