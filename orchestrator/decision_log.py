"""The decision log: JSON lines that hold all that the decisions were made of, so that they can be made again.

A header says who decides, and one line per slot says of what and how:

    {"decision_log", "espalier", "wall", "testbed", "sha256", "policy", "parameters"}
    {"slot", "t", "wall", "version", "state", "observation", "decision"}

A header stands at the top of every file and wherever the policy or the process changes; it holds for the lines below it, up
to the next one. `slot` counts from 1, the policy's initial state, also over slots that could not be written. `state` is the
policy's state *before* the step, `version` that of the routes after it. `replay` decides a log again.

Rotation: a log that has grown past its limit is renamed to `.1`, and the one before that goes. A line that the end of the
process cut short is taken off before the next one is written.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from orchestrator.core import Decision, Observation, ScalingPolicy
from orchestrator.errors import UsageError
from orchestrator.scaling import policies

FORMAT = 1
LONGEST_BYTES = 64 * 2**20
LONGEST_LINE_BYTES = 16 * 2**20
BLOCK_BYTES = 64 * 2**10

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Origin:
    """The testbed file that the decisions are for."""

    testbed: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Header:
    """Who decides from here on."""

    decision_log: int
    """Version of the format."""
    espalier: str
    """Version of the package."""
    wall: str
    """Time of day in ISO 8601."""
    testbed: str
    sha256: str
    """Of the testbed file."""
    policy: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry(Generic[S]):
    """One slot."""

    state: S
    observation: Observation
    decision: Decision


@dataclass(frozen=True, slots=True)
class Slot(Generic[S]):
    """One slot as a line of the log: the entry and what is known about it."""

    slot: int
    t: float
    wall: str
    version: int
    state: S
    observation: Observation
    decision: Decision


@dataclass(frozen=True, slots=True)
class Begin:
    """A header, and the policy it describes."""

    header: Header
    policy: ScalingPolicy[Any]


@dataclass(frozen=True, slots=True)
class CutOff:
    """The last line is not whole: the process that wrote it was ended."""


_HEADER = TypeAdapter(Header)
_HEADER_BEGINS = re.compile(rb'\s*\{\s*"decision_log"\s*:')


def _slots(state_type: type[Any]) -> TypeAdapter[Slot[Any]]:
    return TypeAdapter(Slot[state_type])  # type: ignore[valid-type]


class DecisionLog:
    """Writes the slots of one process."""

    def __init__(self, path: Path, origin: Callable[[], Origin], longest_bytes: int = LONGEST_BYTES) -> None:
        self._path, self._origin, self._longest_bytes = path, origin, longest_bytes
        self._policy: ScalingPolicy[Any] | None = None
        self._slots: TypeAdapter[Slot[Any]] | None = None
        self._announced = False
        self._slot = 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, entry: Entry[S], *, policy: ScalingPolicy[S], wall: str, version: int) -> None:
        """Add one line, and a header before it where one is due.

        Args:
            entry: the slot.
            policy: decided it. Another object than the last time begins with its initial state.
            wall: time of day in ISO 8601, for people; the decision does not depend on it.
            version: of the routes after the decision was applied.

        Raises:
            OSError: it could not be written; the file is as it was.
            ValueError: a number in it is infinite or not a number.
        """
        if policy is not self._policy or self._slots is None:
            self._policy, self._slots = policy, _slots(policy.state_type)
            self._announced, self._slot = False, 0
        self._slot += 1
        slot = Slot(self._slot, entry.observation.t, wall, version, entry.state, entry.observation, entry.decision)
        line = _line(self._slots, slot)
        # Unbuffered, so that nothing is left to be written by close() after a failure.
        with self._path.open("a+b", buffering=0) as stream:
            begun = _end_of_last_line(stream)
            stream.truncate(begun)
            due = not self._announced or begun == 0
            _write(stream, (self._header(policy, wall) if due else b"") + line, begun)
            size = stream.tell()
        self._announced = True
        if size > self._longest_bytes:
            os.replace(self._path, self._path.with_name(self._path.name + ".1"))

    def _header(self, policy: ScalingPolicy[Any], wall: str) -> bytes:
        name, parameters = policies.describe(policy)
        origin, version = self._origin(), importlib.metadata.version("espalier")
        return _line(_HEADER, Header(FORMAT, version, wall, origin.testbed, origin.sha256, name, parameters))


def _line(adapter: TypeAdapter[Any], value: Any) -> bytes:
    return json.dumps(adapter.dump_python(value, mode="json"), allow_nan=False).encode() + b"\n"


def _write(stream: RawIOBase, data: bytes, begun: int) -> None:
    """All of it or nothing: half a line would spoil the next one too."""
    try:
        while data:  # a disk that is nearly full takes a part of it, and says what is wrong when asked again
            data = data[stream.write(data) :]
    except OSError:
        stream.truncate(begun)
        raise


def _end_of_last_line(stream: RawIOBase) -> int:
    """Where the last whole line ends [bytes]; what follows was cut off by the end of a process."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        stream.seek(start)
        newline = (stream.read(end - start) or b"").rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read(path: Path) -> Iterator[tuple[int, Begin | Slot[Any] | CutOff]]:
    """What the lines of a log say, each with its number, from 1.

    Raises:
        UsageError: a line is none of a decision log; says which, and what is wrong.
    """
    state_type: type[Any] | None = None
    slots: TypeAdapter[Slot[Any]] | None = None
    content: Begin | Slot[Any] | CutOff
    with path.open("rb") as stream:
        for number in itertools.count(1):
            raw = stream.readline(LONGEST_LINE_BYTES)
            if not raw:
                break
            whole = raw.endswith(b"\n")
            try:
                content = _parse(raw, slots)
            except ValueError as error:
                if whole or len(raw) == LONGEST_LINE_BYTES:
                    raise UsageError(f"{path}:{number}: {_problem(error)}") from None
                content = CutOff()
            if isinstance(content, Begin) and content.policy.state_type is not state_type:
                state_type = content.policy.state_type
                slots = _slots(state_type)
            yield number, content


def _parse(raw: bytes, slots: TypeAdapter[Slot[Any]] | None) -> Begin | Slot[Any]:
    if _HEADER_BEGINS.match(raw):
        header = _HEADER.validate_json(raw)
        if header.decision_log != FORMAT:
            raise ValueError(f"format {header.decision_log}; this version of espalier reads format {FORMAT}")
        return Begin(header, policies.build(header.policy, header.parameters))
    if slots is None:
        raise ValueError("no header of a decision log (which espalier writes at the top of decisions.jsonl)")
    return slots.validate_json(raw)


def _problem(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
