"""Exported decoders say what the whole model says, in every precision and however they are cut; and a spoilt one is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.checkpoint import resolve
from models.errors import CheckpointError
from models.manifest import Precision, load
from models.session import Array
from models.verification import verify
from models.verification.figures import Verdict
from models.verification.generation import Answer, Decoder, check_width, left_padded
from tests.conftest import exported
from tests.models.verification.test_sentence import missed, reseal

TOKENS = "greedy tokens that differ"


def test_a_language_model_says_the_same_in_every_precision(lm_ci: Path) -> None:
    verdict = verify(lm_ci, "lm-ci")
    assert missed(verdict) == set()
    figures = {(figure.precision, figure.what): figure for figure in verdict.figures}
    assert figures["float32", TOKENS].value == 0
    assert figures["float32", TOKENS].count >= 400  # 32 tokens of each prompt, alone and in a batch
    assert figures["float32", "logits, largest difference"].value < 1e-4
    assert figures["int8", "logits, 1 - cosine"].value > 1e-4  # it is a quantised model that was compared
    assert {figure.precision for figure in verdict.figures} == {"float32", "float16", "int8"}


@pytest.mark.parametrize(("name", "parts"), [("lm-ci", 2), ("lm-ci", 3), ("asr-ci", 2), ("vlm-ci", 2)])
def test_a_cut_model_says_the_same(name: str, parts: int) -> None:
    made = exported(name, "float32", parts=parts)
    assert len(load(made).parts("generate")) == parts
    verdict = verify(made, name)
    assert missed(verdict) == set()
    assert _values(verdict)[TOKENS] == 0


def test_a_speech_model_hears_and_says_the_same(asr_ci: Path) -> None:
    values = _values(verify(asr_ci, "asr-ci"))
    assert values[TOKENS] == 0
    assert values["hidden states, largest difference"] < 1e-4
    assert values["logits, largest difference"] < 1e-4


def test_a_vision_language_model_sees_and_says_the_same(vlm_ci: Path) -> None:
    values = _values(verify(vlm_ci, "vlm-ci"))
    assert values[TOKENS] == 0
    assert values["image embeddings, largest difference"] < 1e-4
    assert values["logits, largest difference"] < 1e-4


def test_a_spoilt_table_is_found(lm_ci: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(lm_ci, tmp_path / "lm-ci"))
    table = np.load(copy / "generate-embedding.npy")
    np.save(copy / "generate-embedding.npy", np.roll(table, 1, axis=0))
    reseal(copy)
    assert ("float32", TOKENS) in missed(verify(copy, "lm-ci"))


def test_another_checkpoint_is_refused(lm_ci: Path) -> None:
    with pytest.raises(CheckpointError, match="name the checkpoint that was exported"):
        check_width(resolve("lm-ci"), load(lm_ci), 65)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_row_of_a_padded_batch_is_answered_as_if_alone(precision: Precision, lm_ci: Path) -> None:
    decoder = Decoder(load(lm_ci), lm_ci, precision)
    prompts = [[1, 9, 30], [1, *range(40, 60)]]
    tokens = np.array([[11, 12, 13, 14], [21, 22, 23, 24]])
    together = decoder.logits(_asked(decoder, prompts, tokens))
    for row in range(2):
        alone = decoder.logits(_asked(decoder, prompts[row : row + 1], tokens[row : row + 1]))
        # int8 scales activations by the largest of the batch, so that neighbours count a little.
        np.testing.assert_allclose(together[row], alone[0], atol={"float32": 1e-4, "float16": 0.2, "int8": 5.0}[precision])


def _asked(decoder: Decoder, prompts: list[list[int]], tokens: Array) -> Answer:
    ids, mask = left_padded(prompts, 0)
    return Answer(decoder.embed(ids, mask), mask, tokens, np.zeros(0))


def _values(verdict: Verdict) -> dict[str, float]:
    return {figure.what: figure.value for figure in verdict.figures}
