"""What is special to one way of running replicas, as the keeper (`runtimes.keeper`) sees it: a driver with a few verbs.

A driver starts one replica, finds those a predecessor left, and clears away what remains of one that has ended. When to do
which is the keeper's business alone. Drivers: `processes`, `engine` and `swarm`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from orchestrator.runtimes.records import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How replicas of a service are started, whatever runs them."""

    model: str
    """Directory of the exported model, below the models directory."""
    options: tuple[str, ...]
    """Arguments of `services.stage` that all replicas of the service share."""
    drain_grace_s: float
    cpus: float
    """Cores that placement reserves."""
    cpu_limit: float
    """Cores that a replica may use, where something enforces it."""
    memory_bytes: int
    """Memory that a replica may use, where something enforces it."""
    gpus: int = 0
    model_sha256: str = ""
    """Digest of the model's manifest: a model that was exported anew makes replicas outdated."""
    generation: int = 0
    """How many restarts of the service the operator has asked for."""

    def specification(self, *parts: object) -> str:
        """Digest of everything that makes a replica outdated when it changes; `parts` are what the driver adds."""
        shared = asdict(replace(self, generation=0))
        return hashlib.sha256(json.dumps([shared, *parts], sort_keys=True).encode()).hexdigest()


Absence = Literal["down", "leaving"]
"""Why nothing may be started on a node: it is not there, or what it has is to go elsewhere."""


class Handle(Protocol):
    """One live replica and the event of its end."""

    @property
    def exited(self) -> asyncio.Event:
        """Set when it has ended."""

    @property
    def exit_code(self) -> int | None:
        """How it ended, in the words of the system; None while it runs, and where nobody can tell."""

    async def wait(self, limit_s: float) -> bool:
        """Whether it ended within the limit."""

    async def stop(self, grace_s: float) -> None:
        """Ask it to end; end it by force when it has not after the grace time."""

    def release(self) -> None:
        """Stop watching; the replica goes on."""


class Listener(Protocol):
    """Whom a driver tells what it learns of its own accord."""

    def moved(self, replica: str, url: str) -> None:
        """A replica has another address now."""

    def ending(self, replica: str) -> None:
        """Somebody else has told a replica to end; it finishes what it has."""

    def changed(self) -> None:
        """`problem`, `absent` or what `specification` gives has changed."""


class Driver(Protocol):
    """One way of running replicas."""

    @property
    def problem(self) -> str | None:
        """Why nothing can be started or stopped now, as a sentence; None when all is well."""

    def absent(self, node: str) -> Absence | None:
        """Why nothing may be started on a node now; None where it may. Replicas on one that is down have ended."""

    def specification(self, launch: Launch) -> str:
        """What a replica started now would be: one started as something else is outdated."""

    async def open(self, listener: Listener) -> None:
        """Before first use: check that replicas can be run at all, and begin to tell the listener.

        Raises:
            SetupFailed: they cannot; the message says what to do.
        """

    async def find(self, known: Sequence[Record]) -> list[tuple[Record, Handle]]:
        """Take up what a predecessor left running, and clear away its other leftovers.

        Args:
            known: what the predecessor wrote down. What is found beside it has the state `starting`.
        """

    async def start(self, record: Record, launch: Launch, output: Path) -> tuple[Record, Handle]:
        """Start one replica.

        Args:
            record: what is known of it already.
            launch: how to start it.
            output: file for what it writes.

        Returns:
            The record with its address and with what it is recognised by, and its handle.

        Raises:
            StartFailed: it could not be started, and nothing of it is left.
            Unreachable: whoever runs replicas does not answer, so `problem` says so; this is not the replica's fault.
        """

    async def discard(self, replica: str, output: Path, *, unasked: bool) -> None:
        """Clear away what remains of a replica that has ended; `unasked`: nobody had told it to."""

    @property
    def has_news(self) -> bool:
        """Whether replicas could be started from something newer than what they are started from."""

    async def refresh(self) -> None:
        """Start replicas from the newest there is, from now on."""

    def revert(self) -> None:
        """Start them from what was used before the last `refresh` again."""

    def keep(self) -> None:
        """What the last `refresh` found is good: a successor starts from it too."""

    async def close(self) -> None:
        """Let go of everything; replicas go on."""


class StartFailed(Exception):
    """One replica could not be started. The keeper answers it; nobody else sees it."""


class Unreachable(Exception):
    """Whoever runs the replicas does not answer. The keeper holds until it does; nobody else sees it."""
