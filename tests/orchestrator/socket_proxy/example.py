"""A policy, and a body that it allows, written out as the engine gets it."""

from __future__ import annotations

from typing import Any

from orchestrator.socket_proxy.rules import Policy

POLICY = Policy(
    scope="edge",
    project="edge",
    images=frozenset({"espalier/stage:0.1.0", "espalier/stage-gpu:0.1.0"}),
    network="edge_default",
    models="edge_models",
)


def container(
    policy: Policy = POLICY, image: str = "espalier/stage:0.1.0", cmd: tuple[str, ...] = ("--model", "/models/m")
) -> Any:
    """A body of `POST /containers/create`."""
    return {
        "Image": image,
        "Cmd": list(cmd),
        "User": "10001:10001",
        "Labels": {
            "espalier.scope": policy.scope,
            "espalier.testbed": "demo",
            "espalier.service": "encode",
            "espalier.replica": "encode-1",
            "espalier.node": "core-a",
            "espalier.generation": "0",
            "espalier.specification": "9" * 64,
            "com.docker.compose.project": policy.project,
            "com.docker.compose.service": "stage",
            "com.docker.compose.container-number": "1",
            "com.docker.compose.oneoff": "False",
        },
        "StopSignal": "SIGTERM",
        "HostConfig": {
            "NetworkMode": policy.network,
            "Mounts": [{"Type": "volume", "Source": policy.models, "Target": "/models", "ReadOnly": True}],
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Init": True,
            "NanoCpus": 500_000_000,
            "CpuShares": 512,
            "Memory": 64 << 20,
            "MemorySwap": 64 << 20,
            "PidsLimit": 256,
            "Tmpfs": {"/tmp": "rw,noexec,nosuid,size=64m"},
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}},
        },
    }
