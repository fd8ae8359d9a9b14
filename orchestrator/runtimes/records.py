"""What the processes runtime writes down of each process it started, so that its successor can take over where it stopped.

One small JSON file per process under the state directory, replaced in one step at every change of state and removed when the
process is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from orchestrator.runtimes.child import Identity
from services.dataplane.document import Document
from services.dataplane.routes import ReplicaState

log = logging.getLogger(__name__)


class Record(Document):
    """A process of ours."""

    id: str
    kind: Literal["stage", "gateway"]
    service: str
    """Name of the service, or of the gateway."""
    node: str
    url: str
    state: ReplicaState
    generation: int = 0
    """How many restarts of the service the operator had asked for when this one was started."""
    specification: tuple[str, ...]
    """The part of the command line that all replicas of the service share; another one now means it is outdated."""
    cpus: float = 0.0
    memory_bytes: int = 0
    pid: int
    create_time: float
    argv: tuple[str, ...]

    @property
    def identity(self) -> Identity:
        """What the process is recognised by."""
        return Identity(self.pid, self.create_time, self.argv)


class Records:
    """The files, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, record: Record) -> None:
        """Write or replace the record of a process. A full disk costs the successor a process, and the present one nothing."""
        path = self._path(record.id)
        partial = path.with_name(path.name + ".partial")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            partial.write_text(record.model_dump_json())
            os.replace(partial, path)
        except OSError as error:
            log.warning("%s: its record could not be written, so a successor will not find it: %s", record.id, error)

    def forget(self, replica: str) -> None:
        """Remove the record of a process that is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._path(replica).unlink()

    def all(self) -> Iterator[Record]:
        """Every record, by id; a file that cannot be read is skipped, since it names no process to take up."""
        for path in sorted(self._directory.glob("*.json")):
            with contextlib.suppress(OSError, ValidationError):
                yield Record.model_validate_json(path.read_bytes())

    def _path(self, replica: str) -> Path:
        return self._directory / f"{replica}.json"
