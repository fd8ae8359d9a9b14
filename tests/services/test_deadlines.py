"""docs/deadlines.md, sentence by sentence: test_dN is the test of sentence DN."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from models.manifest import ServiceLaw
from services import server
from services.dataplane import deadline, itinerary, wire
from services.dataplane.batching import DeadlineQueue, Waiting, next_batch
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest
from services.dataplane.generation import GenerationEstimate, Member, next_to_join
from services.dataplane.itinerary import Candidate, Hop
from services.dataplane.routing import RetryBudget, RouteBook
from services.dataplane.service_time import ServiceEstimate
from services.dataplane.streams import Pace
from services.dataplane.wire import Array, Message, Tensor
from services.forward import Call, Forwarder
from services.gateway import openai
from services.hotpath import Answer, Endpoint, Front, Request, Stream
from services.transport import Transport
from tests.services import generative, harness
from tests.services.harness import (
    Doubler,
    Gate,
    chain,
    document,
    infer,
    numbers,
    outcomes,
    reason,
    replica,
    result,
    with_standbys,
)
from tests.services.test_streams import Client, asking, begun, connected, until
from tests.services.test_streams import counted as counted_stream

DOCUMENT = Path(__file__).parents[2] / "docs" / "deadlines.md"


def test_every_sentence_has_a_test_and_every_test_a_sentence() -> None:
    sentences = set(re.findall(r"^- \*\*D(\d+)\*\*", DOCUMENT.read_text(), re.MULTILINE))
    tests = {m.group(1) for name in vars(sys.modules[__name__]) if (m := re.match(r"test_d(\d+)_", name))}
    assert sentences == tests


async def counted(gateway: Any) -> dict[str, int]:
    return outcomes(gateway.metrics.exposition().decode())


# --- reading it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "content", "status"),
    [
        ("task", b"{", 400),
        ("task", b'{"inputs": []}', 400),
        ("nothing", harness.body(1.0), 404),
        ("task", b" " * 2000, 413),
    ],
)
async def test_d1_a_malformed_request_has_no_outcome(tmp_path: Path, model: str, content: bytes, status: int) -> None:
    async with harness.stages(replica(Doubler())) as [stage]:
        kept = document([chain("double")], {"double": [stage]})
        async with harness.gateway(kept, tmp_path, limits=wire.Limits(body_bytes=1000)) as (url, gateway), Transport() as http:
            answer = await http.post(f"{url}/v2/models/{model}/infer", content, {}, 5.0)
            assert answer.status == status
            assert await counted(gateway) == {}
            assert "espalier_bad_requests_total" in gateway.metrics.exposition().decode()


FORMS: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"x-request-timeout-seconds": "1.5"}, {}),
    ({"grpc-timeout": "2500m"}, {}),
    ({"x-envoy-expected-rq-timeout-ms": "3500"}, {}),
    ({}, {"timeout": 4_500_000}),
    ({}, {}),
]


@pytest.mark.parametrize("first", range(len(FORMS)))
def test_d2_the_first_form_present_counts(first: int) -> None:
    headers: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    for more_headers, more_parameters in FORMS[first:]:
        headers |= more_headers
        parameters |= more_parameters
    budget = deadline.read_budget_s(headers, parameters, default_s=5.5, maximum_s=60.0)
    assert budget == pytest.approx(1.5 + first)


async def test_d3_a_budget_over_a_minute_is_a_minute(tmp_path: Path) -> None:
    gate = Gate()
    async with harness.stages(replica(gate)) as [stage]:
        async with harness.gateway(document([chain("double")], {"double": [stage]}), tmp_path) as (url, gateway):
            gate.open.set()
            service = gateway._service
            assert service is not None
            until = service.deadline(service.plan("task"), Request({}, {"x-request-timeout-seconds": "9000"}, b"", 0.0), {})
            assert until.budget_s == 60.0
            assert (await infer(url, "task", 1.0, headers={"x-request-timeout-seconds": "9000"})).status == 200


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", ""])
async def test_d4_a_budget_must_be_a_positive_time(tmp_path: Path, text: str) -> None:
    async with harness.stages(replica(Doubler())) as [stage]:
        async with harness.gateway(document([chain("double")], {"double": [stage]}), tmp_path) as (url, _):
            answer = await infer(url, "task", 1.0, headers={"x-request-timeout-seconds": text})
            assert (answer.status, reason(answer)) == (400, "bad_request")


async def test_d5_a_slow_upload_spends_its_own_time(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler())) as [stage]:
        kept = document([chain("double", deadline_s=0.2)], {"double": [stage]})
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            content = harness.body(1.0)
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            head = f"POST /v2/models/task/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content[:5])
            await asyncio.sleep(0.25)  # the upload itself is what takes the time here
            writer.write(content[5:])
            assert b" 504 " in await reader.readline()
            assert await counted(gateway) == {"expired": 1}
            writer.close()


# --- on the way -----------------------------------------------------------------------------------------------------------


async def test_d6_a_hop_is_told_what_remains() -> None:
    seen: list[dict[str, Any]] = []

    async def stage(request: Request) -> Answer:
        message = wire.decode_request(request.body, request.headers.get(wire.HEADER_LENGTH), wire.Limits())
        seen.append(dict(message.parameters))
        tensor = Tensor("next.y", "FP32", numbers(4.0))
        encoded, length = wire.encode_response(Message((tensor,), binary=True), model="next")
        reports = itinerary.headers({"replica": "next-0", "total_s": 0.0}, None)
        return Answer(200, [(wire.HEADER_LENGTH.encode(), str(length).encode()), *reports], encoded)

    recorder = Front(FastAPI())
    recorder.open(Endpoint(stage, body_limit=10_000), {"/": Endpoint(stage, body_limit=10_000)})
    async with harness.serving(recorder) as following, harness.stages(replica(Doubler())) as [first]:
        hops = (
            Hop("double", "double", (), {"x": "request.x"}, ("double.y",), 0.0),
            Hop("next", "next", (Candidate("next-0", following),), {"x": "double.y"}, ("next.y",), 0.0),
        )
        parameters = {itinerary.PARAMETER: itinerary.to_parameter(hops), "timeout": 900_000}
        content, length = wire.encode_request(Message((Tensor("request.x", "FP32", numbers(1.0)),), parameters=parameters))
        async with Transport() as http:
            answer = await http.post(f"{first}/v2/models/double/infer", content, {wire.HEADER_LENGTH: str(length)}, 5.0)
    assert answer.status == 200
    (told,) = seen
    assert 0 < told["timeout"] < 900_000
    assert set(told) == {itinerary.PARAMETER, "timeout", "binary_data_output"}, "nothing else about time is said"


def waiting(due: float, items: int = 1, length: int = 1) -> Waiting[str]:
    return Waiting(f"{due}", due, items, (length,), 0.0, 0.01)


async def test_d7_the_most_urgent_task_is_computed_first() -> None:
    gate = Gate()
    async with harness.stages(replica(gate)) as [url]:
        first = asyncio.ensure_future(infer(url, "double", 0.0, timeout=20_000_000))
        await asyncio.to_thread(gate.entered.wait)
        later = []
        for value, seconds in ((1.0, 19), (2.0, 9), (3.0, 14)):
            later.append(asyncio.ensure_future(infer(url, "double", value, timeout=seconds * 1_000_000)))
            await queued(url, len(later))
        gate.open.set()
        await asyncio.gather(first, *later)
    assert gate.batches == [[0.0], [2.0], [3.0], [1.0]]


async def queued(url: str, count: int) -> None:
    """Wait until the stage's queue holds that many tasks."""
    async with asyncio.timeout(10), Transport() as http:
        while True:
            page = (await http.get(f"{url}/metrics", 5.0)).body.decode()
            if f'espalier_stage_queue_length{{node="local",stage="double"}} {count}.0' in page:
                return


async def test_d8_a_task_that_would_not_be_done_in_time_is_dropped_before_it_is_computed() -> None:
    class Slow(Gate):
        """Takes a tenth of a second, also when it is warmed up, so the stage knows."""

        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            self.batches.append([])
            self.open.wait(0.1)
            return {"y": inputs["x"]}

    slow = Slow()
    async with harness.stages(replica(slow)) as [url]:
        computed = len(slow.batches)
        answer = await infer(url, "double", 1.0, timeout=50_000)
        assert (answer.status, reason(answer)) == (504, "would_expire")
        assert len(slow.batches) == computed


async def test_d9_a_task_that_expires_in_the_queue_is_never_computed() -> None:
    gate = Gate()
    async with harness.stages(replica(gate)) as [url]:
        first = asyncio.ensure_future(infer(url, "double", 1.0, timeout=20_000_000))
        await asyncio.to_thread(gate.entered.wait)
        second = asyncio.ensure_future(infer(url, "double", 2.0, timeout=100_000))
        await queued(url, 1)
        await asyncio.sleep(0.15)  # the deadline is what must pass
        gate.open.set()
        answer = await second
        assert (answer.status, reason(answer)) == (504, "expired_in_queue")
        assert (await first).status == 200
    assert gate.batches == [[1.0]]


@pytest.mark.parametrize(("due", "together"), [(0.25, 2), (0.15, 1)])
def test_d10_a_batch_stops_growing_where_its_most_urgent_member_would_be_late(due: float, together: int) -> None:
    queue: DeadlineQueue[str] = DeadlineQueue(8)
    for each in (due, 9.0):
        queue.push(waiting(each))
    law = ServiceLaw(base_s=0.0, per_unit_s=0.1, tail_ratio=1.0)
    batch, doomed = next_batch(queue, 0.0, ServiceEstimate(law), 8)
    assert (len(batch), doomed) == (together, [])


async def test_d11_at_the_deadline_the_gateway_answers_without_waiting(tmp_path: Path) -> None:
    gate = Gate()
    async with harness.stages(replica(gate)) as [stage]:
        kept = document([chain("double", deadline_s=0.2)], {"double": [stage]})
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            answer = await infer(url, "task", 1.0)
            assert gate.entered.is_set()
            assert not gate.open.is_set(), "the stage is still at work"
            assert (answer.status, reason(answer)) == (504, "expired")
            assert await counted(gateway) == {"expired": 1}
            gate.open.set()


async def test_d12_at_the_deadline_work_not_begun_is_cancelled_and_begun_work_ends(tmp_path: Path) -> None:
    gate = Gate()
    async with harness.stages(replica(gate)) as [stage]:
        kept = document([chain("double", deadline_s=0.3)], {"double": [stage]})
        async with harness.gateway(kept, tmp_path) as (url, _):
            begun = asyncio.ensure_future(infer(url, "task", 1.0))
            await asyncio.to_thread(gate.entered.wait)
            not_begun = asyncio.ensure_future(infer(url, "task", 2.0))
            assert {(await begun).status, (await not_begun).status} == {504}
            await queued(stage, 0)
            gate.open.set()
            assert result(await infer(stage, "double", 3.0)) == [6.0], "the stage serves on"
    assert gate.batches == [[1.0], [3.0]]


async def test_d13_an_answer_complete_after_the_deadline_is_sent_and_counts_as_late(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler())) as [stage]:
        async with harness.gateway(document([chain("double")], {"double": [stage]}), tmp_path) as (_, gateway):
            service = gateway._service
            assert service is not None

            class Tardy:
                """A walk whose last step ends just after the deadline."""

                def admit(self, *_: Any) -> None: ...

                async def run(self, *arguments: Any) -> Any:
                    until: Deadline = arguments[3]
                    while until.remaining_s(asyncio.get_running_loop().time()) > 0:
                        await asyncio.sleep(0.01)
                    return {"double.y": Tensor("double.y", "FP32", numbers(2.0))}, []

            service._walker = Tardy()  # type: ignore[assignment]
            plan = service.plan("task")
            answered = await service.run(plan, {}, Deadline(asyncio.get_running_loop().time(), 0.05), {})
            assert answered.tensors["y"].array.tolist() == [2.0]
            await asyncio.sleep(0)  # counted at the loop's next turn
            assert await counted(gateway) == {"late": 1}


# --- when the client goes away --------------------------------------------------------------------------------------------


async def test_d14_a_client_that_leaves_cancels_its_task_at_every_hop(tmp_path: Path) -> None:
    gate = Gate()
    first, second = replica(Doubler(), name="first"), replica(gate, name="double")
    async with harness.stages(first, second) as [front, back]:
        kept = document([chain("first", "double", deadline_s=20.0)], {"first": [front], "double": [back]})
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            holds = asyncio.ensure_future(infer(url, "task", 1.0))
            await asyncio.to_thread(gate.entered.wait)
            leaves = asyncio.ensure_future(infer(url, "task", 50.0))
            await queued(back, 1)
            leaves.cancel()
            await queued(back, 0)
            gate.open.set()
            assert result(await holds) == [4.0]
            assert await counted(gateway) == {"on_time": 1, "cancelled": 1}
            assert first.in_flight == second.in_flight == 0
    assert gate.batches == [[2.0]]


# --- trying again ---------------------------------------------------------------------------------------------------------


def closed_port() -> str:
    """An address where nobody listens."""
    import socket  # noqa: PLC0415

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_d15_a_hop_that_cannot_be_reached_is_tried_once_more_elsewhere(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler(), identifier="double-1")) as [alive]:
        kept = document([chain("double")], {"double": [closed_port(), alive]})
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            assert [result(await infer(url, "task", 1.0)) for _ in range(20)] == [[2.0]] * 20
            assert await counted(gateway) == {"on_time": 20}


async def test_d15_and_a_second_failure_is_the_answer(tmp_path: Path) -> None:
    kept = document([chain("double")], {"double": [closed_port(), closed_port(), closed_port()]})
    async with harness.gateway(kept, tmp_path) as (url, gateway):
        answer = await infer(url, "task", 1.0)
        assert (answer.status, reason(answer)) == (502, "upstream_error")
        assert await counted(gateway) == {"failed": 1}


@pytest.mark.parametrize(("least_s", "tried"), [(0.0, 2), (60.0, 1)])
async def test_d16_no_second_try_without_time_for_the_rest(least_s: float, tried: int) -> None:
    loop = asyncio.get_running_loop()
    candidates = [Candidate(str(i), closed_port() + "/") for i in range(2)]
    call = Call("double", candidates, (b"",), None, due=loop.time() + 5, least_s=least_s)
    async with Transport() as http:
        with pytest.raises(Exception, match="could not be reached"):
            await Forwarder(http, RouteBook(), RetryBudget()).post(call)
    assert len(call.failed) == tried


def test_d17_retries_are_a_tenth_of_requests_beyond_the_reserve() -> None:
    budget = RetryBudget()
    requests, retries = 10_000, 0
    for _ in range(requests):
        budget.request()
        retries += budget.allow()
    assert retries <= 0.1 * requests + 100
    assert retries >= 0.1 * requests


# --- streams --------------------------------------------------------------------------------------------------------------


async def test_d26_a_stream_without_a_token_by_its_deadline_has_expired(tmp_path: Path) -> None:
    async with generative.served(tmp_path, deadline_s=0.3) as served:
        served.graph.hold()
        async with asking(served) as client:
            assert await client.begin() == 504
            assert b"transfer-encoding" not in client.head
        await until(lambda: counted_stream(served) == {"expired": 1})
        await until(lambda: served.gateway.in_flight == 0)


@pytest.mark.parametrize(("token_deadline_s", "outcome"), [(0.5, "late"), (60.0, "on_time"), (None, "on_time")])
async def test_d27_a_wait_between_tokens_makes_a_stream_late(
    tmp_path: Path, token_deadline_s: float | None, outcome: str
) -> None:
    async with generative.served(tmp_path, deadline_s=60.0, token_deadline_s=token_deadline_s) as served:
        async with begun(served, max_tokens=3) as client:
            await asyncio.sleep(0.6)  # the wait itself is what the sentence is about
            served.graph.free()
            assert (await client.rest())[-1] == "DONE"
        await until(lambda: counted_stream(served) == {outcome: 1})


async def test_d27_time_in_which_the_client_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    async with generative.served(tmp_path, token_deadline_s=0.25) as served:
        service = served.gateway._service
        assert service is not None
        plan = service.plan("write")
        request = {
            "request.text": openai.texts("text", [b"ade"]),
            "request.max_tokens": Tensor("max_tokens", "INT64", np.array([20])),
        }
        states = service.stream(plan, request, Deadline(asyncio.get_running_loop().time(), 20.0), {})
        served.graph.hold()
        served.graph.allow()
        await anext(states)
        served.graph.free()
        await asyncio.sleep(0.5)  # whoever reads takes that long
        assert [state.tensors["output_count"].array.tolist() async for state in states][-1] == [20]
        await until(lambda: counted_stream(served) == {"on_time": 1})


@pytest.mark.parametrize(("deadline_s", "token_deadline_s"), [(60.0, 0.1), (1.0, None)])
async def test_d28_a_stream_of_which_nothing_more_comes_ends_with_an_error(
    tmp_path: Path, deadline_s: float, token_deadline_s: float | None
) -> None:
    async with generative.served(tmp_path, deadline_s=deadline_s, token_deadline_s=token_deadline_s) as served:
        async with begun(served) as client:
            (error,) = await client.rest()
            assert error["error"]["code"] == "expired"
        await until(lambda: counted_stream(served) == {"expired": 1})
    assert Pace.of(token_deadline_s, deadline_s).stall_s == pytest.approx(1.0)


async def test_d29_an_error_after_the_first_token_is_told_in_the_stream_and_nothing_follows(tmp_path: Path) -> None:
    async with generative.served(tmp_path) as served:
        async with begun(served) as client:
            harness.break_off(served.stages["generate"])
            events = await client.rest()
            assert [event["error"]["code"] for event in events] == ["upstream_error"]
        await until(lambda: counted_stream(served) == {"failed": 1})


@pytest.mark.parametrize("leaves", [True, False])
async def test_d30_the_token_being_made_is_the_last(tmp_path: Path, leaves: bool) -> None:
    async with generative.served(tmp_path) as served:
        served.graph.hold()
        served.graph.allow(3)
        ask = {"model": "write", "prompt": "ade", "max_tokens": 40}
        async with asking(served) if leaves else asking_whole(served, 0.5, **ask):
            assert await asyncio.to_thread(served.graph.waits.wait, 10)
            if not leaves:
                await until(lambda: counted_stream(served) == {"expired": 1})
        await until(lambda: served.replicas["generate"].in_flight == 0)
        served.graph.allow()  # the fourth had begun
        await until(lambda: served.graph.runs == 4)
        served.graph.free()
        async with asking_whole(served, 20.0, **(ask | {"max_tokens": 2})) as client:
            assert await client.begin() == 200
        assert served.graph.runs == 4 + 2
        assert set(counted_stream(served)) == {"cancelled" if leaves else "expired", "on_time"}


async def test_d31_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WRITE_S", 0.2)
    closed = asyncio.Event()
    asked = 0

    async def pieces() -> AsyncGenerator[bytes]:
        nonlocal asked
        try:
            while True:
                asked += 1
                yield b"x" * 100_000
        finally:
            closed.set()

    async def stream(request: Request) -> Stream:
        return Stream(200, [], pieces())

    front = Front(FastAPI())
    front.open(Endpoint(stream, body_limit=1000))
    async with harness.serving(front) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1000)
        writer.write(b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        async with asyncio.timeout(20):
            await closed.wait()
        assert asked < 1000, "no more was asked for than the buffers on the way hold"
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(10**12)
        writer.close()


def joining(due: float, rows: int = 1, tokens: int = 1, length: int = 10) -> Waiting[Any]:
    return Waiting(SimpleNamespace(tokens=tokens), due, rows, (length,), 0.0, 0.1)


PREFILL = ServiceLaw(base_s=0.0, per_unit_s=0.01, tail_ratio=1.5)
STEP = ServiceLaw(base_s=0.02, per_unit_s=0.01, tail_ratio=1.0)
"""A prompt of 10 tokens is read in 0.1 s, with bad luck 0.15 s; a step takes 0.02 s and 0.01 s for each sequence."""


@pytest.mark.parametrize(
    ("member", "joins"),
    [
        (Member(due=0.14, rows=1, steps=1.0), True),
        (Member(due=0.13, rows=1, steps=1.0), False),
        (Member(due=0.3, rows=1, steps=6.0), False),
        (Member(due=0.35, rows=1, steps=6.0), True),
        (Member(due=0.02, rows=1, steps=1.0), True),
        (Member(due=math.inf, rows=3, steps=1.0), True),
        (Member(due=math.inf, rows=4, steps=1.0), False),
    ],
    ids=[
        "the next token waits 0.1 s and takes 0.04 s",
        "and would be late",
        "the rest of an answer would be late",
        "and would not",
        "late without it as well",
        "nobody minds",
        "no room",
    ],
)
def test_d32_a_task_joins_while_everybody_stays_in_time(member: Member, joins: bool) -> None:
    queue: DeadlineQueue[Any] = DeadlineQueue(8)
    later, urgent = joining(9.0), joining(8.0)
    for each in (later, urgent):
        queue.push(each)
    taken, doomed = next_to_join(queue, [member], 0.0, GenerationEstimate(PREFILL, STEP), max_rows=4)
    assert doomed == []
    assert taken is (urgent if joins else None)
    assert len(queue) == (1 if joins else 2)


@pytest.mark.parametrize(
    ("tokens", "shares", "due", "dropped"),
    [(1, [1.0], 0.16, False), (1, [1.0], 0.14, True), (11, [1.0], 0.46, False), (11, [1.0], 0.44, True), (11, [], 0.16, False)],
    ids=["a stream's first token", "not in time", "eleven tokens", "not in time", "nothing known of how many they will be"],
)
def test_d33_a_task_is_dropped_when_its_tokens_would_probably_not_be_there(
    tokens: int, shares: list[float], due: float, dropped: bool
) -> None:
    estimate = GenerationEstimate(PREFILL, STEP)
    for share in shares:
        estimate.answered(int(share * 10), 10)
    queue: DeadlineQueue[Any] = DeadlineQueue(8)
    queue.push(task := joining(due, tokens=tokens))
    assert next_to_join(queue, [], 0.0, estimate, 4) == ((None, [task]) if dropped else (task, []))


async def test_d33_and_is_told_so(tmp_path: Path) -> None:
    async with generative.served(tmp_path) as served:
        slow = ServiceEstimate(ServiceLaw(base_s=30.0, per_unit_s=0.0, tail_ratio=1.0))
        worker: Any = served.replicas["generate"]._service
        worker._worker._estimate.prefill = slow
        async with asking(served) as client:
            assert await client.begin() == 504
            assert json.loads(await client.body())["error"]["code"] == "would_expire"


def asking_whole(served: generative.House, seconds: float, **fields: Any) -> AbstractAsyncContextManager[Client]:
    """The same task, asked for as a whole answer."""
    return connected(served, fields, f"x-request-timeout-seconds: {seconds}\r\n".encode())


# --- refusing -------------------------------------------------------------------------------------------------------------


async def test_d18_a_task_with_no_hope_is_refused_at_the_door(tmp_path: Path) -> None:
    gate = Gate()
    async with harness.stages(replica(gate)) as [stage]:
        async with harness.gateway(document([chain("double")], {"double": [stage]}), tmp_path) as (url, gateway):
            gate.open.set()
            now = asyncio.get_running_loop().time()
            gateway._book.answered("double-0", now, wait_s=30.0, service_s=0.1, transfer_s=0.001)
            answer = await infer(url, "task", 1.0)
            assert (answer.status, reason(answer)) == (429, "overloaded")
            assert 20 <= int(answer.headers["retry-after"]) <= 30
            assert await counted(gateway) == {"rejected": 1}
    assert gate.batches == []


async def test_d19_a_full_queue_answers_429() -> None:
    gate = Gate()
    async with harness.stages(replica(gate, queue_capacity=1)) as [url]:
        tasks = [asyncio.ensure_future(infer(url, "double", 1.0))]
        await asyncio.to_thread(gate.entered.wait)
        tasks.append(asyncio.ensure_future(infer(url, "double", 2.0)))
        await queued(url, 1)
        answer = await infer(url, "double", 3.0)
        assert (answer.status, reason(answer)) == (429, "queue_full")
        gate.open.set()
        assert [result(await task) for task in tasks] == [[2.0], [4.0]]


async def test_d20_every_429_says_when_to_come_back(tmp_path: Path) -> None:
    gate = Gate()
    async with harness.stages(replica(gate, queue_capacity=1)) as [stage]:
        kept = document([chain("double")], {"double": [stage]})
        async with harness.gateway(kept, tmp_path, max_in_flight=2) as (url, _):
            tasks = [asyncio.ensure_future(infer(stage, "double", 1.0))]
            await asyncio.to_thread(gate.entered.wait)
            tasks.append(asyncio.ensure_future(infer(stage, "double", 2.0)))
            await queued(stage, 1)
            for address, model in ((stage, "double"), (url, "task")):
                answer = await infer(address, model, 3.0)
                assert answer.status == 429
                assert int(answer.headers["retry-after"]) >= 1
            gate.open.set()
            await asyncio.gather(*tasks)


async def test_d21_no_ready_replica_is_503(tmp_path: Path) -> None:
    async with harness.gateway(document([chain("double")], {"double": []}), tmp_path) as (url, gateway):
        answer = await infer(url, "task", 1.0)
        assert (answer.status, reason(answer)) == (503, "no_replica")
        assert json.loads(answer.body)["stage"] == "double"
        assert await counted(gateway) == {"rejected": 1}


async def test_d24_a_standby_is_let_out_for_a_task_that_would_wait_too_long(tmp_path: Path) -> None:
    """Ten seconds of deadline, one hop: a quarter of the slack of 9.9 s may be waited for."""
    held, free = Gate(), Gate(open_at_first=True)
    stages = (replica(held, identifier="double-0"), replica(free, identifier="double-1"))
    async with harness.stages(*stages) as urls:
        kept = with_standbys(document([chain("double", deadline_s=10.0)], {"double": urls}), "double-1")
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            now = asyncio.get_running_loop().time()
            gateway._book.answered("double-0", now, wait_s=2.0, service_s=0.1, transfer_s=0.0)
            waiting = asyncio.ensure_future(infer(url, "task", 1.0))
            assert await asyncio.to_thread(held.entered.wait, 10.0)
            gateway._book.answered("double-0", now, wait_s=9.0, service_s=0.1, transfer_s=0.0)
            assert [result(await infer(url, "task", 2.0)) for _ in range(3)] == [[4.0]] * 3
            held.open.set()
            assert result(await waiting) == [2.0]
            assert await counted(gateway) == {"on_time": 4}
    assert (held.batches, free.batches) == ([[1.0]], [[2.0]] * 3)


async def test_d25_a_standby_stands_in_where_nobody_is_alive(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler(), identifier="double-1")) as [alive]:
        kept = document([chain("double")], {"double": [closed_port(), alive]})
        for allowance, status in ((0, 503), (1, 200)):
            nobody = with_standbys(kept, "double-0", "double-1", allowance=allowance)
            async with harness.gateway(nobody, tmp_path) as (url, gateway):
                gateway._book.failed("double-0", asyncio.get_running_loop().time())
                assert (await infer(url, "task", 1.0)).status == status
        async with harness.gateway(with_standbys(kept, "double-1"), tmp_path) as (url, gateway):
            now = asyncio.get_running_loop().time()
            gateway._book.answered("double-0", now, wait_s=30.0, service_s=0.1, transfer_s=0.0)
            assert result(await infer(url, "task", 1.0)) == [2.0]
            assert await counted(gateway) == {"on_time": 1}


async def test_d22_every_error_has_one_shape(tmp_path: Path) -> None:
    gate = Gate()
    async with harness.stages(replica(gate)) as [stage]:
        kept = document([chain("double", deadline_s=0.1)], {"double": [stage]})
        async with harness.gateway(kept, tmp_path) as (url, _), Transport() as http:
            answers = [
                await http.post(f"{url}/v2/models/task/infer", b"{", {}, 5.0),
                await http.post(f"{url}/v2/models/none/infer", b"{}", {}, 5.0),
                await http.get(f"{url}/v2/models/none", 5.0),
                await http.get(f"{url}/nowhere", 5.0),
                await http.get(f"{url}/v2/models/task/infer", 5.0),
                await http.post(f"{stage}/v2/models/double/infer", b"{", {}, 5.0),
                await infer(url, "task", 1.0),
            ]
            gate.open.set()
    for answer in answers:
        told = json.loads(answer.body)
        assert answer.status >= 400
        assert isinstance(told["error"], str)
        assert isinstance(told["reason"], str)
        assert set(told) <= {"error", "reason", "stage", "budget_ms", "elapsed_ms", "hops"}
    expired = json.loads(answers[-1].body)
    assert expired["stage"] == "double"
    assert expired["budget_ms"] == 100
    assert expired["elapsed_ms"] >= 100


# --- counting -------------------------------------------------------------------------------------------------------------


async def test_d23_every_task_is_counted_once(tmp_path: Path) -> None:
    gate = Gate(open_at_first=True)
    async with harness.stages(replica(gate, queue_capacity=4)) as [stage]:
        kept = document([chain("double")], {"double": [stage]})
        async with harness.gateway(kept, tmp_path) as (url, gateway):
            tasks = [asyncio.ensure_future(infer(url, "task", float(i), timeout=1 + 1000 * (i % 40))) for i in range(120)]
            for task in tasks[::7]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            answered = sum(not isinstance(each, BaseException) for each in done)
            while gateway.in_flight:
                await asyncio.sleep(0.01)
            counts = await counted(gateway)
            assert sum(counts.values()) - counts.get("cancelled", 0) == answered
            assert sum(counts.values()) <= 120
            assert set(counts) <= {"on_time", "late", "expired", "rejected", "failed", "cancelled"}


def test_a_malformed_itinerary_is_a_bad_request() -> None:
    cases: list[Any] = [1, [], [{}], [{"step": 1}], [[]] * 40]
    for nonsense in cases:
        with pytest.raises(BadRequest):
            itinerary.from_parameter(nonsense)
