"""The orchestrator process: reads what it needs, serves the control plane, and runs the testbed until told to end.

    python -m orchestrator.daemon TESTBED --state-dir DIR --models-dir DIR

SIGTERM ends the orchestrator and leaves the data plane running, for a successor to adopt. SIGINT, and `POST /v1/shutdown`,
drain and stop everything first. With `--lease` it is one of several: it waits until it leads (`orchestrator.lease`), then takes
up what the one before it left, as any successor does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import uvicorn

from orchestrator import app, survey
from orchestrator import plan as plans
from orchestrator import testbed as testbeds
from orchestrator.control import GATEWAY_MODULE, STAGE_MODULE, Orchestrator, Settings
from orchestrator.errors import EspalierError, RunFailed, SetupFailed
from orchestrator.lease import FileStore, Lease, Over, Store
from orchestrator.plan import Plan
from orchestrator.runtimes.containers import EngineOptions
from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.swarm_api import SwarmApi
from orchestrator.runtimes.swarm_lease import SwarmStore
from orchestrator.state_dir import LEASE, Daemon, StateDir
from orchestrator.testbed import Loaded

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("espalier")
HOST = "127.0.0.1"
INTERRUPTED = 130
KILLED_S = 5.0
"""A killed process is gone within this time [s]."""
UPDATE_LIMIT_S = 600.0
"""For a testbed file that changed while no orchestrator was up [s]."""


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the orchestrator tells it when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(arguments: argparse.Namespace) -> int:
    """Run the orchestrator until it is told to end; returns the exit status."""
    state = StateDir(arguments.state_dir)
    state.root.mkdir(parents=True, exist_ok=True)
    if not arguments.lease:
        return await _lead(arguments, state, None)
    given = testbeds.load(arguments.testbed)
    lease = Lease(await _store(arguments, state, given), f"{socket.gethostname()}-{os.getpid()}")
    with _recorded_as_waiting(state, given):
        async with _answering(arguments):
            try:
                await lease.take()
            except Over:
                log.info("the testbed was taken down; nothing is left to wait for")
                return 0
    holding = asyncio.create_task(lease.hold())
    try:
        return await _lead(arguments, state, holding)
    finally:
        holding.cancel()
        # Whoever ended it all has cleared the state directory: then nobody is to begin again.
        await lease.release(over=state.read_daemon() is None)


async def _store(arguments: argparse.Namespace, state: StateDir, given: Loaded) -> Store:
    """Where the lease lies: with the Swarm's managers, else in the state directory, which all of this machine share."""
    if arguments.runtime != "swarm":
        return FileStore(state.lease)
    api = SwarmApi()
    try:
        await api.connect()
    except Unreachable as error:
        raise SetupFailed(str(error)) from None
    return SwarmStore(api, arguments.engine_project or state.scope(given.testbed.name))


@contextlib.asynccontextmanager
async def _answering(arguments: argparse.Namespace) -> AsyncIterator[None]:
    """While it waits: say so to whoever asks on a port that is this one's own. On one machine the port is the leader's."""
    try:
        listener = _listen(arguments.host, arguments.port, None) if arguments.port else None
    except SetupFailed:
        listener = None
    if listener is None:
        yield
        return
    config = uvicorn.Config(app.waiting(), log_config=None, access_log=False, lifespan="off", loop="none")
    config.timeout_graceful_shutdown = 1
    server = _Server(config)
    with listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


@contextlib.contextmanager
def _recorded_as_waiting(state: StateDir, given: Loaded) -> Iterator[None]:
    path = state.save_waiting(_this(given, ""))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _this(given: Loaded, url: str) -> Daemon:
    this = psutil.Process()
    return Daemon(
        pid=this.pid, create_time=this.create_time(), argv=tuple(this.cmdline()), url=url,
        testbed=given.testbed.name, sha256=given.sha256,
    )  # fmt: skip


async def _lead(arguments: argparse.Namespace, state: StateDir, holding: asyncio.Task[None] | None) -> int:
    """Run the testbed; `holding` ends when somebody else is to do so."""
    given = testbeds.load(arguments.testbed)
    before = state.read_daemon()
    if before is not None and before.is_alive():
        if holding is None or not before.one_of_several:
            raise SetupFailed(f"testbed {before.testbed} is up already (process {before.pid}); end it with espalier down")
        await _put_down(before)
    plan = _in_force(state, arguments.models_dir) or plans.make(given, arguments.models_dir)
    in_force = plan.loaded
    plan = await survey.settled(plan)
    with _listen(arguments.host, arguments.port or given.testbed.control.port, before) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        orchestrator = Orchestrator(plan, state, _settings(arguments, url, state.scope(given.testbed.name), given.testbed.name))
        state.save_daemon(_this(given, url))
        if in_force is given:
            state.keep_testbed(given.text)
        # A file that was changed while nobody looked is an update like any other: it can be rolled back. A file that has
        # not changed since is older than what is in force, which then came by `espalier up`.
        changed = before is not None and given.sha256 not in (before.sha256, in_force.sha256)
        if holding is not None:
            holding.add_done_callback(lambda _: orchestrator.end(stop_all=False))
        code = await _run(orchestrator, listener, given if changed else None)
    if holding is not None and holding.done():
        raise RunFailed("another orchestrator leads; everything was left to it")
    return code


async def _put_down(before: Daemon) -> None:
    """End one that has lost its lease and has not noticed: it hangs, and must not go on when it wakes up."""
    log.warning("orchestrator %d leads no more, but is still there; killed", before.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(before.pid, signal.SIGKILL)
    async with asyncio.timeout(KILLED_S):
        while before.is_alive():  # noqa: ASYNC110 - nothing would set an event
            await asyncio.sleep(0.01)


def _in_force(state: StateDir, models_dir: Path) -> Plan | None:
    """What was in force when the predecessor ended; None where there was none, or it is of no use any more."""
    try:
        return plans.make(testbeds.parse(state.testbed.read_text(encoding="utf-8"), str(state.testbed)), models_dir)
    except FileNotFoundError:
        return None
    except EspalierError as error:
        log.warning("the testbed that was in force cannot be used any more, so the given one is: %s", error)
        return None


def _settings(arguments: argparse.Namespace, control_url: str, scope: str, testbed: str) -> Settings:
    models_dir = arguments.models_dir.resolve()
    engine = EngineOptions(
        scope=arguments.engine_project or scope,
        testbed=testbed,
        image=arguments.engine_image,
        gpu_image=arguments.engine_gpu_image,
        network=arguments.engine_network,
        models=arguments.engine_models or str(models_dir),
        project=arguments.engine_project,
    )
    return Settings(
        models_dir=models_dir,
        control_url=control_url,
        stage_module=arguments.stage_module,
        gateway_module=arguments.gateway_module,
        gateway_url=arguments.gateway,
        engine=engine if arguments.runtime == "engine" else None,
        swarm=engine if arguments.runtime == "swarm" else None,
        prometheus_url=arguments.prometheus,
    )


async def _run(orchestrator: Orchestrator, listener: socket.socket, update: Loaded | None) -> int:
    """Returns the exit status."""
    config = uvicorn.Config(app.build(orchestrator), log_config=None, access_log=False, lifespan="off", loop="none")
    config.timeout_graceful_shutdown = 2
    server = _Server(config)
    loop = asyncio.get_running_loop()
    terminating: set[asyncio.Task[None]] = set()
    loop.add_signal_handler(signal.SIGTERM, lambda: terminating.add(asyncio.ensure_future(orchestrator.terminate())))
    loop.add_signal_handler(signal.SIGINT, orchestrator.interrupt)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await orchestrator.run(update, UPDATE_LIMIT_S)
    finally:
        server.should_exit = True
        await serving
    return INTERRUPTED if orchestrator.interrupted else 0


def _listen(host: str, port: int, before: Daemon | None) -> socket.socket:
    """The control plane's socket, on the port of the predecessor where it had one: gateways still ask there."""
    wanted = port or (int(before.url.rpartition(":")[2]) if before is not None else 0)
    # The protocol must be named: only then does asyncio turn off Nagle's algorithm, which costs 40 ms an answer here.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, wanted))
        # Whoever reads where we are before we serve waits, instead of being refused.
        listener.listen()
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or 0)
        raise SetupFailed(
            f"the control plane cannot have {host}:{wanted}: {reason}; free it, or choose another port under control"
        ) from None
    return listener


def main() -> int:
    """Entry point of `python -m orchestrator.daemon`."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return asyncio.run(serve(arguments))
    except EspalierError as error:
        print(f"espalier: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.daemon", description="Run a testbed's orchestrator.")
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--state-dir", type=Path, required=True, help="where it keeps its records and logs")
    parser.add_argument("--models-dir", type=Path, required=True, help="where the models were exported to")
    parser.add_argument("--host", default=HOST, help="address the control plane listens on")
    parser.add_argument("--port", type=int, default=0, help="its port (default: the testbed's)")
    parser.add_argument(
        "--gateway",
        metavar="URL|announced",
        help="a gateway that somebody else keeps running, or those that ask for the routes (default: keep one here)",
    )
    parser.add_argument(LEASE, action="store_true", help="one of several: wait until it leads")
    parser.add_argument("--prometheus", metavar="URL", help="server to observe through (default: ask every replica itself)")
    parser.add_argument("--runtime", choices=["processes", "engine", "swarm"], default="processes", help="what replicas are")
    engine = parser.add_argument_group(
        "the engine runtime, and the swarm runtime",
        "Engine or manager is found as by docker: DOCKER_HOST, a context, or the socket. Under swarm the network is an "
        "attachable overlay, the models are a volume or a path on every box, and the project is the stack.",
    )
    engine.add_argument("--engine-image", default=f"espalier/stage:{VERSION}", help="image of the stages' containers")
    engine.add_argument("--engine-gpu-image", default=f"espalier/stage-gpu:{VERSION}", help="the same for stages on a GPU")
    engine.add_argument("--engine-network", default="bridge", help="network that they are attached to")
    engine.add_argument("--engine-models", help="volume with the exported models (default: the models directory)")
    engine.add_argument("--engine-project", help="Compose project, or stack, that they belong to")
    parser.add_argument("--stage-module", default=STAGE_MODULE, help="Python module that serves a stage")
    parser.add_argument("--gateway-module", default=GATEWAY_MODULE, help="Python module that serves the gateway")
    return parser


if __name__ == "__main__":
    sys.exit(main())
