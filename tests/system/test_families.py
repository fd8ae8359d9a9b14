"""Every family served at once by the testbed families.yaml: each pipeline's answers are the whole PyTorch model's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from services.dataplane import wire
from services.dataplane.wire import Array, Message, Tensor
from tests.conftest import EXPORTS
from tests.system import whole
from tests.system.edge import Edge, running, until

TESTBED = Path(__file__).parents[2] / "deploy" / "testbeds" / "families.yaml"
NEW = 16
"""Tokens asked for."""
TEXTS = ("the ferry carries every letter across the canal", "Why?")

pytestmark = pytest.mark.timeout(600)  # the first run exports every family


@pytest.fixture(scope="module")
def families(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Families]:
    """Exported where `make demo` would put it too, and up as processes."""
    command = [sys.executable, "-m", "orchestrator", "export", str(TESTBED), "--models-dir", str(EXPORTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    with running(Families(tmp_path_factory.mktemp("families"), EXPORTS, testbed=TESTBED)) as edge:
        edge.up()
        yield edge


class Families(Edge):
    """The testbed, with a question to each kind of pipeline."""

    def ask(self, pipeline: str, **inputs: Array) -> Answer:
        """One task by the Open Inference Protocol."""
        kinds = {"O": "BYTES", "i": "INT64", "f": "FP32"}
        tensors = tuple(Tensor(name, kinds[array.dtype.kind], array) for name, array in inputs.items())
        body, header_length = wire.encode_request(Message(tensors, parameters={"hops": True}, binary=True))
        _, headers = wire.media_type(header_length)
        answer = httpx.post(
            f"{self.url}/v2/models/{pipeline}/infer", content=body, timeout=60.0, trust_env=False,
            headers={"content-type": wire.BINARY_TYPE, "x-request-timeout-seconds": "30", **headers},
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        message = wire.decode_response(answer.content, answer.headers.get(wire.HEADER_LENGTH), wire.Limits())
        return Answer({tensor.name: tensor.array for tensor in message.tensors}, message.parameters)

    def computed(self, service: str) -> int:
        """Tasks that all replicas of a service have answered."""
        pages = [httpx.get(f"{url}/metrics", trust_env=False).text for url in self.replicas(service).values()]
        lines = [line for page in pages for line in page.splitlines() if line.startswith("espalier_stage_requests_total{")]
        return sum(int(float(line.rpartition(" ")[2])) for line in lines if 'outcome="ok"' in line)


class Answer(dict[str, Array]):
    """Outputs by name, and the hops that the task came by."""

    def __init__(self, outputs: Mapping[str, Array], parameters: Mapping[str, Any]) -> None:
        super().__init__(outputs)
        self.replicas = {hop["step"]: hop["replica"] for hop in parameters["hops"]}

    def text(self) -> str:
        """The text that was generated."""
        return bytes(self["text"][0]).decode()


def items(*values: bytes | str) -> Array:
    """A BYTES tensor."""
    array = np.empty(len(values), dtype=object)
    array[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return array


def messages(question: str, *, with_image: bool = False) -> Array:
    """A conversation as the stage `chat` takes it."""
    return items(json.dumps(whole.conversation(question, with_image=with_image)))


TOKENS = np.array([NEW], dtype=np.int64)


@pytest.mark.parametrize("text", TEXTS)
def test_embed(families: Families, text: str) -> None:
    answer = families.ask("embed", text=items(text))
    np.testing.assert_allclose(answer["embedding"][0], whole.embedding(text), atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_classify_text(families: Families, text: str) -> None:
    scores, label = whole.text_classes(text)
    answer = families.ask("classify-text", text=items(text))
    np.testing.assert_allclose(answer["scores"][0], scores, atol=1e-4)
    assert answer["label"][0].decode() == label


@pytest.mark.parametrize("seed", [1, 2])
def test_classify_image(families: Families, seed: int) -> None:
    labels = ("a harbour", "a violin", "a quiet garden by the river")
    answer = families.ask("classify-image", image=items(whole.picture(seed)), labels=items(*labels))
    scores = whole.image_classes(whole.picture(seed), labels)
    np.testing.assert_allclose(answer["scores"][0], scores, atol=1e-4)
    assert answer["label"][0].decode() == labels[int(scores.argmax())]


@pytest.mark.parametrize("seed", [1, 2])
def test_ask_image(families: Families, seed: int) -> None:
    question = "What does the picture show?"
    image, asked = items(whole.picture(seed)), messages(question, with_image=True)
    answer = families.ask("ask-image", image=image, messages=asked, max_tokens=TOKENS)
    assert answer.text() == whole.about_image(whole.picture(seed), question, NEW)
    assert answer["output_count"] == [NEW]


@pytest.mark.parametrize("seed", [1, 2])
def test_transcribe(families: Families, seed: int) -> None:
    answer = families.ask("transcribe", audio=items(whole.sound(seed)), max_tokens=TOKENS)
    assert answer.text() == whole.transcript(whole.sound(seed), NEW)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pipeline", ["generate", "generate-in-parts"])
def test_generate(families: Families, pipeline: str, text: str) -> None:
    answer = families.ask(pipeline, prompt=items(text), max_tokens=TOKENS)
    assert answer.text() == whole.continuation(text, NEW)
    assert answer["output_count"] == [NEW]
    assert answer["finish_reason"][0] == b"length"


@pytest.mark.parametrize("text", TEXTS)
def test_chat(families: Families, text: str) -> None:
    answer = families.ask("chat", messages=messages(text), max_tokens=TOKENS)
    assert answer.text() == whole.reply(text, NEW)


def test_one_vision_encoder_serves_two_pipelines_and_counts_both(families: Families) -> None:
    before = families.computed("vision")
    image = items(whole.picture(3))
    classified = families.ask("classify-image", image=image, labels=items("a", "b"))
    asked = families.ask("ask-image", image=image, messages=messages("What?", with_image=True), max_tokens=TOKENS)
    assert classified.replicas["vision"] == asked.replicas["vision"]
    until(lambda: families.computed("vision") == before + 2, "the encoder has counted both")
