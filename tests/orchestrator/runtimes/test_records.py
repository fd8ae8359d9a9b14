from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.runtimes.child import Identity
from orchestrator.runtimes.records import Record, Records

EXAMPLE = Record(
    id="pool-7", kind="stage", service="pool", node="a", url="http://127.0.0.1:1", state="ready", generation=2,
    specification="python -m x", cpus=0.5, memory_bytes=1, pid=4, create_time=5.5, argv=("python", "-m", "x", "--fd",
    "3"),
)  # fmt: skip


def test_a_record_is_kept_replaced_and_forgotten(tmp_path: Path) -> None:
    records = Records(tmp_path / "replicas")
    assert list(records.all()) == []
    records.save(EXAMPLE)
    records.save(EXAMPLE.model_copy(update={"state": "draining"}))
    (kept,) = records.all()
    assert kept.state == "draining"
    assert kept.identity == Identity(4, 5.5, ("python", "-m", "x", "--fd", "3"))
    records.forget("pool-7")
    records.forget("pool-7")
    assert list(records.all()) == []


def test_a_record_says_what_a_person_finds_it_by() -> None:
    container = EXAMPLE.model_copy(update={"pid": None, "container": "0123456789abcdef"})
    assert EXAMPLE.runs_as == {"pid": 4}
    assert container.runs_as == {"container": "0123456789ab"}
    assert container.identity is None
    assert not container.is_same_as(EXAMPLE)
    assert container.model_copy(update={"pid": None, "container": None}).runs_as == {}, "it is still being started"


def test_a_disk_that_takes_nothing_is_logged_and_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "replicas").touch()
    Records(tmp_path / "replicas").save(EXAMPLE)
    assert "pool-7: its record could not be written" in caplog.text


def test_a_file_that_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.save(EXAMPLE)
    (tmp_path / "half.json").write_text('{"id": "ha')
    assert list(records.all()) == [EXAMPLE]
