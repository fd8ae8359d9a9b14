"""The routes document: what it accepts, and that a gateway finds it again on disk or knows that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.manifest import TensorSpec
from services.dataplane import routes
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Link, Replica, Routes, Service

TEXT = TensorSpec(name="text", datatype="BYTES", shape=("batch",))
ECHO = Service(
    name="echo-a",
    model="m",
    stage="echo",
    tier="light",
    inputs=(TEXT,),
    outputs=(TEXT,),
    replicas=(Replica(id="echo-a-0", node="n0", url="http://127.0.0.1:1", state="ready"),),
)
PIPELINE = Pipeline(
    name="p",
    deadline_s=0.2,
    epsilon=0.05,
    steps=(Step(id="echo", service="echo-a", inputs={"text": "request.text"}),),
    outputs={"text": "echo.text"},
)
ROUTES = Routes(
    version=7,
    testbed="one",
    services={"echo-a": ECHO},
    pipelines={"p": PIPELINE},
    links={"n0": {"n1": Link(latency_s=0.001, bandwidth_bytes_per_s=1e6)}},
)


def test_a_document_comes_back_from_the_disk_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet" / "routes.json"
    routes.save(ROUTES, path)
    assert routes.load(path) == ROUTES


def test_the_empty_document_comes_back_too(tmp_path: Path) -> None:
    routes.save(routes.empty(), tmp_path / "routes.json")
    assert routes.load(tmp_path / "routes.json") == routes.empty()
    assert routes.empty().version == 0


def test_a_newer_document_replaces_the_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    routes.save(routes.empty(), path)
    routes.save(ROUTES, path)
    assert routes.load(path) == ROUTES
    assert [each.name for each in tmp_path.iterdir()] == ["routes.json"]


def test_a_reader_with_the_old_document_open_still_reads_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    routes.save(ROUTES, path)
    with path.open("rb") as reader:
        routes.save(routes.empty(), path)
        assert Routes.model_validate_json(reader.read()) == ROUTES


def test_a_save_that_is_cut_short_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    routes.save(ROUTES, path)
    (tmp_path / "routes.json.partial").mkdir()  # writing cannot even begin
    with pytest.raises(OSError, match="partial"):
        routes.save(routes.empty(), path)
    assert routes.load(path) == ROUTES


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", ROUTES.model_dump_json().encode()[:-10], b'{"version": 1}'],
    ids=["empty", "half an object", "null", "a list", "an empty object", "not UTF-8", "cut short", "fields missing"],
)
def test_a_file_that_is_no_document_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "routes.json"
    path.write_bytes(content)
    assert routes.load(path) is None


def test_no_file_is_none(tmp_path: Path) -> None:
    assert routes.load(tmp_path / "routes.json") is None


def test_what_cannot_be_read_at_all_is_none(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    assert routes.load(tmp_path / "directory") is None
    (tmp_path / "file").write_text("")
    assert routes.load(tmp_path / "file" / "routes.json") is None


def test_a_pipeline_through_an_unknown_service_is_refused() -> None:
    with pytest.raises(ValidationError, match="pipeline 'p' uses service 'echo-a', which is not in the document"):
        Routes(version=1, testbed="one", services={}, pipelines={"p": PIPELINE})


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", -1), ("version", "x"), ("pipelines", []), ("testbeds", "one"), ("links", {"n0": {"n1": {"latency_s": 0}}})],
)
def test_fields_that_are_wrong_are_refused(field: str, value: Any) -> None:
    good = ROUTES.model_dump()
    Routes.model_validate(good)
    with pytest.raises(ValidationError, match=field):
        Routes.model_validate(good | {field: value})


def test_a_replica_is_in_one_of_four_states() -> None:
    good = ECHO.replicas[0].model_dump()
    for state in ("starting", "standby", "ready", "draining"):
        Replica.model_validate(good | {"state": state})
    with pytest.raises(ValidationError, match="state"):
        Replica.model_validate(good | {"state": "gone"})


def test_a_link_takes_its_latency_and_the_time_of_the_bytes() -> None:
    link = ROUTES.links["n0"]["n1"]
    assert link.transfer_s(0) == 0.001
    assert link.transfer_s(500_000) == pytest.approx(0.501)


@pytest.mark.parametrize("spoiled", [{"latency_s": -1}, {"bandwidth_bytes_per_s": 0}])
def test_links_that_cannot_be_are_refused(spoiled: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(spoiled))):
        Link.model_validate({"latency_s": 0.0, "bandwidth_bytes_per_s": 1.0} | spoiled)


def test_documents_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ROUTES.version = 8  # type: ignore[misc]
