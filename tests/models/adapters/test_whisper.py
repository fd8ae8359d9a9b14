"""Speech models: their stages, how a transcription begins, and that their parts hear and say what the model does."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.adapters import whisper
from models.checkpoint import Checkpoint, load_model, load_preprocessor, resolve
from models.errors import UnsupportedCheckpoint
from models.presets import speech
from tests.models import chained
from tests.models.conftest import edit

NEW = 32


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint asr-ci; not to be changed."""
    directory = tmp_path_factory.mktemp("checkpoints") / "asr-ci"
    speech.build("asr-ci", directory)
    return directory


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(directory, tmp_path / "asr-ci"))


@pytest.mark.parametrize("language", [None, "de"])
def test_any_number_of_parts_hears_and_says_what_the_model_does(language: str | None, copy: Path) -> None:
    if language is not None:
        edit(copy / "generation_config.json", language=language)
    checkpoint = resolve(str(copy))
    model = load_model(checkpoint, "WhisperForConditionalGeneration")
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 80, 200)).astype(np.float32))
    model.generation_config.eos_token_id = None
    want = model.generate(features, max_new_tokens=NEW, do_sample=False, language=language or "en")
    with torch.no_grad():
        states = model.model.encoder(features).last_hidden_state
    assert len(set(want.flatten().tolist())) >= 20
    for parts in (1, 2, 3) if language is None else (1,):
        cut = whisper.cut(checkpoint, parts)
        heard = features
        for piece in chained.named(cut, "encoder"):
            (graph,) = piece.graphs.values()
            with torch.no_grad():
                heard = graph.module(heard)
        torch.testing.assert_close(heard, states, atol=1e-5, rtol=0)
        pieces = chained.named(cut, "generate")
        assert len(pieces) == parts
        begin = torch.tensor([pieces[0].spec.parameters["prefix"]]).expand(3, -1)
        embeds = chained.embed(pieces[0], begin, torch.arange(begin.shape[1])[None])
        made = chained.greedy(pieces, embeds, torch.ones_like(begin), NEW, chunk=None if parts == 2 else 3, heard=heard)
        assert made == want.tolist()


def test_the_stages_are_the_contract_with_the_services(directory: Path) -> None:
    checkpoint = resolve(str(directory))
    cut = whisper.cut(checkpoint)
    assert (cut.family, cut.architecture) == ("whisper", "WhisperForConditionalGeneration")
    mel, encoder, generate, detokenise = cut.pieces
    assert (mel.spec.name, mel.spec.tier, mel.spec.processor) == ("log_mel", "light", "log_mel")
    assert mel.spec.parameters == {"sample_rate": 16000, "n_fft": 400, "hop": 160, "mels": 80, "seconds": 2}
    assert [(t.name, t.datatype, t.shape) for t in (*mel.spec.inputs, *mel.spec.outputs)] == [
        ("audio", "BYTES", ("batch",)),
        ("input_features", "FP32", ("batch", 80, 200)),
    ]
    filters: Any = mel.assets["log_mel-filters.npy"]
    assert np.array_equal(filters, load_preprocessor(checkpoint, "WhisperFeatureExtractor").mel_filters)
    assert [(t.name, t.shape) for t in (*encoder.spec.inputs, *encoder.spec.outputs)] == [
        ("input_features", ("batch", 80, 200)),
        ("last_hidden_state", ("batch", 100, 64)),
    ]
    assert [t.name for t in generate.spec.inputs] == ["last_hidden_state", "max_tokens", "temperature", "top_p", "seed"]
    assert list(generate.graphs) == ["generate", "generate-cross"]
    assert list(generate.assets) == ["generate-embedding.npy", "generate-positions.npy"]
    step, cross = generate.graphs.values()
    assert [t.name for t in step.inputs] == [
        "inputs_embeds",
        "attention_mask",
        *(f"past_{i}_{kind}" for i in range(3) for kind in ("key", "value")),
        *(f"cross_{i}_{kind}" for i in range(3) for kind in ("key", "value")),
    ]
    assert [t.name for t in cross.outputs] == [t.name for t in step.inputs[-6:]]
    special = {token: 480 - len(speech.SPECIAL) + i for i, token in enumerate(speech.SPECIAL)}
    begins = [special[token] for token in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")]
    assert generate.spec.parameters["prefix"] == begins
    assert generate.spec.parameters["eos"] == [special["<|endoftext|>"]]
    assert special["<|endoftext|>"] in generate.spec.parameters["begin_suppress"]
    assert (generate.spec.parameters["context"], generate.spec.parameters["encoder"]) == (96, True)
    assert detokenise.spec.parameters == {"timestamp_begin": 480}


def test_every_part_of_the_decoder_hears(directory: Path) -> None:
    _, second, third = chained.named(whisper.cut(resolve(str(directory)), 3), "generate")
    for piece in (second, third):
        assert [t.name for t in piece.spec.inputs] == ["hidden", "attention_mask", "last_hidden_state"]
        assert list(piece.graphs) == [piece.spec.name, f"{piece.spec.name}-cross"]


MULTILINGUAL: dict[str, Any] = {
    "decoder_start_token_id": 50,
    "lang_to_id": {"<|en|>": 51, "<|de|>": 52},
    "task_to_id": {"translate": 53, "transcribe": 54},
    "no_timestamps_token_id": 59,
}


@pytest.mark.parametrize(
    ("settings", "config", "ids"),
    [
        (MULTILINGUAL, {}, [50, 51, 54, 59]),
        ({**MULTILINGUAL, "language": "de", "task": "translate"}, {}, [50, 52, 53, 59]),
        ({**MULTILINGUAL, "language": "<|de|>"}, {}, [50, 52, 54, 59]),
        ({"decoder_start_token_id": 50, "no_timestamps_token_id": 59}, {}, [50, 59]),
        ({"decoder_start_token_id": 50}, {}, [50]),
        ({"decoder_start_token_id": 50, "forced_decoder_ids": [[1, 51], [2, 54], [3, 59]]}, {}, [50, 51, 54, 59]),
        (
            {"decoder_start_token_id": 50, "no_timestamps_token_id": 59},
            {"forced_decoder_ids": [[1, 59]]},
            [50, 59],
        ),
    ],
    ids=["English by default", "as stated", "by its token", "English only", "nothing but a start", "forced", "forced long ago"],
)
def test_how_a_transcription_begins(settings: dict[str, Any], config: dict[str, Any], ids: list[int]) -> None:
    assert whisper.prefix(NOWHERE, SimpleNamespace(**settings), SimpleNamespace(**config)) == ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**MULTILINGUAL, "language": "fr"}, "no token for fr"),
        ({**MULTILINGUAL, "task": "sing"}, "no token for en or sing"),
        ({"decoder_start_token_id": 50, "forced_decoder_ids": [[1, None], [2, 54]]}, "leave the language open"),
    ],
)
def test_a_transcription_that_nobody_says_how_to_begin_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        whisper.prefix(NOWHERE, SimpleNamespace(**settings), SimpleNamespace())


@pytest.mark.parametrize(
    ("file", "change", "parts", "message"),
    [
        ("preprocessor_config.json", {"chunk_length": 4}, 1, "makes 80 x 400 features, its encoder takes 80 x 200"),
        ("preprocessor_config.json", {"dither": 0.5}, 1, "dithers"),
        ("config.json", {"architectures": ["WhisperForAudioClassification"]}, 1, "only WhisperForConditionalGeneration"),
        ("config.json", {}, 4, "3 layers cannot be cut into 4 parts"),
    ],
)
def test_what_would_come_out_wrong_is_refused(file: str, change: dict[str, Any], parts: int, message: str, copy: Path) -> None:
    edit(copy / file, **change)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        whisper.cut(resolve(str(copy)), parts)


NOWHERE = Checkpoint(Path("nowhere"), "heard", "heard@1", {})
