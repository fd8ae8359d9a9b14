"""Vision-language models: their stages, which layer of the vision encoder they look at, how images come into a prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.adapters import llava
from models.adapters.piece import Cut
from models.checkpoint import load_model, load_tokenizer, resolve
from models.errors import UnsupportedCheckpoint
from models.presets import language, vision_language
from tests.models import chained
from tests.models.conftest import edit

PATCHES = 16
IMAGE = language.SPECIAL.index(language.IMAGE)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint vlm-ci; not to be changed."""
    directory = tmp_path_factory.mktemp("checkpoints") / "vlm-ci"
    vision_language.build("vlm-ci", directory)
    return directory


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(directory, tmp_path / "vlm-ci"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, 1),
        ({}, 3),
        ({"vision_feature_layer": -2}, 1),
        ({"vision_feature_layer": -2, "vision_feature_select_strategy": "full"}, 3),
        ({"vision_feature_layer": 2, "projector_hidden_act": "gelu_new"}, 2),
    ],
    ids=[
        "last layer",
        "last layer, cut",
        "the one before",
        "the one before with its class token, cut",
        "counted from the front",
    ],
)
def test_the_stages_see_and_say_what_the_model_does(change: dict[str, Any], parts: int, copy: Path) -> None:
    edit(copy / "config.json", **change)
    checkpoint = resolve(str(copy))
    model = load_model(checkpoint, "LlavaForConditionalGeneration")
    model.generation_config.eos_token_id = None
    cut = llava.cut(checkpoint, parts)
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32))
    with torch.no_grad():
        true = torch.stack(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
    seen = _project(cut, _states(cut, pixels), model)
    torch.testing.assert_close(seen, true, atol=1e-5, rtol=0)

    pieces = chained.named(cut, "generate")
    count = pieces[0].spec.inputs[2].shape[1]
    assert chained.named(cut, "tokenise")[0].spec.parameters["image_token"] == {"id": IMAGE, "count": count}
    assert pieces[0].spec.parameters["image_token"] == IMAGE
    assert isinstance(count, int)
    ids, mask = chained.left_padded([[1, *[IMAGE] * count, 90], [1, 7, 30, *[IMAGE] * count, 44, 45]], 0)
    want = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=32, do_sample=False)
    embeds = chained.embed(pieces[0], ids, mask)
    embeds[ids == IMAGE] = seen.reshape(-1, seen.shape[2])
    made = chained.greedy(pieces, embeds, mask, 32, chunk=7)
    assert made == want[:, ids.shape[1] :].tolist()
    assert made[0] != made[1]


def test_the_stages_are_the_contract_with_the_services(directory: Path) -> None:
    cut = llava.cut(resolve(str(directory)))
    assert (cut.family, cut.architecture) == ("llava", "LlavaForConditionalGeneration")
    assert {piece.spec.name: (piece.spec.tier, piece.spec.processor) for piece in cut.pieces} == {
        "preprocess": ("light", "image"),
        "vision": ("core", "onnx"),
        "project": ("light", "project"),
        "chat": ("light", "chat"),
        "tokenise": ("light", "tokenise"),
        "generate": ("core", "generate"),
        "detokenise": ("light", "detokenise"),
    }
    (project,) = chained.named(cut, "project")
    assert [(t.name, t.shape) for t in (*project.spec.inputs, *project.spec.outputs)] == [
        ("last_hidden_state", ("batch", PATCHES + 1, 64)),
        ("image_embedding", ("batch", PATCHES, 64)),
    ]
    assert project.spec.parameters == {"select": "patches", "activation": "gelu", "normalise": False}
    (generate,) = chained.named(cut, "generate")
    assert [t.name for t in generate.spec.inputs[:3]] == ["input_ids", "attention_mask", "image_embedding"]
    (chat,) = chained.named(cut, "chat")
    assert chat.spec.parameters["special_tokens_rule"] == "unless_bos"


@pytest.mark.parametrize(
    ("change", "parts", "message"),
    [
        ({"vision_feature_layer": -3}, 1, "vision_feature_layer is -3"),
        ({"vision_feature_layer": 0}, 1, "vision_feature_layer is 0"),
        ({"projector_hidden_act": "mish"}, 1, "projector_hidden_act 'mish'"),
        ({}, 4, "3 layers cannot be cut into 4 parts"),
    ],
)
def test_what_would_come_out_wrong_is_refused(change: dict[str, Any], parts: int, message: str, copy: Path) -> None:
    edit(copy / "config.json", **change)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        llava.cut(resolve(str(copy)), parts)


def test_several_layers_at_once_are_refused(directory: Path) -> None:
    config = SimpleNamespace(vision_feature_layer=[-1, -2])
    with pytest.raises(UnsupportedCheckpoint, match=r"vision_feature_layer is \[-1, -2\]"):
        llava.looks_at(resolve(str(directory)), config)


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_processors_template_comes_first(name: str, copy: Path) -> None:
    checkpoint = resolve(str(copy))
    assert llava.chat_template(checkpoint, load_tokenizer(checkpoint)) == language.CHAT_TEMPLATE
    (copy / name).write_text(json.dumps({"chat_template": "its own"}))
    assert llava.chat_template(checkpoint, load_tokenizer(checkpoint)) == "its own"


def _states(cut: Cut, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `vision` gives, by name."""
    given: Any = pixels
    for piece in chained.named(cut, "vision"):
        (graph,) = piece.graphs.values()
        with torch.no_grad():
            given = graph.module(given)
        outputs = piece.spec.outputs
    return dict(zip([tensor.name for tensor in outputs], given if isinstance(given, tuple) else (given,), strict=True))


def _project(cut: Cut, states: dict[str, torch.Tensor], model: Any) -> torch.Tensor:
    (piece,) = chained.named(cut, "project")
    arrays: Any = piece.assets["project.npz"]
    hidden = states[piece.spec.inputs[0].name]
    if piece.spec.parameters["select"] == "patches":
        hidden = hidden[:, 1:]
    with torch.no_grad():
        inner = model.model.multi_modal_projector.act(hidden @ torch.from_numpy(arrays["w1"]) + torch.from_numpy(arrays["b1"]))
    projected: torch.Tensor = inner @ torch.from_numpy(arrays["w2"]) + torch.from_numpy(arrays["b2"])
    return projected
