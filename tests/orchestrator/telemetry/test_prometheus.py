from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import ValidationError

from orchestrator.telemetry import prometheus
from orchestrator.telemetry.exposition import Sample
from orchestrator.telemetry.fetch import NoAnswer
from orchestrator.telemetry.prometheus import Prometheus
from tests.orchestrator.telemetry.pages import Clock, Page

WALL = 1_700_000_000.0
LABELS = (("node", "a"), ("stage", "pool"))


def series(name: str, values: list[tuple[float, str]], instance: str = "pool-1:8000", **labels: str) -> dict[str, Any]:
    where = {"__name__": name, "instance": instance, "job": "stage", "replica": "pool-1"}
    return {"metric": {**where, "stage": "pool", "node": "a", **labels}, "values": values}


def answer(*result: dict[str, Any]) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": list(result)}}).encode()


def test_series_of_one_scrape_are_one_sample_on_our_clock() -> None:
    """The last two of three scrapes, 1.25 s and 0.25 s ago; a counter that appeared with the last is in that one only."""
    body = answer(
        series("espalier_stage_queue_length", [(WALL - 2.25, "1"), (WALL - 1.25, "2"), (WALL - 0.25, "3")]),
        series("espalier_stage_requests_total", [(WALL - 0.25, "7")], outcome="ok"),
    )
    assert prometheus.read(body, 100.0, WALL) == {
        ("pool-1:8000", "pool-1"): (
            Sample(98.75, {("stage_queue_length", LABELS): 2.0}),
            Sample(
                99.75,
                {
                    ("stage_queue_length", LABELS): 3.0,
                    ("stage_requests_total", (LABELS[0], ("outcome", "ok"), LABELS[1])): 7.0,
                },
            ),
        )
    }


def test_an_address_that_had_another_replica_before_is_two_places() -> None:
    body = answer(
        series("espalier_stage_queue_length", [(WALL - 2, "9")], replica="encode-7"),
        series("espalier_stage_queue_length", [(WALL - 1, "1")]),
    )
    assert set(prometheus.read(body, 100.0, WALL)) == {("pool-1:8000", "encode-7"), ("pool-1:8000", "pool-1")}


def test_no_sample_lies_in_the_future_and_a_clock_that_is_far_ahead_is_not_believed() -> None:
    slightly = series("espalier_stage_queue_length", [(WALL + 0.3, "1")])
    assert prometheus.read(answer(slightly), 100.0, WALL)["pool-1:8000", "pool-1"][-1].t == 100.0
    assert prometheus.read(answer(series("espalier_stage_queue_length", [(WALL + 5, "1")])), 100.0, WALL) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"{}", b'{"status":"error","errorType":"timeout","error":"query timed out"}',
        b'{"status":"success","data":{"resultType":"vector","result":[]}}',
        answer({"metric": {}, "values": [["now", "many"]]}),
    ],
)  # fmt: skip
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(ValidationError):
        prometheus.read(body, 100.0, WALL)


async def test_a_server_is_asked_once_for_all_and_bounded(pages: list[Page]) -> None:
    pages[0].text = answer(series("espalier_stage_queue_length", [(WALL, "3")])).decode()
    server = Prometheus(f"{pages[0].url}/", Clock(), lambda: WALL)
    assert (await server.newest())["pool-1:8000", "pool-1"] == (Sample(100.0, {("stage_queue_length", LABELS): 3.0}),)
    (asked,) = pages[0].asked
    assert urlsplit(asked).path == "/api/v1/query"
    assert parse_qs(urlsplit(asked).query) == {"query": [prometheus.QUERY], "timeout": ["400ms"]}
    pages[0].text = "something else"
    with pytest.raises(NoAnswer, match="not the answer of a Prometheus server"):
        await server.newest()
    await server.close()
