"""Zero-shot classification of images: CLIP's own probabilities, and which label wins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import StageSpec, TensorSpec
from services.dataplane.wire import Array
from services.stage.processors import Processor, open_processor
from services.stage.processors.match import softmax
from tests.services.stage.processors.theirs import transformers

TOLERANCE = 2e-6


def match(scale: float = 100.0) -> Processor:
    spec = StageSpec(
        name="match",
        tier="light",
        processor="match",
        inputs=(
            TensorSpec(name="image_embedding", datatype="FP32", shape=("batch", 16)),
            TensorSpec(name="label_embeddings", datatype="FP32", shape=("labels", 16)),
            TensorSpec(name="labels", datatype="BYTES", shape=("labels",)),
        ),
        outputs=(
            TensorSpec(name="scores", datatype="FP32", shape=("batch", "labels")),
            TensorSpec(name="label", datatype="BYTES", shape=("batch",)),
        ),
        parameters={"scale": scale},
    )
    return open_processor(spec, (), 1)


def run(processor: Processor, images: Array, labels: Array, names: list[bytes] | None = None) -> dict[str, Array]:
    given = np.empty(len(labels), object)
    given[:] = names or [b"label %d" % n for n in range(len(labels))]
    return processor.run(
        {"image_embedding": images.astype(np.float32), "label_embeddings": labels.astype(np.float32), "labels": given}
    )


def test_scores_are_clips_probabilities() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=shape | {"vocab_size": 99, "eos_token_id": 90, "max_position_embeddings": 12},
            vision_config=shape | {"image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    ).eval()
    pixels, ids = torch.randn(3, 3, 8, 8), torch.randint(3, 80, (5, 6))
    with torch.no_grad():
        whole = clip(input_ids=ids, pixel_values=pixels)
        scale = float(clip.logit_scale.exp())
    outputs = run(match(scale), whole.image_embeds.numpy(), whole.text_embeds.numpy())
    assert np.abs(outputs["scores"] - whole.logits_per_image.softmax(dim=1).numpy()).max() <= TOLERANCE
    assert outputs["scores"].dtype == np.float32
    best = whole.logits_per_image.argmax(dim=1).tolist()
    assert outputs["label"].tolist() == [b"label %d" % n for n in best]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), images=st.integers(1, 4), labels=st.integers(1, 5), scale=st.sampled_from([0.5, 14.3, 100])
)
def test_scores_are_shares_and_length_does_not_matter(seed: int, images: int, labels: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((images, 16)), rng.standard_normal((labels, 16))
    outputs = run(match(scale), left, right)
    np.testing.assert_allclose(outputs["scores"].sum(axis=1), 1, rtol=1e-5)
    stretched = run(match(scale), left * 7, right * rng.uniform(0.1, 9, (labels, 1)))
    np.testing.assert_allclose(stretched["scores"], outputs["scores"], atol=1e-4)
    assert outputs["label"].tolist() == [b"label %d" % n for n in outputs["scores"].argmax(axis=1)]


def test_the_first_among_equals_and_bytes_as_they_were() -> None:
    one = np.eye(16)[:1]
    outputs = run(match(), one, np.concatenate([one, one, one]), [b"\xff\x00", b"a", b"b"])
    assert outputs["label"].tolist() == [b"\xff\x00"]
    np.testing.assert_allclose(outputs["scores"], [[1 / 3] * 3], rtol=1e-6)


def test_a_picture_of_nothing_is_equally_far_from_all() -> None:
    np.testing.assert_allclose(run(match(), np.zeros((1, 16)), np.eye(16)[:4])["scores"], [[0.25] * 4])


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-3e38, -3e38], [80.0]])
def test_softmax_overflows_nowhere(logits: list[float]) -> None:
    shares = softmax(np.array([logits], np.float32))
    assert np.isfinite(shares).all()
    assert shares.sum() == pytest.approx(1)


def test_it_says_how_it_measures() -> None:
    assert match(50.0).describe() == {"similarity": "cosine", "scale": 50.0}
    assert match().inline
