"""Clients people already have, unchanged: tritonclient (sync and aio) on pipelines and stages, openai on embeddings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from tritonclient.utils import InferenceServerException

from services.dataplane.wire import Array
from tests.services import minilm as house

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "minilm_reference.json").read_text())
TEXTS: list[str] = REFERENCE["texts"]
VECTORS = np.array(REFERENCE["embeddings"], dtype=np.float32)
TOLERANCE = 1e-4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[str, dict[str, str]]]:
    async with house.served(minilm, tmp_path_factory.mktemp("gateway")) as addresses:
        yield addresses


pytestmark = pytest.mark.asyncio(loop_scope="module")


def texts(name: str, values: list[str], binary: bool) -> Any:
    tensor = triton.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode() for value in values], dtype=object), binary_data=binary)
    return tensor


def number(name: str, array: Array, datatype: str, binary: bool) -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary", [True, False])
async def test_triton_sync_drives_a_pipeline(served: tuple[str, dict[str, str]], binary: bool) -> None:
    url = served[0].removeprefix("http://")

    def talk() -> Array:
        client = triton.InferenceServerClient(url)
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("embed")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        metadata = client.get_model_metadata("embed")
        assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        outputs = [triton.InferRequestedOutput("embedding", binary_data=binary)]
        answer = client.infer("embed", [texts("text", TEXTS, binary)], outputs=outputs, request_id="seven", timeout=9_000_000)
        assert answer.get_response()["id"] == "seven"
        embedding: Array = answer.as_numpy("embedding")
        client.close()
        return embedding

    assert np.abs(await asyncio.to_thread(talk) - VECTORS).max() < TOLERANCE


@pytest.mark.parametrize("binary", [True, False])
async def test_triton_aio_drives_a_pipeline_with_a_join(served: tuple[str, dict[str, str]], binary: bool) -> None:
    async with triton_aio.InferenceServerClient(served[0].removeprefix("http://")) as client:
        inputs = [
            texts("text", ["The goalkeeper saved the penalty."], binary),
            texts("labels", ["cooking", "football"], binary),
        ]
        answer = await client.infer("classify", inputs)
        assert answer.as_numpy("label").tolist() == [b"football"]
        assert answer.as_numpy("scores").shape == (1, 2)
        query = texts("query", ["Where can I sleep tonight?"], binary)
        documents = texts("documents", ["A recipe for bread", "A hotel by the station", "The price of tin"], binary)
        ranked = await client.infer("rank", [query, documents])
        assert ranked.as_numpy("order")[0, 0] == 1


@pytest.mark.parametrize("binary", [True, False])
async def test_triton_drives_every_single_stage(served: tuple[str, dict[str, str]], binary: bool) -> None:
    addresses = served[1]
    some = TEXTS[:4]  # a JSON tensor of all of them is larger than the client's own library likes

    async def ask(stage: str, *inputs: Any) -> Any:
        async with triton_aio.InferenceServerClient(addresses[stage].removeprefix("http://")) as client:
            assert await client.is_model_ready(stage)
            metadata = await client.get_model_metadata(stage)
            outputs = [triton.InferRequestedOutput(o["name"], binary_data=binary) for o in metadata["outputs"]]
            return await client.infer(stage, list(inputs), outputs=outputs)

    tokens = await ask("tokenise", texts("text", some, binary))
    ids, mask = tokens.as_numpy("input_ids"), tokens.as_numpy("attention_mask")
    mask_input = number("attention_mask", mask, "INT64", binary)
    hidden = await ask("encode", number("input_ids", ids, "INT64", binary), mask_input)
    states = hidden.as_numpy("last_hidden_state")
    pooled = await ask(
        "pool", number("last_hidden_state", states, "FP32", binary), number("attention_mask", mask, "INT64", binary)
    )
    embedding = pooled.as_numpy("embedding")
    assert np.abs(embedding - VECTORS[: len(some)]).max() < TOLERANCE
    labelled = await ask(
        "classify",
        number("embedding", embedding[1:2], "FP32", binary),
        number("label_embeddings", embedding, "FP32", binary),
        texts("labels", some, binary),
    )
    # The client hands JSON texts on as str, binary ones as bytes.
    assert labelled.as_numpy("label").tolist() == [some[1].encode() if binary else some[1]]
    ranked = await ask(
        "rank",
        number("query_embedding", embedding[2:3], "FP32", binary),
        number("document_embeddings", embedding, "FP32", binary),
    )
    assert ranked.as_numpy("order")[0, 0] == 2


async def test_triton_is_told_what_is_wrong(served: tuple[str, dict[str, str]]) -> None:
    async with triton_aio.InferenceServerClient(served[0].removeprefix("http://")) as client:
        with pytest.raises(InferenceServerException, match="no pipeline 'embedd'"):
            await client.infer("embedd", [texts("text", ["a"], True)])
        with pytest.raises(InferenceServerException, match="must be BYTES"):
            await client.infer("embed", [number("text", np.zeros(1, np.float32), "FP32", True)])
        with pytest.raises(InferenceServerException, match="the model takes 256 tokens"):
            await client.infer("embed", [texts("text", ["far too long " * 5000], True)])
        with pytest.raises(InferenceServerException, match="has 1002 tokens"):
            await client.infer("embed", [texts("text", ["too " * 1000], True)])
        assert (await client.infer("embed", [texts("text", ["and on it goes"], True)])).as_numpy("embedding").shape == (1, 384)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_openai_gets_the_reference_embeddings(served: tuple[str, dict[str, str]], encoding: Any) -> None:
    async with AsyncOpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        answer = await client.embeddings.create(model="embed", input=TEXTS, encoding_format=encoding)
        got = np.array([np.frombuffer(_bytes(each.embedding), "<f4") for each in answer.data])
        assert np.abs(got - VECTORS).max() < TOLERANCE
        assert answer.usage.prompt_tokens > 2 * len(TEXTS)
        assert [model.id async for model in await client.models.list()] == ["embed"]


def _bytes(embedding: Any) -> bytes:
    import base64  # noqa: PLC0415

    return base64.b64decode(embedding) if isinstance(embedding, str) else np.array(embedding, dtype="<f4").tobytes()


async def test_openai_sync_with_its_defaults(served: tuple[str, dict[str, str]]) -> None:
    def talk() -> list[float]:
        with OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
            return client.embeddings.create(model="embed", input=TEXTS[2]).data[0].embedding

    assert np.abs(np.array(await asyncio.to_thread(talk)) - VECTORS[2]).max() < TOLERANCE


async def test_openai_is_told_what_is_wrong(served: tuple[str, dict[str, str]]) -> None:
    async with AsyncOpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(NotFoundError, match="no pipeline"):
            await client.embeddings.create(model="gpt", input="a")
        with pytest.raises(BadRequestError, match="makes no embeddings"):
            await client.embeddings.create(model="classify", input="a")
        with pytest.raises(BadRequestError, match="dimensions"):
            await client.embeddings.create(model="embed", input="a", dimensions=7)
        with pytest.raises(BadRequestError, match="input"):
            await client.embeddings.create(model="embed", input=[])
