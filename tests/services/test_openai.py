"""The stock openai client on pipelines that make text: completions, chat about words and images, transcriptions, models."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.http.aio as triton_aio
from openai import APIError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from tritonclient.utils import InferenceServerException

from tests.services import decoder
from tests.services import generative as house
from tests.services.generative import House
from tests.services.test_stock_clients import number, texts
from tests.services.test_streams import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

WHOLE = house.answer("ade", 12)
PICTURE = b"a picture, as far as this model can tell"
SOUND = b"some sound"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with house.served(tmp_path_factory.mktemp("house")) as it:
        yield it


@pytest_asyncio.fixture(loop_scope="module")
async def client(served: House) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as it:
        yield it


async def test_a_completion_whole_and_streamed(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model="write", prompt="ade", max_tokens=12)
    assert whole.choices[0].text == WHOLE
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 12, 15)
    stream = await client.completions.create(
        model="write", prompt="ade", max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    events = [event async for event in stream]
    assert "".join(event.choices[0].text for event in events if event.choices) == WHOLE
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert all(event.usage is None for event in events[:-1])
    assert len({event.id for event in events}) == 1


async def test_a_client_that_is_synchronous(served: House) -> None:
    def talk() -> tuple[str, str]:
        with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="chat", messages=[{"role": "user", "content": "ade"}], max_completion_tokens=12, stream=True
            )
            streamed = "".join(event.choices[0].delta.content or "" for event in stream)
            return streamed, client.completions.create(model="write", prompt="ade", max_tokens=12).choices[0].text

    assert await asyncio.to_thread(talk) == (WHOLE, WHOLE)


async def test_several_prompts_are_several_choices(client: AsyncOpenAI) -> None:
    prompts = ["ade", "hello", "q"]
    expected = [house.answer(prompt, 9) for prompt in prompts]
    whole = await client.completions.create(model="write", prompt=prompts, max_tokens=9)
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.finish_reason for choice in whole.choices] == [house.finish(prompt, 9) for prompt in prompts]
    told = ["", "", ""]
    async for event in await client.completions.create(model="write", prompt=prompts, max_tokens=9, stream=True):
        told[event.choices[0].index] += event.choices[0].text
    assert told == expected


async def test_a_conversation_goes_through_the_chat_stage(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="chat",
        messages=[
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
        ],
        max_tokens=12,
    )
    assert answer.choices[0].message.content == WHOLE
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    events = [
        event
        async for event in await client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "ade"}], max_tokens=12, stream=True
        )
    ]
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices[0].finish_reason == "length"
    assert events[-1].choices[0].delta.content is None


def shown(url: str) -> Any:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "ade"}]}]


async def test_a_question_about_an_image(client: AsyncOpenAI) -> None:
    url = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    answer = await client.chat.completions.create(model="ask", messages=shown(url), max_tokens=9)
    prompt = [decoder.IMAGE_TOKEN] * decoder.IMAGE_TOKENS + [house.LETTERS.index(letter) for letter in "ade"]
    expected = decoder.reference(prompt, 9, image=house.noise(PICTURE, decoder.IMAGE_TOKENS))
    assert answer.choices[0].message.content == house.spelt(expected)
    refused: list[tuple[Any, str, str]] = [
        (shown("https://example.org/cat.png"), "ask", "fetches no images from elsewhere"),
        (shown("data:image/png;base64,%%%"), "ask", "is not base64"),
        (shown(url), "chat", "takes no images"),
        ([{"role": "user", "content": "ade"}], "ask", "exactly one image, not 0"),
        (shown(url) * 2, "ask", "exactly one image, not 2"),
    ]
    for messages, model, words in refused:
        with pytest.raises(BadRequestError, match=words):
            await client.chat.completions.create(model=model, messages=messages)


async def test_a_transcription(client: AsyncOpenAI) -> None:
    expected = house.spelt(decoder.reference([5, 6], 8, states=house.noise(SOUND, decoder.POSITIONS)))
    answer = await client.audio.transcriptions.create(model="transcribe", file=("a.wav", SOUND))
    assert answer.text == expected
    plain = await client.audio.transcriptions.create(model="transcribe", file=("a.wav", SOUND), response_format="text")
    assert plain == expected
    stream = await client.audio.transcriptions.create(model="transcribe", file=("a.wav", SOUND), stream=True)
    events = [event async for event in stream]
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == expected
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == expected
    options: list[tuple[dict[str, Any], str]] = [
        ({"response_format": "verbose_json"}, "response_format: 'verbose_json' is not supported"),
        ({"language": "de"}, "language: 'de' is not supported"),
        ({"temperature": 9}, "temperature"),
    ]
    for fields, words in options:
        with pytest.raises(BadRequestError, match=words):
            await client.audio.transcriptions.create(model="transcribe", file=("a.wav", SOUND), **fields)
    with pytest.raises(BadRequestError, match="transcribes nothing"):
        await client.audio.transcriptions.create(model="write", file=("a.wav", SOUND))


async def test_a_seed_makes_a_sampled_answer_repeatable_and_without_one_it_is_another(client: AsyncOpenAI) -> None:
    async def sampled(seed: int | None) -> str:
        options: dict[str, Any] = {} if seed is None else {"seed": seed}
        answer = await client.completions.create(model="write", prompt="ade", max_tokens=30, temperature=2.0, **options)
        return str(answer.choices[0].text)

    assert await sampled(5) == await sampled(5)
    assert len({*await asyncio.gather(*(sampled(None) for _ in range(4)))}) > 1
    assert await client.completions.create(model="write", prompt="ade", max_tokens=12, temperature=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "n: 2 is not supported"),
        ({"logprobs": 1}, "logprobs: 1 is not supported"),
        ({"echo": True}, "echo: True is not supported"),
        ({"best_of": 2}, "best_of"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"suffix": "x"}, "suffix"),
        ({"extra_body": {"top_k": 3}}, "top_k"),
        ({"prompt": [1, 2]}, "- prompt.0: Input should be a valid string"),
        ({"prompt": ["a", 2]}, "prompt.1: Input"),
        ({"stream_options": {"include": True}, "stream": True}, "stream_options.include: Extra"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 2**63 - 1}, "which leaves 61 of the model's 64"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"temperature": 3.0}, "temperature"),
        ({"stop": ["a"] * 5}, "stop: 5 strings"),
        ({"stop": ""}, "stop: a string must have"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 62}, "which leaves 61 of the model's 64"),
        ({"model": "chat"}, "continues no prompts"),
    ],
)
async def test_what_a_completion_cannot_have_is_refused(client: AsyncOpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        await client.completions.create(**({"model": "write", "prompt": "ade"} | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 3}, "n: 3"),
        ({"logprobs": True}, "logprobs: True"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: a list"),
        ({"response_format": {"type": "json_object"}}, "response_format: an object"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "say different things"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens|JSON"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages.0: Input should be a valid dictionary"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role: 'tool' is not one of"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "parts of type text and image_url"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a text"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "tool_calls"),
        ({"model": "write"}, "does not chat"),
    ],
)
async def test_what_a_chat_cannot_have_is_refused(client: AsyncOpenAI, fields: dict[str, Any], words: str) -> None:
    ask = {"model": "chat", "messages": [{"role": "user", "content": "ade"}]}
    with pytest.raises(BadRequestError, match=words):
        await client.chat.completions.create(**(ask | fields))


async def test_what_asks_for_nothing_is_no_reason_to_refuse(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "ade", "name": "Ada"}],
        max_tokens=2,
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        user="somebody",
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == WHOLE[:2]


async def test_a_body_that_is_no_json_is_told_so(served: House) -> None:
    async with httpx.AsyncClient(base_url=served.url) as http:
        for body, words in ((b"{", "not valid JSON"), (b"[]", "must be a JSON object")):
            answer = await http.post("/v1/completions", content=body)
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]
        answer = await http.post("/v1/audio/transcriptions", data={"model": "transcribe"})
        assert "multipart/form-data" in answer.json()["error"]["message"]


async def test_models_say_what_serves_them_and_that_their_weights_are_seeded(served: House, client: AsyncOpenAI) -> None:
    models = {model.id: model.to_dict() async for model in await client.models.list()}
    assert {name: model["routes"] for name, model in models.items()} == {
        "write": ["completions"],
        "chat": ["chat/completions"],
        "ask": ["chat/completions"],
        "transcribe": ["audio/transcriptions"],
    }
    assert {model["weights"] for model in models.values()} == {"seeded"}
    assert (await client.models.retrieve("chat")).id == "chat"
    with pytest.raises(NotFoundError, match="no model 'gpt'"):
        await client.models.retrieve("gpt")
    async with httpx.AsyncClient(base_url=served.url) as http:
        metadata = (await http.get("/v2/models/write")).json()
    assert metadata["parameters"]["weights"] == "seeded"
    assert {each["name"]: each.get("default") for each in metadata["inputs"]} == {
        "text": None, "max_tokens": 8, "temperature": 0, "top_p": 1, "seed": 0,
    }  # fmt: skip


async def test_an_error_in_the_middle_is_raised_by_the_client(tmp_path: Path) -> None:
    async with house.served(tmp_path) as broken:
        broken.graph.hold()
        async with AsyncOpenAI(base_url=f"{broken.url}/v1", api_key="none", max_retries=0) as client:
            asked = asyncio.ensure_future(client.completions.create(model="write", prompt="ade", max_tokens=12, stream=True))
            await until(broken.graph.waits.is_set)
            broken.graph.allow()
            stream = await asked
            assert (await anext(stream)).choices[0].text == WHOLE[0]
            broken.graph.broken = 1
            broken.graph.free()
            with pytest.raises(APIError, match="internal error"):
                async for _ in stream:
                    pass


async def test_triton_leaves_out_what_has_a_default(served: House) -> None:
    async with triton_aio.InferenceServerClient(served.url.removeprefix("http://")) as client:
        prompts = ["ade", "hello"]
        answer = await client.infer("write", [texts("text", prompts, True)])
        assert answer.as_numpy("text").tolist() == [house.answer(prompt, 8).encode() for prompt in prompts]
        assert answer.as_numpy("output_count").tolist() == [
            len(decoder.reference([house.LETTERS.index(c) for c in p], 8)) for p in prompts
        ]
        some = number("max_tokens", np.array([3, 5]), "INT64", True)
        answer = await client.infer("write", [texts("text", prompts, True), some])
        assert answer.as_numpy("text").tolist() == [house.answer("ade", 3).encode(), house.answer("hello", 5).encode()]
        for order in (1, -1):
            wrong = [texts("text", prompts, True), number("seed", np.array([3]), "INT64", True)][::order]
            with pytest.raises(InferenceServerException, match=r"input 'seed' must have shape \[2\], not \[1\]"):
                await client.infer("write", wrong)
        with pytest.raises(InferenceServerException, match="input 'text' of pipeline 'write' is missing"):
            await client.infer("write", [some])
    async with triton_aio.InferenceServerClient(served.stages["generate"].removeprefix("http://")) as client:
        ids = np.array([[4, 5, 6]])
        inputs = [number(name, array, "INT64", True) for name, array in (("input_ids", ids), ("attention_mask", ids * 0 + 1))]
        answer = await client.infer("generate", inputs)
        assert answer.as_numpy("output_ids").tolist() == [decoder.reference([4, 5, 6], 8)]


async def test_what_was_asked_for_at_once_is_answered_as_alone(client: AsyncOpenAI, served: House) -> None:
    """Ragged: prompts and answers of every length in the same batches, whole and streamed."""
    asked = [("".join(house.LETTERS[3 + (7 * i + j) % 40] for j in range(1 + i % 9)), 1 + (5 * i) % 17) for i in range(24)]

    async def one(i: int, prompt: str, count: int) -> str:
        if i % 2:
            return (await client.completions.create(model="write", prompt=prompt, max_tokens=count)).choices[0].text
        stream = await client.completions.create(model="write", prompt=prompt, max_tokens=count, stream=True)
        return "".join([event.choices[0].text async for event in stream])

    answers = await asyncio.gather(*(one(i, *each) for i, each in enumerate(asked[:16])))
    assert answers == [house.answer(*each) for each in asked[:16]]
    page = served.replicas["generate"].metrics.exposition().decode()
    assert json.dumps("generate") in page
