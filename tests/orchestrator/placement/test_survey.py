from __future__ import annotations

import pytest

from loadgen import arrivals
from orchestrator.placement.survey import demand_of, mean_rate
from services.dataplane.pipeline import Pipeline
from tests.orchestrator.examples import MANIFEST

EMBED = Pipeline.model_validate(
    {
        "name": "embed",
        "deadline_s": 0.3,
        "epsilon": 0.05,
        "steps": [
            {"id": "tokenise", "service": "tokenise", "inputs": {"text": "request.text"}},
            {
                "id": "encode",
                "service": "encode",
                "inputs": {"input_ids": "tokenise.input_ids", "attention_mask": "tokenise.attention_mask"},
            },
            {
                "id": "pool",
                "service": "pool",
                "inputs": {"last_hidden_state": "encode.last_hidden_state", "attention_mask": "tokenise.attention_mask"},
            },
        ],
        "outputs": {"embedding": "pool.embedding"},
    }
)


def test_light_stages_become_delay_on_the_edges_around_the_core() -> None:
    stages = {name: MANIFEST.stage(name) for name in ("tokenise", "encode", "pool")}
    demand = demand_of(EMBED, 20.0, "edge-1", stages, {"tokenise": 0.002, "encode": 0.02, "pool": 0.003})
    assert [(v.id, v.service) for v in demand.visits] == [("encode", "encode")]
    assert [(e.source, e.target, e.delay_s) for e in demand.edges] == [(None, "encode", 0.002), ("encode", None, 0.003)]
    assert (demand.rate, demand.deadline_s, demand.entry) == (20.0, 0.3, {"edge-1": 1.0})


def test_the_parts_of_a_decoder_are_visited_with_its_first() -> None:
    stages = {name: MANIFEST.stage(name) for name in ("tokenise", "encode", "pool")} | {"more": MANIFEST.stage("encode")}
    steps = tuple(step.model_copy(update={"parts": ("more",)}) if step.id == "encode" else step for step in EMBED.steps)
    pipeline = EMBED.model_copy(update={"steps": steps})
    demand = demand_of(pipeline, 20.0, "edge-1", stages, {"tokenise": 0.002, "encode": 0.02, "pool": 0.003, "more": 0.02})
    assert [(v.id, v.service) for v in demand.visits] == [("encode", "encode"), ("encode in more", "more")]
    assert ("encode", "encode in more") in [(e.source, e.target) for e in demand.edges]


@pytest.mark.parametrize(
    ("spec", "rate"),
    [("poisson:20", 20.0), ("constant:10", 10.0), ("gamma:20,cv2=4", 20.0), ("mmpp:5@8s,40@2s", 12.0),
     ("step:10@20s,30@20s", 20.0), ("diurnal:20,amplitude=0.8,period=60s", 20.0)],
)  # fmt: skip
def test_mean_rates(spec: str, rate: float) -> None:
    assert mean_rate(arrivals.parse(spec)) == pytest.approx(rate)
