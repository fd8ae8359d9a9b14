from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from orchestrator import app
from orchestrator.errors import Conflict, Infeasible, RunFailed, UsageError
from orchestrator.routes import Caller
from services.dataplane import routes as document
from services.dataplane.routes import Routes


class Panel:
    """Controls that write down what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.refusal: Exception | None = None
        self.answer: Routes | None = document.empty()

    def status(self) -> dict[str, Any]:
        return {"testbed": "small"}

    def exposition(self) -> bytes:
        return b"espalier_build_info 1\n"

    def targets(self) -> list[dict[str, Any]]:
        return [{"targets": ["127.0.0.1:4001"], "labels": {"job": "stage", "replica": "pool-1"}}]

    async def routes(self, after: int, wait_s: float, gateway: Caller | None) -> Routes | None:
        self.asked.append(("routes", after, wait_s, gateway))
        return self.answer

    def scale(self, service: str, replicas: int | None, standby: int | None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(("scale", service, replicas, standby))

    def let_out(self, service: str, replica: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(("let_out", service, replica))

    def restart(self, services: list[str] | None) -> None:
        self.asked.append(("restart", services))

    def update(self, text: str, name: str, limit_s: float) -> None:
        self.asked.append(("update", text, name, limit_s))

    def drain(self, node: str) -> None:
        self.asked.append(("drain", node))

    def undrain(self, node: str) -> None:
        self.asked.append(("undrain", node))

    async def probe(self, a: str, b: str) -> dict[str, Any]:
        self.asked.append(("probe", a, b))
        return {"between": [a, b]}

    def shut_down(self) -> None:
        self.asked.append(("shut_down",))


@pytest.fixture
def panel() -> Panel:
    return Panel()


@pytest.fixture
async def client(panel: Panel) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app.build(panel)), base_url="http://test") as found:
        yield found


async def test_a_poll_for_routes_is_passed_on_and_answered(panel: Panel, client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/routes", params={"after": 3, "wait": 1.5, "gateway": "g"})
    assert Routes.model_validate_json(answer.content) == document.empty()
    assert panel.asked == [("routes", 3, 1.5, Caller("g"))]
    panel.asked.clear()
    await client.get("/v1/routes", params={"gateway": "g", "node": "edge-2", "port": 8080})
    assert panel.asked == [("routes", 0, 0.0, Caller("g", "edge-2", "http://127.0.0.1:8080"))]
    panel.answer = None
    assert (await client.get("/v1/routes")).status_code == 304


async def test_a_link_is_measured(panel: Panel, client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/probe", json={"between": ["a", "b"]})
    assert (answer.json(), panel.asked) == ({"between": ["a", "b"]}, [("probe", "a", "b")])
    assert (await client.post("/v1/probe", json={"between": ["a"]})).status_code == 400


async def test_orders_are_passed_on(panel: Panel, client: httpx.AsyncClient) -> None:
    for path, body in (
        ("/v1/scale", {"service": "pool", "replicas": 2}),
        ("/v1/scale", {"service": "pool", "replicas": 2, "standby": 1}),
        ("/v1/scale", {"service": "pool", "replicas": None}),
        ("/v1/drain", {"node": "edge-1"}),
        ("/v1/undrain", {"node": "edge-1"}),
        ("/v1/restart", {}),
        ("/v1/restart", {"services": ["pool"]}),
        ("/v1/update", {"testbed": "name: small", "name": "small.yaml", "limit": 60}),
        ("/v1/shutdown", {}),
    ):
        assert (await client.post(path, json=body)).status_code == 202
    assert panel.asked == [
        ("scale", "pool", 2, None), ("scale", "pool", 2, 1), ("scale", "pool", None, None),
        ("drain", "edge-1"), ("undrain", "edge-1"),
        ("restart", None), ("restart", ["pool"]), ("update", "name: small", "small.yaml", 60.0), ("shut_down",),
    ]  # fmt: skip


async def test_a_standby_that_a_gateway_has_let_out_is_put_to_work_or_refused(panel: Panel, client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/let-out", json={"service": "pool", "replica": "pool-2"})
    assert (answer.status_code, answer.json(), panel.asked) == (200, {"let_out": True}, [("let_out", "pool", "pool-2")])
    for refusal, status in ((UsageError("no such replica"), 400), (Infeasible("the allowance is spent"), 409)):
        panel.refusal = refusal
        assert (await client.post("/v1/let-out", json={"service": "pool", "replica": "pool-2"})).status_code == status


@pytest.mark.parametrize(
    ("refusal", "status", "reason"),
    [
        (UsageError("no such service"), 400, "bad_request"),
        (Infeasible("no room"), 409, "infeasible"),
        (Conflict("an update is under way"), 423, "busy"),
        (RunFailed("broken"), 503, "unavailable"),
    ],
)
async def test_a_refusal_says_why(
    panel: Panel, client: httpx.AsyncClient, refusal: Exception, status: int, reason: str
) -> None:
    panel.refusal = refusal
    answer = await client.post("/v1/scale", json={"service": "pool", "replicas": 2})
    assert (answer.status_code, answer.json()) == (status, {"error": str(refusal), "reason": reason})


@pytest.mark.parametrize(
    "body", [{}, {"service": "pool"}, {"service": "pool", "replicas": -1}, {"service": "p", "replicas": 1, "x": 1}]
)
async def test_nonsense_is_refused(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await client.post("/v1/scale", json=body)
    assert (answer.status_code, answer.json()["reason"]) == (400, "bad_request")


async def test_a_server_is_told_whom_to_scrape(panel: Panel, client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/targets")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == panel.targets()


async def test_status_metrics_and_health_answer(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/status")).json() == {"testbed": "small"}
    assert (await client.get("/metrics")).headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (await client.get("/health")).status_code == 200


async def test_one_that_waits_lives_and_sends_everybody_elsewhere() -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app.waiting()), base_url="http://test") as found:
        assert (await found.get("/health")).status_code == 200
        for answer in (await found.get("/v1/routes"), await found.post("/v1/scale", json={})):
            assert (answer.status_code, answer.json()["reason"], answer.headers["connection"]) == (503, "unavailable", "close")
