"""Language models: a Llama of the real architecture with seeded weights, its tokenizer and a chat template.

`lm-ci` is for tests, and has three layers so that it can be cut in three. `lm-demo` takes a CPU some milliseconds a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.presets import vocabulary

SEED = 0
PAD, BEGIN, START, END, IMAGE = SPECIAL = ("<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<image>")
"""Numbered from 0. END ends an answer; IMAGE stands for an image, and means nothing to a model without eyes."""
CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'image' %}<image>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Size:
    """Of a decoder."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    context: int
    spread: float
    """Standard deviation of the weights. At the usual 0.02 a random model says one token for ever, whatever it is asked."""


SIZES: Mapping[str, Size] = {
    "lm-ci": Size(512, 64, 128, 3, 4, 256, 0.2),
    "lm-demo": Size(8192, 256, 704, 6, 8, 1024, 0.1),
}


def build(name: str, directory: Path) -> None:
    """Write one of SIZES as `save_pretrained` does."""
    model(name).save_pretrained(directory)
    save_tokenizer(name, directory)


def model(name: str) -> Any:
    """The seeded `LlamaForCausalLM`, in memory."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    size = SIZES[name]
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=size.context,
        initializer_range=size.spread,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BEGIN),
        eos_token_id=SPECIAL.index(END),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return transformers.LlamaForCausalLM(config)


def save_tokenizer(name: str, directory: Path) -> None:
    """Write the tokenizer of one of SIZES: it begins every text with BEGIN, as Llama's does, and pads at the left."""
    from tokenizers import processors  # noqa: PLC0415

    tokenizer = vocabulary.train(SIZES[name].vocabulary, SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))])
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    vocabulary.save(tokenizer, directory, special, padding_side="left", chat_template=CHAT_TEMPLATE)
