from __future__ import annotations

import pytest

from orchestrator import testbed as testbeds
from orchestrator import wiring
from orchestrator.testbed import Loaded
from tests.orchestrator.examples import MANIFEST, TESTBED, load, tensor

TWO_BRANCHES = """\
    steps:
      - {id: tokenise, service: tokenise, inputs: {text: request.text}}
      - {id: encode, service: encode}
      - {id: other_tokenise, service: tokenise, inputs: {text: request.other}}
      - {id: other_encode, service: encode}
      - {id: pool, service: pool, after: encode}
    outputs: {embedding: pool.embedding, other: other_encode.last_hidden_state}
"""


def problems(loaded: Loaded) -> list[str]:
    found = wiring.wire(loaded.testbed, {"tiny": MANIFEST}).problems
    return list(loaded.complain(found).problems)


def with_steps(block: str) -> str:
    start, end = TESTBED.index("    steps:"), TESTBED.index("gateway:")
    return TESTBED[:start] + block + TESTBED[end:]


def test_unnamed_inputs_come_from_the_nearest_earlier_step_that_outputs_them() -> None:
    wired = wiring.wire(load().testbed, {"tiny": MANIFEST})
    assert not wired.problems
    assert [dict(step.inputs) for step in wired.pipelines["embed"].steps] == [
        {"text": "request.text"},
        {"input_ids": "tokenise.input_ids", "attention_mask": "tokenise.attention_mask"},
        {"last_hidden_state": "encode.last_hidden_state", "attention_mask": "tokenise.attention_mask"},
    ]
    assert wired.tiers == {"tokenise": "light", "encode": "core", "pool": "light"}


def test_after_looks_only_at_a_step_and_its_ancestors() -> None:
    wired = wiring.wire(load(with_steps(TWO_BRANCHES)).testbed, {"tiny": MANIFEST})
    steps = {step.id: dict(step.inputs) for step in wired.pipelines["embed"].steps}
    assert steps["other_encode"]["input_ids"] == "other_tokenise.input_ids"
    assert steps["pool"] == {"last_hidden_state": "encode.last_hidden_state", "attention_mask": "tokenise.attention_mask"}


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("stage: pool,", "stage: pol,", "12: services.pool.stage: model 'tiny' has no stage 'pol'; did you mean pool?"),
        ("stage: pool,", "stage: pool, precision: int8,",
         "12: services.pool.precision: stage 'pool' was exported as float32, not as int8"),
        ("stage: pool,", "stage: pool, tier: core,", "12: services.pool.tier: the manifest says that 'pool' is light"),
        ("inputs: {text: request.text}", "inputs: {txt: request.text}",
         "18: pipelines.embed.steps[0].inputs.txt: service 'tokenise' takes no tensor 'txt'; did you mean text?"),
        ("{id: encode, service: encode}", "{id: encode, service: encode, inputs: {input_ids: tokenise.ids}}",
         "19: pipelines.embed.steps[1].inputs.input_ids: step 'tokenise' gives no tensor 'ids'; "
         "it gives input_ids, attention_mask"),
        ("{id: pool, service: pool}", "{id: pool, service: pool, after: tokenise}",

         "20: pipelines.embed.steps[2]: neither 'tokenise' nor its ancestors give the input 'last_hidden_state' "
         "of step 'pool'; name it under inputs"),
        ("{id: pool, service: pool}", "{id: pool, service: pool, inputs: {attention_mask: encode.last_hidden_state}}",
         "20: pipelines.embed.steps[2].inputs.attention_mask: encode.last_hidden_state is FP32 [batch, seq, 384], "
         "but 'pool' takes INT64 [batch, seq]"),
        ("{id: pool, service: pool}", "{id: pool, service: pool, inputs: {attention_mask: request.text}}",
         "20: pipelines.embed.steps[2].inputs.attention_mask: request.text is BYTES [batch], but 'pool' takes "
         "INT64 [batch, seq]"),
        ("outputs: {embedding: pool.embedding}", "outputs: {embedding: pool.embeding}",
         "21: pipelines.embed.outputs.embedding: step 'pool' gives no tensor 'embeding'; did you mean embedding?"),
        ("outputs: {embedding: pool.embedding}", "outputs: {embedding: request.other}",
         "21: pipelines.embed.outputs.embedding: request.other is taken by no step, so the request has no such tensor"),
    ],
)  # fmt: skip
def test_an_edge_that_does_not_fit_is_named_in_the_file(good: str, bad: str, problem: str) -> None:
    found = problems(load(TESTBED.replace(good, bad, 1)))
    assert f"small.yaml:{problem}" in found


FUSED = TESTBED.replace("stage: pool,", "stages: [encode, pool],").replace("      - {id: encode, service: encode}\n", "")


def test_a_fused_service_is_wired_by_what_its_members_do_not_make_themselves() -> None:
    wired = wiring.wire(load(FUSED).testbed, {"tiny": MANIFEST})
    assert not wired.problems
    assert dict(wired.pipelines["embed"].steps[1].inputs) == {
        "input_ids": "tokenise.input_ids", "attention_mask": "tokenise.attention_mask",
    }  # fmt: skip
    assert wired.tiers["pool"] == "core"
    assert wired.manifests["tiny"].stage("encode-pool").outputs[-1].name == "embedding"


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ("[encode, pol]", "12: services.pool.stages[1]: model 'tiny' has no stage 'pol'; did you mean pool?"),
        ("[tokenise, pool]", "12: services.pool.stages: stage 'pool' takes 'last_hidden_state', which encode makes of what "
         "tokenise makes: put that stage between them"),
        ("[encode, tokenise]", "12: services.pool.stages: stage 'tokenise' takes nothing that encode makes: fused stages are "
         "one chain"),
        ("[encode, pool], tier: light", "12: services.pool.tier: the manifest says that 'encode-pool' is core"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_fused_are_named_in_the_file(stages: str, problem: str) -> None:
    assert problems(load(FUSED.replace("[encode, pool]", stages))) == [f"small.yaml:{problem}"]


def test_a_fused_stage_is_nobody_elses() -> None:
    text = FUSED.replace("stage: tokenise,", "stage: encode-pool,")
    assert problems(load(text)) == [
        "small.yaml:10: services.tokenise.stage: model 'tiny' has no stage 'encode-pool'; did you mean encode?"
    ]


def test_an_input_with_a_default_that_no_step_gives_comes_from_the_request() -> None:
    optional = tensor("temperature", "FP32", "batch").model_copy(update={"default": 0.0})
    stages = [
        stage.model_copy(update={"inputs": (*stage.inputs, optional)}) if stage.name == "pool" else stage
        for stage in MANIFEST.stages
    ]
    wired = wiring.wire(load().testbed, {"tiny": MANIFEST.model_copy(update={"stages": tuple(stages)})})
    assert not wired.problems
    assert wired.pipelines["embed"].steps[2].inputs["temperature"] == "request.temperature"


def cut_in_two(text: str, **parameters: object) -> list[str] | tuple[str, ...]:
    """Problems, or the services of the step `encode`, where `encode` is the first part of two of a decoder."""
    encode = MANIFEST.stage("encode")
    parts = [
        encode.model_copy(
            update={"name": f"encode-{i}", "processor": "generate", "parameters": {"part": i, "parts": 2, **parameters}}
        )
        for i in (1, 2)
    ]
    stages = (*(stage for stage in MANIFEST.stages if stage.name != "encode"), *parts)
    loaded = load(text.replace("stage: encode,", "stage: encode-1,"))
    wired = wiring.wire(loaded.testbed, {"tiny": MANIFEST.model_copy(update={"stages": stages})})
    return wired.pipelines["embed"].steps[1].services if not wired.problems else list(loaded.complain(wired.problems).problems)


SECOND = "  more: {model: tiny, stage: encode-2, cpus: 0.1, memory: 64MiB}\n"


def test_a_decoder_that_was_cut_works_with_the_services_of_its_other_parts() -> None:
    int8 = SECOND.replace("more:", "small:").replace("stage: encode-2", "stage: encode-2, precision: int8")
    assert cut_in_two(TESTBED.replace("  pool:", int8 + SECOND + "  pool:")) == ("encode", "more")


def test_a_part_that_nobody_serves_is_a_problem_and_so_is_a_step_at_a_later_part() -> None:
    assert cut_in_two(TESTBED) == [
        "small.yaml:19: pipelines.embed.steps[1].service: 'encode' is part 1 of 2 of a decoder, and no service serves "
        "'encode-2' of 'tiny'"
    ]
    text = TESTBED.replace("  pool:", SECOND + "  pool:").replace("service: encode}", "service: more}")
    assert cut_in_two(text) == [
        "small.yaml:20: pipelines.embed.steps[1].service: 'more' is part 2 of a decoder; a step names the first, which calls it"
    ]


def test_a_part_of_a_decoder_that_attends_to_an_encoder_is_a_problem() -> None:
    assert cut_in_two(TESTBED.replace("  pool:", SECOND + "  pool:"), encoder=True) == [
        "small.yaml:20: pipelines.embed.steps[1].service: 'encode' is a part of a decoder that attends to an encoder, and such "
        "a decoder is served whole only: give model 'tiny' no cut"
    ]


def test_how_long_a_stream_may_pause_goes_along() -> None:
    text = TESTBED.replace("deadline: 300ms", "deadline: 300ms\n    token_deadline: 50ms")
    assert wiring.wire(load(text).testbed, {"tiny": MANIFEST}).pipelines["embed"].token_deadline_s == 0.05


def test_a_cycle_closed_by_a_wire_is_a_problem_too() -> None:
    block = (
        "    steps:\n"
        "      - {id: encode, service: encode, inputs: {input_ids: tokenise.input_ids, attention_mask: request.mask}}\n"
        "      - {id: pool, service: pool, inputs: {attention_mask: request.mask}}\n"
        "      - {id: tokenise, service: tokenise, inputs: {text: pool.embedding}}\n"
        "    outputs: {embedding: pool.embedding}\n"
    )
    # A stage that makes text of embeddings, so that only the cycle is wrong.
    stages = [
        stage.model_copy(update={"inputs": (MANIFEST.stages[2].outputs[0].model_copy(update={"name": "text"}),)})
        if stage.name == "tokenise"
        else stage
        for stage in MANIFEST.stages
    ]
    loaded = load(with_steps(block))
    found = wiring.wire(loaded.testbed, {"tiny": MANIFEST.model_copy(update={"stages": tuple(stages)})}).problems
    assert [testbeds.dotted(problem.path) for problem in found] == ["pipelines.embed.steps"]
