from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.runtimes import containers, tasks
from orchestrator.runtimes.containers import EngineOptions
from orchestrator.runtimes.records import Record
from tests.orchestrator.runtimes.world import launch

OPTIONS = EngineOptions(
    scope="edge", testbed="demo", image="espalier/stage:1", gpu_image="espalier/stage-gpu:1", network="edge_default",
    models="edge_models", project="edge",
)  # fmt: skip
RECORD = Record(id="encode-3", kind="stage", service="encode", node="box-2", generation=1, specification="s")


def made(options: EngineOptions = OPTIONS, **changes: Any) -> dict[str, Any]:
    how = replace(launch(grace_s=10.0), **changes)
    return tasks.body(options, RECORD, how, "sha256:1", "node.hostname==box-2")


def entry(state: str, hostname: str, label: str | None = None, availability: str = "active") -> dict[str, Any]:
    labels = {} if label is None else {"espalier.node": label}
    return {
        "ID": f"id-{hostname}-{state}", "Spec": {"Labels": labels, "Availability": availability},
        "Description": {"Hostname": hostname}, "Status": {"State": state},
    }  # fmt: skip


def test_a_service_is_one_task_that_nothing_but_the_keeper_starts_again() -> None:
    body = made()
    assert body["Name"] == "edge-encode-3"
    assert body["Mode"] == {"Replicated": {"Replicas": 1}}
    assert body["TaskTemplate"]["RestartPolicy"] == {"Condition": "none"}
    assert body["EndpointSpec"] == {"Mode": "dnsrr"}, "no virtual address"
    assert body["TaskTemplate"]["Placement"] == {"Constraints": ["node.hostname==box-2"]}
    assert body["TaskTemplate"]["Networks"] == [{"Target": "edge_default"}]


def test_a_task_has_no_rights_and_limits() -> None:
    template = made(cpu_limit=0.5, memory_bytes=2**27)["TaskTemplate"]
    container = template["ContainerSpec"]
    assert (container["User"], container["ReadOnly"], container["CapabilityDrop"]) == ("10001:10001", True, ["ALL"])
    assert template["Resources"] == {"Limits": {"NanoCPUs": 500_000_000, "MemoryBytes": 2**27, "Pids": 256}}
    assert container["StopGracePeriod"] == 11_000_000_000, "a second more than the replica keeps itself"
    assert container["Mounts"][0] == {"Type": "volume", "Source": "edge_models", "Target": "/models", "ReadOnly": True}
    assert made(replace(OPTIONS, models="/srv/models"))["TaskTemplate"]["ContainerSpec"]["Mounts"][0]["Type"] == "bind"


def test_gpus_are_asked_of_the_engine() -> None:
    reserved = made(gpus=2)["TaskTemplate"]["Resources"]["Reservations"]["GenericResources"]
    assert reserved == [{"DiscreteResourceSpec": {"Kind": "NVIDIA-GPU", "Value": 2}}]


def test_its_labels_say_whose_it_is_and_a_stack_takes_it_along() -> None:
    body = made()
    found = tasks.deployed({"ID": "1", "Spec": body})
    assert containers.read(found.labels) == containers.Marks("demo", "encode", "encode-3", "box-2", 1, "s")
    assert found.labels["com.docker.stack.namespace"] == "edge"
    assert "com.docker.stack.namespace" not in made(replace(OPTIONS, project=None))["Labels"]
    assert found.reserved == {"cpus": 0.5, "memory_bytes": 2**26, "gpus": 0}
    assert tasks.deployed({"ID": "1", "Spec": made(gpus=2)}).reserved["gpus"] == 2


def test_the_address_of_a_task_is_its_own_on_the_stages_network() -> None:
    networks = [
        {"Network": {"ID": "i", "Spec": {"Name": "ingress"}}, "Addresses": ["10.0.0.7/24"]},
        {"Network": {"ID": "e", "Spec": {"Name": "edge_default"}}, "Addresses": ["10.0.1.4/24"]},
    ]
    found = tasks.task({"ID": "t", "NetworksAttachments": networks, "Status": {"State": "running"}}, "edge_default")
    assert (found.url, found.runs, found.over) == ("http://10.0.1.4:8000", True, False)
    pending = tasks.task({"ID": "t", "Status": {"State": "pending", "Err": "no suitable node"}}, "edge_default")
    assert (pending.url, pending.exit_code, pending.error) == ("", None, "no suitable node")


@pytest.mark.parametrize(
    ("state", "availability", "absence"),
    [
        ("ready", "active", None),
        ("ready", "pause", "leaving"),
        ("ready", "drain", "leaving"),
        ("down", "active", "down"),
        ("disconnected", "active", "down"),
        ("unknown", "active", None),
    ],
)
def test_why_nothing_may_be_started_on_a_box(state: str, availability: str, absence: str | None) -> None:
    """A new leader knows nothing of any box for a moment, and that must not end a single replica."""
    assert tasks.box(entry(state, "box-1", availability=availability)).absence == absence


def test_a_box_is_the_node_of_its_label_or_of_its_host_name() -> None:
    named = tasks.by_node(map(tasks.box, [entry("ready", "box-1"), entry("ready", "machine", "box-2")]))
    assert {node: box.hostname for node, box in named.items()} == {"box-1": "box-1", "box-2": "machine"}
    assert named["box-1"].constraint == "node.hostname==box-1"
    assert named["box-2"].constraint == "node.labels.espalier.node==box-2"


def test_a_box_that_is_just_joining_is_no_node_yet() -> None:
    joining = {key: value for key, value in entry("unknown", "box-4").items() if key != "Description"}
    assert tasks.by_node(map(tasks.box, [joining, {**joining, "Description": {}}])) == {}


def test_of_two_that_claim_one_name_the_one_that_is_there_is_taken() -> None:
    """A box that was put up anew leaves its predecessor's entry behind."""
    (box,) = tasks.by_node(map(tasks.box, [entry("down", "box-1"), entry("ready", "box-1")])).values()
    assert box.state == "ready"
