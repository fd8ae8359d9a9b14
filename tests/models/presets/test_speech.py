"""Seeded speech models: different sounds get different transcriptions, of many tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models.checkpoint import load_model, load_preprocessor, load_tokenizer, resolve
from models.presets import speech


def test_it_hears_a_difference_and_says_many_tokens(tmp_path: Path) -> None:
    speech.build("asr-ci", tmp_path)
    checkpoint = resolve(str(tmp_path))
    model, tokenizer = load_model(checkpoint, "WhisperForConditionalGeneration"), load_tokenizer(checkpoint)
    extractor = load_preprocessor(checkpoint, "WhisperFeatureExtractor")
    t = np.arange(2 * 16000) / 16000
    sounds = [np.sin(2 * np.pi * 200 * t), np.sin(2 * np.pi * 900 * t), np.zeros_like(t)]
    features = extractor([sound.astype(np.float32) for sound in sounds], sampling_rate=16000, return_tensors="np")
    made = model.generate(torch.from_numpy(features["input_features"]), max_new_tokens=32, do_sample=False, language="en")
    rows = [tuple(row) for row in made.tolist()]
    assert len(set(rows)) == 3
    assert all(len(set(row)) >= 10 for row in rows)
    assert len(tokenizer) == model.config.vocab_size
    assert not {tokenizer.convert_tokens_to_ids(sign) for sign in "#*"} & {token for row in rows for token in row}
