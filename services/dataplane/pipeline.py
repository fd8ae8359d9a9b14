"""A pipeline as a DAG of steps, and its cut into segments: the chains that stages walk without coming back to the gateway.

References name tensors inside one task: `request.NAME` for a tensor of the request, `STEP.OUTPUT` for what a step computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, model_validator

from models.manifest import Name, TensorSpec
from services.dataplane.document import Document

REQUEST = "request"


class Step(Document):
    """One visit to a service. The same service may serve several steps of a pipeline."""

    id: Name
    service: Name
    inputs: Mapping[str, str]
    """Input tensor of the service's stage -> reference."""
    parts: tuple[Name, ...] = ()
    """Services with the further parts of a decoder that was cut: the step's own asks them for every token, in this order."""

    @property
    def services(self) -> tuple[str, ...]:
        """Everybody who works for the step."""
        return (self.service, *self.parts)

    @property
    def parents(self) -> frozenset[str]:
        """Ids of the steps whose outputs this step takes."""
        return frozenset(step_of(ref) for ref in self.inputs.values()) - {REQUEST}


class Pipeline(Document):
    """A DAG of steps that answers one type of task."""

    name: Name
    deadline_s: float = Field(gt=0)
    """Deadline of a task that states none [s], from its arrival at the gateway: to the whole answer, or to a stream's first
    token."""
    token_deadline_s: float | None = Field(default=None, gt=0)
    """Longest time [s] between two tokens of a stream that is on time; None where only the first one counts."""
    epsilon: float = Field(gt=0, lt=1)
    """Largest share of tasks that may miss their deadline."""
    steps: tuple[Step, ...] = Field(min_length=1)
    outputs: Mapping[str, str] = Field(min_length=1)
    """Output tensor of the pipeline -> reference."""

    @model_validator(mode="after")
    def _references_resolve(self) -> Pipeline:
        ids = [step.id for step in self.steps]
        if len(set(ids)) != len(ids) or REQUEST in ids:
            raise ValueError(f"step ids must be unique and not {REQUEST!r}: {ids}")
        for ref in [*(ref for step in self.steps for ref in step.inputs.values()), *self.outputs.values()]:
            if ref.count(".") != 1 or not name_of(ref) or step_of(ref) not in {*ids, REQUEST}:
                raise ValueError(f"reference {ref!r} must be {REQUEST}.NAME or STEP.OUTPUT with STEP one of {', '.join(ids)}")
        topological(self.steps)
        return self

    @property
    def request_names(self) -> tuple[str, ...]:
        """Names of the tensors a request must bring, in order of first use."""
        refs = [ref for step in self.steps for ref in step.inputs.values()] + list(self.outputs.values())
        return tuple(dict.fromkeys(name_of(ref) for ref in refs if step_of(ref) == REQUEST))


@dataclass(frozen=True, slots=True)
class Segment:
    """A maximal chain of steps: each needs only the request, earlier segments and the steps before it in the chain."""

    steps: tuple[Step, ...]
    sends: tuple[str, ...]
    """References the gateway sends along with the call."""
    returns: tuple[str, ...]
    """References the chain's last stage answers with."""
    parents: frozenset[int]
    """Indices of the segments that must have answered first."""

    keeps: tuple[tuple[str, ...], ...]
    """For each step, the references still needed once it is done: by later steps of the chain, or by the gateway."""


def segments(pipeline: Pipeline) -> tuple[Segment, ...]:
    """Cut a pipeline into segments, in an order in which each comes after its parents.

    A chain goes on to step b when b takes nothing but the request and the chain, and whoever else waits for the chain waits
    for b as well: then the chain's last stage can call b itself, and nobody is kept waiting by it.
    """
    order = topological(pipeline.steps)
    chains: list[list[Step]] = []
    placed: set[str] = set()
    for step in order:
        if step.id in placed:
            continue
        chain = [step]
        while (following := _only_follower(chain, order)) is not None:
            chain.append(following)
        placed.update(s.id for s in chain)
        chains.append(chain)
    owner = {step.id: i for i, chain in enumerate(chains) for step in chain}
    return tuple(_segment(i, chain, owner, pipeline) for i, chain in enumerate(chains))


def _only_follower(chain: list[Step], order: tuple[Step, ...]) -> Step | None:
    inside = {step.id for step in chain}
    waiting = [step for step in order if step.id not in inside and step.parents & inside]
    free = [step for step in waiting if step.parents <= inside]
    if len(free) != 1:
        return None
    behind = {free[0].id}
    for step in order:
        if step.parents & behind:
            behind.add(step.id)
    return free[0] if all(step.id in behind for step in waiting) else None


def _segment(index: int, chain: list[Step], owner: Mapping[str, int], pipeline: Pipeline) -> Segment:
    inside = {step.id for step in chain}
    taken = [ref for step in chain for ref in step.inputs.values()]
    wanted_elsewhere = [ref for s in pipeline.steps if s.id not in inside for ref in s.inputs.values()]
    wanted = [*wanted_elsewhere, *pipeline.outputs.values()]
    sends = tuple(dict.fromkeys(ref for ref in taken if step_of(ref) not in inside))
    returns = tuple(dict.fromkeys(ref for ref in wanted if step_of(ref) in inside))
    return Segment(
        steps=tuple(chain),
        sends=sends,
        returns=returns,
        keeps=tuple(_kept_after(i, chain, sends, returns) for i in range(len(chain))),
        parents=frozenset(owner[step_of(ref)] for ref in taken if step_of(ref) not in inside | {REQUEST}),
    )


def _kept_after(index: int, chain: list[Step], sends: tuple[str, ...], returns: tuple[str, ...]) -> tuple[str, ...]:
    done = {step.id for step in chain[: index + 1]}
    wanted = [ref for step in chain[index + 1 :] for ref in step.inputs.values()] + list(returns)
    return tuple(ref for ref in dict.fromkeys(wanted) if ref in sends or step_of(ref) in done)


def topological(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps in an order in which each comes after its parents; ties keep the order they were written in.

    Raises:
        ValueError: the steps form a cycle; the message names it.
    """
    done: dict[str, Step] = {}
    left = list(steps)
    while left:
        free = next((step for step in left if step.parents <= done.keys()), None)
        if free is None:
            raise ValueError(f"steps wait for each other in a cycle: {', '.join(step.id for step in left)}")
        done[free.id] = free
        left.remove(free)
    return tuple(done.values())


def step_of(ref: str) -> str:
    """`encode` of `encode.last_hidden_state`."""
    return ref.partition(".")[0]


def name_of(ref: str) -> str:
    """`last_hidden_state` of `encode.last_hidden_state`."""
    return ref.partition(".")[2]


def agree(given: TensorSpec, taken: TensorSpec) -> bool:
    """Whether a tensor may go into an input: equal datatype and rank, and lengths equal where both are fixed."""
    if given.datatype != taken.datatype or len(given.shape) != len(taken.shape):
        return False
    pairs = zip(given.shape, taken.shape, strict=True)
    return all(isinstance(a, str) or isinstance(b, str) or a == b for a, b in pairs)
