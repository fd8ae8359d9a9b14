"""Heads and projectors against the modules of transformers that they replace, on tiny seeded models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn
from transformers.activations import ACT2FN

from models.manifest import ManifestError, ModelFile, StageSpec, TensorSpec
from services.dataplane.wire import Array
from services.stage.processors import Processor, open_processor
from services.stage.processors.project import ACTIVATIONS, erf
from tests.services.stage.processors.theirs import LlavaMultiModalProjector, transformers

TOLERANCE = 2e-6
"""Largest difference to PyTorch; both compute in single precision."""
BATCH, TOKENS, WIDTH, SHARED = 3, 5, 32, 16
EOS, PAD = 90, 1


def open_with(
    directory: Path,
    weights: Mapping[str, Any] | None,
    *,
    output: tuple[int, ...] = (SHARED,),
    width: int = WIDTH,
    name: str = "last_hidden_state",
    **parameters: Any,
) -> Processor:
    files: tuple[Path, ...] = ()
    if weights is not None:
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in weights.items()}
        np.savez(directory / "project.npz", **arrays)
        files = (directory / "project.npz",)
    given = {"select": "first", "eos_id": None, "layer_norm_eps": 1e-5, "normalise": False, "activation": None} | parameters
    ids = TensorSpec(name="input_ids", datatype="INT64", shape=("batch", "tokens"))
    spec = StageSpec(
        name="project",
        tier="light",
        processor="project",
        inputs=(
            TensorSpec(name=name, datatype="FP32", shape=("batch", "tokens", width)),
            *((ids,) if given["select"] == "eos" else ()),
        ),
        outputs=(TensorSpec(name="embedding", datatype="FP32", shape=("batch", *output)),),
        files={"float32": tuple(ModelFile(path=each.name, sha256="0" * 64, size_bytes=0) for each in files)},
        parameters=given,
    )
    return open_processor(spec, files, 1)


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=shape | {"vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": EOS, "pad_token_id": PAD},
        vision_config=shape | {"image_size": 8, "patch_size": 4},
        projection_dim=SHARED,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # fresh ones would be 1 and 0, which any norm gets right
        model.vision_model.post_layernorm.weight.normal_(1, 0.2)
        model.vision_model.post_layernorm.bias.normal_(0, 0.2)
    return model


def transposed(layer: Any) -> Any:
    """Weights as the file has them: (in, out)."""
    return layer.weight.detach().numpy().T


def random_states(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(ours: Array, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == tuple(theirs.shape)
    assert np.abs(ours - theirs.detach().numpy()).max() <= TOLERANCE


def test_an_images_embedding_is_clips(clip: Any, tmp_path: Path) -> None:
    norm = clip.vision_model.post_layernorm
    weights = {
        "ln_weight": norm.weight.detach(),
        "ln_bias": norm.bias.detach(),
        "w1": transposed(clip.visual_projection),
    }
    project = open_with(tmp_path, weights, layer_norm_eps=norm.eps, normalise=True)
    pixels = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = clip.vision_model(pixel_values=pixels).last_hidden_state
        embedding = clip.get_image_features(pixel_values=pixels).pooler_output
        expected = embedding / embedding.norm(dim=-1, keepdim=True)
    close(project.run({"last_hidden_state": states.numpy()})["embedding"], expected)


def test_a_texts_embedding_is_clips_at_the_first_end_of_text(clip: Any, tmp_path: Path) -> None:
    project = open_with(tmp_path, {"w1": transposed(clip.text_projection)}, select="eos", eos_id=EOS, normalise=True)
    ids = torch.tensor([[5, 6, EOS, EOS, PAD], [7, EOS, PAD, PAD, PAD], [95, 98, 8, 9, EOS]])
    with torch.no_grad():
        states = clip.text_model(input_ids=ids).last_hidden_state
        embedding = clip.get_text_features(input_ids=ids).pooler_output
        expected = embedding / embedding.norm(dim=-1, keepdim=True)
    close(project.run({"last_hidden_state": states.numpy(), "input_ids": ids.numpy()})["embedding"], expected)


def test_the_oldest_checkpoints_end_is_the_largest_id(clip: Any, tmp_path: Path) -> None:
    project = open_with(tmp_path, {"w1": transposed(clip.text_projection)}, select="eos", eos_id=None)
    clip_of_old = transformers.CLIPModel(clip.config).eval()
    clip_of_old.load_state_dict(clip.state_dict())
    clip_of_old.text_model.eos_token_id = 2
    ids = torch.tensor([[5, 6, 98, 0, 0], [7, 98, 98, 0, 0]])
    with torch.no_grad():
        states = clip_of_old.text_model(input_ids=ids).last_hidden_state
        expected = clip_of_old.get_text_features(input_ids=ids).pooler_output
    close(project.run({"last_hidden_state": states.numpy(), "input_ids": ids.numpy()})["embedding"], expected)


@pytest.mark.parametrize(("select", "kept"), [("patches", slice(1, None)), ("all", slice(None))])
def test_the_patches_a_decoder_reads_are_llavas(select: str, kept: slice, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=WIDTH, **shape),
        text_config=transformers.LlamaConfig(hidden_size=24, vocab_size=99, **shape),
        projector_hidden_act="gelu",
    )
    projector = LlavaMultiModalProjector(config)
    weights = {
        "w1": transposed(projector.linear_1),
        "b1": projector.linear_1.bias.detach(),
        "w2": transposed(projector.linear_2),
        "b2": projector.linear_2.bias.detach(),
    }
    states = random_states(BATCH, TOKENS, WIDTH) * 30
    project = open_with(
        tmp_path, weights, output=(TOKENS, 24), name="penultimate_hidden_state", select=select, activation="gelu"
    )
    expected = projector(torch.from_numpy(states[:, kept]))
    ours = project.run({"penultimate_hidden_state": states})["embedding"]
    assert np.abs(ours - expected.detach().numpy()).max() <= TOLERANCE * 30  # of values about 30 times as large
    assert ours.shape == tuple(expected.shape)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_new"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("tanh", "tanh"),
    ],
)
def test_activations_are_those_of_transformers(ours: str, theirs: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [0, -0.0, 1e-30, 100, -100]]).astype(np.float32)
    y = ACTIVATIONS[ours](x)
    assert y.dtype == np.float32
    assert np.abs(y - ACT2FN[theirs](torch.from_numpy(x)).numpy()).max() <= TOLERANCE


@given(drawn.arrays(np.float32, st.integers(1, 20), elements=st.floats(-50, 50, width=32)))
def test_erf_is_what_it_says(x: Array) -> None:
    y = erf(x)
    assert y.dtype == np.float32
    assert np.abs(y - [math.erf(each) for each in x]).max() <= 5e-7
    np.testing.assert_array_equal(erf(-x), -y)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 4),
    present=st.fixed_dictionaries({name: st.booleans() for name in ("b1", "w2", "b2", "ln_weight")}),
    normalise=st.booleans(),
)
def test_any_of_its_layers_may_be_missing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, batch: int, present: dict[str, bool], normalise: bool
) -> None:
    rng = np.random.default_rng(seed)
    given = {"w1": rng.standard_normal((WIDTH, SHARED)).astype(np.float32)}
    shapes = {"b1": (SHARED,), "w2": (SHARED, SHARED), "b2": (SHARED,), "ln_weight": (WIDTH,)}
    given |= {name: rng.standard_normal(shapes[name]).astype(np.float32) for name, there in present.items() if there}
    if present["ln_weight"]:
        given["ln_bias"] = rng.standard_normal(WIDTH).astype(np.float32)
    states = random_states(batch, TOKENS, WIDTH, seed=seed)
    project = open_with(tmp_path_factory.getbasetemp(), given, activation="tanh", normalise=normalise)
    x = torch.from_numpy(states[:, 0]).double()
    weights = {name: torch.from_numpy(array).double() for name, array in given.items()}
    if "ln_weight" in weights:
        x = torch.nn.functional.layer_norm(x, (WIDTH,), weights["ln_weight"], weights["ln_bias"], 1e-5)
    y = torch.tanh(x @ weights["w1"] + weights.get("b1", 0))
    if "w2" in weights:
        y = y @ weights["w2"] + weights.get("b2", 0)
    if normalise:
        y = y / y.norm(dim=-1, keepdim=True)
    assert np.abs(project.run({"last_hidden_state": states})["embedding"] - y.numpy()).max() <= 1e-5


def test_inputs_are_left_as_they_came(tmp_path: Path) -> None:
    states = random_states(2, TOKENS, WIDTH)
    states.flags.writeable = False  # as they are when they come off the wire
    weights = {"w1": np.ones((WIDTH, SHARED)), "ln_weight": np.ones(WIDTH), "ln_bias": np.ones(WIDTH)}
    open_with(tmp_path, weights, normalise=True).run({"last_hidden_state": states})


def test_a_small_head_runs_inline_and_a_large_projector_in_a_thread(tmp_path: Path) -> None:
    assert open_with(tmp_path, {"w1": np.zeros((768, 512))}, width=768, output=(512,)).inline
    assert open_with(tmp_path, {"w1": np.zeros((384, 256))}, width=384, output=(36, 256), select="patches").inline
    assert not open_with(tmp_path, {"w1": np.zeros((512, 1024))}, width=512, output=(576, 1024), select="patches").inline


W1 = np.zeros((WIDTH, SHARED))


@pytest.mark.parametrize(
    ("weights", "parameters", "message"),
    [
        (None, {}, "needs its weights"),
        ({"w1": W1}, {"select": "last"}, "selection 'last' is not one of first, eos, patches, all"),
        ({"w1": W1}, {"activation": "mish"}, "activation 'mish' is not one of gelu, gelu_tanh, quick_gelu"),
        ({}, {}, "do not make a layer: nothing"),
        ({"w1": W1.ravel()}, {}, r"do not make a layer: w1 \(512,\)"),
        ({"w1": W1, "b1": np.zeros(3)}, {}, r"do not make a layer: w1 \(32, 16\), b1 \(3,\)"),
        ({"w1": W1, "w2": W1}, {}, "do not make a layer"),
        ({"w1": W1, "w2": np.zeros((SHARED, 9)), "b2": np.zeros(8)}, {}, "do not make a layer"),
        ({"w1": W1.T}, {}, "leads from 16 to 32 numbers, not from 32 to 16 as the manifest says"),
        ({"w1": W1, "ln_weight": np.ones(WIDTH)}, {}, "do not make a norm"),
        ({"w1": W1, "ln_weight": np.ones(9), "ln_bias": np.ones(9)}, {}, "do not make a norm"),
        ({"w1": np.array([object()])}, {}, r"project\.npz: no weights \(.*\); export the model again"),
    ],
)
def test_weights_that_do_not_fit_do_not_open(
    weights: dict[str, Any] | None, parameters: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=message):
        open_with(tmp_path, weights, **parameters)


def test_a_file_that_is_cut_off_does_not_open(tmp_path: Path) -> None:
    open_with(tmp_path, {"w1": W1})
    whole = (tmp_path / "project.npz").read_bytes()
    spec_files = tmp_path / "cut.npz"
    spec_files.write_bytes(whole[: len(whole) // 2])
    spec = StageSpec(
        name="project",
        tier="light",
        processor="project",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=("batch", "tokens", WIDTH)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=("batch", SHARED)),),
        parameters={"select": "first"},
    )
    with pytest.raises(ManifestError, match=r"cut\.npz: no weights"):
        open_processor(spec, (spec_files,), 1)


def test_it_says_what_it_does(tmp_path: Path) -> None:
    assert open_with(tmp_path, {"w1": W1}, normalise=True).describe() == {"select": "first", "width": SHARED, "normalise": True}
