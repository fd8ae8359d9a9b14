from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.runtimes import containers
from orchestrator.runtimes.driver import Launch
from orchestrator.runtimes.records import Record
from orchestrator.socket_proxy.rules import BODY_BYTES, BadPolicy, Call, Policy, Refusal, judge, within
from tests.orchestrator.socket_proxy.example import POLICY, container

SCOPE_FILTER = '{"label": ["espalier.scope=edge"]}'
EVENTS_FILTER = '{"label": ["espalier.scope=edge"], "type": ["container"], "event": ["die", "start"]}'
GPU = [{"Driver": "nvidia", "Count": 2, "Capabilities": [["gpu"]]}]
FULL_ID = "0123456789abcdef" * 4


def create(body: Any) -> Call | Refusal:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return judge(POLICY, "POST", "/v1.41/containers/create", "name=edge-encode-1", text)


def changed(*path: str | int, to: Any) -> Any:
    """The example with one value set; `to` may also be a function of the old value."""
    body = container()
    place = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return body


def filters(text: str, **others: str) -> str:
    return urlencode({"filters": text, **others})


# -- what must pass -------------------------------------------------------------------------------------------------------

PASSES = {
    "ping": ("GET", "/_ping", "", Call("GET", "/_ping")),
    "ping with a version": ("GET", "/v1.41/_ping", "", Call("GET", "/v1.41/_ping")),
    "a newer version": ("GET", "/v1.53/_ping", "", Call("GET", "/v1.53/_ping")),
    "version": ("GET", "/version", "", Call("GET", "/version")),
    "an image": ("GET", "/images/espalier/stage:0.1.0/json", "", Call("GET", "/images/espalier/stage:0.1.0/json")),
    "events, as lists": (
        "GET",
        "/v1.41/events",
        filters(EVENTS_FILTER),
        Call(
            "GET",
            "/v1.41/events",
            filters('{"event": ["die", "start"], "label": ["espalier.scope=edge"], "type": ["container"]}'),
            streams=True,
        ),
    ),
    "events, as maps": (
        "GET",
        "/events",
        filters('{"type": {"container": true}, "label": {"espalier.scope=edge": true}}'),
        Call("GET", "/events", filters('{"label": ["espalier.scope=edge"], "type": ["container"]}'), streams=True),
    ),
    "a list, with the defaults that docker-py states": (
        "GET",
        "/containers/json",
        filters(SCOPE_FILTER, limit="-1", all="1", size="0", trunc_cmd="0"),
        Call("GET", "/containers/json", "filters=%7B%22label%22%3A+%5B%22espalier.scope%3Dedge%22%5D%7D&all=1"),
    ),
    "an inspection": (
        "GET",
        "/v1.41/containers/edge-1/json",
        "",
        Call("GET", "/v1.41/containers/edge-1/json", inspection="/v1.41/containers/edge-1/json"),
    ),
    "a log": (
        "GET",
        "/containers/edge-1/logs",
        "stderr=1&stdout=1&timestamps=0&follow=0&tail=020",
        Call("GET", "/containers/{id}/logs", "stderr=1&stdout=1&tail=20", inspection="/containers/edge-1/json"),
    ),
    "start": ("POST", "/containers/a/start", "", Call("POST", "/containers/{id}/start", inspection="/containers/a/json")),
    "SIGTERM": (
        "POST",
        "/containers/a/kill",
        "signal=SIGTERM",
        Call("POST", "/containers/{id}/kill", "signal=SIGTERM", inspection="/containers/a/json"),
    ),
    "removal, with the defaults that docker-py states": (
        "DELETE",
        "/containers/a",
        "v=False&link=False&force=True",
        Call("DELETE", "/containers/{id}", "force=1", inspection="/containers/a/json"),
    ),
}


@pytest.mark.parametrize(("method", "path", "query", "call"), PASSES.values(), ids=PASSES.keys())
def test_passes_written_anew(method: str, path: str, query: str, call: Call) -> None:
    assert judge(POLICY, method, path, query, b"") == call


@pytest.mark.parametrize(
    "body",
    [
        container(),
        container(image="espalier/stage-gpu:0.1.0") | {"HostConfig": container()["HostConfig"] | {"DeviceRequests": GPU}},
        container(cmd=()),
        container(cmd=("é" * 1024,) * 20),
    ],
    ids=["stage", "stage with GPUs", "no arguments", "long arguments"],
)
def test_a_stage_container_passes_as_it_is(body: Any) -> None:
    call = create(body)
    assert isinstance(call, Call), call
    assert (call.method, call.path, call.query) == ("POST", "/v1.41/containers/create", "name=edge-encode-1")
    assert json.loads(call.body or b"") == body


def test_models_may_be_a_directory_of_the_host() -> None:
    policy = Policy("edge", "edge", POLICY.images, "edge_default", "/srv/models")
    body = container(policy)
    volume = judge(policy, "POST", "/containers/create", "name=edge-1", json.dumps(body).encode())
    assert volume == Refusal("HostConfig.Mounts.0.Type: must be bind")
    body["HostConfig"]["Mounts"][0]["Type"] = "bind"
    assert isinstance(judge(policy, "POST", "/containers/create", "name=edge-1", json.dumps(body).encode()), Call)


@pytest.mark.parametrize("gpus", [0, 1])
def test_what_the_runtime_makes_passes(gpus: int) -> None:
    options = containers.EngineOptions(
        scope="edge", testbed="demo", image="espalier/stage:0.1.0", gpu_image="espalier/stage-gpu:0.1.0",
        network="edge_default", models="edge_models", project="edge",
    )  # fmt: skip
    launch = Launch(
        model="minilm",
        options=("--stage", "encode"),
        drain_grace_s=5.0,
        cpus=0.001,
        cpu_limit=1.5,
        memory_bytes=1 << 30,
        gpus=gpus,
    )
    record = Record(id="encode-1", kind="stage", service="encode", node="core-a", specification=launch.specification())
    body = containers.body(options, record, launch, IMAGE_ID)
    call = judge(
        POLICY,
        "POST",
        "/containers/create",
        urlencode({"name": containers.name_of(options, record.id)}),
        json.dumps(body).encode(),
    )
    assert isinstance(call, Call), call
    assert json.loads(call.body or b"") == body


# -- what must not --------------------------------------------------------------------------------------------------------

OUTSIDE = "this call is not among those that are allowed"
REFUSED = {
    "exec": ("POST", "/containers/a/exec", "", OUTSIDE),
    "start of an exec": ("POST", "/exec/a/start", "", OUTSIDE),
    "attach": ("POST", "/containers/a/attach", "", OUTSIDE),
    "attach by websocket": ("GET", "/containers/a/attach/ws", "", OUTSIDE),
    "copy out": ("GET", "/containers/a/archive", "path=/", OUTSIDE),
    "copy in": ("PUT", "/containers/a/archive", "path=/", OUTSIDE),
    "export": ("GET", "/containers/a/export", "", OUTSIDE),
    "update": ("POST", "/containers/a/update", "", OUTSIDE),
    "rename": ("POST", "/containers/a/rename", "name=b", OUTSIDE),
    "restart": ("POST", "/containers/a/restart", "", OUTSIDE),
    "stop": ("POST", "/containers/a/stop", "", OUTSIDE),
    "top": ("GET", "/containers/a/top", "", OUTSIDE),
    "prune": ("POST", "/containers/prune", "", OUTSIDE),
    "build": ("POST", "/build", "", OUTSIDE),
    "pull": ("POST", "/images/create", "fromImage=x", OUTSIDE),
    "load": ("POST", "/images/load", "", OUTSIDE),
    "tag over an allowed image": ("POST", "/images/a/tag", "repo=espalier/stage&tag=0.1.0", OUTSIDE),
    "removal of an image": ("DELETE", "/images/espalier/stage:0.1.0", "", OUTSIDE),
    "commit": ("POST", "/commit", "container=a", OUTSIDE),
    "networks": ("GET", "/networks", "", OUTSIDE),
    "a network": ("POST", "/networks/create", "", OUTSIDE),
    "connecting": ("POST", "/networks/a/connect", "", OUTSIDE),
    "volumes": ("GET", "/volumes", "", OUTSIDE),
    "a volume": ("POST", "/volumes/create", "", OUTSIDE),
    "swarm": ("POST", "/swarm/init", "", OUTSIDE),
    "services": ("POST", "/services/create", "", OUTSIDE),
    "secrets": ("GET", "/secrets", "", OUTSIDE),
    "plugins": ("POST", "/plugins/pull", "", OUTSIDE),
    "info": ("GET", "/info", "", OUTSIDE),
    "a session": ("POST", "/session", "", OUTSIDE),
    "disk usage": ("GET", "/system/df", "", OUTSIDE),
    "another method": ("HEAD", "/_ping", "", OUTSIDE),
    "a method in lower case": ("get", "/_ping", "", OUTSIDE),
    "no path": ("GET", "", "", OUTSIDE),
    "the whole address": ("GET", "http://engine/_ping", "", OUTSIDE),
    "a version before 20.10's": ("GET", "/v1.40/_ping", "", OUTSIDE),
    "a version that is none": ("GET", "/v1.41x/_ping", "", OUTSIDE),
    "a version in other digits": ("GET", "/v1.٤١/_ping", "", OUTSIDE),
    "two versions": ("GET", "/v1.41/v1.41/_ping", "", OUTSIDE),
    "a double slash": ("GET", "//_ping", "", OUTSIDE),
    "a double slash within": ("GET", "/containers//a/json", "", OUTSIDE),
    "a slash at the end": ("GET", "/containers/a/json/", "", OUTSIDE),
    "a line end": ("GET", "/containers/a/json\n", "", OUTSIDE),
    "dots": ("GET", "/containers/../json", "", OUTSIDE),
    "dots behind an id": ("GET", "/containers/a/../../info/json", "", OUTSIDE),
    "an encoded slash": ("GET", "/containers/a%2f..%2f..%2finfo/json", "", OUTSIDE),
    "an encoded letter": ("GET", "/containers/%61/json", "", OUTSIDE),
    "a parameter in the path": ("GET", "/containers/a;x=1/json", "", OUTSIDE),
    "an id that is too long": ("GET", f"/containers/{'a' * 129}/json", "", OUTSIDE),
    "an id with a brace": ("POST", "/containers/{id}/start", "", OUTSIDE),
    "another image": ("GET", "/images/espalier/gateway:0.1.0/json", "", "of images only espalier/stage"),
    "an unknown parameter": ("GET", "/_ping", "x=1", "parameter x is not allowed"),
    "a parameter twice": ("POST", "/containers/a/kill", "signal=SIGTERM&signal=SIGKILL", "parameter signal is there twice"),
    "a query that is none": ("GET", "/_ping", "x", "the query is not valid"),
    "a query that is not UTF-8": ("POST", "/containers/a/kill", "signal=%ff", "the query is not valid"),
    "a query of many parts": ("GET", "/containers/json", "&".join(["a=1"] * 17), "the query is not valid"),
    "another signal": ("POST", "/containers/a/kill", "signal=SIGSTOP", "parameter signal: must be SIGKILL or SIGTERM"),
    "a signal by number": ("POST", "/containers/a/kill", "signal=9", "parameter signal: must be SIGKILL or SIGTERM"),
    "no signal": ("POST", "/containers/a/kill", "", "parameter signal is missing"),
    "keys for detaching": ("POST", "/containers/a/start", "detachKeys=a", "parameter detachKeys is not allowed"),
    "a checkpoint": ("POST", "/containers/a/start", "checkpoint=a", "parameter checkpoint is not allowed"),
    "removal with volumes": ("DELETE", "/containers/a", "v=1", "parameter v: must be false"),
    "removal of a link": ("DELETE", "/containers/a", "link=1", "parameter link: must be false"),
    "a flag that is none": ("DELETE", "/containers/a", "force=yes", "parameter force: must be false"),
    "sizes": ("GET", "/containers/a/json", "size=1", "parameter size is not allowed"),
    "a log without end": ("GET", "/containers/a/logs", "stdout=1&follow=1&tail=1", "parameter follow: must be false"),
    "a whole log": ("GET", "/containers/a/logs", "stdout=1&tail=all", "tail: must be a number of lines up to 1000"),
    "a log of too many lines": ("GET", "/containers/a/logs", "tail=1001", "tail: must be a number of lines up to 1000"),
    "a log of any length": ("GET", "/containers/a/logs", "stdout=1", "parameter tail is missing"),
    "a list of all containers": ("GET", "/containers/json", "all=1", "parameter filters is missing"),
    "a list with sizes": ("GET", "/containers/json", filters(SCOPE_FILTER, size="1"), "parameter size: must be false"),
    "the last containers": ("GET", "/containers/json", filters(SCOPE_FILTER, limit="5"), "parameter limit: must be -1"),
    "filters without label": ("GET", "/containers/json", filters("{}"), "parameter filters: label is missing"),
    "filters with no label": ("GET", "/containers/json", filters('{"label": []}'), "label must be a list"),
    "another scope": ("GET", "/containers/json", filters('{"label": ["espalier.scope=x"]}'), "label must be a list"),
    "a scope beside ours": (
        "GET", "/containers/json", filters('{"label": ["espalier.scope=edge", "espalier.scope"]}'), "label must be a list",
    ),
    "a label that is text": ("GET", "/containers/json", filters('{"label": "espalier.scope=edge"}'), "label must be a list"),
    "a label denied": ("GET", "/containers/json", filters('{"label": {"espalier.scope=edge": false}}'), "label must be a list"),
    "labels in capitals": ("GET", "/containers/json", filters('{"Label": ["espalier.scope=edge"]}'), "Label is not allowed"),
    "labels twice": (
        "GET", "/containers/json", filters('{"label": ["espalier.scope=edge"], "label": ["a"]}'), "JSON with a key twice",
    ),
    "filters by something else": (
        "GET", "/containers/json", filters('{"label": ["espalier.scope=edge"], "name": ["a"]}'), "name is not allowed",
    ),
    "filters that are a list": ("GET", "/containers/json", filters("[]"), "must be a JSON object"),
    "filters that are no JSON": ("GET", "/containers/json", filters("label"), "not valid JSON"),
    "all events": ("GET", "/events", "", "parameter filters is missing"),
    "events of any type": ("GET", "/events", filters(SCOPE_FILTER), "parameter filters: type is missing"),
    "events of images": (
        "GET", "/events", filters('{"label": ["espalier.scope=edge"], "type": ["image"]}'), "type must be a list of container",
    ),
    "events from the past": ("GET", "/events", filters(EVENTS_FILTER, since="0"), "parameter since is not allowed"),
    "a container without name": ("POST", "/containers/create", "", "parameter name is missing"),
    "a name outside the scope": ("POST", "/containers/create", "name=gateway", "parameter name: must begin with edge-"),
    "a name with a slash": ("POST", "/containers/create", "name=/edge-1", "parameter name: must begin with edge-"),
    "a platform": ("POST", "/containers/create", "name=edge-1&platform=x", "parameter platform is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "query", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_is_refused_with_its_reason(method: str, path: str, query: str, reason: str) -> None:
    verdict = judge(POLICY, method, path, query, b"")
    assert isinstance(verdict, Refusal)
    assert reason in verdict.reason


@pytest.mark.parametrize(("method", "path", "query", "_"), PASSES.values(), ids=PASSES.keys())
def test_only_create_has_a_body(method: str, path: str, query: str, _: Call) -> None:
    assert judge(POLICY, method, path, query, b"{}") == Refusal("this call has no body")


MALICIOUS = {
    "a bind": (changed("HostConfig", "Binds", to=["/:/host"]), "HostConfig.Binds: Extra inputs"),
    "privileges": (changed("HostConfig", "Privileged", to=True), "HostConfig.Privileged: Extra inputs"),
    "capabilities": (changed("HostConfig", "CapAdd", to=["SYS_ADMIN"]), "HostConfig.CapAdd: Extra inputs"),
    "devices": (changed("HostConfig", "Devices", to=[]), "HostConfig.Devices: Extra inputs"),
    "another's volumes": (changed("HostConfig", "VolumesFrom", to=["proxy"]), "HostConfig.VolumesFrom: Extra inputs"),
    "the host's processes": (changed("HostConfig", "PidMode", to="host"), "HostConfig.PidMode: Extra inputs"),
    "the host's memory": (changed("HostConfig", "IpcMode", to="host"), "HostConfig.IpcMode: Extra inputs"),
    "another runtime": (changed("HostConfig", "Runtime", to="x"), "HostConfig.Runtime: Extra inputs"),
    "a parent cgroup": (changed("HostConfig", "CgroupParent", to="/"), "HostConfig.CgroupParent: Extra inputs"),
    "ports": (changed("HostConfig", "PortBindings", to={}), "HostConfig.PortBindings: Extra inputs"),
    "kernel parameters": (changed("HostConfig", "Sysctls", to={}), "HostConfig.Sysctls: Extra inputs"),
    "the host's network": (changed("HostConfig", "NetworkMode", to="host"), "HostConfig.NetworkMode: must be edge_default"),
    "another's network": (changed("HostConfig", "NetworkMode", to="container:a"), "NetworkMode: must be edge_default"),
    "more networks": (changed("NetworkingConfig", to={}), "NetworkingConfig: Extra inputs"),
    "another volume": (changed("HostConfig", "Mounts", 0, "Source", to="edge_state"), "Mounts.0.Source: must be edge_models"),
    "a mount of the host": (changed("HostConfig", "Mounts", 0, "Type", to="bind"), "Mounts.0.Type: must be volume"),
    "a mount elsewhere": (changed("HostConfig", "Mounts", 0, "Target", to="/opt/venv"), "0.Target: Input should be '/models'"),
    "a mount to write to": (changed("HostConfig", "Mounts", 0, "ReadOnly", to=False), "0.ReadOnly: Value error, must be true"),
    "a mount with options": (changed("HostConfig", "Mounts", 0, "VolumeOptions", to={}), "0.VolumeOptions: Extra inputs"),
    "two mounts": (changed("HostConfig", "Mounts", to=[{}, {}]), "Mounts: List should have at most"),
    "a volume": (changed("Volumes", to={"/x": {}}), "Volumes: Extra inputs"),
    "another entry point": (changed("Entrypoint", to=["sh"]), "Entrypoint: Extra inputs"),
    "an environment": (changed("Env", to=["PYTHONPATH=/models"]), "Env: Extra inputs"),
    "a health check": (changed("Healthcheck", to={"Test": ["CMD", "sh"]}), "Healthcheck: Extra inputs"),
    "a working directory": (changed("WorkingDir", to="/models"), "WorkingDir: Extra inputs"),
    "root": (changed("User", to="0:0"), "User: Input should be '10001:10001'"),
    "another image": (changed("Image", to="espalier/gateway:0.1.0"), "Image: must be espalier/stage"),
    "a file system to write to": (changed("HostConfig", "ReadonlyRootfs", to=False), "ReadonlyRootfs: Value error"),
    "a truth that is a number": (changed("HostConfig", "ReadonlyRootfs", to=1), "Input should be a valid boolean"),
    "capabilities kept": (changed("HostConfig", "CapDrop", to=[]), "CapDrop: List should have at least 1 item"),
    "no seccomp": (changed("HostConfig", "SecurityOpt", to=["seccomp=unconfined"]), "SecurityOpt.0: Input should be"),
    "no limit on cores": (changed("HostConfig", "NanoCpus", to=0), "NanoCpus: Input should be greater than 0"),
    "no limit on memory": (changed("HostConfig", "Memory", to=0), "Memory: Input should be greater than 0"),
    "cores as text": (changed("HostConfig", "NanoCpus", to="1"), "NanoCpus: Input should be a valid integer"),
    "cores as a truth": (changed("HostConfig", "NanoCpus", to=True), "NanoCpus: Input should be a valid integer"),
    "swap": (changed("HostConfig", "MemorySwap", to=1 << 40), f"MemorySwap: must be {64 << 20}"),
    "too large a number": (changed("HostConfig", "Memory", to=1 << 63), "Memory: Input should be less than or equal"),
    "no limit on processes": (changed("HostConfig", "PidsLimit", to=-1), "PidsLimit: Input should be greater"),
    "processes as a fraction": (changed("HostConfig", "PidsLimit", to=256.0), "PidsLimit: Input should be a valid integer"),
    "restarts": (changed("HostConfig", "RestartPolicy", "Name", to="always"), "RestartPolicy.Name: Input should be 'no'"),
    "another log driver": (changed("HostConfig", "LogConfig", "Type", to="syslog"), "LogConfig.Type: Input should be"),
    "a long log": (changed("HostConfig", "LogConfig", "Config", "max-size", to="9g"), "Input should be '10m'"),
    "more in memory": (changed("HostConfig", "Tmpfs", to={"/tmp": "size=64g"}), "Input should be 'rw,noexec"),
    "all GPUs": (changed("HostConfig", "DeviceRequests", to=[GPU[0] | {"Count": -1}]), "0.Count: Input should be"),
    "other devices": (changed("HostConfig", "DeviceRequests", to=[GPU[0] | {"Driver": "cdi"}]), "0.Driver: Input should be"),
    "null for no devices": (changed("HostConfig", "DeviceRequests", to=None), "DeviceRequests: Input should be a valid list"),
    "another scope": (changed("Labels", "espalier.scope", to="x"), "Labels.espalier.scope: must be edge"),
    "another project": (changed("Labels", "com.docker.compose.project", to="x"), "compose.project: must be edge"),
    "another service": (changed("Labels", "com.docker.compose.service", to="gateway"), "compose.service: must be stage"),
    "another label": (changed("Labels", "traefik.enable", to="true"), "Labels: traefik.enable is not allowed"),
    "a label too few": (changed("Labels", to={"espalier.scope": "edge"}), "is missing"),
    "a label that is long": (changed("Labels", "espalier.node", to="x" * 257), "espalier.node: String should have"),
    "a label of two lines": (changed("Labels", "espalier.node", to="a\nb"), "espalier.node: Value error, must be one line"),
    "a number that is none": (changed("Labels", "com.docker.compose.container-number", to="x"), "number: must be a number"),
    "many arguments": (container(cmd=("x",) * 65), "Cmd: List should have at most 64 items"),
    "a long argument": (container(cmd=("x" * 1025,)), "Cmd.0: String should have at most 1024 characters"),
    "arguments as text": (container() | {"Cmd": "sh"}, "Cmd: Input should be a valid list"),
    "half a character": (container(cmd=("\ud800",)), "Cmd.0: Input should be a valid string"),
    "no body": (b"", "not valid JSON"),
    "a list": (b"[]", "body: Input should be a valid dictionary"),
    "a body in UTF-16": (json.dumps(container()).encode("utf-16"), "not valid JSON"),
    "a number outside the standard": (b'{"Cmd": NaN}', "JSON with NaN"),
    "a key twice": (b'{"User": "0", "User": "10001:10001"}', "JSON with a key twice"),
    "two bodies": (json.dumps(container()).encode() * 2, "not valid JSON"),
    "a deep body": (b"[" * (BODY_BYTES // 2), "not valid JSON"),
    "a key with control characters": (container() | {"x\n\x1b\u2028": 1}, "x???: Extra inputs"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_body_of_another_shape_is_refused(body: Any, reason: str) -> None:
    verdict = create(body)
    assert isinstance(verdict, Refusal)
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (("a/b", "p", "a:1", "n", "m"), "scope 'a/b'"),
        (("s", "", "a:1", "n", "m"), "project ''"),
        (("s", "p", "a", "n", "m"), "image 'a': give it as name:tag"),
        (("s", "p", "a:1", "host", "m"), "network 'host'"),
        (("s", "p", "a:1", "n", "/"), "models '/'"),
        (("s", "p", "a:1", "n", "/srv/../etc"), "models '/srv/../etc'"),
        (("s", "p", "a:1", "n", "../etc"), "models '../etc'"),
    ],
)
def test_a_policy_names_things_plainly(policy: tuple[str, str, str, str, str], word: str) -> None:
    scope, project, image, network, models = policy
    with pytest.raises(BadPolicy, match=word):
        Policy(scope, project, frozenset({image}), network, models)


# -- properties -----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
DOCKER_KEYS = st.sampled_from(
    [
        "Binds", "Privileged", "PidMode", "IpcMode", "UTSMode", "UsernsMode", "CgroupnsMode", "Cgroup", "Devices",
        "DeviceCgroupRules", "CapAdd", "VolumesFrom", "Links", "PortBindings", "PublishAllPorts", "ExtraHosts", "GroupAdd",
        "Runtime", "CgroupParent", "Sysctls", "Ulimits", "MaskedPaths", "ReadonlyPaths", "OomKillDisable", "AutoRemove",
        "Dns", "ContainerIDFile", "VolumeDriver", "StorageOpt", "ShmSize", "Isolation", "KernelMemory", "Env", "Entrypoint",
        "Volumes", "WorkingDir", "NetworkingConfig", "ExposedPorts", "Healthcheck", "OnBuild", "Shell", "Hostname",
        "BindOptions", "VolumeOptions", "TmpfsOptions", "Consistency", "DeviceIDs", "Options",
    ]
)  # fmt: skip
FREE = {("Cmd",), ("HostConfig", "CpuShares"), ("HostConfig", "NanoCpus")} | {
    ("Labels", f"espalier.{key}") for key in ("testbed", "service", "replica", "node", "generation", "specification")
} | {("Labels", "com.docker.compose.container-number")}  # fmt: skip
"""Places whose value may differ from the example's."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield path, value
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


WITH_GPU = changed("HostConfig", "DeviceRequests", to=GPU)
OBJECTS = st.sampled_from([path for path, value in _places(WITH_GPU) if isinstance(value, dict)])
KEYS = st.sampled_from([(path, key) for path, value in _places(WITH_GPU) if isinstance(value, dict) for key in value])
FIXED = st.sampled_from([path for path, _ in _places(container()) if path and path not in FREE and path[:1] != ("Cmd",)])


def _at(body: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        body = body[step]
    return body


@given(OBJECTS, DOCKER_KEYS | st.text(max_size=12), JSON)
def test_an_added_key_is_refused(path: tuple[Any, ...], key: str, value: Any) -> None:
    body = copy.deepcopy(WITH_GPU)
    assume(key not in _at(body, path))
    _at(body, path)[key] = value
    assert isinstance(create(body), Refusal)


@given(KEYS, st.data(), st.booleans())
def test_a_key_in_another_case_is_refused(place: tuple[tuple[Any, ...], str], data: st.DataObject, instead: bool) -> None:
    path, key = place
    spelt = "".join(data.draw(st.sampled_from([letter.lower(), letter.upper()])) for letter in key)
    # Go's decoder also takes these two letters for s and k.
    spelt = data.draw(st.sampled_from([spelt, spelt.replace("s", "ſ"), spelt.replace("k", "K")]))
    assume(spelt != key)
    body = copy.deepcopy(WITH_GPU)
    inner = _at(body, path)
    inner[spelt] = inner.pop(key) if instead else inner[key]
    assert isinstance(create(body), Refusal)


@given(KEYS, JSON, st.booleans())
def test_a_key_twice_is_refused(place: tuple[tuple[Any, ...], str], value: Any, first: bool) -> None:
    path, key = place
    body = copy.deepcopy(WITH_GPU)
    inner = _at(body, path)
    pair = f"{json.dumps(key)}: {json.dumps(value)}"
    rest = json.dumps(inner)[1:-1]
    doubled = f"{{{pair}, {rest}}}" if first else f"{{{rest}, {pair}}}"
    inner.clear()
    inner["here"] = 1
    text = json.dumps(body).replace('{"here": 1}', doubled)
    assert create(text.encode()) == Refusal("JSON with a key twice")


@given(FIXED, JSON)
def test_another_value_is_refused(path: tuple[Any, ...], value: Any) -> None:
    """Of memory too: swap would have to change with it."""
    body = container()
    assume(json.dumps(value) != json.dumps(_at(body, path)))
    _at(body, path[:-1])[path[-1]] = value
    assert isinstance(create(body), Refusal)


@given(KEYS)
def test_a_missing_key_is_refused_but_for_the_gpus(place: tuple[tuple[Any, ...], str]) -> None:
    path, key = place
    body = copy.deepcopy(WITH_GPU)
    del _at(body, path)[key]
    assert isinstance(create(body), Call if key == "DeviceRequests" else Refusal)


@given(st.lists(st.tuples(st.integers(min_value=0), st.characters(max_codepoint=0x2FFF), st.sampled_from("sid")), max_size=3))
def test_whatever_passes_keeps_what_is_fixed(edits: list[tuple[int, str, str]]) -> None:
    """Bodies damaged anywhere: set, insert or delete a character."""
    text = json.dumps(container())
    for at, letter, edit in edits:
        where = at % len(text)
        text = text[:where] + ("" if edit == "d" else letter) + text[where + (edit != "i") :]
    verdict = create(text.encode("utf-8", "surrogatepass"))
    if isinstance(verdict, Call):
        found, fixed = json.loads(verdict.body or b""), container()
        for path in (*FREE, ("HostConfig", "Memory"), ("HostConfig", "MemorySwap")):
            del _at(found, path[:-1])[path[-1]], _at(fixed, path[:-1])[path[-1]]
        assert found == fixed


SEGMENTS = st.sampled_from(
    [
        "containers", "images", "json", "create", "start", "kill", "logs", "exec", "attach", "archive", "edge-1", "prune",
        "build", "networks", "volumes", "swarm", "services", "_ping", "version", "events", "info", "..", ".", "", "%2e%2e",
        "a%2fb", "espalier", "stage:0.1.0", "commit", "session", "plugins", "update", "rename", "stop", "wait", "copy", "{id}",
    ]
) | st.text(max_size=6)  # fmt: skip
NAMED = [
    ("GET", "_ping"), ("GET", "version"), ("GET", "events"), ("GET", "containers", "json"), ("POST", "containers", "create"),
    ("GET", "images", "espalier", "stage:0.1.0", "json"), ("GET", "containers", "*", "json"),
    ("GET", "containers", "*", "logs"),
    ("POST", "containers", "*", "start"), ("POST", "containers", "*", "kill"), ("DELETE", "containers", "*"),
]  # fmt: skip


@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "CONNECT"]),
    st.booleans(),
    st.lists(SEGMENTS, max_size=6),
)
def test_other_calls_are_refused(method: str, versioned: bool, segments: list[str]) -> None:
    call = (method, *segments)
    assume(not any(_matches(call, known) for known in NAMED))
    path = "/".join(["", *(["v1.41"] if versioned else []), *segments])
    assert isinstance(judge(POLICY, method, path, "", b""), Refusal)


def _matches(call: tuple[str, ...], known: tuple[str, ...]) -> bool:
    return len(call) == len(known) and ".." not in call and all(b in ("*", a) for a, b in zip(call, known, strict=True))


# -- whose container it is ------------------------------------------------------------------------------------------------


def inspected(labels: Any, full_id: Any = FULL_ID) -> bytes:
    return json.dumps({"Id": full_id, "Name": "/edge-1", "Config": {"Labels": labels}}).encode()


def test_the_full_id_takes_the_place_of_the_name() -> None:
    call = judge(POLICY, "POST", "/v1.41/containers/edge-1/kill", "signal=SIGKILL", b"")
    assert isinstance(call, Call)
    ours = within(POLICY, call, inspected({"espalier.scope": "edge", "x": "y"}))
    assert isinstance(ours, Call)
    assert (ours.method, ours.path, ours.query) == ("POST", f"/v1.41/containers/{FULL_ID}/kill", "signal=SIGKILL")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (inspected({}), "does not carry the label espalier.scope=edge"),
        (inspected(None), "does not carry the label espalier.scope=edge"),
        (inspected({"espalier.scope": "edge2"}), "does not carry the label espalier.scope=edge"),
        (inspected({"espalier.scope": ["edge"]}), "does not carry the label espalier.scope=edge"),
        (inspected({"Espalier.scope": "edge"}), "does not carry the label espalier.scope=edge"),
        (inspected({"espalier.scope": "edge"}, "edge-1"), "no full id"),
        (inspected({"espalier.scope": "edge"}, None), "no full id"),
        (b"{}", "could not be read"),
        (b"[]", "could not be read"),
        (b"", "could not be read"),
    ],
)
def test_a_container_that_is_not_ours_is_left_alone(answer: bytes, reason: str) -> None:
    call = judge(POLICY, "DELETE", "/containers/edge-1", "force=1", b"")
    assert isinstance(call, Call)
    verdict = within(POLICY, call, answer)
    assert isinstance(verdict, Refusal)
    assert reason in verdict.reason


IMAGE_ID = f"sha256:{FULL_ID}"


def test_an_image_named_by_its_id_has_to_be_looked_at_first() -> None:
    for call in (
        create(changed("Image", to=IMAGE_ID)),
        judge(POLICY, "GET", f"/v1.41/images/{IMAGE_ID}/json", "", b""),
    ):
        assert isinstance(call, Call)
        assert call.of == "image"
        assert call.inspection is not None
        assert call.inspection.endswith(f"/images/{IMAGE_ID}/json")
        for kind in ("stage", "stage-gpu"):
            assert within(POLICY, call, inspected({"espalier.image": kind}, IMAGE_ID)) == call
        for labels in (None, {}, {"espalier.image": "gateway"}, {"espalier.image": ["stage"]}, {"espalier.scope": "edge"}):
            verdict = within(POLICY, call, inspected(labels, IMAGE_ID))
            assert isinstance(verdict, Refusal)
            assert "does not carry the label espalier.image" in verdict.reason


@pytest.mark.parametrize("image", ["sha256:abc", IMAGE_ID.upper(), f"{IMAGE_ID}0", f"x@{IMAGE_ID}"])
def test_what_only_looks_like_an_id_is_refused(image: str) -> None:
    assert isinstance(create(changed("Image", to=image)), Refusal)


def test_the_proxy_stands_alone() -> None:
    """Whatever goes wrong in the orchestrator's other modules is not loaded here."""
    script = "import sys, orchestrator.socket_proxy.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    ours = {name for name in loaded if name.split(".")[0] in {"orchestrator", "loadgen", "services", "models"}}
    assert {name for name in ours if not name.startswith("orchestrator.socket_proxy")} == {"orchestrator"}
