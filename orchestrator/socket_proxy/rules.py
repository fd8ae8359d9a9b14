"""Which calls of the Docker API pass: an allow list with a schema, as pure functions over a request. `app` calls them.

What is sent on is never what came in, but what was understood of it, written anew: path, query and body of a `Call` are made
here. So it does not matter how the engine would have read the original (Go's decoder takes JSON keys in any case, and the
last of duplicates). A call about a container also names the inspection whose answer `within` has to see first.

The values below are stated here a second time, and not taken from where the orchestrator makes its containers: the proxy is
there for the day on which the orchestrator is not to be trusted.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlencode

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

BODY_BYTES = 64 << 10
"""Most bytes of a request's body."""
LOG_LINES = 1000
"""Most lines of a log in one answer."""
SCOPE_LABEL = "espalier.scope"
IMAGE_LABEL = "espalier.image"
STAGE_IMAGES = frozenset({"stage", "stage-gpu"})
"""Values of that label on images that stages are made from. An image may also be named by its id, so that an update can be
taken back when the name stands for another one already; then its label must say what it is."""
LABELS = frozenset(
    f"espalier.{key}" for key in ("scope", "testbed", "service", "replica", "node", "generation", "specification")
) | frozenset(f"com.docker.compose.{key}" for key in ("project", "service", "container-number", "oneoff"))
"""The labels of a stage's container: these, all of them, and no other."""
SERVICE_LABELS = frozenset(
    f"espalier.{key}" for key in ("scope", "testbed", "service", "replica", "node", "generation", "specification", "cpus")
) | {"com.docker.stack.namespace"}
"""The labels of a stage's service in a Swarm: as above."""
LEASE_LABEL = "espalier.lease"
EVENTS = frozenset({"start", "die", "destroy"})

_INT64 = (1 << 63) - 1
_NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}"
_IMAGE = r"[a-z0-9][a-z0-9._/-]{0,127}:[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}"
_IMAGE_ID = r"sha256:[0-9a-f]{64}"
_FULL_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SERVICE_ID = re.compile(r"[0-9a-z]{25}", re.ASCII)
_ON_A_BOX = rf"node\.(hostname|labels\.espalier\.node)=={_NAME}"
# 20.10 speaks 1.41. In older versions of the API what a body leaves unsaid means other things (an IPC namespace to share).
_VERSION = r"(?P<version>/v1\.(?:4[1-9]|[5-9][0-9]))?"


class BadPolicy(ValueError):
    """A value of the policy that could not be compared with anything."""


@dataclass(frozen=True)
class Policy:
    """What the values of an allowed call are."""

    scope: str
    """Value of the label that says whose a container is; also the beginning of its name."""
    project: str
    """The compose project, whose `down` removes the containers."""
    images: frozenset[str]
    """Images that may be run and looked at, `name:tag`."""
    network: str
    models: str
    """A volume's name, or an absolute path of the host, to be mounted read-only."""
    swarm: bool = False
    """Whether stages are services of a Swarm, and the project is a stack: then no container may be made or touched."""

    def __post_init__(self) -> None:
        named = {"scope": self.scope, "project": self.project, "network": self.network}
        if not self.models.startswith("/"):
            named["models"] = self.models
        for what, name in named.items():
            if not re.fullmatch(_NAME, name, re.ASCII):
                raise BadPolicy(f"{what} {name!r}: 1 to 128 of a-z A-Z 0-9 _ . -, the first a letter or a digit")
        # These names of NetworkMode do not mean a network but none, or the namespace of the host or of another container.
        if self.network in {"host", "none", "default"}:
            raise BadPolicy(f"network {self.network!r}: give the name of a network that was created for the stages")
        for image in self.images:
            if not re.fullmatch(_IMAGE, image, re.ASCII):
                raise BadPolicy(f"image {image!r}: give it as name:tag")
        if self.models.startswith("/") and not _is_plain_path(self.models):
            raise BadPolicy(f"models {self.models!r}: an absolute path below /, without empty parts, . and ..")


@dataclass(frozen=True)
class Call:
    """What will be sent to the engine."""

    method: str
    path: str
    """`{id}` stands for the container's full id, which only `within` can put there."""
    query: str = ""
    body: bytes | None = None
    inspection: str | None = None
    """Path of the inspection whose answer `within` must see before this call may be made; the same as `path` where the call
    is that inspection."""
    of: Literal["container", "image", "service"] = "container"
    """What is inspected."""
    to_none: bool = False
    """Whether the body is the service as it was inspected, but scaled to none."""
    streams: bool = False
    """Whether the answer goes on until one side has had enough."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not sent on."""

    reason: str


class _NotAllowed(Exception):
    """Ends the reading of a request; its text is the reason."""


# -- the body of POST /containers/create ----------------------------------------------------------------------------------


class _Strict(BaseModel):
    """Every field must be there and of its very type; no other may be. Names are those of the Docker API."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _is_true(value: bool) -> bool:
    if not value:
        raise ValueError("must be true")
    return value


_True = Annotated[bool, AfterValidator(_is_true)]
"""Literal[True] would take 1 as well."""


def _is_printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable characters")
    return value


class _Mount(_Strict):
    Type: Literal["volume", "bind"]
    Source: str
    Target: Literal["/models"]
    ReadOnly: _True


class _Tmpfs(_Strict):
    tmp: Literal["rw,noexec,nosuid,size=64m"] = Field(alias="/tmp")


class _RestartPolicy(_Strict):
    Name: Literal["no"]


class _LogOptions(_Strict):
    max_size: Literal["10m"] = Field(alias="max-size")
    max_file: Literal["2"] = Field(alias="max-file")


class _LogConfig(_Strict):
    Type: Literal["json-file"]
    Config: _LogOptions


_Just = Field(min_length=1, max_length=1)


class _DeviceRequest(_Strict):
    Driver: Literal["nvidia"]
    Count: Annotated[int, Field(ge=1, le=64)]
    Capabilities: Annotated[list[Annotated[list[Literal["gpu"]], _Just]], _Just]


class _HostConfig(_Strict):
    NetworkMode: str
    Mounts: Annotated[list[_Mount], _Just]
    ReadonlyRootfs: _True
    CapDrop: Annotated[list[Literal["ALL"]], _Just]
    SecurityOpt: Annotated[list[Literal["no-new-privileges"]], _Just]
    Init: _True
    NanoCpus: Annotated[int, Field(gt=0, le=_INT64)]
    CpuShares: Annotated[int, Field(ge=2, le=262_144)]
    Memory: Annotated[int, Field(gt=0, le=_INT64)]
    MemorySwap: Annotated[int, Field(gt=0, le=_INT64)]
    PidsLimit: Annotated[int, Field(ge=256, le=256)]
    Tmpfs: _Tmpfs
    RestartPolicy: _RestartPolicy
    LogConfig: _LogConfig
    DeviceRequests: Annotated[list[_DeviceRequest], _Just] = []
    """May be left out: stages without a GPU."""


class _Container(_Strict):
    Image: str
    Cmd: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=64)]
    """Free text: the image's entry point reads it, and `Entrypoint` cannot be given."""
    User: Literal["10001:10001"]
    Labels: dict[str, Annotated[str, Field(max_length=256), AfterValidator(_is_printable)]]
    StopSignal: Literal["SIGTERM"]
    HostConfig: _HostConfig


def _container(policy: Policy, body: bytes) -> _Container:
    """What was understood of the body, with the values of the policy checked."""
    try:
        container = _Container.model_validate(_load(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _NotAllowed(f"{_place(first['loc'])}: {first['msg']}") from None
    host, mount, labels = container.HostConfig, container.HostConfig.Mounts[0], container.Labels
    if odd := labels.keys() ^ LABELS:
        raise _NotAllowed(f"Labels: {min(odd)} is {'missing' if min(odd) in LABELS else 'not allowed'}")
    if container.Image not in policy.images and not re.fullmatch(_IMAGE_ID, container.Image, re.ASCII):
        raise _NotAllowed(f"Image: must be {' or '.join(sorted(policy.images))}, or the id of one")
    # Compose's own commands fail on containers whose number is none.
    if not re.fullmatch("[0-9]{1,6}", labels["com.docker.compose.container-number"], re.ASCII):
        raise _NotAllowed("Labels.com.docker.compose.container-number: must be a number")
    fixed = {
        f"Labels.{SCOPE_LABEL}": (labels[SCOPE_LABEL], policy.scope),
        "Labels.com.docker.compose.project": (labels["com.docker.compose.project"], policy.project),
        "Labels.com.docker.compose.service": (labels["com.docker.compose.service"], "stage"),
        "Labels.com.docker.compose.oneoff": (labels["com.docker.compose.oneoff"], "False"),
        "HostConfig.NetworkMode": (host.NetworkMode, policy.network),
        "HostConfig.Mounts.0.Type": (mount.Type, "bind" if policy.models.startswith("/") else "volume"),
        "HostConfig.Mounts.0.Source": (mount.Source, policy.models),
        "HostConfig.MemorySwap": (host.MemorySwap, host.Memory),
    }
    for place, (given, allowed) in fixed.items():
        if given != allowed:
            raise _NotAllowed(f"{place}: must be {allowed}")
    return container


# -- the body of POST /services/create --------------------------------------------------------------------------------------


class _TmpfsOptions(_Strict):
    SizeBytes: Annotated[int, Field(ge=64 << 20, le=64 << 20)]
    Mode: Annotated[int, Field(ge=0o1777, le=0o1777)]


class _TmpfsMount(_Strict):
    Type: Literal["tmpfs"]
    Target: Literal["/tmp"]
    TmpfsOptions: _TmpfsOptions


class _ContainerSpec(_Strict):
    Image: str
    Args: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=64)]
    User: Literal["10001:10001"]
    Labels: dict[str, str]
    StopSignal: Literal["SIGTERM"]
    StopGracePeriod: Annotated[int, Field(ge=0, le=_INT64)]
    Init: _True
    ReadOnly: _True
    CapabilityDrop: Annotated[list[Literal["ALL"]], _Just]
    Mounts: tuple[_Mount, _TmpfsMount]


class _Limits(_Strict):
    NanoCPUs: Annotated[int, Field(gt=0, le=_INT64)]
    MemoryBytes: Annotated[int, Field(gt=0, le=_INT64)]
    Pids: Annotated[int, Field(ge=256, le=256)]


class _Discrete(_Strict):
    Kind: Literal["NVIDIA-GPU"]
    Value: Annotated[int, Field(ge=1, le=64)]


class _Generic(_Strict):
    DiscreteResourceSpec: _Discrete


class _Reservations(_Strict):
    GenericResources: Annotated[list[_Generic], _Just]


class _Resources(_Strict):
    Limits: _Limits
    Reservations: _Reservations | None = None


class _Restart(_Strict):
    Condition: Literal["none"]


class _Placement(_Strict):
    Constraints: Annotated[list[Annotated[str, Field(pattern=f"^{_ON_A_BOX}$")]], _Just]


class _Attached(_Strict):
    Target: str


class _LogDriver(_Strict):
    Name: Literal["json-file"]
    Options: _LogOptions


class _TaskTemplate(_Strict):
    ContainerSpec: _ContainerSpec
    Resources: _Resources
    RestartPolicy: _Restart
    Placement: _Placement
    Networks: Annotated[list[_Attached], _Just]
    LogDriver: _LogDriver


class _Replicated(_Strict):
    Replicas: Annotated[int, Field(ge=1, le=1)]


class _Mode(_Strict):
    Replicated: _Replicated


class _Endpoint(_Strict):
    Mode: Literal["dnsrr"]


class _Service(_Strict):
    Name: str
    Labels: dict[str, Annotated[str, Field(max_length=256), AfterValidator(_is_printable)]]
    TaskTemplate: _TaskTemplate
    Mode: _Mode
    EndpointSpec: _Endpoint
    Networks: None = None
    """The client says this of every service; the task's own are in its template."""


def _service(policy: Policy, body: bytes) -> _Service:
    """What was understood of the body, with the values of the policy checked."""
    try:
        # As JSON, in which a list can be a tuple; `_load` has seen that no key is there twice.
        service = _Service.model_validate_json(json.dumps(_load(body)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _NotAllowed(f"{_place(first['loc'])}: {first['msg']}") from None
    container, labels = service.TaskTemplate.ContainerSpec, service.Labels
    mount = container.Mounts[0]
    if odd := labels.keys() ^ SERVICE_LABELS:
        raise _NotAllowed(f"Labels: {min(odd)} is {'missing' if min(odd) in SERVICE_LABELS else 'not allowed'}")
    if container.Image not in policy.images and not re.fullmatch(_IMAGE_ID, container.Image, re.ASCII):
        raise _NotAllowed(f"Image: must be {' or '.join(sorted(policy.images))}, or the id of one")
    _name(policy, service.Name)
    fixed = {
        f"Labels.{SCOPE_LABEL}": (labels[SCOPE_LABEL], policy.scope),
        "Labels.com.docker.stack.namespace": (labels["com.docker.stack.namespace"], policy.project),
        "ContainerSpec.Labels": (container.Labels, labels),
        "ContainerSpec.Mounts.0.Type": (mount.Type, "bind" if policy.models.startswith("/") else "volume"),
        "ContainerSpec.Mounts.0.Source": (mount.Source, policy.models),
        "Networks.0.Target": (service.TaskTemplate.Networks[0].Target, policy.network),
    }
    for place, (given, allowed) in fixed.items():
        if given != allowed:
            raise _NotAllowed(f"{place}: must be {allowed}")
    return service


def _load(text: bytes | str) -> Any:
    """JSON in UTF-8, in which no object has a key twice and no number is outside the standard."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    # Too deep a nesting ends in a RecursionError.
    except (ValueError, RecursionError):
        raise _NotAllowed("not valid JSON") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _NotAllowed("JSON with a key twice")
    return found


def _no_constant(name: str) -> None:
    raise _NotAllowed(f"JSON with {name}")


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "body"


def _is_plain_path(path: str) -> bool:
    return len(path) > 1 and path.isprintable() and not {"", ".", ".."} & set(path[1:].split("/"))


# -- query parameters -----------------------------------------------------------------------------------------------------

Parameter = Callable[[str], str | None]
"""Reads a parameter's value as it was sent; the value to send on, or None where the engine's default says the same."""


def _flag(value: str) -> str | None:
    if value in {"1", "true", "True"}:
        return "1"
    _off(value)
    return None


def _off(value: str) -> None:
    if value not in {"0", "false", "False"}:
        raise _NotAllowed("must be false")


def _one_of(allowed: frozenset[str], value: str) -> str:
    if value not in allowed:
        raise _NotAllowed(f"must be {' or '.join(sorted(allowed))}")
    return value


def _unlimited(value: str) -> None:
    if value != "-1":
        raise _NotAllowed("must be -1")


def _lines(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,4}", value, re.ASCII) or int(value) > LOG_LINES:
        raise _NotAllowed(f"must be a number of lines up to {LOG_LINES}")
    return str(int(value))


def _name(policy: Policy, value: str) -> str:
    if not re.fullmatch(_NAME, value, re.ASCII) or not value.startswith(f"{policy.scope}-"):
        raise _NotAllowed(f"must begin with {policy.scope}- and be made of a-z A-Z 0-9 _ . -")
    return value


def _filters(policy: Policy, others: Mapping[str, frozenset[str]], required: frozenset[str], value: str) -> str:
    """Filters, written anew as lists: the label of the scope, and of the others only values that are allowed."""
    given = _load(value)
    if not isinstance(given, dict):
        raise _NotAllowed("must be a JSON object")
    allowed = {"label": frozenset({f"{SCOPE_LABEL}={policy.scope}"}), **others}
    if unknown := given.keys() - allowed.keys():
        raise _NotAllowed(f"{min(unknown)} is not allowed")
    if missing := ({"label"} | required) - given.keys():
        raise _NotAllowed(f"{min(missing)} is missing")
    return json.dumps({key: _values(key, given[key], allowed[key]) for key in sorted(given)})


def _values(key: str, given: Any, allowed: frozenset[str]) -> list[str]:
    """One filter's values, in either of the two forms of the API: `["a"]` or `{"a": true}`."""
    if isinstance(given, dict) and all(said is True for said in given.values()):
        given = list(given)
    if not isinstance(given, list) or not given or not all(isinstance(one, str) and one in allowed for one in given):
        raise _NotAllowed(f"{key} must be a list of {' or '.join(sorted(allowed))}")
    return sorted(set(given))


# -- routes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """A request whose method and path have been recognised."""

    version: str
    path: str
    """Without the version."""
    subject: str
    """The container or image that the path names."""
    query: str
    body: bytes

    def parameters(self, allowed: Mapping[str, Parameter], required: frozenset[str] = frozenset()) -> str:
        """The query, written anew."""
        # An empty query is no fault, but one to strict_parsing.
        strict = bool(self.query)
        try:
            given = parse_qsl(self.query, keep_blank_values=True, strict_parsing=strict, errors="strict", max_num_fields=16)
        except ValueError:
            raise _NotAllowed("the query is not valid") from None
        names = [name for name, _ in given]
        for name in names:
            if name not in allowed:
                raise _NotAllowed(f"parameter {name} is not allowed")
            if names.count(name) > 1:
                raise _NotAllowed(f"parameter {name} is there twice")
        if missing := required.difference(names):
            raise _NotAllowed(f"parameter {min(missing)} is missing")
        understood = [(name, _parameter(name, allowed[name], value)) for name, value in given]
        return urlencode([(name, value) for name, value in understood if value is not None])


def _parameter(name: str, read: Parameter, value: str) -> str | None:
    try:
        return read(value)
    except _NotAllowed as error:
        raise _NotAllowed(f"parameter {name}: {error}") from None


def _without_parameters(_: Policy, request: _Request) -> Call:
    return Call("GET", request.version + request.path, request.parameters({}))


def _events(policy: Policy, request: _Request) -> Call:
    others = {"type": frozenset({"container"}), "event": EVENTS}
    filters = partial(_filters, policy, others, frozenset({"type"}))
    query = request.parameters({"filters": filters}, frozenset({"filters"}))
    return Call("GET", f"{request.version}/events", query, streams=True)


def _list(policy: Policy, request: _Request) -> Call:
    filters = partial(_filters, policy, {}, frozenset())
    allowed: dict[str, Parameter] = {"all": _flag, "limit": _unlimited, "size": _off, "trunc_cmd": _off, "filters": filters}
    return Call("GET", f"{request.version}/containers/json", request.parameters(allowed, frozenset({"filters"})))


def _create(policy: Policy, request: _Request) -> Call:
    query = request.parameters({"name": partial(_name, policy)}, frozenset({"name"}))
    container = _container(policy, request.body)
    body = container.model_dump_json(by_alias=True, exclude_unset=True).encode()
    known = container.Image in policy.images
    inspection = None if known else f"{request.version}/images/{container.Image}/json"
    return Call("POST", f"{request.version}/containers/create", query, body, inspection, "image")


def _image(policy: Policy, request: _Request) -> Call:
    path = f"{request.version}/images/{request.subject}/json"
    if request.subject in policy.images:
        return Call("GET", path, request.parameters({}))
    if not re.fullmatch(_IMAGE_ID, request.subject, re.ASCII):
        raise _NotAllowed(f"of images only {' and '.join(sorted(policy.images))} may be looked at")
    return Call("GET", path, request.parameters({}), inspection=path, of="image")


def _inspect(_: Policy, request: _Request) -> Call:
    path = _inspection(request)
    return Call("GET", path, request.parameters({}), inspection=path)


def _logs(_: Policy, request: _Request) -> Call:
    allowed: dict[str, Parameter] = {"stdout": _flag, "stderr": _flag, "timestamps": _flag, "follow": _off, "tail": _lines}
    query = request.parameters(allowed, frozenset({"tail"}))
    return Call("GET", f"{request.version}/containers/{{id}}/logs", query, inspection=_inspection(request))


def _start(_: Policy, request: _Request) -> Call:
    query = request.parameters({})
    return Call("POST", f"{request.version}/containers/{{id}}/start", query, inspection=_inspection(request))


def _kill(_: Policy, request: _Request) -> Call:
    signal = partial(_one_of, frozenset({"SIGTERM", "SIGKILL"}))
    query = request.parameters({"signal": signal}, frozenset({"signal"}))
    return Call("POST", f"{request.version}/containers/{{id}}/kill", query, inspection=_inspection(request))


def _remove(_: Policy, request: _Request) -> Call:
    query = request.parameters({"force": _flag, "v": _off, "link": _off})
    return Call("DELETE", f"{request.version}/containers/{{id}}", query, inspection=_inspection(request))


# -- routes of a Swarm ------------------------------------------------------------------------------------------------------


def _swarm_events(_: Policy, request: _Request) -> Call:
    query = request.parameters({"filters": _swarm_filters}, frozenset({"filters"}))
    return Call("GET", f"{request.version}/events", query, streams=True)


def _swarm_filters(value: str) -> str:
    """Events of boxes and of services, which tell names and nothing more, and no others."""
    given = _load(value)
    if not isinstance(given, dict) or given.keys() != {"type"}:
        raise _NotAllowed("must be by type, and by nothing else")
    return json.dumps({"type": _values("type", given["type"], frozenset({"node", "service"}))})


def _of_scope(policy: Policy, request: _Request) -> Call:
    """A list of services, or of their tasks."""
    filters = partial(_filters, policy, {}, frozenset())
    query = request.parameters({"filters": filters}, frozenset({"filters"}))
    return Call("GET", request.version + request.path, query)


def _network(policy: Policy, request: _Request) -> Call:
    if request.subject != policy.network:
        raise _NotAllowed(f"of networks only {policy.network} may be looked at")
    return Call("GET", request.version + request.path, request.parameters({}))


def _create_service(policy: Policy, request: _Request) -> Call:
    service = _service(policy, request.body)
    body = service.model_dump_json(by_alias=True, exclude_unset=True).encode()
    image = service.TaskTemplate.ContainerSpec.Image
    inspection = None if image in policy.images else f"{request.version}/images/{image}/json"
    return Call("POST", f"{request.version}/services/create", request.parameters({}), body, inspection, "image")


def _inspect_service(_: Policy, request: _Request) -> Call:
    path = f"{request.version}/services/{request.subject}"
    # The client asks for defaults before an update; of what it then sends nothing is taken.
    request.parameters({"insertDefaults": _flag})
    return Call("GET", path, inspection=path, of="service")


def _scale_service(_: Policy, request: _Request) -> Call:
    """To none: the one update there is. Of the body nothing is sent on, for the service is known from its inspection."""
    query = request.parameters({"version": _version}, frozenset({"version"}))
    wanted = _load(request.body)
    mode = wanted.get("Mode") if isinstance(wanted, dict) else None
    if mode != {"Replicated": {"Replicas": 0}}:
        raise _NotAllowed("a service may be scaled to none, and not be changed")
    inspection = f"{request.version}/services/{request.subject}"
    return Call(
        "POST", f"{request.version}/services/{{id}}/update", query, inspection=inspection, of="service", to_none=True
    )  # fmt: skip


def _remove_service(_: Policy, request: _Request) -> Call:
    inspection = f"{request.version}/services/{request.subject}"
    query = request.parameters({})
    return Call("DELETE", f"{request.version}/services/{{id}}", query, inspection=inspection, of="service")


def _service_logs(_: Policy, request: _Request) -> Call:
    allowed: dict[str, Parameter] = {
        "stdout": _flag, "stderr": _flag, "timestamps": _flag, "details": _off, "follow": _off, "since": _since, "tail": _lines,
    }  # fmt: skip
    query = request.parameters(allowed, frozenset({"tail"}))
    inspection = f"{request.version}/services/{request.subject}"
    return Call("GET", f"{request.version}/services/{{id}}/logs", query, inspection=inspection, of="service")


def _lease(policy: Policy, request: _Request) -> str:
    """Name of the one config that may be touched: the lease of the orchestrators, which runs nowhere."""
    if request.subject not in ("", f"{policy.scope}-lease"):
        raise _NotAllowed(f"of configs only {policy.scope}-lease may be touched")
    return f"{policy.scope}-lease"


def _read_lease(policy: Policy, request: _Request) -> Call:
    return Call("GET", f"{request.version}/configs/{_lease(policy, request)}", request.parameters({}))


def _create_lease(policy: Policy, request: _Request) -> Call:
    body = _claim(policy, request)
    body["Data"] = base64.b64encode(body["Name"].encode()).decode()
    return Call("POST", f"{request.version}/configs/create", request.parameters({}), json.dumps(body).encode())


def _write_lease(policy: Policy, request: _Request) -> Call:
    query = request.parameters({"version": _version}, frozenset({"version"}))
    body = json.dumps(_claim(policy, request)).encode()
    return Call("POST", f"{request.version}/configs/{_lease(policy, request)}/update", query, body)


def _claim(policy: Policy, request: _Request) -> dict[str, Any]:
    """Its body, made anew: a name and one label, whatever else was sent."""
    given, name = _load(request.body), _lease(policy, request)
    labels = given.get("Labels") if isinstance(given, dict) else None
    if (
        not isinstance(given, dict)
        or given.get("Name") != name
        or not isinstance(labels, dict)
        or labels.keys() != {LEASE_LABEL}
    ):
        raise _NotAllowed(f"must be named {name} and have the label {LEASE_LABEL} alone")
    if not isinstance(labels[LEASE_LABEL], str):
        raise _NotAllowed(f"the label {LEASE_LABEL} must be a text")
    return {"Name": name, "Labels": {LEASE_LABEL: labels[LEASE_LABEL]}}


def _version(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,19}", value, re.ASCII):
        raise _NotAllowed("must be a number")
    return value


def _since(value: str) -> None:
    if value != "0":
        raise _NotAllowed("must be 0")


def _inspection(request: _Request) -> str:
    return f"{request.version}/containers/{request.subject}/json"


_Rule = Callable[[Policy, _Request], Call]
_Route = tuple[str, re.Pattern[str], _Rule]


def _routes(*rows: tuple[str, str, _Rule]) -> tuple[_Route, ...]:
    """Method, pattern of the whole path, rule; from methods and patterns of paths behind the version."""
    return tuple((method, re.compile(_VERSION + f"(?P<path>{path})", re.ASCII), rule) for method, path, rule in rows)


_ROUTES = _routes(
    ("GET", "/_ping", _without_parameters),
    ("GET", "/version", _without_parameters),
    ("GET", "/events", _events),
    ("GET", "/containers/json", _list),
    ("POST", "/containers/create", _create),
    ("GET", f"/images/(?P<subject>{_IMAGE}|{_IMAGE_ID})/json", _image),
    ("GET", f"/containers/(?P<subject>{_NAME})/json", _inspect),
    ("GET", f"/containers/(?P<subject>{_NAME})/logs", _logs),
    ("POST", f"/containers/(?P<subject>{_NAME})/start", _start),
    ("POST", f"/containers/(?P<subject>{_NAME})/kill", _kill),
    ("DELETE", f"/containers/(?P<subject>{_NAME})", _remove),
)
_SWARM_ROUTES = _routes(
    ("GET", "/_ping", _without_parameters),
    ("GET", "/version", _without_parameters),
    ("GET", "/events", _swarm_events),
    ("GET", "/nodes", _without_parameters),
    ("GET", "/services", _of_scope),
    ("GET", "/tasks", _of_scope),
    ("GET", f"/networks/(?P<subject>{_NAME})", _network),
    ("GET", f"/images/(?P<subject>{_IMAGE}|{_IMAGE_ID})/json", _image),
    ("POST", "/services/create", _create_service),
    ("GET", f"/services/(?P<subject>{_NAME})", _inspect_service),
    ("GET", f"/services/(?P<subject>{_NAME})/logs", _service_logs),
    ("POST", f"/services/(?P<subject>{_NAME})/update", _scale_service),
    ("DELETE", f"/services/(?P<subject>{_NAME})", _remove_service),
    ("GET", f"/configs/(?P<subject>{_NAME})", _read_lease),
    ("POST", "/configs/create", _create_lease),
    ("POST", f"/configs/(?P<subject>{_NAME})/update", _write_lease),
)
_WITH_BODY = frozenset({_create, _create_service, _scale_service, _create_lease, _write_lease})


def judge(policy: Policy, method: str, path: str, query: str, body: bytes) -> Call | Refusal:
    """What to send to the engine for a request, if anything.

    Args:
        policy: what is allowed.
        method: as it came, upper case.
        path: as it came, not decoded: no allowed path needs a `%`, so one with it is not allowed.
        query: as it came, without the `?`.
        body: the whole of it.
    """
    try:
        for verb, pattern, rule in _SWARM_ROUTES if policy.swarm else _ROUTES:
            if verb == method and (found := pattern.fullmatch(path)):
                if body and rule not in _WITH_BODY:
                    raise _NotAllowed("this call has no body")
                parts = found.groupdict()
                return rule(policy, _Request(parts["version"] or "", parts["path"], parts.get("subject", ""), query, body))
        raise _NotAllowed("this call is not among those that are allowed")
    except _NotAllowed as error:
        return Refusal(_printable(str(error)))


def within(policy: Policy, call: Call, inspected: bytes) -> Call | Refusal:
    """The call, if what it is about may be touched.

    A container or service must carry our scope's label; its full id is put into the path. An image must carry the label of a
    stage's. Full ids are never used again, and labels never change but by whoever is at the engine itself, so what was
    inspected is what will be acted on.

    Args:
        policy: what is allowed.
        call: one with an `inspection`.
        inspected: the engine's answer to that inspection.
    """
    try:
        found = json.loads(inspected)
        spec = found["Spec"] if call.of == "service" else found["Config"]
        full_id, labels = found["ID" if call.of == "service" else "Id"], spec["Labels"] or {}
        scope, kind = labels.get(SCOPE_LABEL), labels.get(IMAGE_LABEL)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Refusal(f"the engine's inspection of the {call.of} could not be read")
    if call.of == "image":
        if isinstance(kind, str) and kind in STAGE_IMAGES:
            return call
        return Refusal(f"the image does not carry the label {IMAGE_LABEL} of a stage's")
    pattern = _SERVICE_ID if call.of == "service" else _FULL_ID
    if not isinstance(full_id, str) or not pattern.fullmatch(full_id):
        return Refusal(f"the engine's inspection of the {call.of} has no full id")
    if scope != policy.scope:
        return Refusal(f"the {call.of} does not carry the label {SCOPE_LABEL}={policy.scope}")
    body = json.dumps({**spec, "Mode": {"Replicated": {"Replicas": 0}}}).encode() if call.to_none else call.body
    return replace(call, path=call.path.replace("{id}", full_id), body=body)


def _printable(reason: str) -> str:
    """A reason may quote a request: one line of it, and not all of a long one."""
    return "".join(letter if letter.isprintable() else "?" for letter in reason)[:300]
