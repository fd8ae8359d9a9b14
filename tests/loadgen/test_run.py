from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import pytest_asyncio

from loadgen import arrivals
from loadgen.client import Client, Metadata, Request
from loadgen.corpus import InputSpec
from loadgen.errors import RunFailed, SetupFailed
from loadgen.outcome import Outcome
from loadgen.run import Load, ScheduledTask, Sender, patience_s, plan
from tests.loadgen.server import BEHAVIOURS, Server

LONG_S = 30.0
"""A deadline that no machine misses."""


@pytest_asyncio.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with Client(server.url, connections=64) as client:
        yield client


def load(name: str, spec: str, *, deadline_s: float = LONG_S) -> Load:
    metadata = Metadata(name, (InputSpec("text", "BYTES", (-1,)),), None, None)
    return Load(metadata, arrivals.parse(spec), deadline_s)


def scheduled(
    client: Client, *loads: Load, duration_s: float = 0.1, warmup_s: float = 0.0, seed: int = 1
) -> list[ScheduledTask]:
    return plan(loads, client, seed=seed, duration_s=duration_s, warmup_s=warmup_s, binary=True)


def essence(tasks: Sequence[ScheduledTask], pipeline: str) -> list[tuple[float, bytes]]:
    return [(task.scheduled_s, task.request.body) for task in tasks if task.pipeline == pipeline and task.scheduled_s >= 0]


# --- the plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_is_one_ascending_schedule_of_different_payloads() -> None:
    client = Client("http://127.0.0.1:1", connections=1)
    tasks = scheduled(client, load("embed", "poisson:200"), load("classify", "constant:50"), duration_s=2)
    times = [task.scheduled_s for task in tasks]
    assert times == sorted(times)
    assert {task.pipeline for task in tasks} == {"embed", "classify"}
    bodies = [task.request.body.split(b'"inputs"', 1)[1] for task in tasks]
    assert len(set(bodies)) > 0.98 * len(bodies)
    assert [task.index for task in tasks if task.pipeline == "classify"] == list(range(100))


def test_neither_another_pipeline_nor_the_warm_up_changes_what_is_measured() -> None:
    client = Client("http://127.0.0.1:1", connections=1)
    alone = essence(scheduled(client, load("embed", "poisson:50"), duration_s=2), "embed")
    together = scheduled(client, load("classify", "poisson:50"), load("embed", "poisson:50"), duration_s=2, warmup_s=3)
    assert essence(together, "embed") == alone
    assert essence(scheduled(client, load("embed", "poisson:50"), duration_s=2, seed=2), "embed") != alone


def test_the_warm_up_lies_before_0_and_has_negative_indices() -> None:
    client = Client("http://127.0.0.1:1", connections=1)
    tasks = scheduled(client, load("embed", "constant:4"), duration_s=0.5, warmup_s=1.0)
    assert [task.scheduled_s for task in tasks] == [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25]
    assert [task.index for task in tasks] == [-4, -3, -2, -1, 0, 1]
    assert tasks[0].request.id == "embed--4"


def test_tensors_that_cannot_be_made_fail_the_set_up() -> None:
    strange = replace(load("embed", "constant:4"), metadata=Metadata("embed", (InputSpec("x", "BF16", (1,)),), None, None))
    with pytest.raises(SetupFailed, match=r"pipeline 'embed'.*BF16"):
        scheduled(Client("http://127.0.0.1:1", connections=1), strange)


def test_an_image_cannot_be_sent_to_a_server_that_takes_only_json() -> None:
    client = Client("http://127.0.0.1:1", connections=1)
    metadata = Metadata("classify-image", (InputSpec("image", "BYTES", (-1,)),), None, None)
    with pytest.raises(SetupFailed, match=r"pipeline 'classify-image': .*binary_data, which this server does not take"):
        plan([Load(metadata, arrivals.parse("constant:50"), LONG_S)], client, seed=1, duration_s=0.1, warmup_s=0, binary=False)


@pytest.mark.parametrize(("deadline_s", "expected"), [(0.3, 5.0), (1.0, 5.0), (4.0, 12.0)])
def test_patience_is_three_deadlines_and_at_least_five_seconds(deadline_s: float, expected: float) -> None:
    assert patience_s(deadline_s) == expected


# --- the run --------------------------------------------------------------------------------------------------------------

ENDINGS: dict[str, tuple[Outcome, str | None]] = {
    "embed": ("on_time", None),
    "late": ("late", None),
    "expired": ("expired", "expired_in_queue"),
    "full": ("rejected", "queue_full"),
    "closed": ("rejected", "no_replica"),
    "wrong": ("failed", "http_400"),
    "broken": ("failed", "disconnected"),
    "truncated": ("failed", "broken_answer"),
    "garbage": ("failed", "bad_answer"),
    "empty": ("failed", "bad_answer"),
    "swapped": ("failed", "bad_answer"),
    "held": ("failed", "no_answer"),
}


@pytest.mark.parametrize("model", ENDINGS)
async def test_each_kind_of_server_gives_its_outcome(client: Client, model: str) -> None:
    deadline_s = 0.02 if model == "late" else LONG_S
    tasks = scheduled(client, load(model, "constant:40", deadline_s=deadline_s))
    if model == "held":
        tasks = [replace(task, patience_s=0.05) for task in tasks]
    sender = Sender(client, max_in_flight=64)
    records = await sender.run(tasks)
    assert [(record.outcome, record.reason) for record in records] == [ENDINGS[model]] * 4
    assert sender.outcomes == {ENDINGS[model][0]: 4}
    assert all(record.send_lag_s is not None and record.send_lag_s >= 0 for record in records)
    assert all((record.latency_s is None) == (record.status is None) for record in records)
    assert not sender.interrupted


def test_every_behaviour_of_the_server_is_tried() -> None:
    assert ENDINGS.keys() == BEHAVIOURS.keys() - {"classify"}


async def test_details_of_the_answer_reach_the_record(client: Client) -> None:
    tasks = scheduled(client, load("embed", "constant:10"), load("full", "constant:10"))
    embed, full = sorted(await Sender(client, max_in_flight=4).run(tasks), key=lambda record: record.pipeline)
    assert embed.hops[0].service == "encode-a"
    assert embed.status == 200
    assert (full.retry_after_s, full.detail, full.status) == (3.0, "full", 429)


async def test_nothing_is_sent_before_its_time_and_everything_in_order(client: Client, server: Server) -> None:
    tasks = scheduled(client, load("embed", "poisson:300"), duration_s=0.3)
    records = await Sender(client, max_in_flight=64).run(tasks)
    assert [record.index for record in records] == list(range(len(tasks)))
    assert all(record.sent_s is not None and record.sent_s >= record.scheduled_s for record in records)
    assert {message.id for _, _, message in server.requests} == {f"embed-{i}" for i in range(len(tasks))}


async def test_the_load_is_open_a_held_server_gets_the_next_task_all_the_same(client: Client, server: Server) -> None:
    running = asyncio.create_task(Sender(client, max_in_flight=64).run(scheduled(client, load("held", "constant:100"))))
    while len(server.requests) < 10:
        await asyncio.sleep(0.001)
    server.release.set()
    assert [record.outcome for record in await running] == ["on_time"] * 10


async def test_a_task_over_the_bound_is_not_sent_and_failed(client: Client, server: Server) -> None:
    sender = Sender(client, max_in_flight=2)
    running = asyncio.create_task(sender.run(scheduled(client, load("held", "constant:100"))))
    while sender.outcomes["failed"] < 8:
        await asyncio.sleep(0.001)
    server.release.set()
    records = await running
    assert [record.outcome for record in records] == ["on_time"] * 2 + ["failed"] * 8
    assert all((record.reason, record.sent_s, record.status) == ("not_sent", None, None) for record in records[2:])
    assert len(server.requests) == 2


async def test_an_interrupted_run_keeps_what_it_has_and_cancels_the_rest(client: Client, server: Server) -> None:
    tasks = [*scheduled(client, load("embed", "constant:10")), *scheduled(client, load("held", "constant:1"), duration_s=3600)]
    sender = Sender(client, max_in_flight=8)
    running = asyncio.create_task(sender.run(tasks))
    await server.arrived.wait()
    while not sender.outcomes["on_time"]:
        await asyncio.sleep(0.001)
    sender.interrupt()
    records = await running
    assert sender.interrupted
    assert len(records) == 3601
    assert records[0].outcome == "on_time"
    assert {(record.outcome, record.reason) for record in records[1:]} == {("cancelled", "interrupted")}
    assert records[1].sent_s is not None  # out when the run was interrupted
    assert records[-1].sent_s is None


async def test_a_fault_of_the_generator_is_no_outcome_but_ends_the_run(client: Client, server: Server) -> None:
    class Faulty(Client):
        async def send(self, request: Request, patience_s: float) -> None:  # type: ignore[override]  # breaks its promise
            raise ZeroDivisionError

    tasks = scheduled(client, load("embed", "constant:1"), duration_s=3600)
    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        await Sender(Faulty(server.url, connections=1), max_in_flight=1).run(tasks)


async def test_an_empty_schedule_has_no_records(client: Client) -> None:
    assert await Sender(client, max_in_flight=1).run([]) == []


async def test_the_collector_is_left_as_it_was(client: Client) -> None:
    before = gc.get_threshold()
    await Sender(client, max_in_flight=4).run(scheduled(client, load("embed", "constant:10")))
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
