"""Pipelines that make text, served: the decoder written by hand, between stages that take letters for tokens."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import Manifest, ModelFile, StageSpec, TensorSpec, Tier
from services.dataplane.errors import BadRequest
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Routes
from services.dataplane.wire import Array
from services.gateway.app import Gateway
from services.stage.app import Replica
from services.stage.onward import Identity
from services.stage.processors import Processor
from services.stage.processors.generate import Generate
from services.stage.session import Graph, open_graph
from tests.services import decoder, harness

LETTERS = "\0\1\2abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRS"
assert len(LETTERS) == decoder.VOCABULARY


class Paced:
    """The decoder's graph, which the test may hold: then every run waits until it is allowed."""

    def __init__(self, graph: Graph) -> None:
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.runs = 0
        """Since the first `hold`."""
        self.batches: list[int] = []
        self.broken = 0
        """Runs over so many new tokens fail."""
        self.waits = threading.Event()
        """A run is waiting to be allowed."""
        self._graph = graph
        self._held = self._counts = False
        self._allowed = threading.Semaphore(0)

    def hold(self) -> None:
        """From here on runs need to be allowed, and are counted."""
        self._held = self._counts = True

    def allow(self, runs: int = 1) -> None:
        self._allowed.release(runs)

    def free(self) -> None:
        self._held = False
        self._allowed.release(1000)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        if self._held:
            if not self._allowed.acquire(blocking=False):
                self.waits.set()
                if not self._allowed.acquire(timeout=30):
                    raise TimeoutError("the test never allowed the next step")
            self.waits.clear()
        if self._counts:
            self.runs += 1
            self.batches.append(len(inputs["attention_mask"]))
        if inputs["inputs_embeds"].shape[1] == self.broken:
            raise ZeroDivisionError
        return self._graph.run(inputs, outputs)

    def describe(self) -> dict[str, Any]:
        return self._graph.describe()


class Letters:
    """`text` -> ids, a letter each."""

    inline = True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = [[LETTERS.find(letter) for letter in text.decode().replace(" ", "")] for text in inputs["text"]]
        if any(-1 in row for row in found):
            raise BadRequest("text 0 has a letter that is no token")
        ids = np.zeros((len(found), max(map(len, found))), np.int64)
        for row, tokens in zip(ids, found, strict=True):
            row[: len(tokens)] = tokens
        count = np.array([len(row) for row in found])
        return {"input_ids": ids, "attention_mask": (np.arange(ids.shape[1]) < count[:, None]) * 1, "token_count": count}

    def describe(self) -> dict[str, Any]:
        return {}


class Spell:
    """Ids -> `text`; the end token says nothing."""

    inline = True

    def __init__(self) -> None:
        self.calls = 0
        self.broken = self.refuses = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls += 1
        if self.broken:
            raise ZeroDivisionError
        if self.refuses:
            raise BadRequest("these are no letters")
        text = np.empty(len(inputs["output_ids"]), dtype=object)
        for i, (ids, count) in enumerate(zip(inputs["output_ids"], inputs["output_count"], strict=True)):
            text[i] = spelt(ids[:count]).encode()
        return {"text": text}

    def describe(self) -> dict[str, Any]:
        return {}


class Script:
    """`messages` -> `text`: the contents one after another, without what is no letter."""

    inline = True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import json  # noqa: PLC0415

        text = np.empty(len(inputs["messages"]), dtype=object)
        for i, raw in enumerate(inputs["messages"]):
            contents = [each["content"] for each in json.loads(raw)]
            told = "".join(
                c
                if isinstance(c, str)
                else "".join("\2" * decoder.IMAGE_TOKENS if p["type"] == "image" else p["text"] for p in c)
                for c in contents
            )
            text[i] = told.replace(" ", "").replace("\n", "").encode()
        return {"text": text}

    def example(self, items: int) -> dict[str, Array]:
        messages = np.empty(items, dtype=object)
        messages[:] = b'[{"role": "user", "content": "abc"}]'
        return {"messages": messages}

    def describe(self) -> dict[str, Any]:
        return {}


class Ears:
    """Sound or an image -> made-up numbers: whatever comes, made from its first bytes."""

    inline = True

    def __init__(self, source: str, output: str, length: int) -> None:
        self._source, self._output, self._length = source, output, length

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        made = [noise(raw, self._length) for raw in inputs[self._source]]
        return {self._output: np.stack(made)}

    def describe(self) -> dict[str, Any]:
        return {}


def noise(raw: bytes, length: int) -> Array:
    return np.random.default_rng(list(raw[:8])).normal(size=(length, decoder.WIDTH)).astype(np.float32)


def spelt(ids: Sequence[int]) -> str:
    return "".join(LETTERS[i] for i in ids if i != decoder.EOS)


def answer(prompt: str, count: int) -> str:
    """What the model says greedily."""
    return spelt(decoder.reference([LETTERS.index(letter) for letter in prompt], count))


def finish(prompt: str, count: int) -> str:
    made = decoder.reference([LETTERS.index(letter) for letter in prompt], count)
    return "stop" if made[-1] == decoder.EOS else "length"


def _spec(
    name: str, inputs: dict[str, tuple[str, tuple[Any, ...]]], outputs: dict[str, tuple[str, tuple[Any, ...]]]
) -> StageSpec:
    def tensors(side: dict[str, tuple[str, tuple[Any, ...]]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n, datatype=kind, shape=shape) for n, (kind, shape) in side.items())

    files: dict[Any, tuple[ModelFile, ...]] = {"float32": ()}
    tier: Tier = "light"
    return StageSpec(name=name, tier=tier, processor="test", inputs=tensors(inputs), outputs=tensors(outputs), files=files)


BATCH, SEQ = ("BYTES", ("batch",)), ("INT64", ("batch", "seq"))
TOKENISE = _spec("tokenise", {"text": BATCH}, {"input_ids": SEQ, "attention_mask": SEQ, "token_count": ("INT64", ("batch",))})
DETOKENISE = _spec(
    "detokenise", {"output_ids": ("INT64", ("batch", "new")), "output_count": ("INT64", ("batch",))}, {"text": BATCH}
)
CHAT = _spec("chat", {"messages": BATCH}, {"text": BATCH})
LISTEN = _spec("listen", {"audio": BATCH}, {"last_hidden_state": ("FP32", ("batch", decoder.POSITIONS, decoder.WIDTH))})
LOOK = _spec("look", {"image": BATCH}, {"image_embedding": ("FP32", ("batch", decoder.IMAGE_TOKENS, decoder.WIDTH))})
OPTIONS = ("max_tokens", "temperature", "top_p", "seed")


def _pipeline(
    name: str, before: tuple[Step, ...], taken: dict[str, str], deadline_s: float, token_deadline_s: float | None, service: str
) -> Pipeline:
    taken = taken | {option: f"request.{option}" for option in OPTIONS}
    outputs = {
        "text": "detokenise.text", "finish_reason": "generate.finish_reason", "output_count": "generate.output_count",
    }  # fmt: skip
    if any(step.id == "tokenise" for step in before):
        outputs["token_count"] = "tokenise.token_count"
    return Pipeline(
        name=name,
        deadline_s=deadline_s,
        token_deadline_s=token_deadline_s,
        epsilon=0.05,
        steps=(
            *before,
            Step(id="generate", service=service, inputs=taken),
            Step(
                id="detokenise",
                service="detokenise",
                inputs={"output_ids": "generate.output_ids", "output_count": "generate.output_count"},
            ),
        ),
        outputs=outputs,
    )


def pipelines(deadline_s: float, token_deadline_s: float | None) -> list[Pipeline]:
    """write: text -> text; chat: messages -> text; ask: messages and image -> text; transcribe: audio -> text."""
    tokens = {"input_ids": "tokenise.input_ids", "attention_mask": "tokenise.attention_mask"}
    script = Step(id="chat", service="chat", inputs={"messages": "request.messages"})
    tokenise = Step(id="tokenise", service="tokenise", inputs={"text": "chat.text"})
    look = Step(id="look", service="look", inputs={"image": "request.image"})
    plain = tokenise.model_copy(update={"inputs": {"text": "request.text"}})
    listen = Step(id="listen", service="listen", inputs={"audio": "request.audio"})
    limits = deadline_s, token_deadline_s
    return [
        _pipeline("write", (plain,), tokens, *limits, "generate"),
        _pipeline("chat", (script, tokenise), tokens, *limits, "generate"),
        _pipeline("ask", (look, script, tokenise), tokens | {"image_embedding": "look.image_embedding"}, *limits, "see"),
        _pipeline("transcribe", (listen,), {"last_hidden_state": "listen.last_hidden_state"}, *limits, "hear"),
    ]


class House:
    """Everything up: addresses, and what a test holds and looks at."""

    def __init__(self) -> None:
        self.url = ""
        self.stages: dict[str, str] = {}
        self.replicas: dict[str, Replica] = {}
        self.graphs: dict[str, Paced] = {}
        self.spell = Spell()
        self.routes: Routes
        self.gateway: Gateway

    @property
    def graph(self) -> Paced:
        return self.graphs["generate"]

    def page(self) -> str:
        """The gateway's metrics."""
        return self.gateway.metrics.exposition().decode()


def generator(directory: Path, *, kind: type[Paced] = Paced, **options: Any) -> tuple[StageSpec, Generate, Paced]:
    """The decoder with a graph that can be held."""
    spec, files = decoder.write(directory, **options)
    by_name = {path.name: path for path in files}
    graph = kind(open_graph(files[0], 1))
    cross = by_name.get("generate-cross.float32.onnx")
    positions = by_name.get("generate-positions.npy")
    processor = Generate(
        spec,
        graph,
        np.load(by_name["generate-embedding.npy"]),
        open_graph(cross, 1) if cross else None,
        np.load(positions) if positions else None,
    )
    return spec, processor, graph


def replica(spec: StageSpec, processor: Processor, name: str, **options: Any) -> Replica:
    model = Manifest(model="test", source="made in a test", architecture="none", weights="seeded", stages=(spec,))
    return Replica(model, spec, processor, Identity(name, f"{name}-0", "local"), **options)


@asynccontextmanager
async def served(
    directory: Path,
    *,
    deadline_s: float = 20.0,
    token_deadline_s: float | None = None,
    max_batch: int = 4,
    queue_capacity: int = 16,
    elsewhere: Mapping[str, str] | None = None,
    **options: Any,
) -> AsyncIterator[House]:
    """Stages and a gateway over the four pipelines; of services that are `elsewhere`, by their address, there are two."""
    house = House()
    made: dict[str, tuple[StageSpec, Processor]] = {
        "tokenise": (TOKENISE, Letters()),
        "detokenise": (DETOKENISE, house.spell),
        "chat": (CHAT, Script()),
        "listen": (LISTEN, Ears("audio", "last_hidden_state", decoder.POSITIONS)),
        "look": (LOOK, Ears("image", "image_embedding", decoder.IMAGE_TOKENS)),
    }
    for name, image, encoder in (("generate", False, False), ("see", True, False), ("hear", False, True)):
        spec, decoding, graph = generator(directory / name, max_batch=max_batch, image=image, encoder=encoder)
        made[name] = spec, decoding
        house.graphs[name] = graph
    async with AsyncExitStack() as stack:
        for name, (spec, processor) in made.items():
            house.replicas[name] = replica(spec, processor, name, queue_capacity=queue_capacity)
            (house.stages[name],) = await stack.enter_async_context(harness.stages(house.replicas[name]))
        house.stages |= elsewhere or {}
        house.routes = Routes(
            version=1,
            testbed="test",
            services={
                name: harness.service(name, spec, house.stages[name], weights="seeded") for name, (spec, _) in made.items()
            },
            pipelines={pipeline.name: pipeline for pipeline in pipelines(deadline_s, token_deadline_s)},
        )
        house.url, house.gateway = await stack.enter_async_context(harness.gateway(house.routes, directory, **options))
        try:
            yield house
        finally:
            for graph in house.graphs.values():
                graph.free()
