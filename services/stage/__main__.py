"""`python -m services.stage`: serve one stage of an exported model, or several fused into one."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args

from models import manifest
from models.manifest import ManifestError, Precision
from services.stage import quota
from services.stage.processors.fused import open_stages

SETUP_FAILED = 3


def main() -> int:
    """Serve until stopped; 0 after a drain, 3 when the stage cannot be set up."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        model = manifest.load(arguments.model)
        spec, processor = open_stages(model, arguments.stage, arguments.precision, arguments.model, threads=1)
    except ManifestError as error:
        print(f"espalier stage: {error}", file=sys.stderr)
        return SETUP_FAILED
    # The server's modules come after the files: what reading a vocabulary leaves free in the heap they fill again, a megabyte.
    from services import server  # noqa: PLC0415
    from services.stage.app import Replica, build  # noqa: PLC0415
    from services.stage.onward import Identity  # noqa: PLC0415

    service = arguments.service or spec.name
    identity = Identity(service, arguments.replica or service, arguments.node)
    replica = Replica(
        model,
        spec,
        processor,
        identity,
        cpus=quota.cpus(arguments.cpus),
        queue_capacity=arguments.queue_capacity,
        max_batch=arguments.max_batch,
    )
    server.serve(
        build(replica),
        replica,
        server.listen(arguments.host, arguments.port, arguments.fd),
        grace_s=arguments.drain_grace,
        announce=lambda url: logging.info("stage %s, replica %s, on %s", service, identity.replica, url),
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.stage", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the exported model")
    parser.add_argument(
        "--stage", type=lambda text: text.split(","), required=True, help="which of its stages to serve; A,B,C: fused into one"
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--service", help="name it is served under (default: the stage's)")
    parser.add_argument("--replica", help="name of this replica (default: the service's)")
    parser.add_argument("--node", default="local", help="node it runs on, for metrics and routing")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes any that is free")
    parser.add_argument("--fd", type=int, help="an inherited listening socket instead of host and port")
    parser.add_argument("--cpus", type=float, help="processors it may use (default: the quota, or all)")
    parser.add_argument("--queue-capacity", type=int, default=256, help="tasks that may wait")
    parser.add_argument("--max-batch", type=int, help="most items in a batch of several tasks (default: the manifest's)")
    parser.add_argument("--drain-grace", type=float, default=10.0, help="longest drain after SIGTERM [s]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
