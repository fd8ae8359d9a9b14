"""Checkpoints small enough to build, export and run in a test: real architecture classes and tokenizers, seeded weights.

Vocabularies are written out, because training a tokenizer twice on the same text gives two.
"""

from __future__ import annotations

import json
import string
import warnings
from pathlib import Path
from typing import Any

HIDDEN = 32
POSITIONS = 72
WORDS = ("espalier", "tree", "trained", "along", "fixed", "frame", "pruned", "back", "every", "year", "late", "task", "queue")


def build(directory: Path, family: str = "bert", seed: int = 0, labels: int = 0) -> Path:
    """A checkpoint of `bert`, `distilbert`, `roberta` or `xlm-roberta` as transformers would; a classifier if it has labels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers deprecates parts of itself on import
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415

        english = family in {"bert", "distilbert"}
        tokenizer = _word_piece() if english else _bytes()
        special = {"pad_token_id": 0} if english else {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        inner = "hidden_dim" if family == "distilbert" else "intermediate_size"
        config = transformers.AutoConfig.for_model(
            family,
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,  # at 0.02 every text comes out the same, and a comparison would prove nothing
            **{inner: 64},
            **special,
            **({"num_labels": labels} if labels else {}),
        )
        torch.manual_seed(seed)
        auto: Any = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModel
        model = auto.from_config(config)
        model.save_pretrained(directory)
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        if not english:
            names = {
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "cls_token": "<s>",
                "sep_token": "</s>",
                "mask_token": "<mask>",
            }
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]
        fast.save_pretrained(directory)
    return directory


def add_sentence_settings(directory: Path, *, mode: str, normalise: bool, max_tokens: int) -> None:
    """Add the files by which sentence-transformers says how to pool."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"s.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    _write(directory / "modules.json", modules)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    (directory / "1_Pooling").mkdir()
    every = dict.fromkeys(["pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens"], False)
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": HIDDEN, **every, mode: True})


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))


def _word_piece() -> Any:
    import tokenizers as t  # noqa: PLC0415

    letters = string.ascii_letters + string.digits + string.punctuation
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *WORDS]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = t.Tokenizer(t.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = t.normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = t.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    # As all-MiniLM-L6-v2 ships its own; an export that keeps either is wrong.
    tokenizer.enable_padding(length=24)
    tokenizer.enable_truncation(24)
    return tokenizer


def _bytes() -> Any:
    import tokenizers as t  # noqa: PLC0415

    entries = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(t.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = t.Tokenizer(t.models.BPE({entry: i for i, entry in enumerate(entries)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = t.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer
