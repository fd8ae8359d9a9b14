"""Bad input over raw sockets, against gateway and stages that run: refused with a reason in the one shape, and on it goes."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from tests.system.edge import SERVICES, Edge

LIMIT = 16 << 20
"""Bytes of a body."""
ANSWER_S = 5.0
"""Longest wait for an answer."""
INFER = "/v2/models/embed/infer"
HEADER_LENGTH = "inference-header-content-length"


@dataclass(frozen=True)
class Row:
    """What is sent to whom, and what comes back."""

    sentence: str
    to: str
    sends: bytes
    status: int | None
    """None: the client closes without waiting."""
    reason: str | None = None


def request(path: str, body: bytes, headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    """An HTTP request as it goes over the wire; `headers` go before the length that fits."""
    given = {"host": "test", "content-type": "application/json", **(headers or {})}
    if "transfer-encoding" not in given:
        given.setdefault("content-length", str(len(body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def texts(values: Sequence[str], **changes: Any) -> dict[str, Any]:
    """The tensor `text`, with some of its fields changed."""
    return {"name": "text", "shape": [len(values)], "datatype": "BYTES", "data": list(values), **changes}


def infer(*tensors: dict[str, Any], headers: Mapping[str, str] | None = None, path: str = INFER, **fields: Any) -> bytes:
    """An all-JSON infer request."""
    return request(path, json.dumps({"inputs": list(tensors), **fields}).encode(), headers)


def binary(size: int, raw: bytes, *, shape: Sequence[int] = (1,), header: str | None = None) -> bytes:
    """A request with one text in binary that says of its sizes what it is told to say."""
    tensor = {"name": "text", "shape": list(shape), "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    document = json.dumps({"inputs": [tensor]}).encode()
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: header or str(len(document))}
    return request(INFER, document + raw, headers)


def stage(name: str, *tensors: dict[str, Any], **fields: Any) -> bytes:
    """A request to a stage itself."""
    return infer(*tensors, path=f"/v2/models/{name}/infer", **fields)


def tokens(ids: Sequence[Sequence[int]], **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`input_ids` and an `attention_mask` of ones."""
    array = np.array(ids)
    return (
        {"name": "input_ids", "shape": list(array.shape), "datatype": "INT64", "data": array.ravel().tolist(), **changes},
        {"name": "attention_mask", "shape": list(array.shape), "datatype": "INT64", "data": [1] * array.size},
    )


def states(width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hidden states of two tokens, and their mask."""
    return (
        {"name": "last_hidden_state", "shape": [1, 2, width], "datatype": "FP32", "data": [0.5] * (2 * width)},
        {"name": "attention_mask", "shape": [1, 2], "datatype": "INT64", "data": [1, 1]},
    )


TEXT = texts(["a"])
GOOD = infer(texts(["and on it goes"]))
WORD = struct.pack("<I", 3) + b"cat"
CHUNKED = {"transfer-encoding": "chunked"}
DEADLINE = "x-request-timeout-seconds"
DEEP = b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

ROWS = [
    Row("JSON that breaks off", "gateway", request(INFER, b'{"inputs": [{"name"'), 400, "bad_request"),
    Row("an empty body", "gateway", request(INFER, b""), 400, "bad_request"),
    Row("JSON that is no object", "gateway", request(INFER, b"[1, 2]"), 400, "bad_request"),
    Row("bytes that are no text", "gateway", request(INFER, b'{"inputs": "\xff\xfe"}'), 400, "bad_request"),
    Row("JSON a hundred thousand levels deep", "gateway", request(INFER, DEEP), 400, "bad_request"),
    Row("half of a surrogate pair", "gateway", request(INFER, b'{"inputs": [], "id": "\\ud800"}'), 400, "bad_request"),
    Row("no inputs", "gateway", infer(), 400, "bad_request"),
    Row("an input nobody takes", "gateway", infer(TEXT, texts(["a"], name="more")), 400, "bad_request"),
    Row("an input twice", "gateway", infer(TEXT, texts(["a"])), 400, "bad_request"),
    Row("an output nobody makes", "gateway", infer(TEXT, outputs=[{"name": "logits"}]), 400, "bad_request"),
    Row("numbers for a text", "gateway", infer(texts(["a"], datatype="FP32", data=[1.0])), 400, "bad_request"),
    Row("a datatype nobody knows", "gateway", infer(texts(["a"], datatype="STRING")), 400, "bad_request"),
    Row("a number among the texts", "gateway", infer(texts(["a"], data=[7])), 400, "bad_request"),
    Row("one axis too many", "gateway", infer(texts(["a"], shape=[1, 1])), 400, "bad_request"),
    Row("a shape of more than there is", "gateway", infer(texts(["a"], shape=[2])), 400, "bad_request"),
    Row("a negative shape", "gateway", infer(texts(["a"], shape=[-1])), 400, "bad_request"),
    Row("a shape of a million million", "gateway", infer(texts(["a"], shape=[10**12])), 413, "too_large"),
    Row("a batch of none", "gateway", infer(texts([])), 400, "bad_request"),
    Row("a batch of 257", "gateway", infer(texts(["a"] * 257)), 413, "too_large"),
    Row("a batch of 100,000", "gateway", infer(texts(["a"] * 100_000)), 413, "too_large"),
    Row("a binary size beyond the body", "gateway", binary(1000, WORD), 400, "bad_request"),
    Row("a binary size that is negative", "gateway", binary(-7, WORD), 400, "bad_request"),
    Row("a binary size short of the body", "gateway", binary(7, WORD + b"more"), 400, "bad_request"),
    Row("a text that says 4 GiB", "gateway", binary(7, b"\xff\xff\xff\xffcat"), 400, "bad_request"),
    Row("a shape of more texts than bytes", "gateway", binary(7, WORD, shape=[1000]), 400, "bad_request"),
    Row("a header length beyond the body", "gateway", binary(7, WORD, header="99999"), 400, "bad_request"),
    Row("a header length that is no number", "gateway", binary(7, WORD, header="-1"), 400, "bad_request"),
    Row("a header length in the middle of the JSON", "gateway", binary(7, WORD, header="20"), 400, "bad_request"),
    Row("a text that is not UTF-8", "gateway", binary(7, struct.pack("<I", 3) + b"\xff\xfe\xfd"), 400, "bad_request"),
    Row("a body over the limit", "gateway", request(INFER, b" " * (LIMIT + 1)), 413, "too_large"),
    Row("a body said to be over it", "gateway", request(INFER, b"", {"content-length": str(1 << 40)}), 413, "too_large"),
    Row(
        "a body over it in pieces of unsaid length", "gateway",
        request(INFER, (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 17 + b"0\r\n\r\n", CHUNKED), 413, "too_large",
    ),
    Row("an unknown pipeline", "gateway", infer(TEXT, path="/v2/models/embedd/infer"), 404, "not_found"),
    Row("an unknown version", "gateway", infer(TEXT, path="/v2/models/embed/versions/7/infer"), 404, "not_found"),
    Row("an unknown path", "gateway", request("/v2/modells", b"", method="GET"), 404, "not_found"),
    Row("a path that climbs", "gateway", infer(TEXT, path="/v2/models/../../infer"), 404, "not_found"),
    Row("the wrong method", "gateway", request("/v2/health/ready", b"", method="DELETE"), 405, "method_not_allowed"),
    Row("a negative deadline", "gateway", infer(TEXT, headers={DEADLINE: "-1"}), 400, "bad_request"),
    Row("a deadline of no time", "gateway", infer(TEXT, headers={DEADLINE: "0"}), 400, "bad_request"),
    Row("a deadline that is no number", "gateway", infer(TEXT, headers={DEADLINE: "nan"}), 400, "bad_request"),
    Row("a negative deadline as gRPC has it", "gateway", infer(TEXT, headers={"grpc-timeout": "-5S"}), 400, "bad_request"),
    Row("a negative deadline as OIP has it", "gateway", infer(TEXT, parameters={"timeout": -5}), 400, "bad_request"),
    Row("a text of 1,002 tokens", "gateway", infer(texts(["too " * 1000])), 400, "bad_request"),
    Row("a text of a megabyte", "gateway", infer(texts(["far too long " * 80_000])), 413, "too_large"),
    Row("embeddings asked for without a model", "gateway", request("/v1/embeddings", b'{"input": "a"}'), 400, "bad_request"),
    Row("chunks of no length", "gateway", request(INFER, b"ZZZ\r\nnonsense\r\n0\r\n\r\n", CHUNKED), 400, "bad_request"),
    Row("a length that is no number", "gateway", request(INFER, b"", {"content-length": "many"}), 400, "bad_request"),
    Row("a length and chunks", "gateway", request(INFER, b"0\r\n\r\n", {**CHUNKED, "content-length": "5"}), 400, "bad_request"),
    Row("headers of 200 kB", "gateway", infer(TEXT, headers={"x-junk": "a" * 200_000}), 431, "too_large"),
    Row("a header without an end", "gateway", b"GET /v2 HTTP/1.1\r\nx-junk: " + b"a" * (1 << 20), 431, "too_large"),
    Row("a tunnel", "gateway", b"CONNECT example.org:80 HTTP/1.1\r\nhost: example.org\r\n\r\n", 400, "bad_request"),
    Row("no HTTP at all", "gateway", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "bad_request"),
    Row("half a body, then the end", "gateway", GOOD[:-20], None),
    Row("half a line, then the end", "gateway", GOOD[:20], None),
    Row("a whole task, then the end", "gateway", GOOD, None),
    Row("a token no vocabulary has", "encode", stage("encode", *tokens([[101, 99_999, 102]])), 400, "bad_request"),
    Row("a negative token", "encode", stage("encode", *tokens([[101, -7, 102]])), 400, "bad_request"),
    Row("more tokens than positions", "encode", stage("encode", *tokens([[101] * 600])), 400, "bad_request"),
    Row("tokens of another width", "encode", stage("encode", *tokens([[101, 102]], datatype="INT32")), 400, "bad_request"),
    Row(
        "a mask of another length", "encode",
        stage("encode", tokens([[101, 102]])[0], tokens([[101, 7, 102]])[1]), 400, "bad_request",
    ),
    Row("tokens without a mask", "encode", stage("encode", tokens([[101, 102]])[0]), 400, "bad_request"),
    Row("tokens beyond 64 bits", "encode", stage("encode", *tokens([[1]], data=[2**70])), 400, "bad_request"),
    Row("300 rows of tokens", "encode", stage("encode", *tokens([[101, 102]] * 300)), 413, "too_large"),
    Row("a model of another name", "encode", stage("embed", *tokens([[101, 102]])), 404, "not_found"),
    Row(
        "an itinerary of nonsense", "encode",
        stage("encode", *tokens([[101, 102]]), parameters={"itinerary": [{"step": 7}]}), 400, "bad_request",
    ),
    Row("a body over the limit, at a stage", "pool", request("/v2/models/pool/infer", b" " * (LIMIT + 1)), 413, "too_large"),
    Row("states of another width", "pool", stage("pool", *states(383)), 400, "bad_request"),
    Row("a text of a megabyte, at a stage", "tokenise", stage("tokenise", texts(["long " * 200_000])), 413, "too_large"),
    Row("half a request, at a stage", "tokenise", stage("tokenise", texts(["cat"]))[:-9], None),
    Row("chunks of no length, at a stage", "pool", request("/v2/models/pool/infer", b"ZZZ\r\n", CHUNKED), 400, "bad_request"),
]  # fmt: skip


@dataclass(frozen=True)
class House:
    """Who is sent to, and who must go on."""

    addresses: Mapping[str, tuple[str, int]]
    processes: Mapping[int, float]
    """pid -> start time."""

    def still_runs(self) -> bool:
        """Whether every process is the one it was."""
        return all(psutil.Process(pid).create_time() == started for pid, started in self.processes.items())

    def send(self, to: str, sends: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer to some bytes."""
        with socket.create_connection(self.addresses[to], ANSWER_S) as connection:
            # A server that has refused need not read to the end.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(sends)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            body = answer.read()
            assert answer.headers["content-type"] == "application/json", body
            return answer.status, json.loads(body)

    def throw(self, row: Row) -> None:
        """Send what the row sends, wait for the first of an answer if there is one to come, and close."""
        with socket.create_connection(self.addresses[row.to], ANSWER_S) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(row.sends)
                if row.status is not None:
                    connection.recv(1)


@pytest.fixture(scope="module")
def house(edge: Edge) -> House:
    edge.want(tokenise=2, encode=2, pool=2)
    urls = {"gateway": edge.url, **{service: next(iter(edge.replicas(service).values())) for service in SERVICES}}
    parts = {name: urlsplit(url) for name, url in urls.items()}
    return House(
        {name: (part.hostname or "", part.port or 0) for name, part in parts.items()},
        {pid: psutil.Process(pid).create_time() for pid in edge.pids().values()},
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.sentence)
def test_it_is_refused_with_a_reason_and_the_next_good_request_is_answered(house: House, row: Row) -> None:
    if row.status is None:
        house.throw(row)
    else:
        status, body = house.send(row.to, row.sends)
        assert (status, body.get("reason")) == (row.status, row.reason), body
        assert body["error"]
        assert body.keys() <= {"error", "reason", "stage", "budget_ms", "elapsed_ms", "hops"}
    status, body = house.send("gateway", GOOD)
    assert status == 200, body
    assert len(body["outputs"][0]["data"]) == 384
    assert house.still_runs()


def test_all_of_it_at_once_costs_the_tasks_beside_it_nothing(edge: Edge, house: House, tmp_path: Path) -> None:
    with edge.load(tmp_path, 20, 3) as load:
        load.wait_for(5)
        with ThreadPoolExecutor(8) as several:
            for thrown in [several.submit(house.throw, row) for row in ROWS]:
                thrown.result()
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.outcomes == {"on_time": load.tasks}
    assert house.still_runs()
    assert edge.gauge("espalier_gateway_inflight_requests") == 0


def test_what_only_a_stage_can_find_malformed_is_no_task_either(edge: Edge, house: House) -> None:
    before = edge.counted()
    for sends in (infer(texts(["too " * 1000])), infer(texts(["far too long " * 80_000])), infer(texts(["a"] * 257))):
        status, _ = house.send("gateway", sends)
        assert status in (400, 413)
    assert edge.counted() == before, "400 and 413 never become a task (docs/deadlines.md, D1)"
