"""Language models: the stages of each variant, that their parts speak as the model does, and which variants are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.adapters import adapter_for, llama
from models.adapters.piece import Piece
from models.checkpoint import load_model, resolve
from models.errors import UnsupportedCheckpoint
from models.presets import language
from tests.models import chained
from tests.models.conftest import edit

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 24,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3, one head of keys, tied": (
        "llama",
        {"rope_parameters": LLAMA3, "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "llama, heads of another size": ("llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "initializer_range": 0.6}),
    "mistral": ("mistral", {"sliding_window": None}),
}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of lm-ci; not to be changed."""
    directory = tmp_path_factory.mktemp("vocabulary")
    language.save_tokenizer("lm-ci", directory)
    return directory


def build(vocabulary: Path, directory: Path, family: str, **changes: Any) -> Path:
    """A small checkpoint of the family."""
    shutil.copytree(vocabulary, directory, dirs_exist_ok=True)
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **changes})
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_parts_says_what_the_model_says(variant: str, vocabulary: Path, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    checkpoint = resolve(str(build(vocabulary, tmp_path / "model", family, **changes)))
    model = load_model(checkpoint, "AutoModelForCausalLM")
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    prompts = [[1, 5, 9, 200, 31], [40], [1, *range(100, 120)]]
    batches = [chained.left_padded(rows, 0) for rows in (prompts[:1], prompts[1:2], prompts)]
    wanted = [
        model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)[:, ids.shape[1] :].tolist()
        for ids, mask in batches
    ]
    assert len({token for row in wanted[-1] for token in row}) >= 20  # else equality would show little
    for parts in (1, 2, 3) if variant == "llama" else (1,):  # the others differ within a layer
        pieces = chained.named(adapter_for(checkpoint)(checkpoint, parts), "generate")
        assert len(pieces) == parts
        for (ids, mask), want in zip(batches, wanted, strict=True):
            embeds = chained.embed(pieces[0], ids, mask)
            assert chained.greedy(pieces, embeds, mask, 32, chunk=None if parts == 2 else 4) == want


def test_the_stages_are_the_contract_with_the_services(vocabulary: Path, tmp_path: Path) -> None:
    checkpoint = resolve(str(build(vocabulary, tmp_path / "model", "llama")))
    cut = llama.cut(checkpoint)
    assert (cut.family, cut.architecture) == ("llama", "LlamaForCausalLM")
    sampling = [
        ("max_tokens", "INT64", ("batch",), 128), ("temperature", "FP32", ("batch",), 0.0), ("top_p", "FP32", ("batch",), 1.0),
        ("seed", "INT64", ("batch",), 0),
    ]  # fmt: skip
    ids, mask = ("input_ids", "INT64", ("batch", "seq"), None), ("attention_mask", "INT64", ("batch", "seq"), None)
    text, special = ("text", "BYTES", ("batch",), None), ("add_special_tokens", "INT64", ("batch",))
    made, count = ("output_ids", "INT64", ("batch", "new"), None), ("output_count", "INT64", ("batch",), None)
    assert {piece.spec.name: _tensors(piece) for piece in cut.pieces} == {
        "chat": ("light", "chat", [("messages", "BYTES", ("batch",), None)], [text, (*special, None)]),
        "tokenise": (
            "light",
            "tokenise",
            [text, (*special, 1)],
            [ids, mask, ("token_count", "INT64", ("batch",), None)],
        ),
        "generate": ("core", "generate", [ids, mask, *sampling], [made, count, ("finish_reason", "BYTES", ("batch",), None)]),
        "detokenise": ("light", "detokenise", [made, count], [text]),
    }
    (generate,) = chained.named(cut, "generate")
    assert generate.spec.parameters == {
        "layers": 3, "kv_heads": 2, "head_dim": 8, "hidden": 32, "vocabulary": 512, "eos": [3], "pad": 0, "context": 96,
        "prefix": [], "suppress": [], "begin_suppress": [], "max_tokens": 128, "part": 1, "parts": 1, "encoder": False,
    }  # fmt: skip
    (graph,) = generate.graphs.values()
    assert [tensor.name for tensor in graph.inputs[:5]] == [
        "inputs_embeds", "attention_mask", "position_ids", "past_0_key", "past_0_value",
    ]  # fmt: skip
    assert [(tensor.name, tensor.shape) for tensor in graph.outputs[:2]] == [
        ("logits", ("batch", 512)),
        ("present_0_key", ("batch", 2, "total", 8)),
    ]
    chat = cut.pieces[0]
    assert chat.assets == {"chat_template.jinja": language.CHAT_TEMPLATE.encode()}
    assert chat.spec.parameters["special_tokens"]["bos_token"] == language.BEGIN
    assert cut.pieces[1].spec.parameters["max_tokens"] == 95  # one position is left for an answer


def test_of_a_cut_decoder_only_hidden_states_travel(vocabulary: Path, tmp_path: Path) -> None:
    checkpoint = resolve(str(build(vocabulary, tmp_path / "model", "llama")))
    first, second, third = chained.named(llama.cut(checkpoint, 3), "generate")
    assert [piece.spec.name for piece in (first, second, third)] == ["generate-1", "generate-2", "generate-3"]
    assert [tensor.name for tensor in first.spec.outputs] == ["output_ids", "output_count", "finish_reason"]
    for piece, leaves in ((second, "hidden"), (third, "logits")):
        assert [tensor.name for tensor in piece.spec.inputs] == ["hidden", "attention_mask", "position_ids"]
        assert [tensor.name for tensor in piece.spec.outputs] == [leaves]
        assert not piece.assets
        (graph,) = piece.graphs.values()
        assert {tensor.name for tensor in graph.inputs[3:]} == {"past_0_key", "past_0_value"}  # numbered anew in each part
    assert [piece.spec.parameters["part"] for piece in (first, second, third)] == [1, 2, 3]
    assert list(first.assets) == ["generate-1-embedding.npy"]


def test_without_a_template_there_is_no_chat(vocabulary: Path, tmp_path: Path) -> None:
    directory = build(vocabulary, tmp_path / "model", "llama")
    (directory / "chat_template.jinja").unlink()
    assert [piece.spec.name for piece in llama.cut(resolve(str(directory))).pieces] == ["tokenise", "generate", "detokenise"]


@pytest.mark.parametrize(
    ("family", "changes", "parts", "message"),
    [
        ("mistral", {"sliding_window": 16}, 1, "a sliding window of 16 in a context of 96"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 1, "a sliding window of 8"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 1, "positions 'dynamic'"),
        ("llama", {}, 4, "3 layers cannot be cut into 4 parts"),
    ],
)
def test_what_would_come_out_wrong_is_refused(
    family: str, changes: dict[str, Any], parts: int, message: str, vocabulary: Path, tmp_path: Path
) -> None:
    checkpoint = resolve(str(build(vocabulary, tmp_path / "model", family, **changes)))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        llama.cut(checkpoint, parts)


def test_a_window_as_wide_as_the_context_is_none(vocabulary: Path, tmp_path: Path) -> None:
    checkpoint = resolve(str(build(vocabulary, tmp_path / "model", "mistral", sliding_window=96)))
    assert chained.named(llama.cut(checkpoint), "generate")


def test_a_model_without_a_head_over_the_vocabulary_is_refused(vocabulary: Path, tmp_path: Path) -> None:
    directory = build(vocabulary, tmp_path / "model", "llama")
    edit(directory / "config.json", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UnsupportedCheckpoint, match="LlamaForSequenceClassification; of its kind only"):
        llama.cut(resolve(str(directory)))


def _tensors(piece: Piece) -> tuple[str, str, list[Any], list[Any]]:
    inputs, outputs = (
        [(tensor.name, tensor.datatype, tensor.shape, tensor.default) for tensor in side]
        for side in (piece.spec.inputs, piece.spec.outputs)
    )
    return piece.spec.tier, piece.spec.processor, inputs, outputs
