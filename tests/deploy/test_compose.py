"""What `docker-compose.yml` promises: every service confined, one at the socket, loopback ports, nothing pulled by `up`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOCKET = "/var/run/docker.sock"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
every_service = pytest.mark.parametrize("name", SERVICES)


@every_service
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    forbidden = {"privileged", "cap_add", "pid", "ipc", "userns_mode", "devices", "volumes_from", "extra_hosts"}
    assert not forbidden & service.keys()


@every_service
def test_only_the_proxy_is_root_and_at_the_socket(name: str) -> None:
    service = SERVICES[name]
    mounts = [volume["target"] if isinstance(volume, dict) else volume for volume in service.get("volumes", [])]
    at_socket = any(SOCKET in mount for mount in mounts)
    assert at_socket == (name == "socket-proxy")
    assert (service["user"].split(":")[0] == "0") == (name == "socket-proxy")


def test_the_proxy_is_reached_by_the_orchestrator_alone() -> None:
    assert COMPOSE["networks"]["control"] == {"internal": True}
    assert SERVICES["socket-proxy"]["networks"] == ["control"]
    assert "ports" not in SERVICES["socket-proxy"]
    assert {name for name, service in SERVICES.items() if "control" in service.get("networks", [])} == {
        "socket-proxy", "orchestrator",
    }  # fmt: skip


@every_service
def test_ports_are_on_loopback_but_the_gateways(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("${ESPALIER_BIND:-0.0.0.0}:" if name == "gateway" else "127.0.0.1:")


@every_service
def test_files_of_the_host_are_read_only(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        if isinstance(volume, dict):
            assert volume["type"] == "bind"
            assert volume["read_only"] is True
        elif volume.split(":")[0] not in COMPOSE["volumes"]:
            assert volume.endswith(":ro")


@every_service
def test_own_images_are_built_here_and_never_pulled(name: str) -> None:
    service = SERVICES[name]
    if not service["image"].startswith("espalier/"):
        assert service["profiles"]  # nothing that `docker compose up` alone would pull
        return
    assert service["pull_policy"] == "never"
    builders = [other for other in SERVICES.values() if other["image"] == service["image"] and "build" in other]
    assert len(builders) == 1
    assert builders[0]["build"]["args"]["BASE_IMAGE"] == "${BASE_IMAGE:-python:3.11-slim}"


@every_service
def test_a_health_check_is_cheap_and_valid_for_old_engines(name: str) -> None:
    check = SERVICES[name].get("healthcheck")
    if check is not None:
        assert check["test"][:2] == ["CMD", "healthcheck"]
        assert check.keys() <= {"test", "interval", "timeout", "retries", "start_period"}


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker client")
def test_compose_takes_the_file_under_another_name() -> None:
    command = ["docker", "compose", "--profile", "*", "config", "--format", "json"]
    environment = {**os.environ, "COMPOSE_PROJECT_NAME": "other"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)
    assert read["volumes"]["models"]["name"] == "other_models"
    assert "--engine-models=other_models" in read["services"]["orchestrator"]["command"]
    assert "--network=other_default" in read["services"]["socket-proxy"]["command"]


def test_what_up_starts() -> None:
    started = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert started == {"models", "stage-image", "socket-proxy", "orchestrator", "prometheus", "gateway"}


def test_down_takes_the_gateway_before_the_orchestrator() -> None:
    assert "orchestrator" in SERVICES["gateway"]["depends_on"]
    assert SERVICES["orchestrator"]["stop_grace_period"] == "45s"


def test_the_containers_of_the_orchestrator_are_those_that_the_proxy_lets_pass() -> None:
    def flags(service: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for word in SERVICES[service]["command"]:
            if word.startswith("--"):
                name, _, value = word.partition("=")
                found.setdefault(name, []).append(value)
        return found

    acts, lets = flags("orchestrator"), flags("socket-proxy")
    assert lets["--image"] == acts["--engine-image"] + acts["--engine-gpu-image"]
    assert lets["--network"] == acts["--engine-network"]
    assert lets["--models"] == acts["--engine-models"]
    assert lets["--project"] == acts["--engine-project"] == lets["--scope"]
    assert lets["--image"] == [SERVICES[name]["image"] for name in ("stage-image", "stage-gpu-image")]
