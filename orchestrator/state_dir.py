"""The state directory of a testbed: which file lies where, and who runs it.

In it lie

    lease.json          which orchestrator leads, where several were started; waiting/ has a record of each that does not
    orchestrator.json   the orchestrator: process, address, testbed; kept after its end for the port
    orchestrator.log    its log
    testbed.yaml        the testbed file in force: the last one that came up whole
    replicas/ gateways/ a record per process (`runtimes.records`)
    logs/               output of every process
    routes.json         the routes published last; gateway-1.routes.json is the gateway's own copy
    images.json         the images that containers are made from (`runtimes.pins`)
    orders.json         what the operator ordered
    decisions.jsonl     the decision log

The command line, the orchestrator and its successor meet only here.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from orchestrator.runtimes import child as children
from orchestrator.runtimes.child import Identity
from services.dataplane.document import Document, keep

LEASE = "--lease"
"""Option of an orchestrator that is one of several."""


class Daemon(Document):
    """An orchestrator process."""

    pid: int
    create_time: float
    argv: tuple[str, ...]
    url: str
    testbed: str
    sha256: str
    """Of the testbed file it was started with; the one in force may be another (`espalier up` again)."""

    @property
    def one_of_several(self) -> bool:
        """Whether it leads only as long as it holds the lease."""
        return LEASE in self.argv

    @property
    def identity(self) -> Identity:
        """What the process is recognised by."""
        return Identity(self.pid, self.create_time, self.argv)

    def is_alive(self) -> bool:
        """Whether this very process runs."""
        return children.recognise(self.identity)


@dataclass(frozen=True, slots=True)
class StateDir:
    """Paths under one directory."""

    root: Path

    @property
    def daemon(self) -> Path:
        """Record of the orchestrator."""
        return self.root / "orchestrator.json"

    @property
    def lease(self) -> Path:
        """Which orchestrator leads."""
        return self.root / "lease.json"

    @property
    def waiting(self) -> Path:
        """Records of orchestrators that wait for it."""
        return self.root / "waiting"

    def save_waiting(self, daemon: Daemon) -> Path:
        """Write the record of an orchestrator that waits; returns where."""
        path = self.waiting / f"{daemon.pid}.json"
        keep(path, daemon.model_dump_json())
        return path

    def read_waiting(self) -> list[Daemon]:
        """The orchestrators that wait for the lease."""
        found = []
        for path in self.waiting.glob("*.json"):
            try:
                found.append(Daemon.model_validate_json(path.read_bytes()))
            except (FileNotFoundError, ValidationError):
                continue
        return [daemon for daemon in found if daemon.is_alive()]

    @property
    def log(self) -> Path:
        """Log of the orchestrator."""
        return self.root / "orchestrator.log"

    @property
    def testbed(self) -> Path:
        """The testbed file in force."""
        return self.root / "testbed.yaml"

    @property
    def routes(self) -> Path:
        """The routes published last."""
        return self.root / "routes.json"

    @property
    def gateway_routes(self) -> Path:
        """The gateway's copy."""
        return self.root / "gateway-1.routes.json"

    @property
    def images(self) -> Path:
        """The images that containers are made from."""
        return self.root / "images.json"

    @property
    def orders(self) -> Path:
        """What the operator ordered."""
        return self.root / "orders.json"

    @property
    def decisions(self) -> Path:
        """The decision log."""
        return self.root / "decisions.jsonl"

    def scope(self, testbed: str) -> str:
        """A name for what is made on an engine from here, so that two testbeds of one name do not meet there."""
        return f"{testbed}-{hashlib.sha256(str(self.root.absolute()).encode()).hexdigest()[:8]}"

    def read_daemon(self) -> Daemon | None:
        """The orchestrator that runs here, or ran here last."""
        try:
            return Daemon.model_validate_json(self.daemon.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def save_daemon(self, daemon: Daemon) -> None:
        """Write the record of the orchestrator in one step."""
        keep(self.daemon, daemon.model_dump_json())

    def keep_testbed(self, text: str) -> None:
        """Keep a testbed file as the one in force."""
        keep(self.testbed, text)

    def clear(self) -> None:
        """Forget a testbed that is down, but for its logs, its decisions and the version of its routes."""
        for path in (self.daemon, self.testbed, self.images, self.orders, self.gateway_routes):
            path.unlink(missing_ok=True)
        for directory in ("replicas", "gateways", "waiting"):
            shutil.rmtree(self.root / directory, ignore_errors=True)
