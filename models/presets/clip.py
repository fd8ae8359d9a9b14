"""CLIP with seeded weights. The vision-language presets take their vision weights from here, so one service can serve both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.adapters.image import MEAN, STD
from models.presets import vocabulary

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """Dimensions of a preset."""

    image: int
    patch: int
    vision: tuple[int, int, int]
    """Width, layers, heads."""
    text: tuple[int, int, int]
    """As `vision`."""
    projection: int
    vocabulary: int
    positions: int


SIZES = {
    "clip-tiny": Size(32, 8, (64, 3, 4), (64, 3, 4), 32, 1000, 77),
    "clip-small": Size(224, 32, (384, 6, 6), (256, 4, 4), 256, 8000, 77),
    "clip-vitb32": Size(224, 32, (768, 12, 12), (512, 12, 8), 512, 8000, 77),
}


def model(name: str) -> Any:
    """The CLIPModel of that preset, the same each time."""
    import torch  # noqa: PLC0415
    from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415

    size = SIZES[name]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        vision_config={**_tower(*size.vision), "image_size": size.image, "patch_size": size.patch},
        text_config={
            **_tower(*size.text),
            "vocab_size": size.vocabulary,
            "max_position_embeddings": size.positions,
            **special,
        },
        projection_dim=size.projection,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPModel(config).eval()  # type: ignore[no-untyped-call]


def image_processor(size: Size) -> dict[str, Any]:
    """Content of preprocessor_config.json."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size.image},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size.image, "width": size.image},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def build(name: str, directory: Path) -> None:
    """Write the checkpoint of that preset; see `models.seeded`."""
    import tokenizers as t  # noqa: PLC0415

    size = SIZES[name]
    model(name).save_pretrained(directory)
    tokenizer = vocabulary.train(size.vocabulary, (START, END))
    tokenizer.post_processor = t.processors.TemplateProcessing(f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)])
    # As OpenAI's: what fills a short text is the token that ended it.
    vocabulary.save(
        tokenizer, directory, {"bos_token": START, "eos_token": END, "pad_token": END}, model_max_length=size.positions
    )
    vocabulary.write_json(directory / "preprocessor_config.json", image_processor(size))


def _tower(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "initializer_factor": 2.0,  # at 1.0 all texts come out much the same, and a comparison would prove little
    }
