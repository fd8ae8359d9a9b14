from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from models.manifest import Manifest, StageSpec, TensorSpec
from orchestrator.placement import cuts
from orchestrator.placement.cuts import PROCESS_BYTES, Cut, Ground, Part
from services.dataplane import fusing
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Link

MIB = 2**20


def tensor(name: str, datatype: str, *shape: int | str, size: int = 0) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "datatype": datatype, "shape": shape, "bytes_per_item": size})


TEXT = tensor("text", "BYTES", "batch", size=200)
IDS, MASK = tensor("input_ids", "INT64", "batch", "seq", size=384), tensor("attention_mask", "INT64", "batch", "seq", size=384)
STATES = tensor("last_hidden_state", "FP32", "batch", "seq", 384, size=70_000)
EMBEDDING = tensor("embedding", "FP32", "batch", 384, size=1536)
OTHERS = tensor("label_embeddings", "FP32", "labels", 384, size=6144)


def stage(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **more: object) -> StageSpec:
    fields = {"tier": "light", "processor": name, "files": {"float32": ()}, **more}
    return StageSpec.model_validate({"name": name, "inputs": inputs, "outputs": outputs, **fields})


MODEL = Manifest(
    model="tiny", source="x", architecture="x", weights="seeded", typical_length={"seq": 48},
    stages=(
        stage("tokenise", (TEXT,), (IDS, MASK)),
        stage("encode", (IDS, MASK), (STATES,), tier="core", processor="onnx", max_batch=16),
        stage("pool", (STATES, MASK), (EMBEDDING,)),
        stage("classify", (EMBEDDING, OTHERS), (tensor("scores", "FP32", "batch", "labels", size=16),)),
    ),
)  # fmt: skip
WORK_S = {"tokenise": 0.0002, "encode": 0.015, "pool": 0.0001, "classify": 0.0001}
NODES = {"tokenise": ("a",), "encode": ("a", "b"), "pool": ("b",), "classify": ("a",)}


def part(name: str) -> Part:
    memory = (512 if name == "encode" else 100) * MIB
    return Part(MODEL, (name,), MODEL.stage(name), "float32", WORK_S[name], memory, NODES[name])


PARTS = {name: part(name) for name in WORK_S}
LINK = Link(latency_s=0.001, bandwidth_bytes_per_s=1e7)
GROUND = Ground(PARTS, gateway="a", hop_s=0.0008, links={("a", "b"): LINK, ("b", "a"): LINK}, rates={"embed": 20.0})


def branch(prefix: str, source: str) -> tuple[Step, ...]:
    ids, mask = f"{prefix}tokenise.input_ids", f"{prefix}tokenise.attention_mask"
    return (
        Step(id=f"{prefix}tokenise", service="tokenise", inputs={"text": f"request.{source}"}),
        Step(id=f"{prefix}encode", service="encode", inputs={"input_ids": ids, "attention_mask": mask}),
        Step(
            id=f"{prefix}pool", service="pool",
            inputs={"last_hidden_state": f"{prefix}encode.last_hidden_state", "attention_mask": mask},
        ),
    )  # fmt: skip


EMBED = Pipeline(name="embed", deadline_s=0.3, epsilon=0.05, steps=branch("", "text"), outputs={"embedding": "pool.embedding"})
CLASSIFY = Pipeline(
    name="classify", deadline_s=0.5, epsilon=0.05,
    steps=(
        *branch("", "text"), *branch("label_", "labels"),
        Step(id="classify", service="classify",
             inputs={"embedding": "pool.embedding", "label_embeddings": "label_pool.embedding"}),
    ),
    outputs={"scores": "classify.scores"},
)  # fmt: skip


def found(*pipelines: Pipeline, ground: Ground = GROUND) -> dict[tuple[str, str, str], Cut]:
    return {(cut.pipeline, cut.source, cut.target): cut for cut in cuts.of_pipelines(pipelines, ground)}


def with_parts(parts: Mapping[str, Part]) -> Ground:
    return replace(GROUND, parts={**PARTS, **parts})


def test_what_crosses_a_cut_is_what_is_taken_there_and_what_is_passed_on() -> None:
    first, second = found(EMBED).values()
    assert (first.source, first.target, first.bytes_per_task) == ("tokenise", "encode", 384 + 384)
    assert (second.source, second.target, second.bytes_per_task) == ("encode", "pool", 70_000 + 384), "pool wants the mask too"


def test_a_cut_costs_its_hop_and_the_way_to_the_nearest_replica() -> None:
    first, second = found(EMBED).values()
    assert first.link_s == 0.0, "there is an encoder beside the tokeniser"
    # Of the two encoders the one on a has to go over to b.
    assert second.link_s == pytest.approx(LINK.transfer_s(70_384) / 2)
    assert second.saves_s == pytest.approx(0.0008 + second.link_s)
    assert second.work_s == (0.015, 0.0001)


def test_fusing_two_stages_nobody_shares_frees_their_replicas() -> None:
    cut = found(EMBED)["embed", "encode", "pool"]
    assert cut.shared == {}
    # Two encoders of 512 MiB and one pool of 100 MiB become two of both, each with one process less.
    assert cut.memory_bytes == 2 * (612 * MIB - PROCESS_BYTES) - (2 * 512 + 100) * MIB
    assert cut.loses == ("pool is no longer scaled by itself",)
    assert cut.splitting_loses


def test_a_cut_is_kept_where_the_fused_stage_would_batch_less() -> None:
    cut = found(EMBED)["embed", "tokenise", "encode"]
    assert cut.stops == ("batches would be of at most 1 instead of 16",)
    assert not cut.splitting_loses


def test_a_stage_that_generates_would_no_longer_stream() -> None:
    generates = replace(PARTS["encode"], stage=PARTS["encode"].stage.model_copy(update={"processor": "generate"}))
    cut = found(EMBED, ground=with_parts({"encode": generates}))["embed", "encode", "pool"]
    assert "answers would no longer stream" in cut.stops


def test_a_time_that_was_assumed_says_so() -> None:
    ground = with_parts({"pool": replace(PARTS["pool"], measured=False)})
    (_, said) = cuts.lines(cuts.of_pipelines([EMBED], ground), [EMBED], ground)[1:]
    assert "beside 15 ms and 0.1 ms (assumed) of work" in said


def test_a_hop_that_is_short_beside_both_stages_is_worth_it() -> None:
    slow = {name: replace(PARTS[name], work_s=0.01) for name in PARTS}
    assert not any(cut.splitting_loses for cut in found(EMBED, ground=with_parts(slow)).values())


def test_a_stage_that_other_pipelines_use_would_be_doubled() -> None:
    other = Pipeline(
        name="states", deadline_s=0.3, epsilon=0.05, steps=EMBED.steps[:2], outputs={"states": "encode.last_hidden_state"}
    )
    cut = found(EMBED, other)["embed", "encode", "pool"]
    assert cut.shared == {"encode": ("states",)}
    assert not cut.splitting_loses
    # One fused replica carries embed's 20 tasks/s of 15.1 ms; the encoders stay for the others, the pool's replica does not.
    assert cut.memory_bytes == 612 * MIB - PROCESS_BYTES - 100 * MIB


def test_more_load_asks_for_more_fused_replicas() -> None:
    other = replace(GROUND, rates={"embed": 100.0})
    states = Pipeline(
        name="states", deadline_s=0.3, epsilon=0.05, steps=EMBED.steps[:2], outputs={"states": "encode.last_hidden_state"}
    )
    cut = found(EMBED, states, ground=other)["embed", "encode", "pool"]
    assert cut.memory_bytes == 2 * (612 * MIB - PROCESS_BYTES) - 100 * MIB


def test_branches_meet_by_way_of_the_gateway_and_only_one_can_end_in_the_join() -> None:
    cut = found(EMBED, CLASSIFY)["classify", "pool", "classify"]
    assert cut.by_gateway
    assert cut.bytes_per_task == 1536
    assert cut.link_s == pytest.approx(LINK.transfer_s(1536)), "from b to the gateway on a, where classify is"
    assert cut.shared == {"pool": ("embed", "classify")}


def test_stages_that_cannot_be_fused_say_why() -> None:
    elsewhere = replace(PARTS["pool"], model=MODEL.model_copy(update={"model": "other"}))
    assert (
        found(EMBED, ground=with_parts({"pool": elsewhere}))["embed", "encode", "pool"].obstacle
        == "they are stages of two models"
    )
    core = {"tier": "core"}
    half = replace(PARTS["pool"], precision="int8", stage=PARTS["pool"].stage.model_copy(update=core))
    cut = found(EMBED, ground=with_parts({"pool": half}))["embed", "encode", "pool"]
    assert cut.obstacle == "one is served as float32, the other as int8"
    assert cut.memory_bytes is None
    twice = Pipeline(
        name="twice", deadline_s=1.0, epsilon=0.05,
        steps=(EMBED.steps[0], Step(id="again", service="tokenise", inputs={"text": "tokenise.input_ids"})),
        outputs={"x": "again.input_ids"},
    )  # fmt: skip
    assert found(twice)["twice", "tokenise", "again"].obstacle == "they are the same service"


def test_a_fused_service_is_one_side_of_a_cut_with_all_its_stages() -> None:
    members = ("tokenise", "encode")
    joint = replace(PARTS["encode"], members=members, stage=fusing.fuse(MODEL, members))
    pipeline = Pipeline(
        name="embed", deadline_s=0.3, epsilon=0.05,
        steps=(
            Step(id="encode", service="joint", inputs={"text": "request.text"}),
            Step(id="pool", service="pool",
                 inputs={"last_hidden_state": "encode.last_hidden_state", "attention_mask": "encode.attention_mask"}),
        ),
        outputs={"embedding": "pool.embedding"},
    )  # fmt: skip
    (cut,) = found(pipeline, ground=with_parts({"joint": joint})).values()
    assert cut.obstacle is None
    assert cut.bytes_per_task == 70_000 + 384


def test_a_cut_through_a_decoder_costs_a_hop_for_every_token() -> None:
    steps = tuple(step.model_copy(update={"parts": ("pool",)}) if step.id == "encode" else step for step in EMBED.steps[:2])
    pipeline = Pipeline(name="x", deadline_s=1.0, epsilon=0.05, steps=steps, outputs={"y": "encode.last_hidden_state"})
    model = MODEL.model_copy(update={"typical_length": {"seq": 10, "new": 5}})
    cut = found(pipeline, ground=with_parts({"encode": replace(PARTS["encode"], model=model)}))["x", "encode", "encode in pool"]
    assert cut.hop_s == pytest.approx(5 * 0.0008)
    assert cut.bytes_per_task == pytest.approx(70_000 * 1.4), "the prompt's ten states, and four more"
    assert cut.obstacle is not None


def test_everything_is_said_in_text_and_as_json() -> None:
    pipelines = (EMBED, CLASSIFY)
    every = cuts.of_pipelines(pipelines, GROUND)
    said = cuts.lines(every, pipelines, GROUND)
    assert said[0] == "cuts of embed: 2, with 5.62 ms of hops to 15.3 ms of work (deadline 300 ms)"
    assert said[1] == (
        "  tokenise | encode: 768 B cross in 0.8 ms, beside 0.2 ms and 15 ms of work; keep it: fused, batches would be of "
        "at most 1 instead of 16 (0.8 ms less a task, 28 MiB less memory; tokenise is no longer scaled by itself)"
    )
    assert "; splitting loses here (fused: " in said[2]
    assert any("keep it: pool is shared with embed, classify" in line for line in said)
    first = cuts.document(every[0])
    assert first["between"] == ["tokenise", "encode"]
    assert not first["splitting_loses"]
    assert first["fused"]["saves_s"] == 0.0008
    assert first["fused"]["loses"] == list(every[0].loses)
    assert first["fused"]["stops"] == list(every[0].stops)
