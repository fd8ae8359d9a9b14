"""How an answer is to be made: the inputs that a request's fields make."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from models.manifest import TensorSpec
from services.dataplane.errors import BadRequest
from services.dataplane.pipeline import Pipeline, Step
from services.gateway.sampling import Sampling
from services.gateway.table import Plan

TEMPERATURE = TensorSpec(name="temperature", datatype="FP32", shape=("batch",), default=0.0)
SEED = TensorSpec(name="seed", datatype="INT64", shape=("batch",), default=0)


def plan(*optional: TensorSpec) -> Plan:
    """A pipeline that takes these, with nothing else of one."""
    steps = (Step(id="a", service="a", inputs={each.name: f"request.{each.name}" for each in optional}),)
    pipeline = Pipeline(name="write", deadline_s=1.0, epsilon=0.1, steps=steps, outputs={"y": "a.y"})
    inputs = {each.name: each for each in optional}
    return Plan(pipeline, (), inputs, frozenset(inputs), {}, (), "seeded")


def test_a_seed_is_drawn_where_tokens_are_and_the_request_has_none() -> None:
    warm = replace(
        plan(TEMPERATURE, SEED), inputs={"temperature": TEMPERATURE.model_copy(update={"default": 0.7}), "seed": SEED}
    )
    cold = plan(TEMPERATURE, SEED)
    for where, asked, drawn in (
        (cold, Sampling(), False),
        (cold, Sampling(temperature=0.5), True),
        (warm, Sampling(), True),
        (warm, Sampling(temperature=0.0), False),
        (warm, Sampling(seed=7), True),
        (plan(TEMPERATURE), Sampling(temperature=0.5), False),
    ):
        made = asked.tensors(where, 2)
        assert ("request.seed" in made) is drawn
        if asked.seed is not None:
            assert made["request.seed"].array.tolist() == [7, 7]


def test_what_a_pipeline_does_not_take_is_refused() -> None:
    with pytest.raises(BadRequest, match="top_p: pipeline 'write' does not take it; leave it out"):
        Sampling(top_p=0.5).tensors(plan(SEED), 1)


@pytest.mark.parametrize("text", ["nan", "inf", "-1"])
def test_a_temperature_must_be_a_number_that_makes_sense(text: str) -> None:
    with pytest.raises(ValidationError):
        Sampling.model_validate({"temperature": text}, strict=False)
