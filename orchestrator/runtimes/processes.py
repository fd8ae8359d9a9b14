"""The processes driver: each replica a local process, nodes being shares of this machine. No Docker.

A process gets its listening socket from us, so its port is known and open before it runs, and a session of its own, so that
it outlives us: a restarted orchestrator takes up what it finds and disturbs nothing.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.runtimes import child as children
from orchestrator.runtimes.driver import Absence, Handle, Launch, Listener, StartFailed
from orchestrator.runtimes.records import Record

HOST = "127.0.0.1"
LISTEN_BACKLOG = 1024


class Processes:
    """Driver over local processes; see `driver.Driver`."""

    problem: str | None = None
    """Nothing stands between us and our own processes."""

    def __init__(self, *, models_dir: Path, module: str, environment: Mapping[str, str], python: str = sys.executable) -> None:
        self._models_dir = models_dir
        self._module = module
        self._environment = environment
        self._python = python

    def specification(self, launch: Launch) -> str:
        """See `Driver`."""
        return launch.specification(self._shared(launch))

    async def open(self, listener: Listener) -> None:
        """See `Driver`; there is nothing to check, and nothing will be told."""

    async def find(self, known: Sequence[Record]) -> list[tuple[Record, Handle]]:
        """See `Driver`; a process that nobody wrote down cannot be told from a foreign one."""
        found: list[tuple[Record, Handle]] = []
        for record in known:
            child = children.adopt(record.identity) if record.identity is not None else None
            if child is not None:
                found.append((record, child))
        return found

    async def start(self, record: Record, launch: Launch, output: Path) -> tuple[Record, Handle]:
        """See `Driver`."""
        try:
            with socket.create_server((HOST, 0), backlog=LISTEN_BACKLOG) as listener:
                own = ("--replica", record.id, "--node", record.node, "--fd", str(listener.fileno()))
                argv = (*self._shared(launch), *own)
                child = children.spawn(argv, log=output, environment=self._environment, inherited=[listener.fileno()])
                url = f"http://{HOST}:{listener.getsockname()[1]}"
        except OSError as error:
            raise StartFailed(str(error)) from None
        identity = child.identity
        identified = {"pid": identity.pid, "create_time": identity.create_time, "argv": identity.argv}
        return record.model_copy(update={"url": url, **identified}), child

    async def discard(self, replica: str, output: Path, *, unasked: bool) -> None:
        """See `Driver`; nothing remains of a process but its log."""

    def absent(self, node: str) -> Absence | None:
        """See `Driver`: every node is a share of this machine."""
        return None

    has_news = False
    """The program is what it is."""

    async def refresh(self) -> None:
        """See `Driver`."""

    def revert(self) -> None:
        """See `Driver`."""

    def keep(self) -> None:
        """See `Driver`."""

    async def close(self) -> None:
        """See `Driver`; there is nothing to let go of."""

    def _shared(self, launch: Launch) -> tuple[str, ...]:
        model = str(self._models_dir / launch.model)
        return (self._python, "-m", self._module, "--model", model, *launch.options)
