"""Images and sound for tasks, drawn from the generator handed in: made up here, of no data set, and never twice the same.

An image is a sky with shapes and grain, a JPEG of one of the usual sizes: what a decoder does grows with the pixels, and plain
colours would decode too fast. Sound is a voice-like tone with its overtones in syllables, and noise under it, as a WAV that
lasts between half a second and two: long enough for a word, short enough for the smallest model's window.

An image takes about 10 ms to make and has 10 to 300 kB, sound 2 ms and 15 to 350 kB; a run makes all of them beforehand.
"""

from __future__ import annotations

import io
import wave

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((320, 240), (640, 480), (480, 640), (800, 600), (1280, 720))
"""Width and height [pixels] of images, each as likely as the others."""
RATES_HZ = (16_000, 16_000, 16_000, 8_000, 44_100)
"""Samples a second of sound: what speech models take, mostly."""
SHORTEST_S, LONGEST_S = 0.5, 2.0
STEREO = 0.125
"""Share of sound with two channels."""


def image(rng: np.random.Generator) -> bytes:
    """One image, encoded as JPEG."""
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    # Colours that change slowly: a few random pixels, stretched.
    sky = Image.fromarray(rng.integers(60, 231, (3, 4, 3), np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(sky)
    for _ in range(int(rng.integers(3, 9))):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        box = (left, top, left + int(rng.integers(8, width // 2)), top + int(rng.integers(8, height // 2)))
        colour = tuple(int(part) for part in rng.integers(0, 231, 3))
        shape = (draw.rectangle, draw.ellipse)[int(rng.integers(2))]
        shape(box, fill=colour)
    # No colour is above 230, so that the grain fits into the byte.
    pixels = np.asarray(sky) + rng.integers(0, 25, (height, width, 1), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=int(rng.integers(70, 93)))
    return encoded.getvalue()


def sound(rng: np.random.Generator) -> bytes:
    """One recording, encoded as WAV with 16 bits a sample."""
    rate = RATES_HZ[int(rng.integers(len(RATES_HZ)))]
    seconds = rng.uniform(SHORTEST_S, LONGEST_S)
    t = np.arange(round(seconds * rate)) / rate
    pitch = rng.uniform(90, 260) * (1 + 0.05 * np.sin(2 * np.pi * rng.uniform(1, 4) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(strength * np.sin((n + 1) * phase) for n, strength in enumerate(rng.uniform(0.1, 1, 5)))
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2, 5) * t + rng.uniform(0, 6)), 0, 1)
    heard = voice * syllables + 0.05 * rng.standard_normal(len(t))
    channels = 2 if rng.random() < STEREO else 1
    sides = np.stack([heard * strength for strength in rng.uniform(0.5, 1, channels)], axis=1)
    samples = (sides * (rng.uniform(0.1, 0.9) * 32_767 / np.abs(sides).max())).astype("<i2")
    encoded = io.BytesIO()
    with wave.open(encoded, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return encoded.getvalue()
