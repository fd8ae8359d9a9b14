"""Seeded language models: the same each time, and not so simple that comparing their answers would show nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import load_model, load_tokenizer, resolve
from models.presets import language


def _differs(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_it_is_the_same_each_time_whatever_else_is_random() -> None:
    first = language.model("lm-ci").state_dict()
    torch.manual_seed(9)
    drawn = torch.rand(1)
    torch.manual_seed(9)
    assert _differs(first, language.model("lm-ci").state_dict()) == []
    assert torch.rand(1) == drawn  # nor does it disturb what is random


def test_it_answers_every_prompt_otherwise_and_with_many_tokens(tmp_path: Path) -> None:
    language.build("lm-ci", tmp_path)
    checkpoint = resolve(str(tmp_path))
    model, tokenizer = load_model(checkpoint, "AutoModelForCausalLM"), load_tokenizer(checkpoint)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (3, 0)
    answers = set()
    for prompt in ("", "a", "What is the deadline?", "早安 🌳"):
        asked = tokenizer(prompt, return_tensors="pt")
        assert asked["input_ids"][0, 0] == tokenizer.bos_token_id
        made = model.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :].tolist()
        assert len(set(made)) >= 10
        answers.add(tuple(made))
    assert len(answers) == 4


@pytest.mark.parametrize("content", ["Hello", [{"type": "image"}, {"type": "text", "text": "Hello"}]])
def test_its_template_writes_every_special_token(content: Any, tmp_path: Path) -> None:
    language.save_tokenizer("lm-ci", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    tokenizer = load_tokenizer(resolve(str(tmp_path)))
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    image = "" if content == "Hello" else "<image>\n"
    assert text == f"<|begin|><|im_start|>user\n{image}Hello<|im_end|>\n<|im_start|>assistant\n"
