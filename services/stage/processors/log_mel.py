"""Sound to the log-mel spectrogram a speech encoder takes, equal to transformers' WhisperFeatureExtractor.

libsndfile decodes (WAV, FLAC, OGG), channels are averaged, soxr resamples to the model's rate: what `librosa.load`, which
transformers reads files with, does too. The length in the file's header is held against the model's window before anything is
decoded, and decoding goes in blocks that are averaged at once, so that what a small file can unfold to is bounded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from models.manifest import ManifestError, StageSpec
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import Array

FORMATS = ("WAV", "FLAC", "OGG")
_CONTAINERS = {*FORMATS, "WAVEX", "RF64"}
"""The same as libsndfile names them."""
RATES_HZ = (1_000, 384_000)
CHANNELS = 8
SAMPLES_TOGETHER = 1 << 28
"""Most samples, of all channels, that are decoded for one request: three quarters of an hour in stereo at 48 kHz, a minute and
a half at the most that is taken of both. Silence is a few bytes, and takes as long to decode as anything."""
_BLOCK_FRAMES = 1 << 16
"""Samples of each channel decoded at once."""
_COLUMNS = 256
"""Columns of the spectrogram computed at once: their spectra stay in the cache."""
_FLOOR = 1e-10
"""Least power, as of silence."""


@dataclass(frozen=True, slots=True)
class Window:
    """What the encoder hears: one window per item, shorter sound filled up with silence."""

    rate_hz: int
    samples: int
    n_fft: int
    hop: int

    @property
    def frames(self) -> int:
        """Columns of the spectrogram."""
        return self.samples // self.hop


class LogMel:
    """`audio` BYTES [batch] -> `input_features` FP32 [batch, mels, frames]."""

    inline = False  # milliseconds, and how many depends on the file

    def __init__(self, window: Window, filters: Array, *, truncate: bool) -> None:
        self._window = window
        self._filters = filters.astype(np.float64)
        # The periodic Hann window: one point more than n_fft, and without the last.
        self._taper = np.hanning(window.n_fft + 1)[:-1]
        self._truncate = truncate

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Decode and transform.

        Raises:
            BadRequest: it is no sound, is empty, or lasts longer than the window.
            TooLarge: all together are over the limit.
        """
        features, left = [], SAMPLES_TOGETHER
        for index, raw in enumerate(inputs["audio"]):
            sound, samples = self._read(index, raw, left)
            left -= samples
            features.append(self._transform(sound))
        return {"input_features": np.stack(features)}

    def example(self, items: int) -> dict[str, Array]:
        """As much noise as the window holds, in WAV."""
        noise = np.random.default_rng(0).standard_normal(self._window.samples) / 8
        encoded = io.BytesIO()
        soundfile.write(encoded, noise, self._window.rate_hz, format="WAV", subtype="PCM_16")
        return {"audio": np.array([encoded.getvalue()] * items, dtype=object)}

    def describe(self) -> dict[str, Any]:
        """Formats taken, the window [s], and what happens to longer sound."""
        seconds = self._window.samples / self._window.rate_hz
        return {"formats": list(FORMATS), "seconds": seconds, "truncate": self._truncate}

    # --- sound ----------------------------------------------------------------------------------------------------------

    def _read(self, index: int, raw: bytes, left: int) -> tuple[Array, int]:
        """Samples at the model's rate, mono, FP32 [at most the window's], and how many were decoded, of at most `left`."""
        try:
            with soundfile.SoundFile(io.BytesIO(raw)) as file:
                self._check(index, file)
                # One more than the window needs where the rates differ, so that what is cut off cannot be heard at the end.
                wanted = math.ceil(self._window.samples * file.samplerate / self._window.rate_hz) + 1
                decoded = min(wanted, file.frames) * file.channels
                if decoded > left:
                    raise TooLarge(f"the sounds have more than {SAMPLES_TOGETHER} samples together: send fewer at once")
                sound = self._decode(file, wanted)
                rate_hz = file.samplerate
        except soundfile.LibsndfileError:
            raise BadRequest(f"audio {index} is no sound: send the bytes of a file in one of {', '.join(FORMATS)}") from None
        if not len(sound):
            raise BadRequest(f"audio {index} is empty: send at least one sample")
        if not np.isfinite(sound).all():
            raise BadRequest(f"audio {index} has samples that are no numbers; encode it again")
        if rate_hz != self._window.rate_hz:
            sound = soxr.resample(sound, rate_hz, self._window.rate_hz, quality="HQ")
        return sound[: self._window.samples], decoded

    def _check(self, index: int, file: soundfile.SoundFile) -> None:
        """Raise BadRequest for a file that should not even be decoded."""
        if file.format not in _CONTAINERS:
            raise BadRequest(f"audio {index} is {file.format}: send the bytes of a file in one of {', '.join(FORMATS)}")
        if not RATES_HZ[0] <= file.samplerate <= RATES_HZ[1]:
            raise BadRequest(
                f"audio {index} has {file.samplerate} samples a second; from {RATES_HZ[0]} to {RATES_HZ[1]} are taken"
            )
        if file.channels > CHANNELS:
            raise BadRequest(f"audio {index} has {file.channels} channels; at most {CHANNELS} are taken: mix them down")
        seconds, longest = file.frames / file.samplerate, self._window.samples / self._window.rate_hz
        if seconds > longest and not self._truncate:
            raise BadRequest(f"audio {index} lasts {seconds:.1f} s; the model hears {longest:g} s: cut it or split it")

    @staticmethod
    def _decode(file: soundfile.SoundFile, wanted: int) -> Array:
        blocks = []
        while wanted > 0:
            block = file.read(min(wanted, _BLOCK_FRAMES), dtype="float32", always_2d=True)
            if not len(block):
                break
            blocks.append(block.mean(axis=1) if file.channels > 1 else block[:, 0])
            wanted -= len(block)
        return np.concatenate(blocks) if blocks else np.empty(0, np.float32)

    # --- spectrum -------------------------------------------------------------------------------------------------------

    def _transform(self, sound: Array) -> Array:
        """(log10 of the mel power, no lower than 8 below its maximum, + 4) / 4; FP32 [mels, frames].

        Power is |STFT|^2 with a Hann window of n_fft, centred on every hop-th sample, the ends mirrored.
        Source: WhisperFeatureExtractor, which computes it in double precision where there is no torch.
        """
        window = self._window
        half = window.n_fft // 2
        padded = np.zeros(window.samples)
        padded[: len(sound)] = sound
        views = np.lib.stride_tricks.sliding_window_view(np.pad(padded, half, mode="reflect"), window.n_fft)[:: window.hop]
        log_mel = np.full((window.frames, self._filters.shape[1]), math.log10(_FLOOR))
        # Columns that hear nothing but the silence at the end are left at the floor.
        heard = min(window.frames, -(-(len(sound) + half) // window.hop))
        for start in range(0, heard, _COLUMNS):
            stop = min(start + _COLUMNS, heard)
            spectrum = np.fft.rfft(views[start:stop] * self._taper, axis=1)
            mel = (spectrum.real**2 + spectrum.imag**2) @ self._filters
            log_mel[start:stop] = np.log10(np.maximum(mel, _FLOOR))
        scaled = (np.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0
        features: Array = scaled.T.astype(np.float32)
        return features


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> LogMel:
    """Open the filter bank; see `services.stage.processors`.

    Parameters: `sample_rate` [Hz], `n_fft` and `hop` [samples], `mels`, `seconds` (the window), `truncate` (whether longer
    sound is cut instead of refused). The file holds the mel filters [n_fft / 2 + 1, mels].
    """
    del threads
    if not files:
        raise ManifestError(f"stage {spec.name!r} needs its mel filters; export the model again (espalier export)")
    given = spec.parameters
    rate_hz, n_fft = int(given["sample_rate"]), int(given["n_fft"])
    window = Window(rate_hz, round(given["seconds"] * rate_hz), n_fft, int(given["hop"]))
    try:
        filters = np.load(files[0], allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ManifestError(f"{files[0].name}: no mel filters ({error}); export the model again") from None
    expected = (n_fft // 2 + 1, int(given["mels"]))
    if filters.shape != expected:
        raise ManifestError(f"{files[0].name} has shape {filters.shape}, not {expected}; export the model again")
    if spec.outputs[0].shape[1:] != (expected[1], window.frames):
        raise ManifestError(
            f"stage {spec.name!r} makes {expected[1]} x {window.frames} features, not {spec.outputs[0].shape[1:]} as its "
            "output says; export the model again"
        )
    return LogMel(window, filters, truncate=bool(given.get("truncate", False)))
