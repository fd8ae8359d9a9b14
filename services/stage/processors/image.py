"""An encoded image to the pixels a vision encoder takes, as transformers' `load_image` and image processor make them.

That is: turned upright by its EXIF orientation, made RGB (an alpha channel is dropped; a colour that the file declares
transparent becomes white), resized by Pillow, cropped at the centre, rescaled and normalised. The arithmetic is the
processor's own to the last bit. The size in the file's header is held against a limit before any pixel is decoded. JPEG's
reduced decoding (`draft`) would halve the time, and changes the pixels; it is not used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from models.manifest import ManifestError, StageSpec
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import Array

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded; Pillow knows many more, and every decoder is a door."""
MAX_PIXELS = 1 << 24
"""Largest image, before and after resizing: 16.8 megapixels. Pillow holds one in 64 MiB, and two of them while it is turned or
made RGB."""
PIXELS_TOGETHER = 8
"""Times as many pixels may all images of a request have together: an image of one colour is a few bytes and takes a third of a
second, and a request of hundreds would hold the stage for a minute."""
MAX_SCANS = 64
"""Most scans of a JPEG. A progressive one has about ten; another is thirty bytes, and goes through all pixels again."""
EXAMPLE = (640, 480)
"""Width and height of the image a stage is warmed up with."""

_JPEGS = ("JPEG", "MPO")
"""The same as Pillow calls them; the other one has several images, the first of which is taken."""
_START_OF_SCAN = b"\xff\xda"

# Its own limit is ten times ours, and for the most part a warning.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class Steps:
    """What is done to an upright RGB image, in this order; None leaves a step out. Sizes are (height, width) in pixels."""

    shortest_edge: int | None
    """Resize so that the shorter edge has this length and the other keeps the proportion (rounded down)."""
    size: tuple[int, int] | None
    """Resize to exactly this."""
    resample: Image.Resampling
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


class Preprocess:
    """`image` BYTES [batch] -> `pixel_values` FP32 [batch, 3, height, width]."""

    inline = False  # milliseconds, and how many depends on the file

    def __init__(self, steps: Steps, *, shape: tuple[int, int], transparent: bool, max_pixels: int) -> None:
        self._steps = steps
        self._shape = shape
        self._transparent = transparent
        self._max_pixels = max_pixels
        self._values = _values(steps)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Preprocess; raises BadRequest for what is no image or a broken one, TooLarge for one over the limit of pixels."""
        images = inputs["image"]
        pixels = np.empty((len(images), 3, *self._shape), np.float32)
        left = self._max_pixels * PIXELS_TOGETHER
        for index, (raw, out) in enumerate(zip(images, pixels, strict=True)):
            image = self._open(index, raw)
            left -= image.width * image.height
            if left < 0:
                raise TooLarge(
                    f"the images have more than {self._max_pixels * PIXELS_TOGETHER} pixels together: send fewer at once"
                )
            scaled = np.asarray(self._scale(self._decode(index, image), index))
            for channel in range(3):
                out[channel] = self._values[channel][scaled[:, :, channel]]
        return {"pixel_values": pixels}

    def example(self, items: int) -> dict[str, Array]:
        """Images of usual size, with noise: plain ones decode too fast."""
        noise = np.random.default_rng(0).integers(0, 256, (EXAMPLE[1] // 8, EXAMPLE[0] // 8, 3), np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noise).resize(EXAMPLE).save(encoded, "JPEG")
        return {"image": np.array([encoded.getvalue()] * items, dtype=object)}

    def describe(self) -> dict[str, Any]:
        """Formats taken, and the largest image."""
        return {"formats": list(FORMATS), "max_pixels": self._max_pixels}

    def _open(self, index: int, raw: bytes) -> Image.Image:
        """The image as far as its header."""
        try:
            image: Image.Image = Image.open(io.BytesIO(raw), formats=FORMATS)
        except Exception:  # a decoder on bytes of anybody's making raises whatever it stumbles over
            raise BadRequest(f"image {index} is no image: send the bytes of a file in one of {', '.join(FORMATS)}") from None
        if image.width * image.height > self._max_pixels:
            raise TooLarge(
                f"image {index} has {image.width} x {image.height} pixels; the limit is {self._max_pixels} in all: shrink it"
            )
        # Within the data of a scan no such two bytes stand, so they are not found too often by chance.
        if image.format in _JPEGS and (scans := raw.count(_START_OF_SCAN)) > MAX_SCANS:
            raise TooLarge(f"image {index} has {scans} scans; the limit is {MAX_SCANS}: encode it again")
        return image

    def _decode(self, index: int, image: Image.Image) -> Image.Image:
        try:
            ImageOps.exif_transpose(image, in_place=True)
            return self._rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise BadRequest(f"image {index} is broken: {error}; encode it again") from None

    def _rgb(self, image: Image.Image) -> Image.Image:
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            # An alpha for each colour of the palette: `convert` drops it too, with a warning.
            del image.info["transparency"]
        if image.mode != "RGB":
            image = image.convert("RGB")
        if self._transparent and image.info.get("transparency") is not None:
            # One colour is to be seen through, all others not at all, so this is a choice and no blending.
            opaque = image.convert("RGBA").getchannel("A")
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=opaque)
            image = white
        image.load()
        return image

    def _scale(self, image: Image.Image, index: int) -> Image.Image:
        steps = self._steps
        height, width = steps.size or (image.height, image.width)
        if steps.shortest_edge is not None:
            height, width = _by_shortest_edge(image.height, image.width, steps.shortest_edge)
            if height * width > self._max_pixels:
                raise BadRequest(
                    f"image {index} has {image.width} x {image.height} pixels, too long and thin for a model that makes its "
                    f"shorter edge {steps.shortest_edge}: cut it"
                )
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), steps.resample)
        if steps.crop is not None:
            # Beyond the edges of an image that is too small `crop` fills in zeros, as the processor pads.
            top, left = (height - steps.crop[0]) // 2, (width - steps.crop[1]) // 2
            image = image.crop((left, top, left + steps.crop[1], top + steps.crop[0]))
        return image


def _by_shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _values(steps: Steps) -> Array:
    """Value of each of the 256 levels in each channel, FP32 [3, 256]: rescaled in double precision, normalised in single."""
    values = np.tile(np.arange(256, dtype=np.float64), (3, 1))
    scaled = (values * (1.0 if steps.rescale is None else steps.rescale)).astype(np.float32)
    if steps.mean is None or steps.std is None:
        return scaled
    mean, std = (np.array(each, np.float32)[:, None] for each in (steps.mean, steps.std))
    normalised: Array = (scaled - mean) / std
    return normalised


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Preprocess:
    """Read the steps; see `services.stage.processors`.

    Parameters: `size` {shortest_edge} or {height, width}, `crop` {height, width}, `resample` (Pillow's number), `rescale`,
    `mean` and `std` (3 each), each null where the step is left out; `rgb` (whether declared transparency becomes white),
    `max_pixels`.
    """
    del files, threads
    try:
        steps, shape = _steps(spec.parameters), _shape(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"stage {spec.name!r}: parameters of `image`: {error}; export the model again") from None
    made = steps.crop or steps.size
    if made != shape:
        raise ManifestError(
            f"stage {spec.name!r} makes images of {made}, not {shape} as its output says; export the model again"
        )
    return Preprocess(
        steps,
        shape=shape,
        transparent=bool(spec.parameters.get("rgb", True)),
        max_pixels=int(spec.parameters.get("max_pixels", MAX_PIXELS)),
    )


def _steps(parameters: Mapping[str, Any]) -> Steps:
    size, crop = parameters["size"] or {}, parameters["crop"]
    if size and size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"size has {', '.join(size)}, not shortest_edge or height and width")
    return Steps(
        shortest_edge=int(size["shortest_edge"]) if "shortest_edge" in size else None,
        size=_sides(size) if "height" in size else None,
        resample=Image.Resampling(parameters["resample"]),
        crop=None if crop is None else _sides(crop),
        rescale=parameters["rescale"],
        mean=_three(parameters["mean"]),
        std=_three(parameters["std"]),
    )


def _sides(size: Mapping[str, int]) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def _three(values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    if len(values) != 3:
        raise ValueError("mean and std need three numbers each")
    return tuple(map(float, values))


def _shape(spec: StageSpec) -> tuple[int, int]:
    _, channels, height, width = spec.outputs[0].shape
    if channels != 3 or isinstance(height, str) or isinstance(width, str):
        raise ValueError(f"the output must be 3 x height x width in numbers, not {spec.outputs[0].shape[1:]}")
    return height, width
