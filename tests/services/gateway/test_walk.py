"""Walking DAGs over real stages: branches, joins, and replicas that die on the way."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.dataplane import letting_out, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import NoReplica, Overloaded
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Link, Routes
from services.dataplane.routing import RetryBudget, RouteBook
from services.forward import Forwarder
from services.gateway.app import Gateway
from services.gateway.table import Table
from services.gateway.walk import Walker
from services.hotpath import Request
from services.transport import Transport
from tests.services import harness
from tests.services.harness import Doubler, Gate, chain, document, infer, outcomes, reason, replica, result, with_standbys
from tests.services.test_deadlines import closed_port, queued


def fork() -> Pipeline:
    """first -> (left, right), both answered: two branches that run at once."""
    return Pipeline(
        name="task",
        deadline_s=10.0,
        epsilon=0.05,
        steps=(
            Step(id="first", service="first", inputs={"x": "request.x"}),
            Step(id="left", service="left", inputs={"x": "first.y"}),
            Step(id="right", service="right", inputs={"x": "first.y"}),
        ),
        outputs={"left": "left.y", "right": "right.y"},
    )


@asynccontextmanager
async def forked(directory: Path, left: Gate, right: Gate) -> AsyncIterator[tuple[str, Gateway]]:
    """A gateway over `fork`, with a replica for each of its steps."""
    replicas = (replica(Doubler(), name="first"), replica(left, name="left"), replica(right, name="right"))
    async with harness.stages(*replicas) as [a, b, c]:
        kept = document([fork()], {"first": [a], "left": [b], "right": [c]})
        async with harness.gateway(kept, directory) as (url, gateway):
            yield url, gateway


async def test_branches_run_at_once(tmp_path: Path) -> None:
    left, right = Gate(), Gate()
    async with forked(tmp_path, left, right) as (url, _):
        task = asyncio.ensure_future(infer(url, "task", 1.0))
        await asyncio.to_thread(left.entered.wait)
        await asyncio.to_thread(right.entered.wait)
        left.open.set()
        right.open.set()
        answer = await task
        message = wire.decode_response(answer.body, answer.headers.get(wire.HEADER_LENGTH), wire.Limits())
        assert {t.name: t.array.tolist() for t in message.tensors} == {"left": [4.0], "right": [4.0]}


async def test_a_failing_branch_cancels_the_other(tmp_path: Path) -> None:
    left, right = Gate(), Gate()
    replicas = (replica(Doubler(), name="first"), replica(right, name="right"))
    async with harness.stages(*replicas) as [a, c]:
        kept = document([fork()], {"first": [a], "left": [closed_port()], "right": [c]})
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            holds = asyncio.ensure_future(infer(c, "right", 9.0))
            await asyncio.to_thread(right.entered.wait)
            answer = await infer(url, "task", 1.0)
            assert (answer.status, reason(answer)) == (502, "upstream_error")
            await queued_at(c, "right", 0)
            right.open.set()
            await holds
            assert outcomes(gateway.metrics.exposition().decode()) == {"failed": 1}
    assert right.batches == [[9.0]], "the other branch's work was taken out of the queue"
    left.open.set()


async def test_branches_that_run_out_of_time_together_are_one_expired_task(tmp_path: Path) -> None:
    left, right = Gate(), Gate()
    async with forked(tmp_path, left, right) as (url, gateway):
        answer = await infer(url, "task", 1.0, headers={"x-request-timeout-seconds": "0.5"})
        assert (answer.status, reason(answer)) == (504, "expired")
        assert outcomes(gateway.metrics.exposition().decode()) == {"expired": 1}
        left.open.set()
        right.open.set()


async def queued_at(url: str, service: str, count: int) -> None:
    async with asyncio.timeout(10), Transport() as http:
        while True:
            page = (await http.get(f"{url}/metrics", 5.0)).body.decode()
            if f'espalier_stage_queue_length{{node="local",stage="{service}"}} {count}.0' in page:
                return


async def test_a_dead_replica_down_the_chain_is_passed_over_by_the_stage_before_it(tmp_path: Path) -> None:
    replicas = (replica(Doubler(), name="first"), replica(Doubler(), identifier="double-1"))
    async with harness.stages(*replicas) as [a, b]:
        kept = document([chain("first", "double")], {"first": [a], "double": [closed_port(), b]})
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            for _ in range(10):
                assert result(await infer(url, "task", 1.0)) == [4.0]
            # The stage told the gateway whom it found dead, so the gateway does not choose it first any more.
            assert gateway._book.view("double-0").failures >= 1
            assert outcomes(gateway.metrics.exposition().decode()) == {"on_time": 10}


async def test_a_full_replica_is_passed_over(tmp_path: Path) -> None:
    gates = [Gate(), Gate(open_at_first=True)]
    replicas = [replica(gate, identifier=f"double-{i}", queue_capacity=1) for i, gate in enumerate(gates)]
    async with harness.stages(*replicas) as [full, free]:
        held = [asyncio.ensure_future(infer(full, "double", 1.0))]
        await asyncio.to_thread(gates[0].entered.wait)
        held.append(asyncio.ensure_future(infer(full, "double", 2.0)))
        await queued(full, 1)
        async with harness.gateway(document([chain("double")], {"double": [full, free]}), tmp_path) as (url, _):
            assert [result(await infer(url, "task", 3.0)) for _ in range(10)] == [[6.0]] * 10
        gates[0].open.set()
        await asyncio.gather(*held)


@pytest.mark.parametrize("wanted", [True, False])
async def test_the_time_line_is_told_in_headers_and_on_request_in_the_body(tmp_path: Path, wanted: bool) -> None:
    replicas = (replica(Doubler(), name="first"), replica(Doubler()))
    async with harness.stages(*replicas) as [a, b]:
        kept = document([chain("first", "double")], {"first": [a], "double": [b]})
        async with harness.gateway(kept, tmp_path) as (url, _):
            answer = await infer(url, "task", 1.0, headers={"x-request-id": "abc"}, hops=wanted)
            assert answer.headers["x-request-id"] == "abc"
            timing = answer.headers["server-timing"]
            assert all(f"{step}-{key};dur=" in timing for step in ("first", "double") for key in "qcn")
            hops = json.loads(answer.body).get("parameters", {}).get("hops", [])
            assert [hop["service"] for hop in hops] == (["first", "double"] if wanted else [])
            for hop in hops:
                assert hop["total_s"] >= hop["queue_s"] + hop["compute_s"] - 1e-5
                assert hop["transfer_s"] >= 0


async def test_trace_headers_reach_every_hop(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []

    first, second = replica(Doubler(), name="first"), replica(Doubler())
    async with harness.stages(first, second) as [a, b]:
        for each in (first, second):
            service = each._service
            assert service is not None
            inner = service._answer

            async def spy(request: Request, inner: object = inner) -> object:
                seen.append(dict(request.headers))
                return await inner(request)  # type: ignore[operator]

            service._answer = spy  # type: ignore[assignment]
        kept = document([chain("first", "double")], {"first": [a], "double": [b]})
        async with harness.gateway(kept, tmp_path) as (url, _):
            trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "k=v"}
            await infer(url, "task", 1.0, headers={**trace, "x-request-id": "abc"})
    assert len(seen) == 2
    for headers in seen:
        assert {name: headers[name] for name in (*trace, "x-request-id")} == {**trace, "x-request-id": "abc"}


class Scene:
    """A walker that knows what a test tells it of the replicas, and what it does with a task that has a second left."""

    def __init__(self, kept: Routes) -> None:
        self.book, self.told, self.now = RouteBook(), list[str](), time.monotonic()
        self.table = Table(kept)
        forwarder = Forwarder(Transport(), self.book, RetryBudget())
        self.walker = Walker(forwarder, "local", random.Random(1), wire.Limits(), lambda _, replica: self.told.append(replica))

    def waits(self, **waits_s: float) -> Scene:
        """These replicas report such a wait now, and take 0.1 s for a task."""
        for name, wait_s in waits_s.items():
            self.book.answered(name.replace("_", "-"), self.now, wait_s=wait_s, service_s=0.1, transfer_s=0.0)
        return self

    def first(self, step: int = 0) -> str:
        """The replica preferred for a step."""
        plan = self.table.plans["task"]
        hops = self.walker._hops(self.table, plan, 0, Deadline(self.now, 1.0), self.now, 0.0)
        return hops[step].candidates[0].replica

    def admit(self, budget_s: float = 1.0) -> None:
        self.walker.admit(self.table, self.table.plans["task"], Deadline(self.now, budget_s))


def two(*standbys: str, allowance: int = 1, patience: float = letting_out.SHARE) -> Routes:
    urls = {"double": [f"http://d:{i}" for i in range(4)], "last": ["http://l:1"]}
    return with_standbys(document([chain("double", "last")], urls), *standbys, allowance=allowance, patience=patience)


STANDBYS = ("double-2", "double-3")


@pytest.mark.parametrize(
    ("wait_s", "other_s", "let_out"),
    [(0.09, 0.09, False), (0.11, 0.11, True), (0.11, 0.0, False), (5.0, 5.0, True)],
    ids=["less than a quarter of its share of 0.8 s is taken", "more is taken", "somebody else is free", "too late anyway"],
)
def test_a_standby_is_let_out_when_every_queue_takes_too_much_of_the_slack(
    wait_s: float, other_s: float, let_out: bool
) -> None:
    scene = Scene(two(*STANDBYS)).waits(double_0=wait_s, double_1=other_s, last_0=0.0)
    assert (scene.first() in STANDBYS, len(scene.told)) == (let_out, let_out)


def test_where_the_routes_say_so_a_longer_wait_is_borne() -> None:
    patient = two(*STANDBYS, patience=1.0)
    for wait_s, let_out in ((0.39, False), (0.41, True)):
        scene = Scene(patient).waits(double_0=wait_s, double_1=wait_s, last_0=0.0)
        assert (scene.first() in STANDBYS) == let_out, "its share of 0.8 s is 0.4 s"


def test_a_standby_serves_later_tasks_too_and_no_second_one_is_let_out_beyond_the_allowance() -> None:
    scene = Scene(two(*STANDBYS)).waits(double_0=0.5, double_1=0.5, last_0=0.0)
    let_out = scene.first()
    scene.waits(**{let_out.replace("-", "_"): 0.1})
    assert {scene.first() for _ in range(40)} >= {let_out}
    scene.waits(**{let_out.replace("-", "_"): 0.5})
    scene.first()
    assert scene.told == [let_out]


def test_the_nearest_standby_is_let_out_unless_it_is_known_to_be_dead() -> None:
    kept = two(*STANDBYS)
    far = kept.services["double"].replicas[2].model_copy(update={"node": "far"})
    replicas = (*kept.services["double"].replicas[:2], far, kept.services["double"].replicas[3])
    services = {**kept.services, "double": kept.services["double"].model_copy(update={"replicas": replicas})}
    links = {"local": {"far": Link(latency_s=0.05, bandwidth_bytes_per_s=1e9)}}
    kept = kept.model_copy(update={"services": services, "links": links})
    assert Scene(kept).waits(double_0=0.5, double_1=0.5).first() == "double-3"
    scene = Scene(kept).waits(double_0=0.5, double_1=0.5)
    scene.book.failed("double-3", scene.now)
    assert scene.first() == "double-2"


def test_without_an_allowance_nothing_is_let_out() -> None:
    scene = Scene(two(*STANDBYS, allowance=0)).waits(double_0=5.0, double_1=5.0, last_0=0.0)
    assert scene.first() in ("double-0", "double-1")
    with pytest.raises(Overloaded):
        scene.admit()


def test_a_task_is_not_refused_for_a_wait_that_a_standby_spares_it() -> None:
    scene = Scene(two(*STANDBYS)).waits(double_0=5.0, double_1=5.0, last_0=0.0)
    scene.admit()
    scene.waits(last_0=5.0)
    with pytest.raises(Overloaded):
        scene.admit()


def test_where_nobody_is_at_work_or_alive_a_standby_stands_in() -> None:
    nobody = Scene(two("double-0", "double-1", *STANDBYS))
    nobody.admit()
    assert nobody.first() == nobody.told[0]
    dead = Scene(two(*STANDBYS))
    for replica_id in ("double-0", "double-1"):
        dead.book.failed(replica_id, dead.now)
    assert dead.first() in STANDBYS
    lost = Scene(two("double-0", "double-1", *STANDBYS))
    for i in range(4):
        lost.book.failed(f"double-{i}", lost.now)
    with pytest.raises(NoReplica):
        lost.first()
