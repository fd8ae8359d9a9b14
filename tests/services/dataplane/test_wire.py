"""The wire: what goes out comes back, what lies is refused, and nothing else than a value or a refusal ever happens.

The stock client's own bytes and its own parser are the reference, not our reading of the specification.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from services.dataplane import wire
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import DTYPES, Array, Limits, Message, Tensor

LIMITS = Limits(body_bytes=1 << 16, header_bytes=1 << 14, tensors=8, dimensions=6, elements=1 << 14)
NUMERIC = [name for name in DTYPES if name != "BYTES"]
JSON_NUMERIC = [name for name in NUMERIC if name != "FP16"]


# --- what tensors there are -----------------------------------------------------------------------------------------------


def _shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 4), max_size=4).map(tuple)


def _numeric(datatype: str, *, finite: bool) -> st.SearchStrategy[Array]:
    dtype = DTYPES[datatype]
    elements = npst.from_dtype(dtype, allow_nan=not finite, allow_infinity=not finite)
    return _shapes().flatmap(lambda shape: npst.arrays(dtype, shape, elements=elements))


@st.composite
def _bytes_arrays(draw: st.DrawFn, elements: st.SearchStrategy[bytes]) -> Array:
    shape = draw(_shapes())
    array = np.empty(shape, dtype=object)
    array[...] = b""
    for index in np.ndindex(shape):
        array[index] = draw(elements)
    return array


@st.composite
def _tensors(draw: st.DrawFn, *, binary: bool) -> tuple[Tensor, ...]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3, unique=True))
    tensors = []
    for name in names:
        datatype = draw(st.sampled_from(list(DTYPES) if binary else [*JSON_NUMERIC, "BYTES"]))
        if datatype == "BYTES":
            elements = st.binary(max_size=6) if binary else st.text(max_size=6).map(str.encode)
            array = draw(_bytes_arrays(elements))
        else:
            array = draw(_numeric(datatype, finite=not binary))
        tensors.append(Tensor(name, datatype, array))
    return tuple(tensors)


def assert_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    assert [(t.name, t.datatype, t.array.shape) for t in left] == [(t.name, t.datatype, t.array.shape) for t in right]
    for a, b in zip(left, right, strict=True):
        if a.datatype == "BYTES":
            assert a.array.tolist() == b.array.tolist()
        else:
            np.testing.assert_array_equal(a.array, b.array)


def _header(length: int | None) -> str | None:
    return None if length is None else str(length)


# --- round trips ----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(tensors=_tensors(binary=True), identifier=st.none() | st.text(max_size=5))
def test_a_binary_request_comes_back_as_it_was(tensors: tuple[Tensor, ...], identifier: str | None) -> None:
    message = Message(tensors, id=identifier, parameters={"timeout": 5}, outputs=("a", "b"))
    body, length = wire.encode_request(message)
    assert length is not None
    assert len(body) == length + sum(_raw_size(t) for t in tensors)
    decoded = wire.decode_request(body, str(length), LIMITS)
    assert_same(decoded.tensors, tensors)
    assert (decoded.id, decoded.outputs) == (identifier, ("a", "b"))
    assert decoded.parameters == {"timeout": 5, "binary_data_output": True}
    assert decoded.binary == {"a": True, "b": True}


def _raw_size(tensor: Tensor) -> int:
    if tensor.datatype == "BYTES":
        return sum(4 + len(element) for element in tensor.array.flat)
    return tensor.array.size * DTYPES[tensor.datatype].itemsize


@settings(max_examples=80, deadline=None)
@given(tensors=_tensors(binary=False), identifier=st.none() | st.text(max_size=5))
def test_a_json_request_comes_back_as_it_was(tensors: tuple[Tensor, ...], identifier: str | None) -> None:
    body, length = wire.encode_request(Message(tensors, id=identifier), binary=False)
    assert length is None
    decoded = wire.decode_request(body, None, LIMITS)
    assert_same(decoded.tensors, tensors)
    assert (decoded.id, decoded.outputs, decoded.binary, decoded.parameters) == (identifier, None, False, {})


@settings(max_examples=60, deadline=None)
@given(tensors=_tensors(binary=False), raw=st.data())
def test_an_answer_comes_back_in_any_mixture_of_forms(tensors: tuple[Tensor, ...], raw: st.DataObject) -> None:
    binary = {tensor.name: raw.draw(st.booleans()) for tensor in tensors}
    body, length = wire.encode_response(Message(tensors, id="7", parameters={"hops": []}, binary=binary), model="m")
    assert (length is not None) == any(binary.values())
    decoded = wire.decode_response(body, _header(length), LIMITS)
    assert_same(decoded.tensors, tensors)
    assert decoded.id == "7"


_FORMS = [(name, True) for name in DTYPES] + [(name, False) for name in DTYPES if name != "FP16"]


@pytest.mark.parametrize(("datatype", "binary"), _FORMS, ids=[f"{name} {'raw' if raw else 'json'}" for name, raw in _FORMS])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (0, 5), (5, 0), (2, 0, 3), (2, 3)])
def test_every_datatype_and_shape_both_ways(datatype: str, shape: tuple[int, ...], binary: bool) -> None:
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(shape, dtype=object)
        array[...] = b""
        for i, index in enumerate(np.ndindex(shape)):
            array[index] = b"x" * i
    else:
        array = (np.arange(count) % 2).astype(DTYPES[datatype]).reshape(shape)
    tensors = (Tensor("x", datatype, array),)
    body, length = wire.encode_request(Message(tensors), binary=binary)
    assert_same(wire.decode_request(body, _header(length), LIMITS).tensors, tensors)
    body, length = wire.encode_response(Message(tensors, binary=binary), model="m")
    assert_same(wire.decode_response(body, _header(length), LIMITS).tensors, tensors)


def test_what_is_not_laid_out_as_the_wire_wants_is_sent_right_all_the_same() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert not array.flags.c_contiguous
    body, length = wire.encode_request(Message((Tensor("x", "FP32", array),)))
    assert_same(wire.decode_request(body, _header(length), LIMITS).tensors, (Tensor("x", "FP32", array),))


def test_raw_tensors_are_little_endian_row_major_and_unpadded() -> None:
    tensors = (
        Tensor("a", "INT16", np.array([[1, 2], [3, -2]], "i2")),
        Tensor("b", "BYTES", np.array([b"", b"\xff\x00"], object)),
        Tensor("c", "BOOL", np.array([True, False])),
    )
    body, length = wire.encode_request(Message(tensors))
    assert body[length:] == b"\x01\x00\x02\x00\x03\x00\xfe\xff" + b"\x00\x00\x00\x00\x02\x00\x00\x00\xff\x00" + b"\x01\x00"


@pytest.mark.parametrize(("datatype", "value"), [("FP16", np.float16(1)), ("BYTES", b"\xff")], ids=["FP16", "not UTF-8"])
def test_what_json_cannot_say_is_refused_with_the_way_out(datatype: str, value: Any) -> None:
    array = np.empty(1, DTYPES[datatype])
    array[0] = value
    message = Message((Tensor("x", datatype, array),))
    with pytest.raises(BadRequest, match="binary_data"):
        wire.encode_response(message, model="m")


def test_media_types() -> None:
    assert wire.media_type(None) == ("application/json", {})
    assert wire.media_type(12) == ("application/octet-stream", {"inference-header-content-length": "12"})


def test_a_tensor_is_found_by_name() -> None:
    tensor = Tensor("x", "FP32", np.zeros(1, np.float32))
    assert Message((tensor,)).tensor("x") is tensor
    assert Message((tensor,)).tensor("y") is None


# --- the stock client -----------------------------------------------------------------------------------------------------


def _stock_arrays() -> dict[str, tuple[str, Array]]:
    texts = np.empty((2, 1), dtype=object)
    texts[:, 0] = ["héllo", b"raw"]
    arrays: dict[str, tuple[str, Array]] = {
        name.lower(): (name, (np.arange(6) % 2).astype(DTYPES[name]).reshape(2, 3)) for name in NUMERIC
    }
    return arrays | {"texts": ("BYTES", texts), "nothing": ("FP32", np.zeros((0, 4), np.float32))}


def _stock_request(*, binary: bool, **further: Any) -> tuple[bytes, int | None, dict[str, tuple[str, Array]]]:
    arrays = {name: pair for name, pair in _stock_arrays().items() if binary or pair[0] != "FP16"}
    inputs = []
    for name, (datatype, array) in arrays.items():
        stock = InferInput(name, list(array.shape), datatype)
        stock.set_data_from_numpy(array, binary_data=binary)
        inputs.append(stock)
    body, length = InferenceServerClient.generate_request_body(inputs, **further)
    return body, length, arrays


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_the_stock_clients_request_decodes_to_its_tensors(binary: bool) -> None:
    body, length, arrays = _stock_request(binary=binary, request_id="42", timeout=250_000, priority=1)
    message = wire.decode_request(body, _header(length), Limits())
    assert [tensor.name for tensor in message.tensors] == list(arrays)
    for tensor in message.tensors:
        datatype, array = arrays[tensor.name]
        assert tensor.datatype == datatype
        wanted = [[b"h\xc3\xa9llo"], [b"raw"]] if datatype == "BYTES" else array.tolist()
        assert tensor.array.tolist() == wanted
        assert tensor.array.shape == array.shape
    assert message.id == "42"
    assert message.parameters["timeout"] == 250_000
    assert message.outputs is None
    assert message.binary is True  # the client asks for that where it names no outputs


def test_the_stock_clients_bytes_may_hold_anything() -> None:
    texts = np.array([b"", b"\x00\xff\xfe", "ÿ".encode()], dtype=object)
    stock = InferInput("text", [3], "BYTES")
    stock.set_data_from_numpy(texts)
    body, length = InferenceServerClient.generate_request_body([stock])
    assert wire.decode_request(body, _header(length), LIMITS).tensors[0].array.tolist() == texts.tolist()


def test_the_stock_clients_requested_outputs_say_how_each_should_travel() -> None:
    outputs = [InferRequestedOutput("a", binary_data=True), InferRequestedOutput("b", binary_data=False)]
    body, length, _ = _stock_request(binary=True, outputs=outputs)
    message = wire.decode_request(body, _header(length), Limits())
    assert message.outputs == ("a", "b")
    assert message.binary == {"a": True, "b": False}


@pytest.mark.parametrize("binary", [True, False, "mixed"])
def test_the_stock_client_reads_our_answers(binary: bool | str) -> None:
    arrays = {name: pair for name, pair in _stock_arrays().items() if binary is True or pair[0] != "FP16"}
    tensors = []
    for name, (datatype, array) in arrays.items():
        ours = array
        if datatype == "BYTES":
            ours = np.empty(array.shape, object)
            ours[:, 0] = ["héllo".encode(), b"raw"]
        tensors.append(Tensor(name, datatype, ours))
    asked = {name: i % 2 == 0 for i, name in enumerate(arrays)} if binary == "mixed" else bool(binary)
    body, length = wire.encode_response(Message(tuple(tensors), id="42", binary=asked), model="encode-a")
    result = InferResult.from_response_body(body, header_length=length)
    for tensor in tensors:
        array = result.as_numpy(tensor.name)
        assert array.shape == tensor.array.shape
        wanted = tensor.array.tolist()
        if tensor.datatype == "BYTES" and array.ravel().tolist() != tensor.array.ravel().tolist():
            wanted = [[element.decode() for element in row] for row in wanted]  # the client's JSON strings are str
        assert array.tolist() == wanted
    assert result.get_response()["id"] == "42"
    assert result.get_response()["model_name"] == "encode-a"


# --- strictness -----------------------------------------------------------------------------------------------------------


def request(**entry: Any) -> bytes:
    """A request of one tensor: a valid one, but for what is given; None leaves a field out."""
    tensor: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]} | entry
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not None}]}).encode()


def raw_request(raw: bytes, size: Any, **entry: Any) -> tuple[bytes, str]:
    head = request(data=None, parameters={"binary_data_size": size}, **entry)
    return head + raw, str(len(head))


def test_the_request_the_rows_below_spoil_is_a_good_one() -> None:
    assert wire.decode_request(request(), None, LIMITS).tensors[0].array.tolist() == [1, 2]
    assert wire.decode_request(*raw_request(b"\0" * 8, 8), LIMITS).tensors[0].array.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("entry", "because"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": 7}, "name"),
        ({"datatype": "FP8"}, "'FP8' is not one of BOOL, UINT8"),
        ({"datatype": "fp32"}, "datatype"),
        ({"datatype": None}, "datatype"),
        ({"datatype": ["FP32"]}, "datatype: a list"),
        ({"datatype": {"a": 1}}, "datatype: an object"),
        ({"datatype": "x" * 9000}, "datatype"),
        ({"shape": None}, "shape"),
        ({"shape": 2}, "shape"),
        ({"shape": [2.0]}, "shape"),
        ({"shape": [True]}, "shape"),
        ({"shape": ["2"]}, "shape"),
        ({"shape": [-1]}, "shape"),
        ({"shape": [2, -1]}, "shape"),
        ({"shape": [3]}, "3 elements, 'data' has 2"),
        ({"shape": [1]}, "1 elements, 'data' has 2"),
        ({"shape": []}, "1 elements, 'data' has 2"),
        ({"shape": [2, 0]}, "0 elements, 'data' has 2"),
        ({"data": None}, "data"),
        ({"data": 1.0}, "data"),
        ({"data": "12"}, "data"),
        ({"data": {"0": 1}}, "data"),
        ({"data": [1, None]}, r"data\[1\] is no FP32: None"),
        ({"data": [1, "2"]}, r"data\[1\] is no FP32: '2'"),
        ({"data": [1, True]}, r"data\[1\] is no FP32: True"),
        ({"data": [1, [2]]}, "is no FP32: a list"),
        ({"data": [[1], [2]]}, "is no FP32: a list"),
        ({"data": [1, 1e39]}, "range of FP32"),
        ({"datatype": "INT32", "data": [1, 2.0]}, "is no INT32: 2.0"),
        ({"datatype": "INT32", "data": [1, False]}, "is no INT32: False"),
        ({"datatype": "INT8", "data": [1, 128]}, "range of INT8"),
        ({"datatype": "INT8", "data": [1, -129]}, "range of INT8"),
        ({"datatype": "UINT8", "data": [1, -1]}, "range of UINT8"),
        ({"datatype": "INT64", "data": [1, 2**63]}, "range of INT64"),
        ({"datatype": "UINT64", "data": [1, -1]}, "range of UINT64"),
        ({"datatype": "UINT64", "data": [1, 2**64]}, "UINT64"),
        ({"datatype": "BOOL", "data": [True, 1]}, "is no BOOL: 1"),
        ({"datatype": "BOOL", "data": [True, "true"]}, "is no BOOL"),
        ({"datatype": "BYTES", "data": ["a", 1]}, "string"),
        ({"datatype": "BYTES", "data": ["a", None]}, "string"),
        ({"datatype": "FP16"}, "FP16 has no JSON form"),
        ({"shape": [2, 2], "data": [[1, 2], [3]]}, "nested"),
        ({"shape": [2, 2], "data": [[1, 2], 3]}, "nested"),
        ({"shape": [2, 2], "data": [[1, 2], [3, 4], [5, 6]]}, "4 elements, 'data' has 6"),
        ({"shape": [2, 2], "data": [[1, 2, 3, 4]]}, "nested"),
        ({"shape": [2, 2], "data": [[[1], [2]], [[3], [4]]]}, "is no FP32"),
        ({"shape": [2, 2], "data": [1, 2, [3, 4]]}, "'data' has 3"),
        ({"parameters": []}, "parameters"),
        ({"parameters": "x"}, "parameters"),
        ({"parameters": {"binary_data_size": "8"}}, "binary_data_size: '8'"),
        ({"parameters": {"binary_data_size": 8.0}}, "binary_data_size: 8.0"),
        ({"parameters": {"binary_data_size": True}}, "binary_data_size: True"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size: -1"),
        ({"parameters": {"binary_data_size": 8}}, "only 0 bytes are left"),
        ({"parameters": {"binary_data_size": 0}}, "both 'data' and binary_data_size"),
        ({"data": None, "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}}, "data"),
    ],
)
def test_tensors_that_are_refused(entry: dict[str, Any], because: str) -> None:
    with pytest.raises(BadRequest, match=because) as refusal:
        wire.decode_request(request(**entry), None, LIMITS)
    assert "inputs[0]" in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ({"data": [1, 2.5]}, [1.0, 2.5]),
        ({"datatype": "FP64", "data": [1, 1e300]}, [1.0, 1e300]),
        ({"shape": [2, 1], "data": [1, 2]}, [[1.0], [2.0]]),
        ({"shape": [2, 1], "data": [[1], [2]]}, [[1.0], [2.0]]),
        ({"shape": [1, 2], "data": [[1, 2]]}, [[1.0, 2.0]]),
        ({"shape": [], "data": [3]}, 3.0),
        ({"shape": [0], "data": []}, []),
        ({"shape": [2, 0], "data": [[], []]}, [[], []]),
        ({"shape": [2, 0], "data": []}, [[], []]),
        ({"datatype": "UINT64", "data": [0, 2**64 - 1]}, [0, 2**64 - 1]),
        ({"datatype": "BYTES", "data": ["", "é"]}, [b"", b"\xc3\xa9"]),
        ({"parameters": {}}, [1.0, 2.0]),
        ({"parameters": {"classification": 3}}, [1.0, 2.0]),
        ({"content_type": "text"}, [1.0, 2.0]),
    ],
)
def test_tensors_that_are_taken(entry: dict[str, Any], value: Any) -> None:
    assert wire.decode_request(request(**entry), None, LIMITS).tensors[0].array.tolist() == value


@pytest.mark.parametrize(
    ("body", "because"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"inputs"', "must be a JSON object"),
        (b"{}", "'inputs' must be a list"),
        (b'{"inputs":{}}', "'inputs' must be a list"),
        (b'{"inputs":null}', "'inputs' must be a list"),
        (b'{"inputs":[1]}', r"inputs\[0\] must be a JSON object"),
        (b'{"inputs":[null]}', r"inputs\[0\]\.name"),
        (b'{"inputs":[],"id":7}', "'id'"),
        (b'{"inputs":[],"parameters":[]}', "parameters"),
        (b'{"inputs":[],"parameters":{"binary_data_output":1}}', "binary_data_output"),
        (b'{"inputs":[],"outputs":{}}', "'outputs'"),
        (b'{"inputs":[],"outputs":["a"]}', r"outputs\[0\]"),
        (b'{"inputs":[],"outputs":[{"name":""}]}', r"outputs\[0\]\.name"),
        (b'{"inputs":[],"outputs":[{"name":"a","parameters":{"binary_data":"yes"}}]}', "binary_data"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[Infinity]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP64","shape":[1],"data":[1e999]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\udfff\\ud800"]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"\xff","datatype":"FP32","shape":[1],"data":[1]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}\x00', "not valid JSON"),
        ("\ufeff{}".encode(), "not valid JSON"),
        ('{"inputs":[]}'.encode("utf-16"), "not valid JSON"),
    ],
)
def test_documents_that_are_refused(body: bytes, because: str) -> None:
    with pytest.raises(BadRequest, match=because):
        wire.decode_request(body, None, LIMITS)


@pytest.mark.parametrize("depth", [10, 500, 990, 1000, 1015, 1023, 1024, 1025, 10_000])
@pytest.mark.parametrize("field", ["data", "datatype", "shape", "name", "parameters"])
def test_nesting_of_any_depth_is_a_bad_request(depth: int, field: str) -> None:
    body = request(**{field: "HERE"}).replace(b'"HERE"', b"[" * depth + b"]" * depth)
    with pytest.raises(BadRequest):
        wire.decode_request(body, None, LIMITS)


def test_two_tensors_of_one_name_are_refused() -> None:
    entry = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    with pytest.raises(BadRequest, match="same name"):
        wire.decode_request(orjson.dumps({"inputs": [entry, entry]}), None, LIMITS)
    with pytest.raises(BadRequest, match="same name"):
        wire.decode_response(orjson.dumps({"outputs": [entry, entry]}), None, LIMITS)


@pytest.mark.parametrize(
    "value",
    ["", " ", "+5", "-5", "1_0", " 5", "5 ", "5.0", "0x5", "٥", "five", "nan", "5,5", "-0", "1" * 13, "9" * 5000, "5\x00"],
)
def test_header_lengths_that_are_no_number_are_refused(value: str) -> None:
    with pytest.raises(BadRequest, match="is not a number of bytes") as refusal:
        wire.decode_request(request(), value, LIMITS)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("length", "because"),
    [
        (0, "not valid JSON"),
        (1, "not valid JSON"),
        (len(request()) - 1, "not valid JSON"),
        (len(request()) + 1, "the body has only"),
        (10**11, "the body has only"),
    ],
)
def test_header_lengths_that_lie_are_refused(length: int, because: str) -> None:
    with pytest.raises(BadRequest, match=because):
        wire.decode_request(request(), str(length), LIMITS)


def test_a_header_length_of_the_whole_body_is_the_same_as_none() -> None:
    body = request()
    assert_same(wire.decode_request(body, str(len(body)), LIMITS).tensors, wire.decode_request(body, None, LIMITS).tensors)


@pytest.mark.parametrize(
    ("raw", "size", "entry", "because"),
    [
        (b"\0" * 8, 7, {}, "needs 8 bytes, binary_data_size says 7"),
        (b"\0" * 8, 9, {}, "only 8 bytes are left"),
        (b"\0" * 8, 10**18, {}, "only 8 bytes are left"),
        (b"\0" * 8, 0, {}, "needs 8 bytes"),
        (b"\0" * 9, 8, {}, "1 bytes follow the last tensor"),
        (b"\0" * 8, 8, {"shape": [3]}, "needs 12 bytes"),
        (b"\0" * 8, 8, {"shape": [0]}, "needs 0 bytes"),
        (b"\0" * 8, 8, {"datatype": "FP64"}, "needs 16 bytes"),
        (b"\0" * 7, 7, {"datatype": "BYTES", "shape": [2]}, "at least 8 bytes"),
        (b"\1\0\0\0" * 2, 8, {"datatype": "BYTES", "shape": [2]}, "element 1 says|ends before"),
        (b"\5\0\0\0abcd", 8, {"datatype": "BYTES", "shape": [1]}, "element 0 says 5 bytes, but only 4"),
        (b"\xff\xff\xff\xffabcd", 8, {"datatype": "BYTES", "shape": [1]}, "element 0 says 4294967295"),
        (b"\3\0\0\0abcd", 8, {"datatype": "BYTES", "shape": [1]}, "1 bytes follow the last of 1 elements"),
        (b"\4\0\0\0abcd", 8, {"datatype": "BYTES", "shape": [0]}, "8 bytes follow the last of 0 elements"),
        (b"\4\0\0\0abcd", 8, {"datatype": "BYTES", "shape": [2]}, "ends before the length of element 1"),
        (b"\6\0\0\0abcdef\0\0", 12, {"datatype": "BYTES", "shape": [2]}, "ends before the length of element 1"),
    ],
)
def test_raw_sizes_that_lie_are_refused(raw: bytes, size: int, entry: dict[str, Any], because: str) -> None:
    body, length = raw_request(raw, size, **entry)
    with pytest.raises(BadRequest, match=because):
        wire.decode_request(body, length, LIMITS)


def test_raw_tensors_are_taken_in_the_order_they_are_listed_past_those_in_json() -> None:
    document = {
        "inputs": [
            {"name": "a", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
            {"name": "b", "datatype": "UINT8", "shape": [1], "data": [9]},
            {"name": "c", "datatype": "UINT8", "shape": [1], "parameters": {"binary_data_size": 1}},
        ]
    }
    head = orjson.dumps(document)
    message = wire.decode_request(head + b"\x01\x02\x03", str(len(head)), LIMITS)
    assert [tensor.array.tolist() for tensor in message.tensors] == [[1, 2], [9], [3]]


@pytest.mark.parametrize(
    ("document", "outputs", "binary"),
    [
        ({}, None, False),
        ({"parameters": None, "outputs": None, "id": None}, None, False),
        ({"parameters": {"binary_data_output": True}}, None, True),
        ({"outputs": []}, None, False),
        ({"outputs": [], "parameters": {"binary_data_output": True}}, None, True),
        ({"outputs": [{"name": "a"}]}, ("a",), {"a": False}),
        ({"outputs": [{"name": "a"}], "parameters": {"binary_data_output": True}}, ("a",), {"a": True}),
        (
            {
                "outputs": [{"name": "a", "parameters": {"binary_data": False}}, {"name": "b"}],
                "parameters": {"binary_data_output": True},
            },
            ("a", "b"),
            {"a": False, "b": True},
        ),
        ({"outputs": [{"name": "a", "parameters": {"binary_data": True}}, {"name": "b"}]}, ("a", "b"), {"a": True, "b": False}),
        ({"outputs": [{"name": "a"}, {"name": "a"}]}, ("a",), {"a": False}),
    ],
)
def test_requested_outputs(
    document: dict[str, Any], outputs: tuple[str, ...] | None, binary: bool | Mapping[str, bool]
) -> None:
    message = wire.decode_request(orjson.dumps(document | {"inputs": []}), None, LIMITS)
    assert (message.outputs, message.binary) == (outputs, binary)


# --- limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "because"),
    [
        ({"shape": [2**60]}, "limit of 16384"),
        ({"shape": [2**62, 4]}, "limit of 16384"),
        ({"shape": [2**32, 2**32]}, "limit of 16384"),
        ({"shape": [2**60, 0]}, "limit of 16384"),
        ({"shape": [0, 2**60]}, "limit of 16384"),
        ({"shape": [2**14 + 1]}, "limit of 16384"),
        ({"shape": [1] * 7}, "7 dimensions; the limit is 6"),
        ({"shape": [0] * 1000}, "1000 dimensions; the limit is 6"),
    ],
)
@pytest.mark.parametrize("raw", [True, False], ids=["binary", "json"])
def test_shapes_over_the_limits_are_too_large(entry: dict[str, Any], because: str, raw: bool) -> None:
    body, length = raw_request(b"", 0, **entry) if raw else (request(**entry), None)
    with pytest.raises(TooLarge, match=because):
        wire.decode_request(body, length, LIMITS)


@pytest.mark.parametrize("datatype", list(DTYPES))
def test_a_shape_that_promises_much_reserves_nothing(datatype: str) -> None:
    # Within the limit of elements, so that only the comparison with what came stands between the shape and the memory.
    body, length = raw_request(b"\0" * 8, 8, datatype=datatype, shape=[8 << 20])
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest):
            wire.decode_request(body, length, Limits())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 17


def test_numbers_that_json_cannot_hold_in_an_integer_make_no_shape() -> None:
    body = request(shape="HERE").replace(b'"HERE"', b"[" + b"9" * 400 + b"]")
    with pytest.raises(BadRequest):
        wire.decode_request(body, None, LIMITS)


def test_a_body_over_the_limit_is_not_looked_at() -> None:
    with pytest.raises(TooLarge, match="the limit is 65536"):
        wire.decode_request(b"\xff" * (LIMITS.body_bytes + 1), None, LIMITS)
    with pytest.raises(BadRequest):
        wire.decode_request(b"\xff" * LIMITS.body_bytes, None, LIMITS)


def test_a_json_header_over_the_limit_is_not_parsed() -> None:
    body = b" " * (LIMITS.header_bytes + 1)
    with pytest.raises(TooLarge, match="the limit is 16384"):
        wire.decode_request(body, str(len(body)), LIMITS)


def test_more_tensors_than_the_limit_are_too_large() -> None:
    with pytest.raises(TooLarge, match="9 tensors; the limit is 8"):
        wire.decode_request(orjson.dumps({"inputs": [{}] * 9}), None, LIMITS)


# --- fuzz -----------------------------------------------------------------------------------------------------------------


def decode_or_refuse(body: bytes, header_length: str | None) -> None:
    """Both decoders end in a value within the limits, or in a refusal that is short enough to send."""
    for decode in (wire.decode_request, wire.decode_response):
        try:
            message = decode(body, header_length, LIMITS)
        except (BadRequest, TooLarge) as refusal:
            orjson.dumps(refusal.body())
            assert len(str(refusal)) < 1000  # noqa: PT017 - not whether it is raised, but how it reads
        else:
            assert len(message.tensors) <= LIMITS.tensors
            for tensor in message.tensors:
                assert tensor.array.dtype == DTYPES[tensor.datatype]
                assert tensor.array.size <= LIMITS.elements


_header_lengths = st.none() | st.integers(-2, 400).map(str) | st.text(max_size=6)


@settings(max_examples=80, deadline=None)
@given(body=st.binary(max_size=200), header_length=_header_lengths)
def test_random_bytes(body: bytes, header_length: str | None) -> None:
    decode_or_refuse(body, header_length)


_odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**53, 2**60, 2**63, 2**64 - 1, -(2**63)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from(list(DTYPES)),
)
_json = st.recursive(
    _odd, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=8
)
_sized = st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 24) | _json, "binary_data": _json})
_entries = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y", "z", "w"]) | _json,
        "datatype": st.sampled_from(list(DTYPES)) | _json,
        "shape": st.lists(st.integers(0, 4) | _odd, max_size=4) | _json,
        "data": st.lists(_odd, max_size=6) | _json,
        "parameters": _sized | _json,
    },
)
_documents = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.lists(_entries, max_size=3) | _json,
        "outputs": st.lists(_entries, max_size=3) | _json,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_output": _json, "timeout": _json}) | _json,
        "id": _json,
    },
)


@settings(max_examples=120, deadline=None)
@given(document=_documents, raw=st.binary(max_size=32), off=st.sampled_from([0, 0, 0, 1, -1]), sized=st.booleans())
def test_documents_of_the_right_words_in_the_wrong_places(document: Any, raw: bytes, off: int, sized: bool) -> None:
    head = orjson.dumps(document)
    decode_or_refuse(head + raw if sized else head, str(len(head) + off) if sized else None)


_lies = st.fixed_dictionaries(
    {
        "datatype": st.sampled_from(list(DTYPES)),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**14, 2**20, 2**31, 2**60, 2**64 - 1]), max_size=8),
        "parameters": st.fixed_dictionaries(
            {"binary_data_size": st.integers(0, 40) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1])}
        ),
    }
)


@settings(max_examples=120, deadline=None)
@given(lies=st.lists(_lies, min_size=1, max_size=3), raw=st.binary(max_size=48))
@example(
    lies=[{"datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 8}}], raw=struct.pack("<II", 2**32 - 1, 0)
)
def test_sizes_and_shapes_that_lie(lies: list[dict[str, Any]], raw: bytes) -> None:
    entries = [{"name": f"t{i}"} | lie for i, lie in enumerate(lies)]
    head = orjson.dumps({"inputs": entries, "outputs": entries})
    decode_or_refuse(head + raw, str(len(head)))


@settings(max_examples=80, deadline=None)
@given(tensors=_tensors(binary=True), change=st.data())
def test_good_bodies_with_a_few_bytes_changed(tensors: tuple[Tensor, ...], change: st.DataObject) -> None:
    body, length = wire.encode_request(Message(tensors, id="7", outputs=("a",)))
    spoiled = bytearray(body)
    for _ in range(change.draw(st.integers(1, 4))):
        where = change.draw(st.integers(0, len(spoiled)))
        match change.draw(st.sampled_from(["flip", "insert", "delete", "cut"])):
            case "flip" if where < len(spoiled):
                spoiled[where] = change.draw(st.integers(0, 255))
            case "insert":
                spoiled[where:where] = change.draw(st.binary(max_size=4))
            case "delete":
                del spoiled[where : where + 2]
            case "cut":
                del spoiled[where:]
    decode_or_refuse(bytes(spoiled), _header(length))
