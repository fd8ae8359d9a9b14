"""Measuring a stage: every point in every round, tasks of varied sizes that the stage takes, and what is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.manifest import StageSpec, TensorSpec
from services.stage import examples
from services.stage.measure import UNAVAILABLE, Job, measure

REPOSITORY = Path(__file__).resolve().parents[3]
STATES = TensorSpec(name="last_hidden_state", datatype="FP32", shape=("batch", "seq", 8))
MASK = TensorSpec(name="attention_mask", datatype="INT64", shape=("batch", "seq"))
EMBEDDING = TensorSpec(name="embedding", datatype="FP32", shape=("batch", 8))
POOL = StageSpec(name="pool", tier="light", processor="pool", inputs=(STATES, MASK), outputs=(EMBEDDING,))


def _job(spec: StageSpec, **changes: object) -> Job:
    usual = {"files": (), "typical_length": {"seq": 16}, "threads": 1, "rounds": 2, "points": [(1, 8), (3, 16)], "tasks": 7}
    return Job(spec=spec.model_dump_json(), **{**usual, **changes})  # type: ignore[arg-type]


def test_every_point_is_run_in_every_round_and_every_task_once() -> None:
    found = measure(_job(POOL))
    assert [len(runs) >= 2 and len(runs) % 2 == 0 for runs in found.runs] == [True, True]
    assert len(found.varied) == 7
    assert found.load_s > 0
    assert found.resident_bytes > 0


def test_tasks_have_the_axes_asked_for() -> None:
    made = examples.task(POOL, {"batch": 2, "seq": 5})
    assert {name: array.shape for name, array in made.items()} == {"last_hidden_state": (2, 5, 8), "attention_mask": (2, 5)}


def test_varied_tasks_are_of_one_item_of_many_sizes_about_the_typical_one() -> None:
    rng = np.random.default_rng(0)
    lengths = [examples.varied(POOL, {"seq": 40}, rng)["attention_mask"].shape for _ in range(300)]
    assert {batch for batch, _ in lengths} == {1}
    assert np.mean([length for _, length in lengths]) == pytest.approx(40, rel=0.15)
    assert len({length for _, length in lengths}) > 50


def test_texts_keep_to_the_longest() -> None:
    text = TensorSpec(name="text", datatype="BYTES", shape=("batch",))
    spec = StageSpec(
        name="tokenise", tier="light", processor="tokenise", inputs=(text,), outputs=(MASK,), parameters={"max_tokens": 50}
    )
    rng = np.random.default_rng(0)
    words = [len(examples.varied(spec, {"seq": 48}, rng)["text"][0].split()) for _ in range(200)]
    assert min(words) >= 1
    assert max(words) == 10


@pytest.mark.parametrize(("name", "starts"), [("image", b"\xff\xd8"), ("audio", b"RIFF"), ("messages", b"[{")])
def test_bytes_are_what_their_stage_reads(name: str, starts: bytes) -> None:
    tensor = TensorSpec(name=name, datatype="BYTES", shape=("batch",))
    spec = StageSpec(name="read", tier="light", processor="read", inputs=(tensor,), outputs=(MASK,))
    rng = np.random.default_rng(0)
    made = [examples.varied(spec, {}, rng)[name] for _ in range(3)]
    assert all(each.shape == (1,) and each[0].startswith(starts) for each in made)
    assert len({each[0] for each in made}) == 3


def test_tokens_to_read_are_counted_and_what_has_a_default_is_left_out() -> None:
    ids = TensorSpec(name="output_ids", datatype="INT64", shape=("batch", "new"))
    count = TensorSpec(name="output_count", datatype="INT64", shape=("batch",))
    seed = TensorSpec(name="seed", datatype="INT64", shape=("batch",), default=0)
    spec = StageSpec(name="read", tier="light", processor="read", inputs=(ids, count, seed), outputs=(MASK,))
    made = examples.task(spec, {"batch": 2, "new": 9})
    assert set(made) == {"output_ids", "output_count"}
    assert made["output_count"].tolist() == [9, 9]


def test_a_package_that_is_not_installed_is_an_exit_status_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizers.py").write_text("raise ModuleNotFoundError('No module named tokenizers')")
    spec = POOL.model_copy(update={"processor": "tokenise"})
    done = subprocess.run(
        [sys.executable, "-m", "services.stage.measure"],
        input=json.dumps(_job(spec).__dict__),
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert (done.returncode, done.stdout) == (UNAVAILABLE, "")
    assert "No module named tokenizers" in done.stderr
