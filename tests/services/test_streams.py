"""Streamed answers over real HTTP, with a decoder whose every step the test allows: what is sent when, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from services.dataplane.deadline import Deadline
from services.gateway.openai import texts
from services.gateway.table import Table
from services.transport import Transport
from tests.services import decoder
from tests.services import generative as house
from tests.services.generative import House
from tests.services.harness import break_off, outcomes

PROMPT = "ade"
"""Its answer has no end token for a long while."""


class Client:
    """A connection that reads server-sent events one at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""
        self._left = b""

    async def begin(self) -> int:
        """Read the head; its status."""
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        return int(self.head.split(b" ", 2)[1])

    async def event(self) -> Any:
        """The next event, None at the end."""
        while b"\n\n" not in self._left:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            piece = await self.reader.readexactly(size + 2)
            if not size:
                return None
            self._left += piece[:-2]
        line, self._left = self._left.split(b"\n\n", 1)
        data = line.removeprefix(b"data: ")
        return "DONE" if data == b"[DONE]" else json.loads(data)

    async def body(self) -> bytes:
        """The body of an answer that is no stream."""
        length = int(self.head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return await self.reader.readexactly(length)

    async def rest(self) -> list[Any]:
        events = []
        while (event := await self.event()) is not None:
            events.append(event)
        return events


def text(*events: Any) -> str:
    return "".join(e["choices"][0].get("text", "") for e in events if isinstance(e, dict) and e.get("choices"))


@asynccontextmanager
async def connected(served: House, fields: dict[str, Any], header: bytes = b"") -> AsyncIterator[Client]:
    """A completion, asked for on a connection of its own."""
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n" % (header, len(body)) + body)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def asking(served: House, prompt: str = PROMPT, **fields: Any) -> AbstractAsyncContextManager[Client]:
    """A streamed completion, asked for."""
    return connected(served, {"model": "write", "prompt": prompt, "stream": True, "max_tokens": 12, **fields})


@asynccontextmanager
async def begun(served: House, **fields: Any) -> AsyncIterator[Client]:
    """A streamed completion whose first token has been read. Every further one the test has to allow."""
    served.graph.hold()
    async with asking(served, **fields) as client:
        served.graph.allow()
        assert await client.begin() == 200
        await client.event()
        yield client


async def until(condition: Any) -> None:
    """Wait for something that only polling can tell."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def counted(served: House) -> dict[str, int]:
    return outcomes(served.page(), "write")


def in_flight(served: House) -> int:
    return served.gateway.in_flight + sum(replica.in_flight for replica in served.replicas.values())


async def test_each_token_is_sent_before_the_next_one_is_made(tmp_path: Path) -> None:
    expected = house.answer(PROMPT, 12)
    assert len(expected) == 12
    async with house.served(tmp_path) as served:
        served.graph.hold()
        async with asking(served) as client:
            for n in range(1, 12):
                served.graph.allow()
                if n == 1:
                    assert await client.begin() == 200
                    assert b"text/event-stream" in client.head
                event = await client.event()
                assert text(event) == expected[n - 1]
                assert served.graph.runs == n, "the model has made no token that the client does not have"
            served.graph.allow()
            last = await client.rest()
            assert text(*last) == expected[-1]
            assert [event["choices"][0]["finish_reason"] for event in last[:-1]] == [None, "length"]
            assert last[-1] == "DONE"
        await until(lambda: counted(served))
        assert counted(served) == {"on_time": 1}
        assert "espalier_time_between_tokens_seconds_count" in served.page()
        assert 'espalier_generated_tokens_total{pipeline="write"} 12.0' in served.page()


async def test_a_client_that_leaves_frees_its_place_within_one_token(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        served.graph.hold()
        async with asking(served, max_tokens=50) as client:
            served.graph.allow(2)
            await client.begin()
            await client.event()
            assert await asyncio.to_thread(served.graph.waits.wait, 10)
            begun = served.graph.runs + 1
        # The step that was begun ends; there is no other, however many are allowed.
        await until(lambda: in_flight(served) == 0)
        served.graph.free()
        await until(lambda: served.graph.runs >= begun)
        assert await infer_alone(served) == house.answer("xyz", 3)
        assert served.graph.batches.count(1) == served.graph.runs, "nobody else was in a batch any more"
        assert served.graph.runs == begun + 3
        assert counted(served) == {"cancelled": 1, "on_time": 1}


async def infer_alone(served: House) -> str:
    async with Transport() as http:
        body = json.dumps({"model": "write", "prompt": "xyz", "max_tokens": 3}).encode()
        answer = await http.post(f"{served.url}/v1/completions", body, {}, 20.0)
        return str(json.loads(answer.body)["choices"][0]["text"])


async def test_tasks_join_the_running_batch_between_two_steps(tmp_path: Path) -> None:
    prompts = ["abc", "hello", "q", "xyzxyz"]
    async with house.served(tmp_path, max_batch=3) as served:
        served.graph.hold()
        async with asking(served, prompts[0]) as first:
            served.graph.allow()
            await first.begin()
            await first.event()
            async with asking(served, prompts[1]) as second, asking(served, prompts[2]) as third:
                await until(lambda: served.replicas["generate"].in_flight == 3)
                async with asking(served, prompts[3]) as fourth:
                    await until(lambda: served.replicas["generate"].in_flight == 4)
                    served.graph.free()
                    for client, prompt in ((second, prompts[1]), (third, prompts[2]), (fourth, prompts[3])):
                        await client.begin()
                        assert text(*await client.rest()) == house.answer(prompt, 12)
                    assert text(*await first.rest()) == house.answer(prompts[0], 12)[1:]
        assert 3 in served.graph.batches, "three at once"
        assert max(served.graph.batches) == 3, "and never more"
        await until(lambda: sum(counted(served).values()) == 4)
        assert counted(served) == {"on_time": 4}


async def test_a_reader_that_is_slow_holds_nobody_up(tmp_path: Path) -> None:
    """What it does not read is made all the same, and comes in fewer pieces once nobody on the way holds it any more."""
    async with house.served(tmp_path) as served:
        served.graph.hold()
        async with asking(served, max_tokens=40) as slow:
            served.graph.allow()
            await slow.begin()
            first = await slow.event()
            slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
            served.graph.free()
            assert await infer_alone(served) == house.answer("xyz", 3)
            await until(lambda: served.replicas["generate"].in_flight == 0)
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert text(first, *await slow.rest()) == house.answer(PROMPT, 40)
        await until(lambda: counted(served) == {"on_time": 2})


async def test_a_stage_that_dies_in_the_middle_is_an_error_in_the_stream_and_a_failed_task(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        async with begun(served, max_tokens=40) as client:
            break_off(served.stages["generate"])
            (error,) = await client.rest()
            assert error["error"]["code"] == "upstream_error"
            assert error["error"]["type"] == "server_error"
            assert error["stage"] == "generate"
        await until(lambda: counted(served))
        assert counted(served) == {"failed": 1}
        assert in_flight(served) - served.replicas["generate"].in_flight == 0


async def test_a_stage_behind_that_dies_ends_the_work(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        async with begun(served, max_tokens=40) as client:
            served.spell.broken = True
            served.graph.allow()
            (error,) = await client.rest()
            assert error["error"]["code"] == "internal"
            assert error["stage"] == "detokenise"
        await until(lambda: counted(served))
        assert counted(served) == {"failed": 1}
        served.graph.free()
        await until(lambda: in_flight(served) == 0)


async def test_a_replica_that_dies_in_the_middle_of_a_stream_is_avoided_by_the_gateway_too(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        async with begun(served, max_tokens=40) as client:
            break_off(served.stages["generate"])
            (error,) = await client.rest()
        assert [hop["replica"] for hop in error["hops"]] == ["tokenise-0"]
        assert error["hops"][0]["failed"] == ["generate-0"]
        book, now = served.gateway._book, asyncio.get_running_loop().time()
        assert [name for name in ("tokenise-0", "generate-0") if book.ejected(name, now)] == ["generate-0"]


async def test_streams_that_are_ended_early_are_not_taken_for_work_that_is_still_to_do(tmp_path: Path) -> None:
    whole = house.answer(PROMPT, 40)
    async with house.served(tmp_path) as served:
        for _ in range(3):
            async with asking(served, max_tokens=40, stop=whole[5:7]) as client:
                await client.begin()
                assert text(*await client.rest()) == whole[:5]
        await until(lambda: in_flight(served) == 0)
        page = served.replicas["generate"].metrics.exposition().decode()
        assert 'espalier_stage_compute_duration_seconds_count{node="local",stage="generate"} 3.0' in page
        views = [served.gateway._book.view(f"{name}-0") for name in ("tokenise", "generate")]
        assert [view.sent_since for view in views] == [0, 0]
        assert all(view.service_s > 0 for view in views)


async def test_a_stream_read_to_its_end_gives_its_connection_back(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        for _ in range(3):
            async with asking(served) as client:
                await client.begin()
                await client.rest()
        service = served.gateway._service
        assert service is not None
        kept = service._walker._forwarder._transport._idle
        await until(lambda: sum(map(len, kept.values())) == 1)
        assert len(service._walker._forwarder._transport._open) == 1


async def test_a_stop_string_ends_the_answer_and_the_work_for_it(tmp_path: Path) -> None:
    whole = house.answer(PROMPT, 40)
    stop = whole[5:7]
    assert whole.index(stop) == 5
    async with house.served(tmp_path) as served:
        served.graph.hold()
        async with asking(served, max_tokens=40, stop=[stop, "never"]) as client:
            served.graph.allow(7)
            await client.begin()
            events = await client.rest()
            assert text(*events) == whole[:5]
            assert events[-2]["choices"][0]["finish_reason"] == "stop"
            assert events[-1] == "DONE"
        await until(lambda: in_flight(served) == 0)
        served.graph.free()
        assert await infer_alone(served) == house.answer("xyz", 3)
        assert served.graph.runs <= 8 + 3
        await until(lambda: counted(served) == {"on_time": 2})


async def asked_whole(served: House, deadline_s: float = 20.0, **fields: Any) -> tuple[int, Any]:
    body = json.dumps({"model": "write", "prompt": PROMPT, "max_tokens": 40, **fields}).encode()
    async with Transport() as http:
        answer = await http.post(f"{served.url}/v1/completions", body, {"x-request-timeout-seconds": str(deadline_s)}, 30.0)
        return answer.status, json.loads(answer.body)


async def test_a_stop_string_ends_an_answer_that_is_not_streamed_and_the_work_for_it_too(tmp_path: Path) -> None:
    whole = house.answer(PROMPT, 40)
    async with house.served(tmp_path) as served:
        served.graph.hold()
        served.graph.allow(7)
        status, body = await asked_whole(served, stop=[whole[5:7]])
        assert status == 200
        assert body["choices"] == [{"index": 0, "text": whole[:5], "logprobs": None, "finish_reason": "stop"}]
        assert body["usage"]["completion_tokens"] == 7
        await until(lambda: in_flight(served) == 0)
        served.graph.free()
        assert await infer_alone(served) == house.answer("xyz", 3)
        assert served.graph.runs <= 8 + 3
        status, body = await asked_whole(served, stop="never")
        assert body["choices"][0]["text"] == whole
        await until(lambda: counted(served) == {"on_time": 3})


async def test_its_deadline_is_the_whole_answers(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        served.graph.hold()
        served.graph.allow(2)
        status, body = await asked_whole(served, deadline_s=0.5, stop="never")
        assert (status, body["error"]["code"]) == (504, "expired")
        await until(lambda: in_flight(served) == 0)
        assert counted(served) == {"expired": 1}


async def test_it_is_begun_once_more_where_a_replica_dies_in_the_middle(tmp_path: Path) -> None:
    whole = house.answer(PROMPT, 40)
    async with house.served(tmp_path) as served:
        served.graph.hold()
        served.graph.allow(3)
        asked = asyncio.ensure_future(asked_whole(served, stop=[whole[5:7]]))
        assert await asyncio.to_thread(served.graph.waits.wait, 10)
        break_off(served.stages["generate"])
        served.graph.free()
        status, body = await asked
        assert (status, body["choices"][0]["text"]) == (200, whole[:5])
        assert counted(served) == {"on_time": 1}


async def test_what_a_stage_refuses_in_the_middle_has_failed_and_was_no_bad_request(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        async with begun(served, max_tokens=40) as client:
            served.spell.refuses = True
            served.graph.allow()
            (error,) = await client.rest()
            assert error["error"]["code"] == "bad_request"
        await until(lambda: counted(served) == {"failed": 1})
        assert "espalier_bad_requests_total{" not in served.page()


async def test_what_goes_wrong_before_the_first_token_is_an_ordinary_error(tmp_path: Path) -> None:
    async with house.served(tmp_path) as served:
        for fields, status, words in (
            ({"prompt": "abc!"}, 400, b"no token"),
            ({"prompt": "a" * decoder.CONTEXT}, 400, b"the model takes 64 with the answer"),
            ({"model": "nobody"}, 404, b"no pipeline"),
            ({"prompt": ["a"] * 5}, 413, b"takes 4"),
        ):
            async with asking(served, **fields) as client:
                assert await client.begin() == status
                body = await client.body()
                assert words in body
                assert "message" in json.loads(body)["error"]
        assert counted(served) == {}
        assert "espalier_bad_requests_total" in served.page()


async def test_a_chain_in_which_nobody_generates_streams_a_single_piece(tmp_path: Path) -> None:
    """As where the generating stage is fused with others."""
    async with house.served(tmp_path) as served:
        plan = served.gateway.plan("write", None)
        only = plan.pipeline.model_copy(
            update={"name": "only", "steps": plan.pipeline.steps[:1], "outputs": {"n": "tokenise.token_count"}}
        )
        service = served.gateway._service
        assert service is not None
        table = Table(served.routes.model_copy(update={"pipelines": {"only": only}}))
        served.gateway.subscription.table = table
        due = Deadline(asyncio.get_running_loop().time(), 5.0)
        found = service.stream(table.plans["only"], {"request.text": texts("text", [b"abcd"])}, due, {})
        assert [state.tensors["n"].array.tolist() async for state in found] == [[4]]
