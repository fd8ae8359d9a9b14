"""Sound against transformers' WhisperFeatureExtractor: its spectrogram on the same samples, and files of all kinds to samples.

Its computation in double precision is met within 1e-6. Where torch is installed it computes in single precision instead, and
is itself up to 2.4e-5 away from that (a pure tone, whose quiet bands lie 80 dB below).
"""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import ManifestError, ModelFile, StageSpec, TensorSpec
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import Array
from services.stage.processors import Exemplary, Processor, open_processor
from services.stage.processors import log_mel as subject
from tests.services.stage.processors.theirs import transformers

DOUBLE, SINGLE = 1e-6, 5e-5
"""Largest difference to the extractor's numpy and torch computation."""
RATE, SECONDS = 16_000, 2
MELS = 40
EXTRACTOR = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS)


@pytest.fixture(scope="module")
def filters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filters") / "log_mel-filters.npy"
    np.save(path, EXTRACTOR.mel_filters.astype(np.float32))
    return path


def open_with(filters: Path | None, frames: int = SECONDS * 100, **parameters: Any) -> Processor:
    given = {"sample_rate": RATE, "n_fft": 400, "hop": 160, "mels": MELS, "seconds": SECONDS} | parameters
    files = (filters,) if filters is not None else ()
    spec = StageSpec(
        name="log_mel",
        tier="light",
        processor="log_mel",
        inputs=(TensorSpec(name="audio", datatype="BYTES", shape=("batch",)),),
        outputs=(TensorSpec(name="input_features", datatype="FP32", shape=("batch", MELS, frames)),),
        files={"float32": tuple(ModelFile(path=each.name, sha256="0" * 64, size_bytes=0) for each in files)},
        parameters=given,
    )
    return open_processor(spec, files, 1)


@pytest.fixture(scope="module")
def log_mel(filters: Path) -> Processor:
    return open_with(filters)


def run(processor: Processor, *files: bytes) -> Array:
    audio = np.empty(len(files), dtype=object)
    audio[:] = files
    return processor.run({"audio": audio})["input_features"]


def encoded(sound: Array, rate: int = RATE, subtype: str = "FLOAT", form: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, sound, rate, format=form, subtype=subtype)
    return stream.getvalue()


def heard(file: bytes) -> Array:
    """What is in a file, FP32 mono, as librosa would load it."""
    sound, _ = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)
    mono: Array = sound.mean(axis=1)
    return mono


def double(sound: Array) -> Array:
    """The extractor's features of one sound, by its computation in double precision."""
    window = np.zeros((1, RATE * SECONDS), np.float32)
    window[0, : len(sound)] = sound[: RATE * SECONDS]
    features: Array = EXTRACTOR._np_extract_fbank_features(window, "cpu")[0]
    return features


def single(sound: Array) -> Array:
    """The extractor's features as a user of transformers gets them who has torch."""
    features: Array = EXTRACTOR(sound, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    return features


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, loudness: float = 0.5) -> Array:
    return loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def noise(seconds: float, rate: int = RATE, *channels: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (round(seconds * rate), *channels))


FILES: dict[str, bytes] = {
    "noise over the whole window": encoded(noise(SECONDS)),
    "a short noise": encoded(noise(0.3)),
    "one sample": encoded(np.array([0.5])),
    "a tone": encoded(tone(440)),
    "a very quiet tone": encoded(tone(440, loudness=1e-4)),
    "silence": encoded(np.zeros(8000)),
    "silence, then a click": encoded(np.eye(1, 20_000, 19_999)[0]),
    "clipped": encoded(np.clip(tone(300, loudness=8), -1, 1)),
    "beyond full scale": encoded(tone(300, loudness=3)),
    "all at the rail": encoded(np.ones(9000)),
    "16 bits": encoded(noise(1), subtype="PCM_16"),
    "8 bits": encoded(noise(1), subtype="PCM_U8"),
    "24 bits": encoded(noise(1), subtype="PCM_24"),
    "32 bits": encoded(noise(1), subtype="PCM_32"),
    "64-bit floats": encoded(noise(1), subtype="DOUBLE"),
    "µ-law": encoded(noise(1), subtype="ULAW"),
    "stereo": encoded(noise(1, RATE, 2), subtype="PCM_16"),
    "surround": encoded(noise(0.5, RATE, 6), subtype="PCM_16"),
    "extensible WAV": encoded(noise(1, RATE, 2), subtype="PCM_24", form="WAVEX"),
    "FLAC": encoded(noise(1), subtype="PCM_16", form="FLAC"),
    "OGG": encoded(noise(1), subtype="VORBIS", form="OGG"),
}


@pytest.mark.parametrize("name", FILES)
def test_features_are_the_extractors(name: str, log_mel: Processor) -> None:
    ours = run(log_mel, FILES[name])
    assert ours.shape == (1, MELS, SECONDS * 100)
    assert ours.dtype == np.float32
    sound = heard(FILES[name])
    assert np.abs(ours[0] - double(sound)).max() <= DOUBLE
    assert np.abs(ours[0] - single(sound)).max() <= SINGLE


@settings(max_examples=40, deadline=None)
@given(seconds=st.floats(0.001, SECONDS), seed=st.integers(0, 99), loudness=st.floats(0, 2), channels=st.integers(1, 3))
def test_any_length_and_loudness_equals_the_extractor(
    log_mel: Processor, seconds: float, seed: int, loudness: float, channels: int
) -> None:
    file = encoded(loudness * noise(seconds, RATE, channels, seed=seed))
    assert np.abs(run(log_mel, file)[0] - double(heard(file))).max() <= DOUBLE


def test_the_standard_librarys_wav_is_read(log_mel: Processor) -> None:
    samples = (tone(440) * 32767).astype("<i2")
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    assert np.abs(run(log_mel, stream.getvalue())[0] - double((samples / 32768).astype(np.float32))).max() <= DOUBLE


@pytest.mark.parametrize("rate", [1_000, 4_000, 8_000, 11_025, 12_345, 22_050, 44_100, 48_000, 96_000, 384_000])
def test_a_tone_is_the_same_tone_at_any_rate(rate: int, log_mel: Processor) -> None:
    hertz = min(440, rate / 5)
    resampled = run(log_mel, encoded(tone(hertz, 1.0, rate), rate))[0]
    plain = run(log_mel, encoded(tone(hertz, 1.0)))[0]
    # Away from the ends, where the resampler's filter rings, and in the bands that are heard at all: 1/4 is 10 dB.
    middle = slice(10, 85)
    loud = plain[:, middle] > plain.max() - 1.0
    assert np.abs(resampled[:, middle] - plain[:, middle])[loud].max() < 0.02


def test_what_lies_above_the_models_band_is_filtered_out_not_folded_back(log_mel: Processor) -> None:
    high = encoded(tone(15_000, 1.0, 48_000), 48_000)  # would be heard at 1 kHz
    assert run(log_mel, high)[0][:, 10:85].max() < run(log_mel, encoded(tone(1_000)))[0].max() - 1.5


def test_a_batch_is_each_sound_by_itself(log_mel: Processor) -> None:
    files = [FILES[name] for name in ("a tone", "silence", "stereo")]
    assert np.array_equal(run(log_mel, *files), np.concatenate([run(log_mel, file) for file in files]))


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "file", "message"),
    [
        ("nothing", b"", "is no sound: send the bytes of a file in one of WAV, FLAC, OGG"),
        ("text", b"made up", "is no sound"),
        ("an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "is no sound"),
        ("a WAV of its header alone", encoded(np.zeros(0)), "is empty: send at least one sample"),
        ("a WAV that breaks off in its header", FILES["16 bits"][:30], "is no sound"),
        ("a format that is not read", encoded(noise(0.1), subtype="PCM_16", form="AIFF"), "is AIFF: send"),
        ("longer than the window", encoded(noise(2.1)), "lasts 2.1 s; the model hears 2 s: cut it or split it"),
        ("longer at another rate", encoded(noise(2.5, 8000), 8000), "lasts 2.5 s"),
        ("no numbers", encoded(np.array([0.1, np.nan, 0.1])), "has samples that are no numbers"),
        ("infinitely loud", encoded(np.array([0.1, np.inf, 0.1])), "has samples that are no numbers"),
        ("too slow to be sound", encoded(noise(1, 999), 999), "has 999 samples a second; from 1000 to 384000 are taken"),
        ("nine channels", encoded(noise(0.1, RATE, 9)), "has 9 channels; at most 8 are taken: mix them down"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0] != "i" else "",
)
def test_bad_input_is_refused_with_its_place_and_what_to_change(
    sentence: str, file: bytes, message: str, log_mel: Processor
) -> None:
    del sentence
    with pytest.raises(BadRequest, match=f"audio 1 {message}"):
        run(log_mel, FILES["a tone"], file)


def test_many_sounds_of_nothing_are_too_many_at_once(log_mel: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SAMPLES_TOGETHER", 2 * 2 * 4_000)
    silence = encoded(np.zeros((4_000, 2)), subtype="PCM_16", form="FLAC")
    assert len(run(log_mel, silence, silence)) == 2
    with pytest.raises(TooLarge, match="the sounds have more than 16000 samples together: send fewer at once"):
        run(log_mel, silence, silence, silence)


def test_a_file_that_breaks_off_is_what_there_is_of_it(log_mel: Processor) -> None:
    cut = FILES["16 bits"][: 44 + 2 * 5000]
    assert np.abs(run(log_mel, cut)[0] - double(heard(FILES["16 bits"])[:5000])).max() <= DOUBLE


def test_longer_sound_is_cut_where_the_stage_says_so(filters: Path) -> None:
    cut = open_with(filters, truncate=True)
    long = noise(3.3).astype(np.float32)
    assert np.abs(run(cut, encoded(long))[0] - single(long)).max() <= SINGLE
    plain, resampled = (run(cut, encoded(tone(300, 9.0, rate), rate))[0] for rate in (RATE, 44_100))
    loud = plain > plain.max() - 1.0
    loud[:, :10] = False  # where the resampler's filter rings; at the end it has what it needs
    loud[:, -10:] = False
    assert np.abs(resampled - plain)[loud].max() < 0.02


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_broken_files_end_in_features_or_a_refusal(data: st.DataObject, log_mel: Processor) -> None:
    file = bytearray(FILES[data.draw(st.sampled_from(["16 bits", "stereo", "FLAC", "OGG", "extensible WAV"]))])
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, min(200, len(file) - 1)))] = data.draw(st.integers(0, 255))
    del file[data.draw(st.integers(1, len(file))) :]
    try:
        features = run(log_mel, bytes(file))
    except BadRequest:
        return
    assert np.isfinite(features).all()


# --- the stage ------------------------------------------------------------------------------------------------------------


def test_a_stage_whose_files_and_manifest_disagree_does_not_open(filters: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="needs its mel filters"):
        open_with(None)
    with pytest.raises(ManifestError, match=r"log_mel-filters\.npy has shape \(201, 40\), not \(257, 40\)"):
        open_with(filters, n_fft=512)
    with pytest.raises(ManifestError, match=r"makes 40 x 200 features, not \(40, 300\)"):
        open_with(filters, frames=300)
    broken = tmp_path / "filters.npy"
    broken.write_bytes(filters.read_bytes()[:60])
    with pytest.raises(ManifestError, match=r"filters\.npy: no mel filters"):
        open_with(broken)


def test_it_works_in_a_thread_and_brings_its_own_example(log_mel: Processor) -> None:
    assert not log_mel.inline
    assert isinstance(log_mel, Exemplary)
    assert log_mel.run(log_mel.example(2))["input_features"].shape == (2, MELS, SECONDS * 100)
    assert log_mel.describe() == {"formats": ["WAV", "FLAC", "OGG"], "seconds": SECONDS, "truncate": False}
