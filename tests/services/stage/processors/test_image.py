"""Images against transformers' own processor, over what people send; and what is refused before or while it is decoded."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.manifest import ManifestError, StageSpec, TensorSpec
from services.dataplane.errors import BadRequest, TaskError, TooLarge
from services.dataplane.wire import Array
from services.stage.processors import Exemplary, Processor, open_processor

TOLERANCE = 0.0
"""Largest difference to the processor; stated as 1e-6, and it is none."""
CLIP = {
    "size": {"shortest_edge": 32},
    "crop": {"height": 32, "width": 32},
    "resample": 3,
    "rescale": 1 / 255,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "rgb": True,
}


def open_with(*shape: int, **parameters: Any) -> Processor:
    spec = StageSpec(
        name="preprocess",
        tier="light",
        processor="image",
        inputs=(TensorSpec(name="image", datatype="BYTES", shape=("batch",)),),
        outputs=(TensorSpec(name="pixel_values", datatype="FP32", shape=("batch", *(shape or (3, 32, 32)))),),
        parameters=CLIP | parameters,
    )
    return open_processor(spec, (), 1)


PREPROCESS = open_with()


def run(processor: Processor, *files: bytes) -> Array:
    images = np.empty(len(files), dtype=object)
    images[:] = files
    return processor.run({"image": images})["pixel_values"]


def reference(file: bytes, parameters: Mapping[str, Any] = CLIP) -> Array:
    """What transformers makes of a file of these bytes: `load_image`, then the processor on Pillow."""
    options = {
        "size": parameters["size"],
        "crop_size": parameters["crop"],
        "resample": parameters["resample"],
        "rescale_factor": parameters["rescale"],
        "image_mean": parameters["mean"],
        "image_std": parameters["std"],
    }
    switches = {
        "do_resize": parameters["size"] is not None,
        "do_center_crop": parameters["crop"] is not None,
        "do_rescale": parameters["rescale"] is not None,
        "do_normalize": parameters["mean"] is not None,
        "do_convert_rgb": parameters["rgb"],
    }
    given = {name: value for name, value in options.items() if value is not None}
    processor = CLIPImageProcessorPil(**given, **switches)
    found: Array = processor(load_image(base64.encodebytes(file).decode()), return_tensors="np")["pixel_values"]
    return found


def noise(height: int, width: int, *channels: int, seed: int = 0) -> Array:
    """Smooth colours with noise over them: neither flat nor white."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 150, height * width).reshape(height, width, *(1,) * len(channels))
    return (slope + rng.integers(0, 100, (height, width, *channels))).astype(np.uint8)


def encoded(pixels: Array | Image.Image, form: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(orientation: int, form: str = "JPEG") -> bytes:
    """An image that says it is to be turned before it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(48, 64, 3), form, exif=exif)


def palette(transparency: int | bytes | None) -> bytes:
    image = Image.fromarray(noise(40, 50, 3)).quantize(16)
    return encoded(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


def animation() -> bytes:
    frames = [Image.fromarray(noise(40, 30, 3, seed=seed)) for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


DEEP = (noise(40, 50).astype(np.uint16) << 8) + 77
FILES: dict[str, bytes] = {
    "a photograph": encoded(noise(120, 160, 3), "JPEG", quality=90),
    "upright": encoded(noise(160, 120, 3), "JPEG"),
    "square": encoded(noise(77, 77, 3), "PNG"),
    "grey": encoded(noise(60, 90), "JPEG"),
    "grey in PNG": encoded(noise(60, 90), "PNG"),
    "one bit": encoded(Image.fromarray(noise(60, 90)).convert("1"), "PNG"),
    "grey with alpha": encoded(Image.fromarray(noise(60, 90)).convert("LA"), "PNG"),
    "RGBA": encoded(noise(60, 90, 4), "PNG"),
    "RGBA in WebP": encoded(noise(60, 90, 4), "WEBP", lossless=True),
    "WebP": encoded(noise(60, 90, 3), "WEBP"),
    "BMP": encoded(noise(60, 90, 3), "BMP"),
    "GIF": encoded(noise(60, 90, 3), "GIF"),
    "an animation's first frame": animation(),
    "palette": palette(None),
    "palette with a transparent colour": palette(3),
    "palette with an alpha for each colour": palette(bytes([0, 128, 255])),
    "RGB with a transparent colour": encoded(np.full((40, 40, 3), (9, 9, 9), np.uint8), "PNG", transparency=(9, 9, 9)),
    "16 bits": encoded(Image.fromarray(DEEP), "PNG"),
    "CMYK": encoded(Image.fromarray(noise(60, 90, 3)).convert("CMYK"), "JPEG"),
    "YCbCr with every chroma sample": encoded(noise(60, 90, 3), "JPEG", subsampling=0),
    "progressive": encoded(noise(60, 90, 3), "JPEG", progressive=True),
    "1 x 1": encoded(noise(1, 1, 3), "PNG"),
    "smaller than the crop": encoded(noise(5, 9, 3), "PNG"),
    "long and thin": encoded(noise(400, 3, 3), "PNG"),
    "just the size": encoded(noise(32, 32, 3), "PNG"),
    "4 megapixels": encoded(noise(2000, 2000, 3), "JPEG", quality=30),
    "black": encoded(np.zeros((50, 40, 3), np.uint8), "PNG"),
    "white": encoded(np.full((50, 40, 3), 255, np.uint8), "PNG"),
    **{f"EXIF orientation {n}": turned(n) for n in range(1, 9)},
    "EXIF orientation in PNG": turned(6, "PNG"),
    "EXIF orientation in WebP": turned(8, "WEBP"),
    "an orientation that there is none of": turned(99),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # transformers' way says so; ours need not
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_the_processors_own(name: str) -> None:
    with warnings.catch_warnings(action="error"):
        ours = run(PREPROCESS, FILES[name])
    assert ours.shape == (1, 3, 32, 32)
    assert ours.dtype == np.float32
    assert np.abs(ours - reference(FILES[name])).max() <= TOLERANCE


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    seed=st.integers(0, 99),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]),
    orientation=st.integers(1, 8),
    resample=st.sampled_from([0, 1, 2, 3, 4, 5]),
)
def test_any_size_mode_and_orientation_equals_the_processor(
    height: int, width: int, seed: int, mode: str, orientation: int, resample: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    form = "JPEG" if mode == "CMYK" else "PNG"
    file = encoded(Image.fromarray(noise(height, width, 3, seed=seed)).convert(mode), form, exif=exif)
    wanted = reference(file, CLIP | {"resample": resample})
    assert np.abs(run(open_with(resample=resample), file) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ((3, 24, 40), {"size": {"height": 24, "width": 40}, "crop": None}),
        ((3, 50, 60), {"size": {"shortest_edge": 20}, "crop": {"height": 50, "width": 60}}),
        ((3, 21, 33), {"size": None, "crop": {"height": 21, "width": 33}}),
        ((3, 32, 32), {"mean": None, "std": None}),
        ((3, 32, 32), {"rescale": None, "mean": None, "std": None}),
        ((3, 32, 32), {"rescale": None}),
        ((3, 32, 32), {"rgb": False}),
        ((3, 30, 30), {"size": {"shortest_edge": 41}, "crop": {"height": 30, "width": 30}, "resample": 2}),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else " ".join(value),
)
@pytest.mark.parametrize("name", ["a photograph", "upright", "smaller than the crop", "RGBA", "RGB with a transparent colour"])
def test_every_step_may_be_set_or_left_out(name: str, shape: tuple[int, ...], parameters: dict[str, Any]) -> None:
    ours = run(open_with(*shape, **parameters), FILES[name])
    assert ours.shape == (1, *shape)
    assert np.abs(ours - reference(FILES[name], CLIP | parameters)).max() <= TOLERANCE


def test_a_batch_is_each_image_by_itself() -> None:
    files = [FILES[name] for name in ("grey", "RGBA", "1 x 1")]
    together = run(PREPROCESS, *files)
    assert np.array_equal(together, np.concatenate([run(PREPROCESS, file) for file in files]))


# --- what is refused ------------------------------------------------------------------------------------------------------

JPEG = FILES["a photograph"]


def claimed(width: int, height: int) -> bytes:
    """A PNG that says it is of this size and holds nothing of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("sentence", "file", "kind", "message"),
    [
        ("nothing", b"", BadRequest, "is no image: send the bytes of a file in one of JPEG, PNG, WEBP, GIF, BMP"),
        ("text", b"made up", BadRequest, "is no image"),
        ("base64 of an image", b"iVBORw0KGgoAAAANSUhEUg", BadRequest, "is no image"),
        ("a format that is not decoded", encoded(noise(4, 4, 3), "TIFF"), BadRequest, "is no image"),
        ("a program that draws", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", BadRequest, "is no image"),
        ("a JPEG that breaks off", JPEG[: len(JPEG) // 2], BadRequest, "is broken: .*; encode it again"),
        ("a JPEG of little but its header", JPEG[:200], BadRequest, "is (broken|no image)"),
        ("a PNG that breaks off", FILES["square"][:300], BadRequest, "is broken"),
        ("a PNG without its pixels", claimed(20, 20), BadRequest, "is broken"),
        ("a bomb", claimed(60_000, 60_000), TooLarge, "60000 x 60000 pixels; the limit is 16777216 in all: shrink it"),
        ("just over the limit", claimed(4097, 4096), TooLarge, "4097 x 4096 pixels"),
        ("nothing wide", claimed(0, 5), BadRequest, "is (broken|no image)"),
        ("a thread", encoded(noise(1, 20_000, 3), "PNG"), BadRequest, "too long and thin for a model .* 32: cut it"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_bad_input_is_refused_with_its_place_and_what_to_change(
    sentence: str, file: bytes, kind: type[TaskError], message: str
) -> None:
    del sentence
    with pytest.raises(kind, match=f"image 1 .*{message}" if not message.startswith("is") else f"image 1 {message}"):
        run(PREPROCESS, FILES["grey"], file)


def test_the_limit_is_a_parameter() -> None:
    small = open_with(max_pixels=60 * 90)
    run(small, FILES["grey"])
    with pytest.raises(TooLarge, match="120 pixels; the limit is 5400"):
        run(small, JPEG)


def test_many_images_of_nothing_are_too_many_at_once() -> None:
    """A few bytes each, and each as much work as a photograph."""
    empty = encoded(np.zeros((90, 60, 3), np.uint8), "PNG")
    small = open_with(max_pixels=60 * 90)
    assert len(run(small, *[empty] * 8)) == 8
    with pytest.raises(TooLarge, match="more than 43200 pixels together: send fewer at once"):
        run(small, *[empty] * 9)


def test_a_jpeg_that_draws_itself_again_and_again_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    few = 64 - whole.count(b"\xff\xda")
    run(PREPROCESS, whole[:-2] + scan * few + b"\xff\xd9")
    with pytest.raises(TooLarge, match="image 0 has 65 scans; the limit is 64: encode it again"):
        run(PREPROCESS, whole[:-2] + scan * (few + 1) + b"\xff\xd9")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_broken_files_end_in_an_answer_or_a_refusal(data: st.DataObject) -> None:
    file = bytearray(
        FILES[data.draw(st.sampled_from(["a photograph", "RGBA", "palette", "GIF", "WebP", "BMP", "EXIF orientation 6"]))]
    )
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    del file[data.draw(st.integers(1, len(file))) :]
    try:
        pixels = run(PREPROCESS, bytes(file))
    except (BadRequest, TooLarge):
        return
    assert np.isfinite(pixels).all()


# --- the stage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parameters", "message"),
    [
        ((3, 32, 32), {"size": {"longest_edge": 32}}, "size has longest_edge"),
        ((3, 32, 32), {"crop": {"height": 32}}, "'width'"),
        ((3, 32, 32), {"resample": 9}, "9 is not a valid Resampling"),
        ((3, 32, 32), {"mean": [0.5]}, "three numbers"),
        ((1, 32, 32), {}, "3 x height x width"),
        ((3, 30, 32), {}, r"makes images of \(32, 32\), not \(30, 32\)"),
        ((3, 32, 32), {"crop": None}, "makes images of None"),
    ],
)
def test_what_cannot_be_done_does_not_open(shape: tuple[int, ...], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        open_with(*shape, **parameters)


def test_it_works_in_a_thread_and_brings_its_own_example() -> None:
    assert not PREPROCESS.inline
    assert isinstance(PREPROCESS, Exemplary)
    assert PREPROCESS.run(PREPROCESS.example(2))["pixel_values"].shape == (2, 3, 32, 32)
    assert PREPROCESS.describe() == {"formats": ["JPEG", "PNG", "WEBP", "GIF", "BMP"], "max_pixels": 1 << 24}
