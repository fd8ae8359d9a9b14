"""A language model served from its export, against what transformers generates; and a stage that is killed while it writes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI

from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Routes
from tests.services import generative, harness
from tests.services.minilm import open_replica
from tests.services.test_streams import until

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "lm_ci_reference.json").read_text())
STAGES = ("tokenise", "generate", "detokenise")
WRITE = Pipeline(
    name="write",
    deadline_s=30.0,
    epsilon=0.05,
    steps=(
        Step(
            id="tokenise",
            service="tokenise",
            inputs={"text": "request.prompt", "add_special_tokens": "request.add_special_tokens"},
        ),
        Step(
            id="generate",
            service="generate",
            inputs={
                "input_ids": "tokenise.input_ids",
                "attention_mask": "tokenise.attention_mask",
                "max_tokens": "request.max_tokens",
            },
        ),
        Step(
            id="detokenise",
            service="detokenise",
            inputs={"output_ids": "generate.output_ids", "output_count": "generate.output_count"},
        ),
    ),
    outputs={
        "text": "detokenise.text",
        "finish_reason": "generate.finish_reason",
        "output_count": "generate.output_count",
        "token_count": "tokenise.token_count",
    },
)


@asynccontextmanager
async def served(directory: Path, kept: Path) -> AsyncIterator[AsyncOpenAI]:
    replicas = {stage: open_replica(directory, stage) for stage in STAGES}
    async with harness.stages(*replicas.values()) as urls:
        services = {
            name: harness.service(name, replica.spec, url, model="lm-ci", weights="seeded")
            for (name, replica), url in zip(replicas.items(), urls, strict=True)
        }
        routes = Routes(version=1, testbed="test", services=services, pipelines={"write": WRITE})
        async with harness.gateway(routes, kept) as (url, _):
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                yield client


async def test_all_prompts_at_once_are_answered_as_transformers_answers_each(lm_ci: Path, tmp_path: Path) -> None:
    async def one(client: AsyncOpenAI, expected: Any, streamed: bool) -> None:
        ask: dict[str, Any] = {"model": "write", "prompt": expected["text"], "max_tokens": REFERENCE["max_tokens"]}
        if streamed:
            events = [event async for event in await client.completions.create(**ask, stream=True)]
            text, finish = "".join(event.choices[0].text for event in events), events[-1].choices[0].finish_reason
        else:
            answer = await client.completions.create(**ask)
            text, finish = answer.choices[0].text, answer.choices[0].finish_reason
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(expected["input_ids"])
            assert answer.usage.completion_tokens == len(expected["output_ids"])
        assert (text, finish) == (expected["output_text"], expected["finish_reason"])

    plain = [each for each in REFERENCE["answers"] if each["add_special_tokens"]]
    assert len(plain) > 3
    async with served(lm_ci, tmp_path) as client:
        await asyncio.gather(*(one(client, each, streamed) for each in plain for streamed in (True, False)))


async def test_a_stage_killed_while_it_writes_is_an_error_in_the_stream_and_a_failed_task(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.services.slow_stage", str(tmp_path / "slow")]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    try:
        url = (await process.stdout.readline()).decode().strip()
        async with generative.served(tmp_path, elsewhere={"generate": url}) as house:
            async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as client:
                stream = await client.completions.create(model="write", prompt="ade", max_tokens=50, stream=True)
                assert generative.answer("ade", 9).startswith((await anext(stream)).choices[0].text)
                process.kill()
                with pytest.raises(APIError, match="service 'generate' broke off"):
                    _ = [event async for event in stream]
            await until(lambda: harness.outcomes(house.page(), "write") == {"failed": 1})
            assert house.gateway.in_flight == house.replicas["tokenise"].in_flight == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
