"""A whole testbed in processes of its own, brought up and down by the commands a user would give, and load on it.

Whatever a test does to it, `Edge.want` brings it back to a known state, and `Edge.sweep` leaves nothing running.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import psutil
from click.testing import CliRunner

from loadgen.outcome import OUTCOMES
from orchestrator import testbed as testbeds
from orchestrator.__main__ import main
from orchestrator.state_dir import StateDir
from tests.services import harness
from tests.system.engine import docker, labelled, program

TESTBED = Path(__file__).with_name("edge.yaml")
SERVICES = ("tokenise", "encode", "pool")
PIPELINE = "embed"

DEADLINE_S = 2.0
"""So generous that only what is lost misses it, not what a busy machine holds up."""
PATIENCE_S = 15.0
"""For what takes one or two seconds on an idle machine: a bound, not a measurement."""
MARK = "ESPALIER_SYSTEM_TEST"
"""In the environment of everything that is started here, so that all of it can be found again."""


class Served:
    """Something with a gateway: what that has counted, and load on it."""

    url: str
    """Address of the gateway."""
    mark: str = ""

    def metrics(self) -> str:
        """The gateway's exposition page."""
        return httpx.get(f"{self.url}/metrics", trust_env=False, timeout=PATIENCE_S).text

    def counted(self) -> Counter[str]:
        """Tasks that have ended at this gateway, by outcome."""
        return Counter(harness.outcomes(self.metrics(), PIPELINE))

    def gauge(self, name: str) -> float:
        """One number of the gateway's page."""
        (line,) = [line for line in self.metrics().splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[1])

    def load(self, directory: Path, rate: float, seconds: float, deadline_s: float = DEADLINE_S) -> Load:
        """So many tasks a second, evenly, for so long: their number is known beforehand."""
        return Load(self, directory, rate, seconds, deadline_s)


@dataclass
class Edge(Served):
    """A testbed (edge.yaml) whose replicas are processes, or containers of this machine's engine."""

    home: Path
    models: Path
    runtime: str = "processes"
    testbed: Path = TESTBED
    options: tuple[str, ...] = ()
    """Further ones of `espalier up`."""
    state: StateDir = field(init=False)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.state = StateDir(self.home / "state")
        self._runner = CliRunner(env={MARK: self.mark})

    # --- the command line -------------------------------------------------------------------------------------------------

    def espalier(self, command: str, *arguments: str) -> str:
        """Run a command on this testbed; its standard output."""
        result = self._runner.invoke(main, [command, *arguments, "--state-dir", str(self.state.root)])
        assert result.exit_code == 0, result.output
        return result.stdout

    def refused(self, command: str, *arguments: str) -> str:
        """Run a command that must fail; what it says."""
        result = self._runner.invoke(main, [command, *arguments, "--state-dir", str(self.state.root)])
        assert result.exit_code != 0, result.output
        return result.stderr

    def up(self, testbed: Path | None = None) -> None:
        """Start everything, find everything running, or go over to another version of the testbed's file."""
        self.espalier("up", *self.as_given(testbed))

    def as_given(self, testbed: Path | None = None) -> list[str]:
        """Arguments of `up`."""
        places = [str(testbed or self.testbed), "--models-dir", str(self.models)]
        return [*places, "--runtime", self.runtime, *self.options]

    def status(self) -> dict[str, Any]:
        """What `espalier status` knows."""
        found: dict[str, Any] = json.loads(self.espalier("status", "-o", "json"))
        return found

    def want(self, **replicas: int) -> None:
        """Bring it to so many replicas of each service, wait until it is so, and find it answering."""
        self.up()
        for service, count in replicas.items():
            if self.status()["services"][service]["wanted"]["ready"] != count:
                self.espalier("scale", service, str(count))
        self.settle()
        version = self.status()["version"]
        until(lambda: self.gauge("espalier_gateway_routes_version") == version, "the gateway knows it")

    def settle(self) -> None:
        """Wait until everything is as wanted, standbys too."""
        until(lambda: all(service["settled"] for service in self.status()["services"].values()), "everything is as wanted")

    # --- what runs --------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:  # type: ignore[override]
        """Address of the gateway."""
        return str(self.status()["gateway"]["url"])

    def pids(self) -> dict[str, int]:
        """Process of every replica and of the gateway; of a container, the one that its init looks after."""
        status = self.status()
        replicas = [replica for service in status["services"].values() for replica in service["replicas"]]
        return {"gateway": status["gateway"]["pid"], **{replica["id"]: self._pid(replica) for replica in replicas}}

    def _pid(self, replica: dict[str, Any]) -> int:
        if "pid" in replica:
            return int(replica["pid"])
        return program(replica["container"]).pid

    def replicas(self, service: str) -> dict[str, str]:
        """Address of every replica of a service."""
        return {replica["id"]: replica["url"] for replica in self.status()["services"][service]["replicas"]}

    # --- the end ----------------------------------------------------------------------------------------------------------

    def down(self) -> None:
        """Take everything down, as a user would."""
        self.espalier("down")

    def running(self) -> list[psutil.Process]:
        """Every process that was started from here and still runs."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def containers(self) -> list[str]:
        """Every container that was made from here."""
        if self.runtime != "engine":
            return []
        return labelled(f"espalier.scope={self.state.scope(testbeds.load(self.testbed).testbed.name)}")

    def sweep(self) -> None:
        """End whatever is left."""
        for process in self.running():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if left := self.containers():
            docker("rm", "--force", *left)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            return False


@dataclass(frozen=True)
class Ran:
    """What a run of the load generator has found."""

    report: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def outcomes(self) -> Counter[str]:
        """Tasks by outcome, those that occurred."""
        return +Counter(self.report["outcomes"])

    @property
    def unanswered(self) -> list[dict[str, Any]]:
        """Tasks without an answer."""
        return [record for record in self.records if record["outcome"] not in ("on_time", "late")]

    def seen(self, service: str) -> set[str]:
        """Replicas of a service that tasks came by."""
        return {hop["replica"] for record in self.records for hop in record["hops"] if hop["service"] == service}

    def when(self, ended: int) -> float:
        """When, on the generator's clock [s], so many tasks had ended: not before the gateway had counted them."""
        finished = sorted(record["finished_s"] for record in self.records if record["finished_s"] is not None)
        return float(finished[min(ended, len(finished) - 1)])

    def on_time_share(self, begin_s: float, end_s: float) -> float:
        """Of the tasks scheduled between two moments."""
        outcomes = [record["outcome"] for record in self.scheduled_from(begin_s) if record["scheduled_s"] < end_s]
        return outcomes.count("on_time") / len(outcomes)

    def scheduled_from(self, moment_s: float) -> list[dict[str, Any]]:
        """Tasks scheduled from that moment on."""
        return [record for record in self.records if record["scheduled_s"] >= moment_s]

    def check_every_task_ended_once(self, sent: int) -> None:
        """One record and one outcome per task that was planned."""
        assert self.report["sent"] == sent
        assert len({record["index"] for record in self.records}) == len(self.records) == sent
        assert set(self.outcomes) <= set(OUTCOMES)
        assert sum(self.outcomes.values()) == sent


class Load:
    """`python -m loadgen` beside the test; killed on the way out if it has not ended."""

    def __init__(self, edge: Served, directory: Path, rate: float, seconds: float, deadline_s: float) -> None:
        self.tasks = round(rate * seconds)
        self._edge = edge
        self._before = edge.counted()
        self._seconds = seconds
        self._files = {name: directory / f"{uuid.uuid4().hex}.{name}" for name in ("report", "records", "log")}
        self._argv = [sys.executable, "-m", "loadgen", edge.url, "--quiet", "--warmup", "0", "--duration", f"{seconds:g}"]
        self._argv += ["--pipeline", f"{PIPELINE}=constant:{rate:g}", "--deadline", f"{deadline_s:g}"]
        self._argv += ["--report", str(self._files["report"]), "--records", str(self._files["records"])]

    def __enter__(self) -> Self:
        environment = {**os.environ, MARK: self._edge.mark}
        with self._files["log"].open("wb") as log:
            self._process = subprocess.Popen(self._argv, env=environment, stdout=log, stderr=log)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def counted(self) -> Counter[str]:
        """Tasks of this load that have ended at the gateway, by outcome. A gateway that began anew counts anew."""
        counts = self._edge.counted()
        counts.subtract(self._before)
        return +counts

    def ended(self) -> int:
        """How many they are."""
        return sum(self.counted().values())

    def wait_for(self, tasks: int) -> None:
        """Until so many have ended."""
        until(lambda: self.ended() >= tasks, f"{tasks} tasks have ended")

    def finish(self) -> Ran:
        """Wait for the run's end."""
        code = self._process.wait(self._seconds + 2 * PATIENCE_S)
        # 4 says that the generator lagged: a busy machine, and nothing these tests look at.
        assert code in (0, 4), self._files["log"].read_text()
        records = [json.loads(line) for line in self._files["records"].read_text().splitlines()]
        return Ran(json.loads(self._files["report"].read_text()), records)


def until(condition: Callable[[], bool], what: str, limit_s: float = PATIENCE_S) -> None:
    """Wait for a condition; one that cannot be looked at now (a gateway that is gone) does not hold."""
    end = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)


Some = TypeVar("Some", bound=Edge)


@contextlib.contextmanager
def running(edge: Some) -> Iterator[Some]:
    """The testbed, up; afterwards it is taken down, and nothing of it is left."""
    try:
        edge.up()
        yield edge
        edge.down()
        assert edge.running() == [], "espalier down left something running"
        assert edge.containers() == [], "espalier down left a container"
    finally:
        edge.sweep()
