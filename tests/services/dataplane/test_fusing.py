from __future__ import annotations

import pytest

from models.manifest import Manifest, ManifestError, ModelFile, ServiceLaw, ServicePoint, StageProfile, StageSpec, TensorSpec
from services.dataplane import fusing
from services.dataplane.fusing import CannotFuse

FILE = ModelFile(path="a", sha256="0" * 64, size_bytes=1)


def tensor(name: str, datatype: str, *shape: int | str, **more: object) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "datatype": datatype, "shape": shape, **more})


TEXT = tensor("text", "BYTES", "batch")
IDS, MASK = tensor("input_ids", "INT64", "batch", "seq", pad_value=3), tensor("attention_mask", "INT64", "batch", "seq")
HIDDEN = tensor("hidden", "FP32", "batch", "seq", 8)
STATES = tensor("last_hidden_state", "FP32", "batch", "seq", 8)
EMBEDDING = tensor("embedding", "FP32", "batch", 8)
LABELS = tensor("label_embeddings", "FP32", "labels", 8)


def profile(mean_s: float, units: float, resident_bytes: int, cv: float = 0.0, tail_ratio: float = 1.0) -> StageProfile:
    point = ServicePoint(
        batch=1, length=1, samples=5, mean_s=mean_s, std_s=cv * mean_s, p50_s=mean_s, p95_s=mean_s, p99_s=mean_s
    )  # fmt: skip
    law = ServiceLaw(base_s=0.0, per_unit_s=mean_s / units, tail_ratio=tail_ratio)
    return StageProfile(points=(point,), law=law, resident_bytes=resident_bytes, load_s=0.1, threads=1, cpu="x")


def stage(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **more: object) -> StageSpec:
    fields = {"tier": "light", "processor": name, "files": {"float32": (FILE,)}, **more}
    return StageSpec.model_validate({"name": name, "inputs": inputs, "outputs": outputs, **fields})


CORE = {"tier": "core", "processor": "onnx", "files": {"float32": (FILE,), "int8": (FILE, FILE)}, "max_batch": 16}
MODEL = Manifest(
    model="tiny", source="x", architecture="x", weights="seeded", typical_length={"seq": 10, "labels": 4},
    stages=(
        stage("tokenise", (TEXT,), (IDS, MASK, tensor("token_count", "INT64", "batch"))),
        stage("encode-1", (IDS, MASK), (HIDDEN,), **CORE, profile={"float32": profile(0.02, 10, 100_000_000, cv=0.3)}),
        stage("encode-2", (HIDDEN, MASK), (STATES,), **(CORE | {"max_batch": 4}),
              profile={"float32": profile(0.03, 10, 80_000_000, cv=0.4, tail_ratio=1.5)}),
        stage("pool", (STATES, MASK), (EMBEDDING,)),
        stage("classify", (EMBEDDING, LABELS), (tensor("scores", "FP32", "batch", "labels"),)),
        stage("other", (tensor("embedding", "FP32", "batch", 9),), (tensor("y", "FP32", "batch"),)),
    ),
)  # fmt: skip


def names(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return [each.name for each in tensors]


def test_inputs_are_what_no_member_makes_and_outputs_all_that_they_make() -> None:
    fused = fusing.fuse(MODEL, ["encode-1", "encode-2", "pool"])
    assert names(fused.inputs) == ["input_ids", "attention_mask"]
    assert names(fused.outputs) == ["hidden", "last_hidden_state", "embedding"]
    assert fused.name == "encode-1-encode-2-pool"
    assert fused.tier == "core", "any member of the core makes it one"
    assert fusing.fuse(MODEL, ["pool", "classify"]).tier == "light"


def test_a_batch_goes_as_far_as_every_core_member_allows() -> None:
    assert fusing.fuse(MODEL, ["encode-1", "encode-2"]).max_batch == 4
    assert fusing.fuse(MODEL, ["encode-2", "pool"]).max_batch == 4, "pool says 1 because batching gains it nothing"


def test_tasks_that_could_not_be_cut_apart_again_are_not_batched() -> None:
    assert fusing.fuse(MODEL, ["tokenise", "encode-1"]).max_batch == 1, "nobody outside knows each text's tokens"
    whole = ["tokenise", "encode-1", "encode-2", "pool", "classify"]
    assert fusing.fuse(MODEL, whole).max_batch == 1, "labels belong to a task, not to an item"


def test_a_precision_is_the_core_members_and_light_ones_go_along() -> None:
    fused = fusing.fuse(MODEL, ["tokenise", "encode-1"])
    assert {precision: len(files) for precision, files in fused.files.items()} == {"float32": 2, "int8": 3}
    assert fusing.precision_of(MODEL.stage("tokenise"), "int8") == "float32"
    assert fusing.precision_of(MODEL.stage("encode-1"), "int8") == "int8"


def test_a_profile_is_the_members_profiles_added_up_at_typical_lengths() -> None:
    fused = fusing.fuse(MODEL, ["tokenise", "encode-1", "encode-2", "pool"])
    ((precision, found),) = fused.profile.items()
    assert precision == "float32", "as int8 nothing was measured"
    # Units are texts now; ten tokens each make the 20 ms and 30 ms of the members.
    assert found.law.mean_s(fused.units((2,))) == pytest.approx(0.1)
    assert found.law.tail_ratio == 1.5
    assert found.resident_bytes == 180_000_000 - fusing.BARE_BYTES, "one interpreter less"
    assert found.load_s == pytest.approx(0.2)
    (point,) = found.points
    assert point.std_s == pytest.approx((0.006**2 + 0.012**2) ** 0.5)


def test_without_a_profile_of_every_core_member_there_is_none() -> None:
    bare = MODEL.model_copy(update={"stages": tuple(
        each.model_copy(update={"profile": {}}) if each.name == "encode-2" else each for each in MODEL.stages
    )})  # fmt: skip
    assert fusing.fuse(bare, ["encode-1", "encode-2"]).profile == {}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["encode-1"], "name at least two stages, each of them once"),
        (["pool", "pool"], "name at least two stages, each of them once"),
        (["encode-1", "tokenise"], "stage 'tokenise' takes nothing that encode-1 makes: fused stages are one chain"),
        (["tokenise", "pool"], "stage 'pool' takes 'last_hidden_state', which encode-2 makes of what tokenise makes"),
        (["encode-1", "pool"], "takes nothing that encode-1 makes"),
        (["pool", "other"], "stage 'other' takes another 'embedding' than the stages before it take or make"),
    ],
)
def test_stages_that_are_no_chain_are_refused(members: list[str], reason: str) -> None:
    with pytest.raises(CannotFuse, match=reason):
        fusing.fuse(MODEL, members)


def test_a_part_of_a_decoder_is_refused() -> None:
    first = MODEL.stage("encode-1").model_copy(update={"parameters": {"part": 1, "parts": 2}})
    model = MODEL.model_copy(update={"stages": tuple(first if each.name == first.name else each for each in MODEL.stages)})
    with pytest.raises(CannotFuse, match="stage 'encode-1' is a part of a decoder"):
        fusing.fuse(model, ["tokenise", "encode-1"])


def test_a_stage_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ManifestError, match="has no stage 'pol'"):
        fusing.fuse(MODEL, ["encode-2", "pol"])


def test_a_model_carries_its_fused_stages_beside_its_own_and_can_be_told_without_them() -> None:
    both = fusing.with_fused(MODEL, ["encode-1", "encode-2"])
    assert both.stage("encode-1-encode-2").processor == fusing.FUSED
    assert fusing.with_fused(both, ["encode-1", "encode-2"]) == both
    assert fusing.as_exported(both) == MODEL


def test_members_are_wired_to_the_nearest_earlier_one_that_makes_the_tensor() -> None:
    stages = [MODEL.stage(name) for name in ("tokenise", "encode-1", "encode-2")]
    assert fusing.wires(stages)[2] == {"hidden": 1, "attention_mask": 0}


def test_a_name_that_is_too_long_is_still_its_own() -> None:
    many = ["tokenise", *(f"encode-{i}" for i in range(1, 9))]
    names = {fusing.name_of(many), fusing.name_of([*many, "pool"]), fusing.name_of(many[:2])}
    assert len(names) == 3
    assert all(len(name) <= 63 for name in names)
    assert fusing.name_of(many[:2]) == "tokenise-encode-1"
