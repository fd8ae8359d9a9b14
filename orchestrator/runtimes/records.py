"""What is written down of each process or container we started, so that our successor can take over where we stopped.

One small JSON file each under the state directory, replaced in one step at every change of state and removed when what it
describes is gone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from orchestrator.runtimes.child import Identity
from services.dataplane.document import Document, keep
from services.dataplane.routes import ReplicaState

log = logging.getLogger(__name__)

SHORT_ID = 12
"""Characters of a container's or task's id that Docker's own tools show."""


class Record(Document):
    """A process or container of ours."""

    id: str
    kind: Literal["stage", "gateway"]
    service: str
    """Name of the service, or of the gateway."""
    node: str
    url: str = ""
    """Empty while it is being started."""
    state: ReplicaState = "starting"
    generation: int = 0
    """How many restarts of the service the operator had asked for when this one was started."""
    specification: str
    """What it was started as, or a digest of that; another one now means that it is outdated."""
    cpus: float = 0.0
    memory_bytes: int = 0
    gpus: int = 0
    pid: int | None = None
    """Of a process, with its start time and its command line."""
    create_time: float = 0.0
    argv: tuple[str, ...] = ()
    container: str | None = None
    """The id of a container."""
    task: str | None = None
    """The id of a task of a Swarm."""

    @property
    def identity(self) -> Identity | None:
        """What a process is recognised by; None of anything else."""
        return None if self.pid is None else Identity(self.pid, self.create_time, self.argv)

    @property
    def runs_as(self) -> dict[str, int | str]:
        """What a person finds it by: its process, its container, or its task; empty while it is being started."""
        if self.container is not None:
            return {"container": self.container[:SHORT_ID]}
        if self.task is not None:
            return {"task": self.task[:SHORT_ID]}
        return {} if self.pid is None else {"pid": self.pid}

    def is_same_as(self, other: Record) -> bool:
        """Whether both describe one and the same process, container or task."""
        return (self.id, self.identity, self.container, self.task) == (other.id, other.identity, other.container, other.task)


BLANK = Record(id="", kind="stage", service="", node="", specification="")
"""Stands for any replica, where only what all of them share matters."""


class Records:
    """The files, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, record: Record) -> None:
        """Write or replace a record. A full disk costs the successor what it describes, and the present one nothing."""
        try:
            keep(self._path(record.id), record.model_dump_json())
        except OSError as error:
            log.warning("%s: its record could not be written, so a successor will not find it: %s", record.id, error)

    def forget(self, replica: str) -> None:
        """Remove the record of what is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._path(replica).unlink()

    def all(self) -> Iterator[Record]:
        """Every record, by id; a file that cannot be read is skipped, since it names nothing to take up."""
        for path in sorted(self._directory.glob("*.json")):
            with contextlib.suppress(OSError, ValidationError):
                yield Record.model_validate_json(path.read_bytes())

    def _path(self, replica: str) -> Path:
        return self._directory / f"{replica}.json"
