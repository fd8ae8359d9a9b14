"""Walking DAGs over real stages: branches, joins, and replicas that die on the way."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from services.dataplane import wire
from services.dataplane.pipeline import Pipeline, Step
from services.hotpath import Request
from services.transport import Transport
from tests.services import harness
from tests.services.harness import Doubler, Gate, chain, document, infer, outcomes, reason, replica, result
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


async def test_branches_run_at_once(tmp_path: Path) -> None:
    left, right = Gate(), Gate()
    replicas = (replica(Doubler(), name="first"), replica(left, name="left"), replica(right, name="right"))
    async with harness.stages(*replicas) as [a, b, c]:
        kept = document([fork()], {"first": [a], "left": [b], "right": [c]})
        async with harness.gateway(kept, tmp_path) as (url, _):
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
