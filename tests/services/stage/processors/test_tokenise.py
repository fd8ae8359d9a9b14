"""Tokenising on a small real tokenizer made here: padding, mask, counts, and the texts that are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.manifest import ManifestError, ModelFile, StageSpec, TensorSpec
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import Array
from services.stage.processors import Processor, open_processor
from tests.services.stage.processors.theirs import transformers

MAX_TOKENS = 16
CORPUS = ["the quick brown fox jumps over the lazy dog", "an espalier is a tree trained along a fixed frame", "été"] * 4


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer as BERT's, trained on a few words, saved with the padding and truncation of its training."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(pad_id=0, length=128)
    tokenizer.enable_truncation(4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def open_on(path: Path | None, **parameters: Any) -> Processor:
    files = (path,) if path is not None else ()
    listed = tuple(
        ModelFile(path=each.name, sha256=hashlib.sha256(each.read_bytes()).hexdigest(), size_bytes=each.stat().st_size)
        for each in files
    )
    seq = ("batch", "seq")
    spec = StageSpec(
        name="tokenise",
        tier="light",
        processor="tokenise",
        inputs=(TensorSpec(name="text", datatype="BYTES", shape=("batch",)),),
        outputs=(
            TensorSpec(name="input_ids", datatype="INT64", shape=seq),
            TensorSpec(name="attention_mask", datatype="INT64", shape=seq),
            TensorSpec(name="token_count", datatype="INT64", shape=("batch",)),
        ),
        files={"float32": listed},
        parameters={"max_tokens": MAX_TOKENS, "pad_id": 3} | parameters,
    )
    return open_processor(spec, files, 1)


@pytest.fixture(scope="module")
def tokenise(tokenizer_file: Path) -> Processor:
    return open_on(tokenizer_file)


def run(processor: Processor, *texts: str | bytes, special: Sequence[int] | None = None) -> dict[str, Array]:
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() if isinstance(text, str) else text for text in texts]
    further = {} if special is None else {"add_special_tokens": np.array(special, np.int64)}
    return processor.run({"text": array, **further})


def test_texts_are_padded_to_the_longest_with_the_models_own_padding(tokenise: Processor) -> None:
    outputs = run(tokenise, "the quick brown fox", "dog", "the lazy dog")
    ids, mask, count = outputs["input_ids"], outputs["attention_mask"], outputs["token_count"]
    assert ids.shape == mask.shape == (3, 6)
    assert count.tolist() == [6, 3, 5]
    assert mask.tolist() == [[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0]]
    assert ids[1, 3:].tolist() == [3, 3, 3]
    assert (ids[:, 0] == 1).all()
    assert [ids[row, n - 1] for row, n in enumerate(count)] == [2, 2, 2]
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.int64)}


def test_ids_are_those_of_the_tokenizer_itself(tokenise: Processor, tokenizer_file: Path) -> None:
    reference = Tokenizer.from_file(str(tokenizer_file))
    reference.no_padding()
    reference.no_truncation()
    for text in ("The QUICK brown fox", "unknown wörds!", "été", ""):
        assert run(tokenise, text)["input_ids"][0].tolist() == reference.encode(text).ids


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 2), (" \t\n", 2), ("\x00", 2), ("🌳", 3), ("dog " * (MAX_TOKENS - 2), MAX_TOKENS), ("\ufeffdog", 3)],
    ids=["empty", "only space", "a NUL", "an emoji is one unknown token", "just fits", "a byte order mark"],
)
def test_odd_texts_are_texts(tokenise: Processor, text: str, count: int) -> None:
    outputs = run(tokenise, text)
    assert outputs["token_count"].tolist() == [count]
    assert outputs["attention_mask"].tolist() == [[1] * count]


def test_a_text_over_the_models_limit_is_refused_with_its_place_and_both_numbers(tokenise: Processor) -> None:
    with pytest.raises(BadRequest, match="text 1 has 17 tokens; the model takes 16"):
        run(tokenise, "dog", "dog " * (MAX_TOKENS - 1))


def test_many_texts_of_any_length_are_too_much_at_once(tokenise: Processor) -> None:
    with pytest.raises(TooLarge, match="the texts have 1050000 bytes together; the limit is 1048576: send fewer at once"):
        run(tokenise, *["ab" * 500] * 1050)


def test_a_text_far_over_the_limit_is_refused_unread(tokenise: Processor) -> None:
    with pytest.raises(TooLarge, match="text 0 has 40000 bytes"):
        run(tokenise, b"\xff" * 40_000)  # had it been read, it would be no UTF-8


@pytest.mark.parametrize("raw", [b"\xff", b"dog \xc3", b"\xed\xa0\x80", b"\xc0\x80"], ids=repr)
def test_what_is_not_utf8_is_refused(tokenise: Processor, raw: bytes) -> None:
    with pytest.raises(BadRequest, match="text 1 is not UTF-8"):
        run(tokenise, "dog", raw)


def test_truncation_keeps_the_beginning_and_the_closing_token(tokenizer_file: Path) -> None:
    cut = open_on(tokenizer_file, truncate=True)
    outputs = run(cut, "dog " * 50, "fox")
    assert outputs["token_count"].tolist() == [MAX_TOKENS, 3]
    ids = outputs["input_ids"][0].tolist()
    assert (ids[0], ids[-1], len(set(ids[1:-1]))) == (1, 2, 1)


def test_truncation_takes_a_text_of_any_length(tokenizer_file: Path) -> None:
    cut = open_on(tokenizer_file, truncate=True)
    outputs = run(cut, "dog " * 100_000)
    assert outputs["token_count"].tolist() == [MAX_TOKENS]


def test_a_refusal_leaves_the_stage_as_it_was(tokenise: Processor) -> None:
    before = run(tokenise, "the lazy dog")["input_ids"].tolist()
    with pytest.raises(BadRequest):
        run(tokenise, "dog " * 40)
    assert run(tokenise, "the lazy dog")["input_ids"].tolist() == before


def test_each_text_says_whether_the_tokenizer_adds_its_special_tokens(tokenise: Processor, tokenizer_file: Path) -> None:
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    texts, special = ("dog", "the lazy dog", "fox"), (0, 1, 0)
    outputs = run(tokenise, *texts, special=special)
    expected = [reference.encode(text, add_special_tokens=bool(add)) for text, add in zip(texts, special, strict=True)]
    rows = zip(outputs["input_ids"], outputs["token_count"], strict=True)
    assert [ids[:count].tolist() for ids, count in rows] == expected
    assert outputs["token_count"].tolist() == [1, 5, 1]
    assert outputs["attention_mask"].tolist() == [[1, 0, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]


def test_a_text_without_any_token_is_refused(tokenise: Processor) -> None:
    with pytest.raises(BadRequest, match="text 1 has no tokens; the model takes at least one: write something"):
        run(tokenise, "dog", "", special=[0, 0])


def test_a_tokenizer_that_cannot_be_read_does_not_open(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ManifestError, match=r"tokenizer\.json: no tokenizer \(.*\); export the model again"):
        open_on(tmp_path / "tokenizer.json")


# --- a text that names an image ------------------------------------------------------------------------------------------

PATCHES = 6


@pytest.fixture(scope="module")
def with_image(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Processor, Any]:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens(["<image>"])
    path = tmp_path_factory.mktemp("with_image") / "tokenizer.json"
    tokenizer.save(str(path))
    image = {"id": tokenizer.token_to_id("<image>"), "count": PATCHES}
    return open_on(path, image_token=image), transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["<image>", "<image> the dog", "the <image>dog", "dog\n<image>", "no picture"])
def test_an_image_becomes_as_many_tokens_as_llavas_processor_makes_of_it(text: str, with_image: tuple[Processor, Any]) -> None:
    tokenise, tokenizer = with_image
    # Patches of 4 x 4 pixels, and the class token that the strategy `default` leaves out again.
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    pictures = [Image.new("RGB", (20, 20))] if "<image>" in text else None
    expected = processor(images=pictures, text=text)["input_ids"]
    outputs = run(tokenise, text)
    assert outputs["input_ids"].tolist() == [list(expected[0])]
    assert outputs["token_count"].tolist() == [len(expected[0])]


def test_two_images_in_a_text_are_refused(with_image: tuple[Processor, Any]) -> None:
    with pytest.raises(BadRequest, match="text 1 names 2 images; the model takes one with each text: name it once"):
        run(with_image[0], "<image>", "<image><image>")


def test_the_models_limit_counts_the_images_tokens(with_image: tuple[Processor, Any]) -> None:
    tokenise, _ = with_image
    assert run(tokenise, "<image>" + "dog " * (MAX_TOKENS - 2 - PATCHES))["token_count"].tolist() == [MAX_TOKENS]
    with pytest.raises(BadRequest, match="text 0 has 17 tokens; the model takes 16"):
        run(tokenise, "<image>" + "dog " * (MAX_TOKENS - 1 - PATCHES))


def test_it_says_what_it_takes(tokenise: Processor) -> None:
    assert tokenise.describe() == {"max_tokens": MAX_TOKENS, "truncate": False}
    assert tokenise.inline


def test_a_stage_without_its_tokenizer_does_not_open() -> None:
    with pytest.raises(ManifestError, match=r"needs its tokenizer\.json"):
        open_on(None)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.text(max_size=12) | st.binary(max_size=6), min_size=1, max_size=4))
def test_any_texts_give_a_rectangle_of_tokens_or_a_refusal(tokenise: Processor, texts: list[str | bytes]) -> None:
    try:
        outputs = run(tokenise, *[text if isinstance(text, bytes) else text.encode("utf-8", "replace") for text in texts])
    except BadRequest:
        return
    ids, mask, count = outputs["input_ids"], outputs["attention_mask"], outputs["token_count"]
    assert ids.shape == mask.shape == (len(texts), count.max())
    assert mask.sum(axis=1).tolist() == count.tolist()
    assert (ids[mask == 0] == 3).all()
