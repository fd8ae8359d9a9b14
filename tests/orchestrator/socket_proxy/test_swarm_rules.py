"""What passes the proxy where stages are services of a Swarm."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.runtimes import tasks
from orchestrator.runtimes.containers import EngineOptions
from orchestrator.runtimes.records import Record
from orchestrator.socket_proxy.rules import Call, Policy, Refusal, judge, within
from tests.orchestrator.runtimes.world import launch

POLICY = Policy("edge", "edge", frozenset({"espalier/stage:1"}), "edge_default", "edge_models", swarm=True)
OPTIONS = EngineOptions("edge", "demo", "espalier/stage:1", "espalier/stage-gpu:1", "edge_default", "edge_models", "edge")
RECORD = Record(id="encode-3", kind="stage", service="encode", node="box-2", specification="s")
IMAGE = "sha256:" + "a" * 64
SERVICE = "a1b2c3d4e5f6g7h8i9j0k1l2m"
OURS = json.dumps({"label": ["espalier.scope=edge"]})


def body(image: str = "espalier/stage:1") -> dict[str, Any]:
    """As the driver makes it, and as the client sends it."""
    return {**tasks.body(OPTIONS, RECORD, launch(), image, "node.hostname==box-2"), "Networks": None}


def ask(method: str, path: str, query: str = "", content: Any = None) -> Call | Refusal:
    return judge(POLICY, method, path, query, b"" if content is None else json.dumps(content).encode())


def inspected(scope: str = "edge") -> bytes:
    spec = {"Name": "edge-encode-3", "Labels": {"espalier.scope": scope}, "Mode": {"Replicated": {"Replicas": 1}}}
    return json.dumps({"ID": SERVICE, "Spec": spec}).encode()


def test_a_service_as_the_driver_makes_it_passes() -> None:
    call = ask("POST", "/v1.41/services/create", content=body())
    assert isinstance(call, Call), call
    assert json.loads(call.body or b"") == body()
    assert call.inspection is None


def test_of_an_image_named_by_its_id_the_label_is_looked_at() -> None:
    call = ask("POST", "/v1.41/services/create", content=body(IMAGE))
    assert isinstance(call, Call), call
    assert (call.inspection, call.of) == (f"/v1.41/images/{IMAGE}/json", "image")
    assert isinstance(within(POLICY, call, b'{"Id": "x", "Config": {"Labels": {}}}'), Refusal)


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *way, last = path.split(".")
        place: Any = document
        for step in way:
            place = place[int(step)] if step.isdigit() else place[step]
        place[int(last) if last.isdigit() else last] = value

    return change


CONTAINER = "TaskTemplate.ContainerSpec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{CONTAINER}.Mounts.0.Source", "/"),
        (f"{CONTAINER}.Mounts.0.Type", "bind"),
        (f"{CONTAINER}.Mounts.0.ReadOnly", False),
        (f"{CONTAINER}.Image", "somebody/else:1"),
        (f"{CONTAINER}.User", "0:0"),
        (f"{CONTAINER}.CapabilityDrop", []),
        (f"{CONTAINER}.CapabilityAdd", ["SYS_ADMIN"]),
        (f"{CONTAINER}.Command", ["sh"]),
        (f"{CONTAINER}.Privileges", {}),
        (f"{CONTAINER}.Secrets", []),
        ("TaskTemplate.Placement.Constraints", ["node.role==manager"]),
        ("TaskTemplate.Networks.0.Target", "host"),
        ("TaskTemplate.Resources.Limits.MemoryBytes", 0),
        ("Mode", {"Global": {}}),
        ("Mode.Replicated.Replicas", 5),
        ("EndpointSpec", {"Mode": "dnsrr", "Ports": [{"TargetPort": 8000}]}),
        ("Name", "another"),
        ("Labels", {"espalier.scope": "edge"}),
        ("Networks", ["host"]),
    ],
)
def test_nothing_else_passes(path: str, value: Any) -> None:
    changed = copy.deepcopy(body())
    set_in(path, value)(changed)
    assert isinstance(ask("POST", "/v1.41/services/create", content=changed), Refusal)


def test_a_service_of_ours_is_scaled_to_none_and_stays_as_it_is() -> None:
    wanted = {"Mode": {"Replicated": {"Replicas": 0}}, "TaskTemplate": {"ContainerSpec": {"Image": "evil:1"}}}
    call = ask("POST", f"/v1.41/services/{SERVICE}/update", "version=17", wanted)
    assert isinstance(call, Call), call
    sent = within(POLICY, call, inspected())
    assert isinstance(sent, Call)
    spec = json.loads(inspected())["Spec"]
    assert json.loads(sent.body or b"") == {**spec, "Mode": {"Replicated": {"Replicas": 0}}}
    assert (sent.path, sent.query) == (f"/v1.41/services/{SERVICE}/update", "version=17")
    more = {"Mode": {"Replicated": {"Replicas": 3}}}
    assert isinstance(ask("POST", f"/v1.41/services/{SERVICE}/update", "version=17", more), Refusal)


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("DELETE", f"/v1.41/services/{SERVICE}", ""),
        ("GET", f"/v1.41/services/{SERVICE}", ""),
        ("GET", f"/v1.41/services/{SERVICE}", "insertDefaults=True"),
        ("GET", f"/v1.41/services/{SERVICE}/logs", "stdout=1&stderr=1&details=False&follow=False&since=0&tail=20"),
    ],
)
def test_what_is_somebody_elses_is_not_touched(method: str, path: str, query: str) -> None:
    call = ask(method, path, query)
    assert isinstance(call, Call), call
    assert isinstance(within(POLICY, call, inspected()), Call)
    assert isinstance(within(POLICY, call, inspected("other")), Refusal)


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/v1.41/nodes", ""),
        ("GET", "/v1.41/networks/edge_default", ""),
        ("GET", "/v1.41/services", f"filters={OURS}"),
        ("GET", "/v1.41/tasks", f"filters={OURS}"),
        ("GET", "/v1.41/events", 'filters={"type": ["node", "service"]}'),
    ],
)
def test_what_there_is_may_be_looked_at(method: str, path: str, query: str) -> None:
    assert isinstance(ask(method, path, query), Call)


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/v1.41/services", ""),
        ("GET", "/v1.41/tasks", ""),
        ("GET", "/v1.41/events", 'filters={"type": ["container"]}'),
        ("GET", "/v1.41/events", ""),
        ("GET", "/v1.41/networks/ingress", ""),
        ("GET", "/v1.41/swarm", ""),
        ("GET", "/v1.41/secrets", ""),
        ("POST", "/v1.41/nodes/x/update", "version=1"),
        ("POST", "/v1.41/containers/create", "name=edge-x"),
        ("GET", "/v1.41/containers/json", f"filters={OURS}"),
    ],
)
def test_the_rest_may_not(method: str, path: str, query: str) -> None:
    assert isinstance(ask(method, path, query), Refusal)


def test_without_a_swarm_its_calls_do_not_pass() -> None:
    engine = Policy("edge", "edge", frozenset({"espalier/stage:1"}), "edge_default", "edge_models")
    assert isinstance(judge(engine, "GET", "/v1.41/nodes", "", b""), Refusal)


LEASE = {"Name": "edge-lease", "Labels": {"espalier.lease": "{}"}}


def test_the_lease_may_be_read_created_and_swapped_and_what_is_sent_is_made_anew() -> None:
    assert judge(POLICY, "GET", "/v1.41/configs/edge-lease", "", b"") == Call("GET", "/v1.41/configs/edge-lease")
    given = json.dumps({**LEASE, "Data": "c2VjcmV0", "Templating": {"Name": "golang"}}).encode()
    created = judge(POLICY, "POST", "/v1.41/configs/create", "", given)
    assert isinstance(created, Call)
    assert json.loads(created.body or b"") == {**LEASE, "Data": "ZWRnZS1sZWFzZQ=="}
    written = judge(POLICY, "POST", "/v1.41/configs/edge-lease/update", "version=7", given)
    assert isinstance(written, Call)
    assert (written.path, written.query, json.loads(written.body or b"")) == (
        "/v1.41/configs/edge-lease/update", "version=7", LEASE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "query", "body"),
    [
        ("GET", "/configs/other", "", None),
        ("GET", "/configs", "", None),
        ("DELETE", "/configs/edge-lease", "", None),
        ("POST", "/configs/other/update", "version=7", LEASE),
        ("POST", "/configs/edge-lease/update", "", LEASE),
        ("POST", "/configs/edge-lease/update", "version=7", {**LEASE, "Name": "other"}),
        ("POST", "/configs/create", "", {**LEASE, "Name": "other"}),
        ("POST", "/configs/create", "", {**LEASE, "Labels": {"espalier.lease": "{}", "espalier.scope": "edge"}}),
        ("POST", "/configs/create", "", {**LEASE, "Labels": {"espalier.lease": 7}}),
        ("POST", "/configs/create", "", [LEASE]),
    ],
)
def test_no_other_config_may_be_touched(method: str, path: str, query: str, body: object) -> None:
    sent = b"" if body is None else json.dumps(body).encode()
    assert isinstance(judge(POLICY, method, f"/v1.41{path}", query, sent), Refusal)


def test_without_a_swarm_there_is_no_lease() -> None:
    assert isinstance(judge(replace(POLICY, swarm=False), "GET", "/configs/edge-lease", "", b""), Refusal)
