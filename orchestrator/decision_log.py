"""The decision log: one JSON line per slot with all that the decision was made of, so that it can be made again.

    {"t", "wall", "version", "state", "observation", "decision"}

`state` is the policy's state *before* the step, `version` that of the routes after it. `replay` steps a policy over a log
and compares: equal inputs must give equal decisions, bit for bit. Rotation: a log that has grown past its limit is renamed
to `.1`, and the one before that goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from orchestrator.core import Decision, Observation, ScalingPolicy

LONGEST_BYTES = 64 * 2**20

S = TypeVar("S")
_OBSERVATION = TypeAdapter(Observation)
_DECISION = TypeAdapter(Decision)


@dataclass(frozen=True, slots=True)
class Entry(Generic[S]):
    """One slot."""

    state: S
    observation: Observation
    decision: Decision


class DecisionLog(Generic[S]):
    """Writes entries of one policy."""

    def __init__(self, path: Path, state_type: type[S], longest_bytes: int = LONGEST_BYTES) -> None:
        self._path = path
        self._longest_bytes = longest_bytes
        self._state: TypeAdapter[S] = TypeAdapter(state_type)
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, entry: Entry[S], *, wall: str, version: int) -> None:
        """Add one line.

        Args:
            entry: the slot.
            wall: time of day in ISO 8601, for people; the decision does not depend on it.
            version: of the routes after the decision was applied.
        """
        line = {
            "t": entry.observation.t,
            "wall": wall,
            "version": version,
            "state": self._state.dump_python(entry.state, mode="json"),
            "observation": _OBSERVATION.dump_python(entry.observation, mode="json"),
            "decision": _DECISION.dump_python(entry.decision, mode="json"),
        }
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
            size = stream.tell()
        if size > self._longest_bytes:
            os.replace(self._path, self._path.with_suffix(self._path.suffix + ".1"))


@dataclass(frozen=True, slots=True)
class Difference:
    """A slot that was decided otherwise."""

    line: int
    logged: Decision
    replayed: Decision


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of deciding a log again."""

    slots: int
    differences: tuple[Difference, ...]


def replay(path: Path, policy: ScalingPolicy[Any]) -> Replay:
    """Decide every slot of a log again, each from the state and the observation it was decided from.

    Raises:
        ValueError: a line is no entry of this policy.
    """
    slots, differences = 0, []
    for number, entry in enumerate(read(path, policy.state_type), start=1):
        _, decision = policy.step(entry.state, entry.observation)
        slots += 1
        if _DECISION.dump_json(decision) != _DECISION.dump_json(entry.decision):
            differences.append(Difference(number, entry.decision, decision))
    return Replay(slots, tuple(differences))


def read(path: Path, state_type: type[S]) -> Iterator[Entry[S]]:
    """The entries of a log, in order."""
    state: TypeAdapter[S] = TypeAdapter(state_type)
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            entry = json.loads(line)
            yield Entry(
                state.validate_python(entry["state"]),
                _OBSERVATION.validate_python(entry["observation"]),
                _DECISION.validate_python(entry["decision"]),
            )
