"""The socket proxy as a process.

    python -m orchestrator.socket_proxy --listen 0.0.0.0:2375 --socket /var/run/docker.sock --scope espalier --project espalier
        --image espalier/stage:0.1.0 --network espalier_default --models espalier_models

SIGTERM and SIGINT stop it at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from types import FrameType

import uvicorn

from orchestrator.socket_proxy.app import SocketProxy, configuration, engine
from orchestrator.socket_proxy.rules import BadPolicy, Policy

BAD_USAGE = 2
SETUP_FAILED = 3


class _Server(uvicorn.Server):
    """uvicorn without its graceful end: there is nothing to finish, and a stream of events would never be done."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn at SIGTERM and SIGINT."""
        os._exit(0)


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT`.

    Raises:
        ValueError: it is not one.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(text)
    return host, int(port)


def main() -> int:
    """Entry point of `python -m orchestrator.socket_proxy`."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.socket_proxy", description="Guard a Docker socket.")
    parser.add_argument("--listen", type=address, required=True, metavar="HOST:PORT", help="an IPv4 address; port 0: any")
    parser.add_argument("--socket", required=True, metavar="PATH", help="the engine's Unix socket")
    parser.add_argument("--scope", required=True, help="value of the label espalier.scope; names begin with it")
    parser.add_argument("--project", required=True, help="the compose project that containers belong to")
    parser.add_argument("--image", action="append", required=True, dest="images", help="may be run; may be given again")
    parser.add_argument("--network", required=True, help="that containers are attached to")
    parser.add_argument("--models", required=True, help="a volume's name or an absolute path, mounted read-only")
    parser.add_argument("--swarm", action="store_true", help="stages are services of a Swarm, and the project is a stack")
    arguments = parser.parse_args()
    try:
        policy = Policy(
            arguments.scope, arguments.project, frozenset(arguments.images), arguments.network, arguments.models,
            swarm=arguments.swarm,
        )  # fmt: skip
    except BadPolicy as error:
        print(f"socket proxy: {error}", file=sys.stderr)
        return BAD_USAGE
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for library in ("httpx", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # The protocol must be named: only then does asyncio turn off Nagle's algorithm, which costs 40 ms an answer here.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(arguments.listen)
            listener.listen()
        except OSError as error:
            print(f"socket proxy: cannot listen on {':'.join(map(str, arguments.listen))}: {error}", file=sys.stderr)
            return SETUP_FAILED
        logging.info("listening on %s:%d for scope %s", *listener.getsockname(), policy.scope)
        _Server(configuration(SocketProxy(policy, engine(arguments.socket)))).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
