from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import manifest
from models.manifest import Manifest, ManifestError, Precision
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Routes
from services.dataplane.wire import Array
from services.stage.app import Replica
from services.stage.onward import Identity
from services.stage.processors import Exemplary, Processor, fused, open_processor
from services.transport import Transport
from tests.services import harness
from tests.services.minilm import PIPELINES, open_replica

CHAIN = ("tokenise", "encode", "pool")
TEXTS = [b"a short text", b"and another one that is rather longer than the first", b""]


def texts(*values: bytes) -> Array:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@pytest.fixture(scope="module")
def model(minilm: Path) -> Manifest:
    return manifest.load(minilm)


def apart(model: Manifest, directory: Path, precision: Precision) -> list[Processor]:
    """The members on their own, as their replicas open them."""
    opened = []
    for spec in map(model.stage, CHAIN):
        own: Precision = precision if precision in spec.files else "float32"
        opened.append(open_processor(spec, manifest.check_files(spec, own, directory), 1))
    return opened


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_fused_stages_answer_as_they_do_one_by_one(model: Manifest, minilm: Path, precision: Precision) -> None:
    there: dict[str, Array] = {"text": texts(*TEXTS)}
    for name, processor in zip(CHAIN, apart(model, minilm, precision), strict=True):
        there |= processor.run({tensor.name: there[tensor.name] for tensor in model.stage(name).inputs})
    spec, together = fused.open_stages(model, CHAIN, precision, minilm, threads=1)
    found = together.run({"text": texts(*TEXTS)})
    assert set(found) == {tensor.name for tensor in spec.outputs}
    for name, array in found.items():
        np.testing.assert_array_equal(array, there[name])


def test_fused_stages_run_inline_only_if_all_of_them_do(model: Manifest, minilm: Path) -> None:
    assert not fused.open_stages(model, CHAIN, "float32", minilm, 1)[1].inline
    assert fused.open_stages(model, ("pool", "classify"), "float32", minilm, 1)[1].inline


def test_each_member_says_what_runs_it(model: Manifest, minilm: Path) -> None:
    said = fused.open_stages(model, CHAIN, "float32", minilm, 1)[1].describe()
    assert list(said["stages"]) == list(CHAIN)
    assert said["stages"]["encode"]["threads"] == 1


def test_one_stage_is_opened_as_it_is(model: Manifest, minilm: Path) -> None:
    spec, processor = fused.open_stages(model, ["pool"], "float32", minilm, 1)
    assert spec == model.stage("pool")
    assert processor.describe() == {"mode": "mean", "normalise": True}


def test_stages_that_are_no_chain_are_refused_with_the_model_named(model: Manifest, minilm: Path) -> None:
    with pytest.raises(ManifestError, match="model 'minilm': tokenise, pool cannot be fused: stage 'pool' takes"):
        fused.open_stages(model, ("tokenise", "pool"), "float32", minilm, 1)


def test_a_fused_language_model_answers_as_its_stages_do_and_is_never_run_in_the_event_loop(lm_ci: Path) -> None:
    model = manifest.load(lm_ci)
    there: dict[str, Array] = {"text": texts(b"the ferry carries"), "max_tokens": np.array([8])}
    names = ("tokenise", "generate", "detokenise")
    for spec in map(model.stage, names):
        processor = open_processor(spec, manifest.check_files(spec, "float32", lm_ci), 1)
        there |= processor.run({tensor.name: there[tensor.name] for tensor in spec.inputs if tensor.name in there})
    _, together = fused.open_stages(model, names, "float32", lm_ci, threads=1)
    found = together.run({"text": texts(b"the ferry carries"), "max_tokens": np.array([8])})
    assert found["text"][0] == there["text"][0]
    assert found["output_count"] == [8]
    assert isinstance(together, Exemplary), "how long it takes is for max_tokens to say, not for a shape"
    assert list(together.example(2)["max_tokens"]) == [fused.TOKENS] * 2


class Drawn:
    """A member whose input cannot be made up by others."""

    inline = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"embedding": inputs["image"]}

    def example(self, items: int) -> dict[str, Array]:
        return {"image": np.full(items, 7.0)}

    def describe(self) -> dict[str, Any]:
        return {}


def test_what_a_member_makes_up_for_the_warm_up_is_the_whole_stages_if_it_comes_from_outside(model: Manifest) -> None:
    classify = model.stage("classify")
    image = classify.inputs[0].model_copy(update={"name": "image"})
    drawn = model.stage("pool").model_copy(update={"inputs": (image,)})
    first = fused.Fused([(drawn, Drawn()), (classify, open_processor(classify, (), 1))])
    assert isinstance(first, Exemplary)
    assert list(first.example(2)) == ["image"]
    pool = model.stage("pool")
    later = fused.Fused([(pool.model_copy(update={"outputs": (image,)}), open_processor(pool, (), 1)), (drawn, Drawn())])
    assert isinstance(later, Exemplary)
    assert not later.example(2), "the image is made inside"
    plain = fused.Fused([(classify, open_processor(classify, (), 1))])
    assert not isinstance(plain, Exemplary)


async def ask(gateway: str, pipeline: str) -> dict[str, Any]:
    """A text's answer, with the hops it came by."""
    text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXTS[0].decode()]}
    body = json.dumps({"inputs": [text], "parameters": {"hops": True}}).encode()
    async with Transport() as transport:
        answer = await transport.post(f"{gateway}/v2/models/{pipeline}/infer", body, {}, 30.0)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = json.loads(answer.body)
    return found


async def test_a_task_gets_the_same_answer_over_one_hop_instead_of_three(model: Manifest, minilm: Path, tmp_path: Path) -> None:
    spec, processor = fused.open_stages(model, CHAIN, "float32", minilm, threads=1)
    replicas = [*(open_replica(minilm, stage) for stage in CHAIN),
                Replica(model, spec, processor, Identity("whole", "whole-0", "local"))]  # fmt: skip
    names = (*CHAIN, "whole")
    pipeline = Pipeline(
        name="fused", deadline_s=10.0, epsilon=0.05, steps=(Step(id="all", service="whole", inputs={"text": "request.text"}),),
        outputs={"embedding": "all.embedding", "token_count": "all.token_count"},
    )  # fmt: skip
    async with harness.stages(*replicas) as urls:
        services = {
            name: harness.service(name, replica.spec, url, model="minilm")
            for name, replica, url in zip(names, replicas, urls, strict=True)
        }
        pipelines = {each.name: each for each in (PIPELINES[0], pipeline)}
        async with harness.gateway(Routes(version=1, testbed="t", services=services, pipelines=pipelines), tmp_path) as (
            url,
            _,
        ):
            split, whole = await ask(url, "embed"), await ask(url, "fused")
    assert [hop["service"] for hop in split["parameters"]["hops"]] == list(CHAIN)
    assert [hop["service"] for hop in whole["parameters"]["hops"]] == ["whole"]
    assert whole["outputs"] == split["outputs"]
