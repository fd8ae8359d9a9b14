"""Token ids to text against transformers' `decode`, on the kinds of vocabularies that decoders have, whole and growing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from models.manifest import ManifestError, ModelFile, StageSpec, TensorSpec
from services.dataplane.errors import BadRequest
from services.dataplane.wire import Array
from services.stage.processors import Processor, open_processor
from tests.services.stage.processors.theirs import transformers

TEXTS = [
    "",
    "An espalier is a tree trained along a fixed frame.",
    "Spaliere für Äpfel & Birnen: 3,50 €",
    "🌳👩‍🌾🏳️‍🌈 e\u0301",
    "שלום עולם! مرحبا",
    "木を壁に沿って育てる",
    "  two  spaces\n\tand a tab ",
    "\x00\u200b\ufeff",
    "it 's n't so , is it ?",
]


def byte_level() -> Tokenizer:
    """As GPT-2's, Qwen's and Whisper's: every byte has a token, and pairs were merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama's first two: pieces of words, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,:!?'", "▁t", "▁tr", "▁tree"]
    merges = [("▁", "t"), ("▁t", "r"), ("▁tr", "ee")]
    pieces.append("ee")
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [("e", "e"), *merges], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {"byte_level": byte_level, "byte_fallback": byte_fallback}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    tokenizer = KINDS[request.param]()
    tokenizer.add_tokens(["<tool>"])  # not special: it is text
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, path


def open_on(path: Path | None, **parameters: Any) -> Processor:
    files = (path,) if path is not None else ()
    spec = StageSpec(
        name="detokenise",
        tier="light",
        processor="detokenise",
        inputs=(
            TensorSpec(name="output_ids", datatype="INT64", shape=("batch", "new")),
            TensorSpec(name="output_count", datatype="INT64", shape=("batch",)),
        ),
        outputs=(TensorSpec(name="text", datatype="BYTES", shape=("batch",)),),
        files={"float32": tuple(ModelFile(path=each.name, sha256="0" * 64, size_bytes=0) for each in files)},
        parameters=parameters,
    )
    return open_processor(spec, files, 1)


def run(processor: Processor, *rows: Sequence[int], counts: Sequence[int] | None = None) -> list[str]:
    longest = max(map(len, rows))
    ids = np.array([[*row, *[0] * (longest - len(row))] for row in rows], np.int64).reshape(len(rows), longest)
    given: Array = np.array([len(row) for row in rows] if counts is None else counts, np.int64)
    return [text.decode() for text in processor.run({"output_ids": ids, "output_count": given})["text"]]


def reference(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text: str = wrapped.decode(list(ids), skip_special_tokens=True)
    return text


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_texts_come_back_as_transformers_decodes_them(text: str, kind: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = kind
    ids = tokenizer.encode(f"<s>{text}<tool></s>").ids
    (ours,) = run(open_on(path), ids)
    assert ours == reference(tokenizer, ids)
    assert ours.strip(" ") == f"{text}<tool>".strip(" ")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_equal_transformers(data: st.DataObject, kind: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = kind
    # Beyond the vocabulary too: a decoder's output layer is often padded.
    row = st.lists(st.integers(0, tokenizer.get_vocab_size() + 9), max_size=12)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    assert run(open_on(path), *rows) == [reference(tokenizer, ids) for ids in rows]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_growing_text_told_up_to_its_broken_end_is_the_whole_text(text: str, kind: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = kind
    ids, detokenise = tokenizer.encode(text).ids, open_on(path)
    told = ""
    for count in range(len(ids) + 1):
        # Vocabularies that fall back to bytes break the characters before an unfinished one too, until it is finished.
        told += run(detokenise, ids[:count])[0].rstrip("\ufffd")[len(told) :]
    assert told == run(detokenise, ids)[0]


def test_only_as_many_ids_as_are_counted_are_read(kind: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = kind
    ids = tokenizer.encode("a tree").ids
    assert run(open_on(path), [*ids, 2**40], ids, counts=[len(ids), 0]) == [reference(tokenizer, ids), ""]


def test_timestamps_are_left_out_as_whispers_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|startoftranscript|>", "<|notimestamps|>"])
    begin = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<|{n * 0.02:.2f}|>", normalized=False) for n in range(1501)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = [begin, *tokenizer.encode(" a tree").ids, begin + 50, begin + 50, *tokenizer.encode(" 3.50").ids, begin + 1500, 1]
    whisper = transformers.WhisperTokenizerFast(tokenizer_object=tokenizer)
    expected = whisper.decode(ids, skip_special_tokens=True)
    assert run(open_on(tmp_path / "tokenizer.json", timestamp_begin=begin), ids) == [expected] == [" a tree 3.50"]


@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        ([[1, 2]], [3], "output_count must be between 0 and 2, the length of a row of output_ids"),
        ([[1, 2]], [-1], "output_count must be between 0 and 2"),
        ([[1, -5]], [2], "output_ids must be token ids, 0 or more, not -5"),
        ([[2**40, 2]], [2], "output_ids must be token ids, 0 or more, not 1099511627776"),
    ],
)
def test_what_are_no_ids_is_refused(
    rows: list[list[int]], counts: list[int], message: str, kind: tuple[Tokenizer, Path]
) -> None:
    with pytest.raises(BadRequest, match=message):
        run(open_on(kind[1]), *rows, counts=counts)


def test_the_stage(kind: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    tokenizer, path = kind
    detokenise = open_on(path)
    assert detokenise.inline
    assert detokenise.describe() == {"vocabulary": tokenizer.get_vocab_size()}
    with pytest.raises(ManifestError, match=r"needs its tokenizer\.json"):
        open_on(None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"tokenizer\.json: no tokenizer"):
        open_on(tmp_path / "tokenizer.json")
