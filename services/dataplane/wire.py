"""The Open Inference Protocol v2 on the wire: JSON, and JSON followed by raw tensors (the binary extension).

Pure functions between bytes and tensors. Every size is checked against its limit before anything of that size is allocated,
and whatever arrives, decoding ends in a value or in BadRequest or TooLarge.

    body  =  header JSON | raw tensor | raw tensor | ...        little-endian, row-major, no padding
             `Inference-Header-Content-Length` bytes            BYTES: per element a uint32 length, then the bytes

Sources: kserve/open-inference-protocol, specification/protocol/inference_rest.md; Triton, extension_binary_data.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from models.manifest import TensorSpec
from services.dataplane.errors import BadRequest, TooLarge, shown

Array = NDArray[Any]

Part = bytes | memoryview

HEADER_LENGTH = "inference-header-content-length"
BINARY_TYPE = "application/octet-stream"
JSON_TYPE = "application/json"

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
}
"""OIP datatype -> numpy dtype; an element of a BYTES tensor is a Python `bytes`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of memory before it is refused."""

    body_bytes: int = 16 << 20
    header_bytes: int = 1 << 20
    tensors: int = 64
    dimensions: int = 8
    elements: int = 8 << 20
    """Elements of one tensor."""


class Tensor(NamedTuple):
    """A named tensor of a request or an answer."""

    name: str
    datatype: str
    array: Array


@dataclass(frozen=True, slots=True)
class Message:
    """An inference request or answer, as far as the two are alike."""

    tensors: tuple[Tensor, ...]
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] | None = None
    """Outputs asked for by name; None asks for all."""
    binary: bool | Mapping[str, bool] = False
    """Whether the answer's tensors travel raw: for all, or by output name (default False)."""

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of that name, if it is there."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def filled(spec: TensorSpec, axes: Mapping[str, int]) -> Array:
    """The default of an input that a request left out, for every item; an axis of unknown length is 1 long."""
    return np.full([axes.get(n, 1) if isinstance(n, str) else n for n in spec.shape], spec.default, DTYPES[spec.datatype])


def decode_request(body: bytes, header_length: str | None, limits: Limits) -> Message:
    """Parse the body of an infer request.

    Args:
        body: the whole body.
        header_length: value of the `Inference-Header-Content-Length` header, None where the request has none (all JSON).
        limits: what is refused.

    Raises:
        BadRequest: malformed, contradictory or lying about its sizes.
        TooLarge: over a limit.
    """
    document, raw = _split(body, header_length, limits)
    parameters = _object(document.get("parameters"), "parameters")
    outputs = document.get("outputs")
    binary_default = _boolean(parameters.get("binary_data_output", False), "parameters.binary_data_output")
    names, binary = _requested(outputs, binary_default)
    return Message(
        tensors=_tensors(document, "inputs", raw, limits),
        id=_identifier(document),
        parameters=parameters,
        outputs=names,
        binary=binary,
    )


def decode_response(body: bytes, header_length: str | None, limits: Limits) -> Message:
    """Parse the body of an infer response; raises as `decode_request` does."""
    document, raw = _split(body, header_length, limits)
    return Message(
        tensors=_tensors(document, "outputs", raw, limits),
        id=_identifier(document),
        parameters=_object(document.get("parameters"), "parameters"),
    )


def encode_request(message: Message, *, binary: bool = True) -> tuple[bytes, int | None]:
    """The body of an infer request, and the length of its JSON part where tensors follow it (None: all JSON).

    With `binary`, inputs travel raw and the answer is asked for raw as well.
    """
    parts, header_length = request_parts(message, binary=binary)
    return b"".join(parts), header_length


def request_parts(message: Message, *, binary: bool = True) -> tuple[list[Part], int | None]:
    """As `encode_request`, but in pieces that have not been copied together: views of the tensors themselves."""
    parameters = dict(message.parameters)
    if binary:
        parameters["binary_data_output"] = True
    document: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if message.id is not None:
        document["id"] = message.id
    if message.outputs is not None:
        document["outputs"] = [{"name": name} for name in message.outputs]
    return _parts(document, "inputs", message.tensors, binary)


def encode_response(message: Message, *, model: str, version: str = "1") -> tuple[bytes, int | None]:
    """The body of an infer response in the representation the request asked for; see `encode_request`."""
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if message.id is not None:
        document["id"] = message.id
    if message.parameters:
        document["parameters"] = message.parameters
    parts, header_length = _parts(document, "outputs", message.tensors, message.binary)
    return b"".join(parts), header_length


def media_type(header_length: int | None) -> tuple[str, dict[str, str]]:
    """Content type and further headers that announce a body encoded here."""
    if header_length is None:
        return JSON_TYPE, {}
    return BINARY_TYPE, {HEADER_LENGTH: str(header_length)}


# --- decoding -------------------------------------------------------------------------------------------------------------


def _split(body: bytes, header_length: str | None, limits: Limits) -> tuple[dict[str, Any], memoryview]:
    if len(body) > limits.body_bytes:
        raise TooLarge(f"the body has {len(body)} bytes; the limit is {limits.body_bytes}")
    length = len(body)
    if header_length is not None:
        # isdecimal, not int(): int() also takes '+1', ' 1' and '1_0'.
        if not (header_length.isascii() and header_length.isdecimal() and len(header_length) <= 12):
            raise BadRequest(f"{HEADER_LENGTH}: {header_length[:40]!r} is not a number of bytes")
        length = int(header_length)
        if length > len(body):
            raise BadRequest(f"{HEADER_LENGTH} is {length}, but the body has only {len(body)} bytes")
    if header_length is not None and length > limits.header_bytes:
        raise TooLarge(f"the JSON header has {length} bytes; the limit is {limits.header_bytes}")
    view = memoryview(body)
    try:
        document = orjson.loads(view[:length])
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the request is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadRequest("the request must be a JSON object")
    return document, view[length:]


def _tensors(document: Mapping[str, Any], key: str, raw: memoryview, limits: Limits) -> tuple[Tensor, ...]:
    entries = document.get(key)
    if not isinstance(entries, list):
        raise BadRequest(f"{key!r} must be a list of tensors")
    if len(entries) > limits.tensors:
        raise TooLarge(f"{len(entries)} tensors; the limit is {limits.tensors}")
    tensors: list[Tensor] = []
    offset = 0
    for position, entry in enumerate(entries):
        where = f"{key}[{position}]"
        entry = _object(entry, where)  # noqa: PLW2901 - narrowed, not changed
        size = _object(entry.get("parameters"), f"{where}.parameters").get("binary_data_size")
        if size is None:
            tensors.append(_from_json(entry, where, limits))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise BadRequest(f"{where}.parameters.binary_data_size: {shown(size)} is not a number of bytes")
        if offset + size > len(raw):
            raise BadRequest(f"{where}: binary_data_size is {size}, but only {len(raw) - offset} bytes are left in the body")
        tensors.append(_from_raw(entry, raw[offset : offset + size], where, limits))
        offset += size
    if offset != len(raw):
        raise BadRequest(f"{len(raw) - offset} bytes follow the last tensor; the binary_data_size values add up to {offset}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise BadRequest(f"two tensors in {key!r} have the same name")
    return tuple(tensors)


def _head(entry: Mapping[str, Any], where: str, limits: Limits) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or not name:
        raise BadRequest(f"{where}.name must be a non-empty string")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise BadRequest(f"{where}.datatype: {shown(datatype)} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape):
        raise BadRequest(f"{where}.shape must be a list of numbers >= 0")
    if len(shape) > limits.dimensions:
        raise TooLarge(f"{where}.shape has {len(shape)} dimensions; the limit is {limits.dimensions}")
    # A zero anywhere makes the product 0 however large the rest is, and numpy refuses such a shape: bound each one too.
    if max(shape, default=0) > limits.elements or math.prod(shape) > limits.elements:
        raise TooLarge(f"{where}: shape {shape} has more elements than the limit of {limits.elements}")
    return name, datatype, tuple(shape)


def _from_raw(entry: Mapping[str, Any], data: memoryview, where: str, limits: Limits) -> Tensor:
    name, datatype, shape = _head(entry, where, limits)
    if "data" in entry:
        raise BadRequest(f"{where} has both 'data' and binary_data_size; send one of them")
    if datatype == "BYTES":
        return Tensor(name, datatype, _split_strings(data, shape, where))
    dtype = DTYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise BadRequest(
            f"{where}: shape {list(shape)} of {datatype} needs {expected} bytes, binary_data_size says {len(data)}"
        )
    return Tensor(name, datatype, np.frombuffer(data, dtype).reshape(shape))


def _split_strings(data: memoryview, shape: tuple[int, ...], where: str) -> Array:
    count = math.prod(shape)
    if len(data) < 4 * count:
        raise BadRequest(f"{where}: {count} BYTES elements need at least {4 * count} bytes, there are {len(data)}")
    array = np.empty(count, dtype=object)
    offset = 0
    for i in range(count):
        if offset + 4 > len(data):
            raise BadRequest(f"{where}: the data ends before the length of element {i}")
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + length > len(data):
            raise BadRequest(f"{where}: element {i} says {length} bytes, but only {len(data) - offset} are left")
        array[i] = bytes(data[offset : offset + length])
        offset += length
    if offset != len(data):
        raise BadRequest(f"{where}: {len(data) - offset} bytes follow the last of {count} elements")
    return array.reshape(shape)


def _from_json(entry: Mapping[str, Any], where: str, limits: Limits) -> Tensor:
    name, datatype, shape = _head(entry, where, limits)
    data = entry.get("data")
    if not isinstance(data, list):
        raise BadRequest(f"{where}.data must be a list, or parameters.binary_data_size must be given")
    if datatype == "FP16":
        raise BadRequest(f"{where}: FP16 has no JSON form; send it with the binary extension")
    flat = _flatten(data, shape, where)
    count = math.prod(shape)
    if len(flat) != count:
        raise BadRequest(f"{where}: shape {list(shape)} has {count} elements, 'data' has {len(flat)}")
    if datatype == "BYTES":
        return Tensor(name, datatype, _strings(flat, shape, where))
    return Tensor(name, datatype, _numbers(flat, datatype, shape, where))


def _flatten(data: list[Any], shape: tuple[int, ...], where: str) -> list[Any]:
    """The elements of flat or nested JSON data; nesting, where there is any, must follow the shape."""
    flat: list[Any] = data
    for length in shape[1:] if data and isinstance(data[0], list) else ():
        if any(not isinstance(row, list) or len(row) != length for row in flat):
            raise BadRequest(f"{where}.data is nested, but not in the shape {list(shape)}")
        flat = [element for row in flat for element in row]
    return flat


def _strings(flat: Sequence[Any], shape: tuple[int, ...], where: str) -> Array:
    array = np.empty(len(flat), dtype=object)
    for i, element in enumerate(flat):
        if not isinstance(element, str):
            raise BadRequest(f"{where}.data[{i}] must be a string, since the datatype is BYTES")
        array[i] = element.encode()
    return array.reshape(shape)


def _numbers(flat: Sequence[Any], datatype: str, shape: tuple[int, ...], where: str) -> Array:
    kinds: tuple[type, ...] = (bool,) if datatype == "BOOL" else (int,) if "INT" in datatype else (int, float)
    for i, element in enumerate(flat):
        if not isinstance(element, kinds) or (datatype != "BOOL" and isinstance(element, bool)):
            raise BadRequest(f"{where}.data[{i}] is no {datatype}: {shown(element)}")
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=DTYPES[datatype]).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise BadRequest(f"{where}.data has a number outside the range of {datatype}") from None


def _requested(outputs: Any, default: bool) -> tuple[tuple[str, ...] | None, bool | Mapping[str, bool]]:
    if outputs is None:
        return None, default
    if not isinstance(outputs, list):
        raise BadRequest("'outputs' must be a list")
    binary: dict[str, bool] = {}
    for position, entry in enumerate(outputs):
        where = f"outputs[{position}]"
        name = _object(entry, where).get("name")
        if not isinstance(name, str) or not name:
            raise BadRequest(f"{where}.name must be a non-empty string")
        options = _object(entry.get("parameters"), f"{where}.parameters")
        for unknown in options.keys() - {"binary_data"}:
            # Ignoring one would answer something else than what was asked for: classification, shared memory.
            raise BadRequest(f"{where}.parameters.{shown(unknown)} is not supported; only binary_data is")
        wanted = options.get("binary_data", default)
        binary[name] = _boolean(wanted, f"{where}.parameters.binary_data")
    return (tuple(binary) if binary else None), (binary if binary else default)


def _object(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"{where} must be a JSON object")
    return value


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{where} must be true or false")
    return value


def _identifier(document: Mapping[str, Any]) -> str | None:
    identifier = document.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadRequest("'id' must be a string")
    return identifier


# --- encoding -------------------------------------------------------------------------------------------------------------


def _parts(
    document: dict[str, Any], key: str, tensors: Iterable[Tensor], binary: bool | Mapping[str, bool]
) -> tuple[list[Part], int | None]:
    entries: list[dict[str, Any]] = []
    chunks: list[Part] = []
    for tensor in tensors:
        entry: dict[str, Any] = {"name": tensor.name, "shape": list(tensor.array.shape), "datatype": tensor.datatype}
        raw = binary if isinstance(binary, bool) else binary.get(tensor.name, False)
        if raw:
            chunk = _raw(tensor)
            entry["parameters"] = {"binary_data_size": len(chunk)}
            chunks.append(chunk)
        else:
            entry["data"] = _plain(tensor)
        entries.append(entry)
    document[key] = entries
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return [header, *chunks], len(header) if chunks else None


def _raw(tensor: Tensor) -> Part:
    if tensor.datatype == "BYTES":
        return b"".join(part for element in tensor.array.flat for part in (struct.pack("<I", len(element)), element))
    array = np.ascontiguousarray(tensor.array, DTYPES[tensor.datatype])
    # cast() refuses an array with a zero in its shape, whose raw form is empty anyway.
    return array.data.cast("B") if array.size else b""


def _plain(tensor: Tensor) -> Any:
    if tensor.datatype == "BYTES":
        try:
            return [element.decode() for element in tensor.array.flat]
        except UnicodeDecodeError:
            raise BadRequest(f"tensor {tensor.name!r} is not UTF-8 and has no JSON form; ask for it with binary_data") from None
    if tensor.datatype == "FP16":
        raise BadRequest(f"tensor {tensor.name!r} is FP16 and has no JSON form; ask for it with binary_data")
    return np.ascontiguousarray(tensor.array).reshape(-1)
