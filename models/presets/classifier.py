"""A BERT that classifies texts, with seeded weights."""

from __future__ import annotations

from pathlib import Path

from models.presets import vocabulary

LABELS = ("negative", "neutral", "positive")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_VOCABULARY, _POSITIONS = 1000, 512


def build(name: str, directory: Path) -> None:
    """Write the checkpoint `classifier-ci`; see `models.seeded`."""
    import tokenizers as t  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415

    del name
    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=_POSITIONS,
        pad_token_id=0,
        initializer_range=0.2,  # at 0.02 every text comes out the same
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    model.save_pretrained(directory)
    tokenizer = vocabulary.train(_VOCABULARY, tuple(SPECIAL.values()))
    tokenizer.post_processor = t.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    vocabulary.save(tokenizer, directory, SPECIAL, model_max_length=_POSITIONS)
