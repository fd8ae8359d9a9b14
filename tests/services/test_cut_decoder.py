"""A decoder cut in two and in three, each part a stage of its own: the same tokens as whole, and what a lost part does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, APIStatusError, AsyncOpenAI

from models.manifest import Manifest
from services.dataplane.pipeline import Step
from services.dataplane.routes import Replica as ReplicaRoute
from services.dataplane.routes import Routes, Service
from services.stage.app import Replica
from services.stage.processors.generate_part import Part
from tests.services import harness
from tests.services.minilm import open_replica
from tests.services.test_generating import REFERENCE, WRITE
from tests.services.test_streams import until

PLAIN = [each for each in REFERENCE["answers"] if each["add_special_tokens"]]


class House:
    """What is up."""

    def __init__(self, url: str, replicas: dict[str, Replica], stages: dict[str, str], gateway: Any) -> None:
        self.url, self.replicas, self.stages, self.gateway = url, replicas, stages, gateway

    def part(self, name: str = "generate-2") -> Part:
        processor = self.replicas[name]._processor
        assert isinstance(processor, Part)
        return processor

    def counted(self) -> dict[str, int]:
        return harness.outcomes(self.gateway.metrics.exposition().decode(), "write")


@asynccontextmanager
async def served(directory: Path, kept: Path, parts: int, *, twice: bool = False) -> AsyncIterator[tuple[House, AsyncOpenAI]]:
    """A pipeline over a cut decoder; the second part perhaps with two replicas."""
    further = tuple(f"generate-{i}" for i in range(2, parts + 1))
    names = ["tokenise", "generate-1", *further, "detokenise"]
    replicas = {name: open_replica(directory, name) for name in names}
    if twice:
        replicas["generate-2-1"] = open_replica(directory, "generate-2")
    async with harness.stages(*replicas.values()) as urls:
        stages = dict(zip(replicas, urls, strict=True))

        def service(name: str) -> Service:
            spec = replicas[name].spec
            there = [name, f"{name}-1"] if f"{name}-1" in stages else [name]
            routes = tuple(ReplicaRoute(id=f"{each}-0", node="local", url=stages[each], state="ready") for each in there)
            return Service(
                name=name, model="lm", stage=name, tier=spec.tier, inputs=spec.inputs, outputs=spec.outputs, replicas=routes
            )  # fmt: skip

        steps = tuple(
            step if step.id != "generate" else Step(id="generate", service="generate-1", inputs=step.inputs, parts=further)
            for step in WRITE.steps
        )
        pipeline = WRITE.model_copy(update={"steps": steps})
        routes = Routes(
            version=1, testbed="test", services={name: service(name) for name in names}, pipelines={"write": pipeline}
        )
        async with harness.gateway(routes, kept) as (url, gateway):
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                yield House(url, replicas, stages, gateway), client


async def ask(client: AsyncOpenAI, prompt: str, count: int, streamed: bool) -> tuple[str, str]:
    fields: dict[str, Any] = {"model": "write", "prompt": prompt, "max_tokens": count}
    if not streamed:
        choice = (await client.completions.create(**fields)).choices[0]
        return choice.text, choice.finish_reason
    events = [event async for event in await client.completions.create(**fields, stream=True)]
    return "".join(event.choices[0].text for event in events), events[-1].choices[0].finish_reason


@pytest.mark.parametrize("parts", [2, 3])
async def test_a_cut_decoder_answers_as_the_whole_one(lm_cut: dict[int, Path], tmp_path: Path, parts: int) -> None:
    """All at once, so that sequences of every length join and leave in all parts."""
    async with served(lm_cut[parts], tmp_path, parts) as (house, client):
        answers = await asyncio.gather(
            *(ask(client, each["text"], REFERENCE["max_tokens"], streamed) for each in PLAIN for streamed in (True, False)),
            *(ask(client, each["text"], 1, False) for each in PLAIN),
        )
        expected = [(each["output_text"], each["finish_reason"]) for each in PLAIN for _ in range(2)]
        assert answers[: len(expected)] == expected
        await until(lambda: house.counted() == {"on_time": 3 * len(PLAIN)})
        assert house.part().sequences <= 8, "nothing is kept of those who have left"
        house.part().forget(1e12)
        assert house.part().sequences == 0


async def test_a_running_batch_keeps_to_one_replica_of_a_part(lm_cut: dict[int, Path], tmp_path: Path) -> None:
    async with served(lm_cut[2], tmp_path, 2, twice=True) as (house, client):
        await asyncio.gather(*(ask(client, each["text"], 20, False) for each in PLAIN * 3))
        served_by = {name for name in ("generate-2", "generate-2-1") if house.part(name).sequences}
        assert len(served_by) == 1
        (used,) = served_by
        harness.break_off(house.stages[used])
        assert (await ask(client, PLAIN[0]["text"], REFERENCE["max_tokens"], True))[0] == PLAIN[0]["output_text"]


async def test_a_part_that_has_lost_its_sequences_ends_the_answers_of_the_batch(
    lm_cut: dict[int, Path], tmp_path: Path
) -> None:
    async with served(lm_cut[2], tmp_path, 2) as (house, client):
        part = house.part()
        proceed, passes = part.proceed, 0

        def forgetful(*arguments: Any) -> Any:
            nonlocal passes
            passes += 1
            if passes == 4:
                part.forget(1e12)
            return proceed(*arguments)

        part.proceed = forgetful  # type: ignore[method-assign, assignment]
        with pytest.raises((APIError, APIStatusError), match="does not have these sequences"):
            await ask(client, PLAIN[1]["text"], 20, True)
        assert (await ask(client, PLAIN[1]["text"], REFERENCE["max_tokens"], True))[0] == PLAIN[1]["output_text"]


async def test_a_part_is_asked_by_its_first_part_only(lm_cut: dict[int, Path], tmp_path: Path) -> None:
    from services.transport import Transport  # noqa: PLC0415

    async with served(lm_cut[2], tmp_path, 2) as (house, _), Transport() as http:
        ids = {"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [5]}
        mask = {"name": "attention_mask", "shape": [1, 1], "datatype": "INT64", "data": [1]}
        body = json.dumps({"inputs": [ids, mask]}).encode()
        answer = await http.post(f"{house.stages['generate-1']}/v2/models/generate-1/infer", body, {}, 5.0)
        assert answer.status == 400
        assert b"found by a pipeline only" in answer.body
        hidden = {"name": "hidden", "shape": [1, 1, 64], "datatype": "FP32", "data": [0.0] * 64}
        place = {"name": "position_ids", "shape": [1, 1], "datatype": "INT64", "data": [0]}
        for session in (None, {"batch": "a", "rows": [1], "past": [3]}, {"batch": "a", "rows": [1, 1], "past": [0, 0]}):
            body = json.dumps({"inputs": [hidden, mask, place], "parameters": {"session": session}}).encode()
            answer = await http.post(f"{house.stages['generate-2']}/v2/models/generate-2/infer", body, {}, 5.0)
            assert answer.status == 400, answer.body


def test_a_manifest_of_a_cut_decoder_says_so(lm_cut: dict[int, Path]) -> None:
    model = Manifest.model_validate_json((lm_cut[3] / "manifest.json").read_bytes())
    assert [model.stage(f"generate-{i}").parameters["part"] for i in (1, 2, 3)] == [1, 2, 3]
