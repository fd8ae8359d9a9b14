"""`espalier replay`: every slot of a decision log decided again, by the policy that its header describes.

Equal inputs must give equal outputs, bit for bit: the decision, and the state that the next slot of the same run began
with. Each slot begins from its logged state, so that one difference does not pull others after it.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from orchestrator import decision_log
from orchestrator.core import Decision, ScalingPolicy
from orchestrator.decision_log import Begin, CutOff, Header, Slot
from orchestrator.errors import RunFailed, UsageError

SHOWN = 10

_DECISION = TypeAdapter(Decision)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that came out otherwise, as JSON values."""

    line: int
    what: Literal["decision", "state"]
    """`state`: the one that the slot began with is not the one that the slot before it led to."""
    logged: Any
    replayed: Any


@dataclass(slots=True)
class Run:
    """The slots below one header."""

    line: int
    header: Header
    slots: int = 0


@dataclass(slots=True)
class Replay:
    """What came of deciding a log again."""

    runs: list[Run] = field(default_factory=list)
    slots: int = 0
    different: int = 0
    """Slots with a difference."""
    missing: int = 0
    """Slots that were never written, by their numbers (a full disk)."""
    cut_off: int | None = None
    """Number of the last line, if it is not whole; it is left out."""
    differences: list[Difference] = field(default_factory=list)
    """The first `SHOWN`."""

    def document(self) -> dict[str, Any]:
        """For `-o json`; see docs/decision-log.md."""
        runs = [
            {"line": run.line, "slots": run.slots}
            | {name: getattr(run.header, name) for name in ("policy", "testbed", "sha256", "espalier", "wall")}
            for run in self.runs
        ]
        return {
            "equal": self.different == 0, "slots": self.slots, "different": self.different, "missing": self.missing,
            "cut_off": self.cut_off, "runs": runs, "differences": [asdict(difference) for difference in self.differences],
        }  # fmt: skip


class _Chain:
    """The policy of one header, and what the slot before led to."""

    def __init__(self, policy: ScalingPolicy[Any]) -> None:
        self._policy = policy
        self._states: TypeAdapter[Any] = TypeAdapter(policy.state_type)
        self._next = 1
        self._state: bytes | None = self._states.dump_json(policy.initial())

    def missing(self, slot: Slot[Any]) -> int:
        """Slots that lack before this one."""
        return max(0, slot.slot - self._next) if self._next > 1 else 0

    def decide(self, line: int, slot: Slot[Any]) -> list[Difference]:
        """Differences of one slot.

        Raises:
            RunFailed: the policy fails on it.
        """
        differences = []
        logged = self._states.dump_json(slot.state)
        if slot.slot == self._next and self._state is not None and logged != self._state:
            differences.append(Difference(line, "state", json.loads(logged), json.loads(self._state)))
        try:
            state, decision = self._policy.step(slot.state, slot.observation)
        except Exception as error:
            raise RunFailed(f"the policy of this version fails on the slot of line {line}: {error!r}") from error
        self._next, self._state = slot.slot + 1, self._states.dump_json(state)
        logged, replayed = _DECISION.dump_json(slot.decision), _DECISION.dump_json(decision)
        if logged != replayed:
            differences.append(Difference(line, "decision", json.loads(logged), json.loads(replayed)))
        return differences


def replay(path: Path) -> Replay:
    """Decide every slot of a log again.

    Raises:
        UsageError: the file is no decision log, or a line is unreadable; says which.
        RunFailed: the policy of this version fails on a slot.
    """
    result, chain = Replay(), None
    for line, content in decision_log.read(path):
        match content:
            case Begin(header, policy):
                chain = _Chain(policy)
                result.runs.append(Run(line, header))
            case CutOff():
                result.cut_off = line
            case Slot() if chain is not None:
                result.missing += chain.missing(content)
                _count(result, chain.decide(line, content))
    if not result.runs:
        raise UsageError(f"{path}: there is no decision log in it")
    return result


def _count(result: Replay, differences: list[Difference]) -> None:
    result.slots += 1
    result.runs[-1].slots += 1
    result.different += bool(differences)
    result.differences += differences[: SHOWN - len(result.differences)]


def lines(path: Path, result: Replay) -> Iterator[str]:
    """The result for people."""
    policies = ", ".join(dict.fromkeys(run.header.policy for run in result.runs))
    equal = "all equal" if not result.different else f"{result.different} different"
    count = f"{_plural(result.slots, 'slot')} below {_plural(len(result.runs), 'header')}"
    yield f"{path}: {count} decided again by {policies}: {equal}"
    here = importlib.metadata.version("espalier")
    for version in dict.fromkeys(run.header.espalier for run in result.runs):
        if version != here:
            yield f"written by espalier {version}; this is {here}"
    if result.missing:
        yield f"{_plural(result.missing, 'slot')} in between were never written"
    if result.cut_off is not None:
        yield f"line {result.cut_off} is cut off, as by the end of the process that wrote it; it was left out"
    for difference in result.differences:
        for where, logged, replayed in _leaves(difference.what, difference.logged, difference.replayed):
            yield f"{path}:{difference.line}: {where}: logged {logged}, replayed {replayed}"
    if result.different and len(result.differences) == SHOWN:
        yield f"only the first {SHOWN} differences are shown"


def _leaves(where: str, logged: Any, replayed: Any) -> Iterator[tuple[str, str, str]]:
    """The innermost values that differ, each with its place."""
    if not isinstance(logged, Mapping) or not isinstance(replayed, Mapping) or list(logged) != list(replayed):
        yield where, json.dumps(logged), json.dumps(replayed)
        return
    for key, value in logged.items():
        if json.dumps(value) != json.dumps(replayed[key]):
            yield from _leaves(f"{where}.{key}", value, replayed[key])


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
