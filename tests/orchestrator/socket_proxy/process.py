"""The proxy as a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.socket_proxy.rules import Policy

SOCKET = "/var/run/docker.sock"


def command(policy: Policy, socket_path: str = SOCKET, listen: str = "127.0.0.1:0") -> list[str]:
    """The command line for a policy."""
    images = [argument for image in sorted(policy.images) for argument in ("--image", image)]
    return [
        *(sys.executable, "-m", "orchestrator.socket_proxy", "--listen", listen, "--socket", socket_path),
        *(
            "--scope",
            policy.scope,
            "--project",
            policy.project,
            "--network",
            policy.network,
            "--models",
            policy.models,
            *images,
        ),
    ]


@contextmanager
def proxy_process(policy: Policy, socket_path: str = SOCKET) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A proxy that listens; yields it and its address, `HOST:PORT`."""
    with subprocess.Popen(command(policy, socket_path), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            found = re.search(r"listening on (\S+) for scope", first)
            assert found, first + process.stderr.read()
            yield process, found[1]
        finally:
            process.kill()
