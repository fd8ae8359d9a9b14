"""The orchestrator process: reads what it needs, serves the control plane, and runs the testbed until told to end.

    python -m orchestrator.daemon TESTBED --state-dir DIR --models-dir DIR

SIGTERM ends the orchestrator and leaves the data plane running, for a successor to adopt. SIGINT, and `POST /v1/shutdown`,
drain and stop everything first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import uvicorn

from models import manifest as manifests
from models.manifest import Manifest, ManifestError
from orchestrator import app, wiring
from orchestrator import testbed as testbeds
from orchestrator.control import GATEWAY_MODULE, STAGE_MODULE, Orchestrator
from orchestrator.errors import EspalierError, SetupFailed
from orchestrator.state_dir import Daemon, StateDir
from orchestrator.testbed import Testbed

HOST = "127.0.0.1"
INTERRUPTED = 130


def load_models(testbed: Testbed, models_dir: Path) -> dict[str, Manifest]:
    """Manifests of all models of the testbed.

    Raises:
        SetupFailed: one is not exported.
    """
    try:
        return {name: manifests.load(models_dir / name) for name in testbed.models}
    except ManifestError as error:
        raise SetupFailed(str(error)) from None


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the orchestrator tells it when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(arguments: argparse.Namespace) -> int:
    """Run the orchestrator until it is told to end; returns the exit status."""
    loaded = testbeds.load(arguments.testbed)
    models = load_models(loaded.testbed, arguments.models_dir)
    wired = wiring.wire(loaded.testbed, models)
    if wired.problems:
        raise loaded.complain(wired.problems)
    state = StateDir(arguments.state_dir)
    state.root.mkdir(parents=True, exist_ok=True)
    before = state.read_daemon()
    if before is not None and before.is_alive():
        raise SetupFailed(f"testbed {before.testbed} is up already (process {before.pid}); end it with espalier down")
    with _listen(loaded.testbed.control.port, before) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        orchestrator = Orchestrator(
            loaded, models, wired, state, arguments.models_dir, url, arguments.stage_module, arguments.gateway_module
        )
        this = psutil.Process()
        state.save_daemon(
            Daemon(
                pid=this.pid, create_time=this.create_time(), argv=tuple(this.cmdline()), url=url,
                testbed=loaded.testbed.name, sha256=loaded.sha256,
            )
        )  # fmt: skip
        return await _run(orchestrator, listener)


async def _run(orchestrator: Orchestrator, listener: socket.socket) -> int:
    """Returns the exit status."""
    config = uvicorn.Config(app.build(orchestrator), log_config=None, access_log=False, lifespan="off", loop="none")
    config.timeout_graceful_shutdown = 2
    server = _Server(config)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: orchestrator.end(stop_all=False))
    loop.add_signal_handler(signal.SIGINT, orchestrator.interrupt)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await orchestrator.run()
    finally:
        server.should_exit = True
        await serving
    return INTERRUPTED if orchestrator.interrupted else 0


def _listen(port: int, before: Daemon | None) -> socket.socket:
    """The control plane's socket, on the port of the predecessor where it had one: gateways still ask there."""
    wanted = port or (int(before.url.rpartition(":")[2]) if before is not None else 0)
    # The protocol must be named: only then does asyncio turn off Nagle's algorithm, which costs 40 ms an answer here.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, wanted))
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or 0)
        raise SetupFailed(
            f"the control plane cannot have {HOST}:{wanted}: {reason}; free it, or choose another port under control"
        ) from None
    return listener


def main() -> int:
    """Entry point of `python -m orchestrator.daemon`."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.daemon", description="Run a testbed's orchestrator.")
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--state-dir", type=Path, required=True, help="where it keeps its records and logs")
    parser.add_argument("--models-dir", type=Path, required=True, help="where the models were exported to")
    parser.add_argument("--stage-module", default=STAGE_MODULE, help="Python module that serves a stage")
    parser.add_argument("--gateway-module", default=GATEWAY_MODULE, help="Python module that serves the gateway")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return asyncio.run(serve(arguments))
    except EspalierError as error:
        print(f"espalier: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
