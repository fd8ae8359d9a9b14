"""The benches' common material: texts of mixed lengths, encoded requests, and the same work done in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadgen import corpus
from models import manifest
from models.manifest import Precision
from services.dataplane import wire
from services.dataplane.wire import Array, Message, Tensor
from services.stage.processors import Processor, open_processor
from services.transport import HttpAnswer, Transport

DEADLINE_S = 20.0


def texts(count: int, seed: int = 1) -> list[bytes]:
    """Texts as the load generator draws them."""
    rng = np.random.default_rng(seed)
    return [corpus.text(rng).encode() for _ in range(count)]


class Request:
    """An encoded infer request for one text, ready to be sent many times."""

    def __init__(self, text: bytes, **parameters: Any) -> None:
        array = np.empty(1, dtype=object)
        array[0] = text
        message = Message((Tensor("text", "BYTES", array),), parameters=parameters)
        self.body, length = wire.encode_request(message)
        self.headers = {
            "content-type": wire.BINARY_TYPE,
            wire.HEADER_LENGTH: str(length),
            "x-request-timeout-seconds": f"{DEADLINE_S}",
        }

    async def send(self, transport: Transport, url: str) -> HttpAnswer:
        """Send it and wait for the answer."""
        return await transport.post(url, self.body, self.headers, DEADLINE_S)


class OneProcess:
    """Tokenise, encode and pool as three function calls: what the hops are compared with."""

    def __init__(self, model: Path, precision: Precision = "float32") -> None:
        exported = manifest.load(model)
        self._stages: list[Processor] = []
        for name in ("tokenise", "encode", "pool"):
            spec = exported.stage(name)
            own: Precision = precision if precision in spec.files else "float32"
            self._stages.append(open_processor(spec, manifest.check_files(spec, own, model), 1))

    def embed(self, text: bytes) -> Array:
        """The embedding of one text."""
        array = np.empty(1, dtype=object)
        array[0] = text
        tokenise, encode, pool = self._stages
        tokens = tokenise.run({"text": array})
        mask = tokens["attention_mask"]
        states = encode.run({"input_ids": tokens["input_ids"], "attention_mask": mask})
        return pool.run({**states, "attention_mask": mask})["embedding"]


def timed(function: Any, *arguments: Any) -> float:
    """Seconds a call took."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def quantile(values: Sequence[float], q: float) -> float:
    """Sample quantile by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def cycle(items: Sequence[Any]) -> Iterator[Any]:
    """The items for ever."""
    while True:
        yield from items
