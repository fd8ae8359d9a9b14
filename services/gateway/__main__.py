"""`python -m services.gateway`: serve the pipelines of a testbed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from services import server
from services.gateway.app import Gateway, build


def main() -> int:
    """Serve until stopped; 0 after a drain."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    listener = server.listen(arguments.host, arguments.port, arguments.fd)
    gateway = Gateway(
        name=arguments.name,
        node=arguments.node,
        routes_urls=arguments.routes_url,
        routes_file=arguments.routes_file,
        port=listener.getsockname()[1],
        max_in_flight=arguments.max_in_flight,
    )
    server.serve(
        build(gateway),
        gateway,
        listener,
        grace_s=arguments.drain_grace,
        announce=lambda url: logging.info("gateway %s on %s", arguments.name, url),
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.gateway", description=__doc__)
    parser.add_argument(
        "--routes-url",
        action="append",
        default=[],
        help="where the orchestrator publishes the routes, http://HOST:PORT/v1/routes; once for each that may lead",
    )
    parser.add_argument("--routes-file", type=Path, help="copy of the routes, read at start and kept current")
    parser.add_argument("--name", default=os.environ.get("ESPALIER_NAME", "gateway"), help="name of this gateway")
    parser.add_argument(
        "--node", default=os.environ.get("ESPALIER_NODE", "local"), help="node it runs on, for the links to the replicas"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 takes any that is free")
    parser.add_argument("--fd", type=int, help="an inherited listening socket instead of host and port")
    parser.add_argument("--max-in-flight", type=int, default=4096, help="tasks held at once; more are refused with 429")
    parser.add_argument("--drain-grace", type=float, default=10.0, help="longest drain after SIGTERM [s]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
