from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from orchestrator import render
from orchestrator.__main__ import main
from orchestrator.errors import UsageError
from orchestrator.render import Options
from tests.orchestrator.examples import TESTBED, load

OPTIONS = Options("small", "./small.yaml", tag="1")
EVERYWHERE = TESTBED.replace("gateway: {port: 0}", "gateway: {node: all, port: 8081}")


def document(text: str = TESTBED, options: Options = OPTIONS) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(render.stack(load(text), options))
    return found


def test_a_gateway_on_every_box_is_that_box_s_own_ingress_and_is_told_its_node() -> None:
    gateway = document(EVERYWHERE)["services"]["gateway"]
    assert gateway["deploy"]["mode"] == "global"
    assert gateway["deploy"]["endpoint_mode"] == "dnsrr"
    assert gateway["ports"] == [{"target": 8080, "published": 8081, "protocol": "tcp", "mode": "host"}]
    assert gateway["environment"] == {"ESPALIER_NODE": "{{.Node.Hostname}}", "ESPALIER_NAME": "gateway-{{.Node.Hostname}}"}


def test_a_gateway_on_one_node_is_pinned_to_the_box_of_that_name() -> None:
    deploy = document()["services"]["gateway"]["deploy"]
    assert (deploy["mode"], deploy["replicas"]) == ("replicated", 1)
    assert deploy["placement"]["constraints"] == ["node.hostname == edge-1"]


def test_the_control_plane_is_on_managers_and_only_the_proxy_has_the_socket() -> None:
    services = document()["services"]
    for name in ("orchestrator", "socket-proxy"):
        assert services[name]["deploy"]["placement"]["constraints"] == ["node.role == manager"]
    assert "ports" not in services["orchestrator"]
    mounts = {name: [volume.get("source") for volume in service["volumes"]] for name, service in services.items()}
    assert [name for name, sources in mounts.items() if render.SOCKET in sources] == ["socket-proxy"]
    assert [name for name, service in services.items() if "control" in service["networks"]] == ["socket-proxy", "orchestrator"]


def test_another_testbed_file_is_another_config() -> None:
    names = {document(text)["configs"]["testbed"]["name"] for text in (TESTBED, EVERYWHERE)}
    assert len(names) == 2
    assert names.isdisjoint({""})


def test_models_lie_in_a_volume_of_each_box_or_in_a_directory_that_all_have() -> None:
    assert document()["volumes"]["models"] == {"name": "small_models"}
    elsewhere = document(options=Options("small", "./small.yaml", models="/srv/models"))
    assert "models" not in elsewhere["volumes"]
    orchestrator = elsewhere["services"]["orchestrator"]
    assert {"type": "bind", "source": "/srv/models", "target": "/models", "read_only": True} in orchestrator["volumes"]
    assert "--engine-models=/srv/models" in orchestrator["command"]
    with pytest.raises(UsageError, match="must be absolute"):
        document(options=Options("small", "./small.yaml", models="models"))


def test_of_several_orchestrators_one_leads_and_gateways_know_of_the_others() -> None:
    services = document(options=Options("small", "./small.yaml", orchestrators=2))["services"]
    deploy = services["orchestrator"]["deploy"]
    assert (deploy["replicas"], deploy["placement"]["max_replicas_per_node"]) == (2, 1)
    assert "--lease" in services["orchestrator"]["command"]
    assert services["gateway"]["command"].count("--routes-url=http://orchestrator:8090/v1/routes") == 2
    assert "--lease" not in document()["services"]["orchestrator"]["command"]


def test_every_service_is_without_rights_and_limited() -> None:
    for service in document()["services"].values():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["deploy"]["resources"]["limits"]["memory"]


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker client")
@pytest.mark.parametrize("text", [TESTBED, EVERYWHERE])
def test_docker_takes_the_file_that_the_command_writes(text: str, tmp_path: Path) -> None:
    testbed, file = tmp_path / "testbeds" / "small.yaml", tmp_path / "stack" / "stack.yaml"
    testbed.parent.mkdir()
    testbed.write_text(text)
    result = CliRunner().invoke(main, ["render", "stack", str(testbed), "--out", str(file), "--name", "edge"])
    assert result.exit_code == 0, result.output
    found = subprocess.run(["docker", "stack", "config", "-c", str(file)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    taken = yaml.safe_load(found.stdout)
    assert set(taken["services"]) == {"socket-proxy", "orchestrator", "gateway", "prometheus"}
    assert Path(taken["configs"]["testbed"]["file"]) == testbed


def test_without_a_file_the_stack_goes_to_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text(TESTBED)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["render", "stack", "small.yaml"])
    assert yaml.safe_load(result.stdout)["configs"]["testbed"]["file"] == "./small.yaml"
