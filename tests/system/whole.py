"""The whole PyTorch models, asked what the testbed `families` is asked: one function for each kind of task.

Everything here is transformers' own: its tokenizers, its preprocessing, its models' `forward` and `generate`.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.checkpoint import Checkpoint, load_model, load_preprocessor, load_tokenizer, resolve
from services.dataplane.wire import Array

RATE = 16_000
"""Of the sounds [1/s]."""


def embedding(text: str) -> Array:
    """Mean of the token states, scaled to length 1; (d,)."""
    checkpoint = resolve("minilm")
    tokens = load_tokenizer(checkpoint)(text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        states = load_model(checkpoint)(**tokens).last_hidden_state[0]
    mean = states.mean(0).numpy()
    found: Array = mean / np.linalg.norm(mean)
    return found


def text_classes(text: str) -> tuple[Array, str]:
    """Probability of every class, (classes,), and the name of the likeliest."""
    checkpoint = resolve("classifier-ci")
    model = load_model(checkpoint, "AutoModelForSequenceClassification")
    with torch.no_grad():
        scores = model(**load_tokenizer(checkpoint)(text, return_tensors="pt")).logits[0].softmax(-1).numpy()
    return scores, str(model.config.id2label[int(scores.argmax())])


def image_classes(image: bytes, labels: Sequence[str]) -> Array:
    """Probability of every label, (labels,)."""
    checkpoint = resolve("clip-tiny")
    tokens = load_tokenizer(checkpoint)(list(labels), return_tensors="pt", padding=True)
    with torch.no_grad():
        found = load_model(checkpoint, "CLIPModel")(**tokens, pixel_values=_pixels(checkpoint, image))
    scores: Array = found.logits_per_image[0].softmax(-1).numpy()
    return scores


def about_image(image: bytes, question: str, new: int) -> str:
    """A greedy answer of so many tokens at most."""
    checkpoint = resolve("vlm-ci")
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, "LlavaForConditionalGeneration")
    messages = conversation(question, with_image=True)
    prompt = _prompt(tokenizer, messages)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    mark = str(tokenizer.convert_ids_to_tokens(model.config.image_token_id))
    assert prompt.count(mark) == 1
    tokens = tokenizer(prompt.replace(mark, mark * patches), return_tensors="pt", add_special_tokens=False)
    return _generated(model, tokenizer, new, **tokens, pixel_values=_pixels(checkpoint, image))


def transcript(audio: bytes, new: int) -> str:
    """A greedy transcript of so many tokens at most."""
    checkpoint = resolve("asr-ci")
    with wave.open(io.BytesIO(audio)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 2**15
    extractor = load_preprocessor(checkpoint, "WhisperFeatureExtractor")
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    model, tokenizer = load_model(checkpoint, "WhisperForConditionalGeneration"), load_tokenizer(checkpoint)
    with torch.no_grad():
        made = model.generate(features, max_new_tokens=new, do_sample=False, num_beams=1, language="en", task="transcribe")
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def continuation(text: str, new: int) -> str:
    """A greedy continuation of so many tokens at most."""
    checkpoint = resolve("lm-ci")
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, "AutoModelForCausalLM")
    return _generated(model, tokenizer, new, **tokenizer(text, return_tensors="pt"))


def reply(question: str, new: int) -> str:
    """A greedy reply of so many tokens at most."""
    checkpoint = resolve("lm-ci")
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, "AutoModelForCausalLM")
    prompt = _prompt(tokenizer, conversation(question))
    return _generated(model, tokenizer, new, **tokenizer(prompt, return_tensors="pt", add_special_tokens=False))


def _prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _generated(model: Any, tokenizer: Any, new: int, **inputs: Any) -> str:
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=new, do_sample=False, num_beams=1)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _pixels(checkpoint: Checkpoint, image: bytes) -> Any:
    processor = load_preprocessor(checkpoint, "CLIPImageProcessorPil")
    return processor(Image.open(io.BytesIO(image)), return_tensors="pt")["pixel_values"]


# --- what is asked about ---------------------------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    """A PNG of smooth random colours, 48 x 36."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((48, 36), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def sound(seed: int, seconds: float = 1.5) -> bytes:
    """A WAV of a wandering tone in noise, 16 bits, one channel."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(RATE * seconds)) / RATE
    tone = np.sin(2 * np.pi * np.cumsum(400 + 300 * np.sin(2 * np.pi * 1.3 * t + seed)) / RATE)
    samples = np.clip(0.5 * tone + rng.normal(0, 0.05, len(t)), -1, 1)
    out = io.BytesIO()
    with wave.open(out, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(RATE)
        written.writeframes((samples * (2**15 - 1)).astype("<i2").tobytes())
    return out.getvalue()


def conversation(question: str, *, with_image: bool = False) -> list[dict[str, Any]]:
    """One message of a user."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts if with_image else question}]
