from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.runtimes import containers
from orchestrator.runtimes.containers import EngineOptions, Marks
from orchestrator.runtimes.driver import Launch
from orchestrator.runtimes.records import Record

IMAGE = f"sha256:{'0' * 64}"
OPTIONS = EngineOptions(
    scope="espalier", testbed="small", image="espalier/stage:1", gpu_image="espalier/stage-gpu:1", network="espalier_default",
    models="espalier_models", project="espalier",
)  # fmt: skip
LAUNCH = Launch(
    model="minilm", options=("--stage", "pool", "--service", "pool", "--cpus", "1"), drain_grace_s=10.0, cpus=0.05,
    cpu_limit=1.0, memory_bytes=64 * 2**20, generation=2,
)  # fmt: skip
RECORD = Record(id="pool-7", kind="stage", service="pool", node="edge-1", generation=2, specification="5bec")


def test_the_whole_body() -> None:
    """Written out, since the socket proxy knows this shape and no other."""
    assert containers.name_of(OPTIONS, "pool-7") == "espalier-pool-7"
    assert containers.body(OPTIONS, RECORD, LAUNCH, IMAGE) == {
        "Image": IMAGE,
        "Cmd": [
            *("--model", "/models/minilm", "--stage", "pool", "--service", "pool", "--cpus", "1"),
            *("--replica", "pool-7", "--node", "edge-1", "--host", "0.0.0.0", "--port", "8000"),
        ],
        "User": "10001:10001",
        "Labels": {
            "espalier.scope": "espalier",
            "espalier.testbed": "small",
            "espalier.service": "pool",
            "espalier.replica": "pool-7",
            "espalier.node": "edge-1",
            "espalier.generation": "2",
            "espalier.specification": "5bec",
            "com.docker.compose.project": "espalier",
            "com.docker.compose.service": "stage",
            "com.docker.compose.container-number": "7",
            "com.docker.compose.oneoff": "False",
        },
        "StopSignal": "SIGTERM",
        "HostConfig": {
            "NetworkMode": "espalier_default",
            "Mounts": [{"Type": "volume", "Source": "espalier_models", "Target": "/models", "ReadOnly": True}],
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Init": True,
            "NanoCpus": 1_000_000_000,
            "CpuShares": 51,
            "Memory": 64 * 2**20,
            "MemorySwap": 64 * 2**20,
            "PidsLimit": 256,
            "Tmpfs": {"/tmp": "rw,noexec,nosuid,size=64m"},
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}},
        },
    }


def test_without_a_compose_project_there_are_none_of_its_labels() -> None:
    labels = containers.body(replace(OPTIONS, project=None), RECORD, LAUNCH, IMAGE)["Labels"]
    assert all(name.startswith("espalier.") for name in labels)


def test_models_in_a_directory_are_bound() -> None:
    (mount,) = containers.body(replace(OPTIONS, models="/srv/models"), RECORD, LAUNCH, IMAGE)["HostConfig"]["Mounts"]
    assert (mount["Type"], mount["Source"], mount["ReadOnly"]) == ("bind", "/srv/models", True)


def test_gpus_come_with_their_own_image() -> None:
    body = containers.body(OPTIONS, RECORD, replace(LAUNCH, gpus=2), IMAGE)
    assert OPTIONS.image_for(replace(LAUNCH, gpus=2)) == "espalier/stage-gpu:1"
    assert OPTIONS.image_for(LAUNCH) == "espalier/stage:1"
    assert body["HostConfig"]["DeviceRequests"] == [{"Driver": "nvidia", "Count": 2, "Capabilities": [["gpu"]]}]


@pytest.mark.parametrize(("cpus", "shares"), [(0.001, 2), (0.5, 512), (4.0, 4096)])
def test_shares_follow_the_reservation(cpus: float, shares: int) -> None:
    assert containers.body(OPTIONS, RECORD, replace(LAUNCH, cpus=cpus), IMAGE)["HostConfig"]["CpuShares"] == shares


def test_labels_are_read_back() -> None:
    labels = containers.body(OPTIONS, RECORD, LAUNCH, IMAGE)["Labels"]
    assert containers.read(labels) == Marks("small", "pool", "pool-7", "edge-1", 2, "5bec")


@pytest.mark.parametrize("lost", ["espalier.replica", "espalier.generation"])
def test_labels_that_are_not_whole_mean_nothing(lost: str) -> None:
    labels = containers.body(OPTIONS, RECORD, LAUNCH, IMAGE)["Labels"]
    assert containers.read({name: value for name, value in labels.items() if name != lost}) is None
    assert containers.read({**labels, "espalier.generation": "two"}) is None


def test_what_the_engine_lists_and_inspects_is_read_alike() -> None:
    networks = {"Networks": {"espalier_default": {"IPAddress": "172.18.0.5"}}}
    listed = containers.listed(
        {"Id": "ab", "Names": ["/espalier-pool-7"], "State": "running", "Labels": {"a": "b"}, "NetworkSettings": networks},
        "espalier_default",
    )
    document = {
        "Id": "ab", "Name": "/espalier-pool-7", "State": {"Status": "running"}, "Config": {"Labels": {"a": "b"}},
        "NetworkSettings": networks,
    }  # fmt: skip
    inspected = containers.inspected(document, "espalier_default")
    assert listed == inspected
    assert (listed.url, listed.runs) == ("http://172.18.0.5:8000", True)


def test_a_container_that_ended_has_no_address() -> None:
    gone = containers.listed({"Id": "ab", "Names": None, "State": "exited", "Labels": None, "NetworkSettings": None}, "n")
    assert (gone.url, gone.runs, gone.labels) == ("", False, {})


def test_what_was_reserved_is_read_from_a_container() -> None:
    config = containers.body(OPTIONS, RECORD, replace(LAUNCH, cpus=0.5), IMAGE)["HostConfig"]
    assert containers.reserved({"HostConfig": config}) == {"cpus": 0.5, "memory_bytes": 64 * 2**20, "gpus": 0}
