"""A light stage whose work depends on the file, served: bad files are the client's fault, and the event loop is never held."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.manifest import Manifest, StageSpec, TensorSpec
from services.dataplane import wire
from services.dataplane.wire import Array, Message, Tensor
from services.stage.app import Replica
from services.stage.onward import Identity
from services.stage.processors import open_processor
from services.transport import HttpAnswer, Transport
from tests.services import harness

SPEC = StageSpec(
    name="preprocess",
    tier="light",
    processor="image",
    inputs=(TensorSpec(name="image", datatype="BYTES", shape=("batch",)),),
    outputs=(TensorSpec(name="pixel_values", datatype="FP32", shape=("batch", 3, 8, 8)),),
    files={"float32": ()},
    parameters={
        "size": {"shortest_edge": 8},
        "crop": {"height": 8, "width": 8},
        "resample": 3,
        "rescale": 1 / 255,
        "mean": None,
        "std": None,
        "max_pixels": 10_000,
    },
)


class Where:
    """As `Preprocess`, noting in which thread it ran."""

    inline = False

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self._processor = open_processor(SPEC, (), 1)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.threads.append(threading.current_thread())
        return self._processor.run(inputs)

    def describe(self) -> dict[str, Any]:
        return self._processor.describe()

    def example(self, items: int) -> dict[str, Array]:
        images = np.empty(items, dtype=object)
        images[:] = picture(20, 30)
        return {"image": images}


def picture(width: int, height: int, form: str = "PNG") -> bytes:
    encoded = io.BytesIO()
    Image.effect_noise((width, height), 60).save(encoded, form)
    return encoded.getvalue()


def replica(processor: Where) -> Replica:
    model = Manifest(model="test", source="made in a test", architecture="none", weights="seeded", stages=(SPEC,))
    return Replica(model, SPEC, processor, Identity("preprocess", "preprocess-0", "local"))


async def ask(address: str, *files: bytes) -> HttpAnswer:
    images = np.empty(len(files), dtype=object)
    images[:] = files
    body, length = wire.encode_request(Message((Tensor("image", "BYTES", images),)))
    _, headers = wire.media_type(length)
    async with Transport() as transport:
        return await transport.post(f"{address}/v2/models/preprocess/infer", body, headers, 30.0)


GOOD = picture(40, 30)
JPEG = picture(90, 90, "JPEG")


@pytest.mark.parametrize(
    ("sentence", "file", "status", "reason", "says"),
    [
        ("no image", b"made up", 400, "bad_request", "image 1 is no image: send the bytes of a file in one of JPEG"),
        ("a JPEG that breaks off", JPEG[: len(JPEG) // 2], 400, "bad_request", "image 1 is broken"),
        ("an image over the limit", picture(101, 100), 413, "too_large", "image 1 has 101 x 100 pixels; the limit is 10000"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
async def test_a_bad_file_is_refused_and_the_next_good_one_is_answered(
    sentence: str, file: bytes, status: int, reason: str, says: str
) -> None:
    del sentence
    async with harness.stages(replica(Where())) as (address,):
        refused = await ask(address, GOOD, file)
        document = json.loads(refused.body)
        assert (refused.status, document["reason"], document["stage"]) == (status, reason, "preprocess")
        assert says in document["error"]
        answered = await ask(address, GOOD)
        assert answered.status == 200
        message = wire.decode_response(answered.body, answered.headers.get(wire.HEADER_LENGTH), wire.Limits())
        assert message.tensors[0].array.shape == (1, 3, 8, 8)


async def test_what_depends_on_the_file_never_runs_in_the_event_loop_however_short_it_is_thought() -> None:
    processor = Where()
    async with harness.stages(replica(processor)) as (address,):
        processor.threads.clear()  # those of the warm-up, when nobody is served yet
        assert (await ask(address, GOOD)).status == 200
    assert len(processor.threads) == 1
    assert threading.main_thread() not in processor.threads
