"""Seeded vision-language models are made of the catalogue's CLIP and language model, weight for weight."""

from __future__ import annotations

from pathlib import Path

import torch

from models.checkpoint import load_model, resolve
from models.presets import clip, language, vision_language


def test_it_sees_with_clips_eyes_and_speaks_with_the_language_models_mouth(tmp_path: Path) -> None:
    vision_language.build("vlm-ci", tmp_path)
    model = load_model(resolve(str(tmp_path)), "LlavaForConditionalGeneration")
    eyes, mouth = clip.model("clip-tiny").vision_model.state_dict(), language.model("lm-ci").state_dict()
    seen, spoken = model.model.vision_tower.state_dict(), model.model.language_model.state_dict()
    assert set(seen) == set(eyes)
    assert all(torch.equal(seen[name], weight) for name, weight in eyes.items())
    assert all(torch.equal(spoken[name.removeprefix("model.")], w) for name, w in mouth.items() if name != "lm_head.weight")
    assert torch.equal(model.lm_head.weight, mouth["lm_head.weight"])
    assert (model.config.vision_feature_layer, model.generation_config.eos_token_id) == (-1, 3)
