"""The Docker SDK through the proxy, on the engine of this machine."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from orchestrator.socket_proxy.rules import Policy
from tests.engine import own_name
from tests.orchestrator.socket_proxy.example import container
from tests.orchestrator.socket_proxy.process import SOCKET, proxy_process

IMAGE = os.environ.get("BASE_IMAGE", "espalier/base:3.11")
SLEEP = ("sh", "-c", "echo here I am; exec sleep 300")


@pytest.fixture(scope="module")
def direct() -> Iterator[Any]:
    """The engine itself."""
    try:
        client = docker.APIClient(f"unix://{SOCKET}", timeout=30)
    except DockerException as error:
        pytest.skip(f"no Docker engine answers at {SOCKET}: {error}")
    with contextlib.closing(client):
        try:
            client.inspect_image(IMAGE)
        except ImageNotFound:
            pytest.skip(f"the engine has no image {IMAGE}; deploy/base-image.sh makes one")
        yield client


@pytest.fixture(scope="module")
def policy(direct: Any) -> Iterator[Policy]:
    """A scope of this run alone; what is left of it is removed at the end."""
    scope = own_name()
    yield Policy(scope, scope, frozenset({IMAGE}), "bridge", f"{scope}_models")
    for left in direct.containers(all=True, filters={"label": [f"espalier.scope={scope}"]}):
        direct.remove_container(left["Id"], force=True)
    with contextlib.suppress(NotFound):
        direct.remove_volume(f"{scope}_models")


@pytest.fixture(scope="module")
def through(policy: Policy) -> Iterator[Any]:
    """The engine through the proxy."""
    with proxy_process(policy) as (_, address), contextlib.closing(docker.APIClient(f"tcp://{address}", timeout=30)) as client:
        yield client


@pytest.fixture(scope="module")
def foreign(direct: Any) -> Iterator[str]:
    """A running container of somebody else."""
    made = direct.create_container(IMAGE, ["sleep", "300"], name=own_name(), labels={"espalier.scope": "x"})
    direct.start(made["Id"])
    yield made["Id"]
    direct.remove_container(made["Id"], force=True)


def test_a_container_of_ours_lives_its_whole_life(through: Any, direct: Any, policy: Policy, foreign: str) -> None:
    label = f"espalier.scope={policy.scope}"
    name = f"{policy.scope}-encode-1"
    events = through.events(filters={"label": [label], "type": "container", "event": ["start", "die", "destroy"]}, decode=True)
    # Of this nothing must be seen.
    direct.restart(foreign, timeout=0)
    made = through.create_container_from_config(container(policy, IMAGE, SLEEP), name)
    through.start(name)
    assert (event := next(events))["status"] == "start"
    assert event["id"] == made["Id"]
    seen = through.inspect_container(name)
    assert (seen["Id"], seen["State"]["Running"], seen["HostConfig"]["Privileged"]) == (made["Id"], True, False)
    assert [one["Id"] for one in through.containers(all=True, filters={"label": [label]})] == [made["Id"]]
    through.kill(name, "SIGKILL")
    assert next(events)["status"] == "die"
    assert through.logs(name, stdout=True, stderr=True, tail=20) == b"here I am\n"
    through.remove_container(name, force=True)
    assert next(events)["status"] == "destroy"
    events.close()
    with pytest.raises(NotFound):
        through.inspect_container(name)


def test_questions_about_the_engine_are_answered(through: Any, direct: Any) -> None:
    assert through.ping() is True
    assert through.version() == direct.version()
    assert through.inspect_image(IMAGE) == direct.inspect_image(IMAGE)


def test_a_container_that_is_not_ours_cannot_be_touched(through: Any, direct: Any, policy: Policy, foreign: str) -> None:
    name = direct.inspect_container(foreign)["Name"].lstrip("/")
    for subject in (foreign, foreign[:12], name):
        for act in (
            through.inspect_container,
            through.start,
            lambda it: through.kill(it, "SIGKILL"),
            lambda it: through.logs(it, tail=1),
            lambda it: through.remove_container(it, force=True),
        ):
            with pytest.raises(APIError, match="does not carry the label"):
                act(subject)
    assert through.containers(all=True, filters={"label": [f"espalier.scope={policy.scope}"]}) == []
    assert direct.inspect_container(foreign)["State"]["Running"]


def test_a_container_that_could_reach_the_host_is_not_made(through: Any, direct: Any, policy: Policy) -> None:
    body = container(policy, IMAGE, SLEEP)
    body["HostConfig"]["Binds"] = ["/:/host"]
    with pytest.raises(APIError, match=r"HostConfig\.Binds"):
        through.create_container_from_config(body, f"{policy.scope}-encode-2")
    # What the engine itself would have taken for a bind.
    body["HostConfig"]["binds"] = body["HostConfig"].pop("Binds")
    with pytest.raises(APIError, match=r"HostConfig\.binds"):
        through.create_container_from_config(body, f"{policy.scope}-encode-2")
    assert direct.containers(all=True, filters={"label": [f"espalier.scope={policy.scope}"]}) == []


def test_an_image_by_its_id_needs_the_label_of_a_stage(through: Any, direct: Any, policy: Policy) -> None:
    plain = direct.inspect_image(IMAGE)["Id"]
    files = io.BytesIO(f"FROM {IMAGE}\nLABEL espalier.image=stage\n".encode())
    tag = f"{policy.scope}:labelled"
    assert not any("error" in line for line in direct.build(fileobj=files, tag=tag, rm=True, decode=True))
    labelled = direct.inspect_image(tag)["Id"]
    try:
        with pytest.raises(APIError, match=r"does not carry the label espalier\.image"):
            through.create_container_from_config(container(policy, plain, SLEEP), f"{policy.scope}-encode-3")
        with pytest.raises(APIError, match=r"does not carry the label espalier\.image"):
            through.inspect_image(plain)
        assert through.inspect_image(labelled)["Id"] == labelled
        made = through.create_container_from_config(container(policy, labelled, SLEEP), f"{policy.scope}-encode-3")
        through.remove_container(made["Id"], force=True)
    finally:
        direct.remove_image(tag)


CALLS: dict[str, Callable[[Any, str], Any]] = {
    "exec": lambda engine, id: engine.exec_create(id, "sh"),
    "attach": lambda engine, id: engine.attach(id),
    "copy out": lambda engine, id: engine.get_archive(id, "/"),
    "copy in": lambda engine, id: engine.put_archive(id, "/", b""),
    "export": lambda engine, id: list(engine.export(id)),
    "diff": lambda engine, id: engine.diff(id),
    "top": lambda engine, id: engine.top(id),
    "stats": lambda engine, id: engine.stats(id, stream=False),
    "wait": lambda engine, id: engine.wait(id),
    "stop": lambda engine, id: engine.stop(id),
    "restart": lambda engine, id: engine.restart(id),
    "pause": lambda engine, id: engine.pause(id),
    "update": lambda engine, id: engine.update_container(id, mem_limit=1 << 30),
    "rename": lambda engine, id: engine.rename(id, "other"),
    "commit": lambda engine, id: engine.commit(id, "espalier/stage"),
    "prune": lambda engine, _: engine.prune_containers(),
    "containers": lambda engine, _: engine.containers(all=True),
    "create": lambda engine, _: engine.create_container(IMAGE, "sh"),
    "build": lambda engine, _: list(engine.build(fileobj=io.BytesIO(b"FROM scratch"))),
    "pull": lambda engine, _: engine.pull("espalier/other"),
    "push": lambda engine, _: engine.push("espalier/stage"),
    "images": lambda engine, _: engine.images(),
    "tag": lambda engine, _: engine.tag(IMAGE, "espalier/stage"),
    "remove image": lambda engine, _: engine.remove_image(IMAGE),
    "load": lambda engine, _: list(engine.load_image(b"")),
    "networks": lambda engine, _: engine.networks(),
    "connect": lambda engine, id: engine.connect_container_to_network(id, "host"),
    "volumes": lambda engine, _: engine.volumes(),
    "create volume": lambda engine, _: engine.create_volume("v"),
    "swarm": lambda engine, _: engine.init_swarm(),
    "nodes": lambda engine, _: engine.nodes(),
    "services": lambda engine, _: engine.services(),
    "secrets": lambda engine, _: engine.secrets(),
    "plugins": lambda engine, _: engine.plugins(),
    "info": lambda engine, _: engine.info(),
    "disk usage": lambda engine, _: engine.df(),
}


def test_everything_else_is_403(through: Any, direct: Any, policy: Policy) -> None:
    """Even on a container of ours. One test, for one container."""
    made = through.create_container_from_config(container(policy, IMAGE, SLEEP), f"{policy.scope}-encode-3")
    through.start(made["Id"])
    statuses = {}
    for name, call in CALLS.items():
        try:
            statuses[name] = call(through, made["Id"])
        except APIError as error:
            statuses[name] = error.status_code
    assert statuses == dict.fromkeys(CALLS, 403)
    assert direct.inspect_container(made["Id"])["State"]["Running"]
    through.remove_container(made["Id"], force=True)
