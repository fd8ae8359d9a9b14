"""`docker compose up`: everything in containers, and what is killed there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from click.testing import CliRunner

from orchestrator.__main__ import main
from tests.system.composed import Composed
from tests.system.edge import until
from tests.system.engine import docker, program

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "minilm_reference.json").read_text())
SLOT_S = 1.0
"""Of composed.yaml."""


def embed(project: Composed, texts: list[str]) -> list[list[float]]:
    """Embeddings from the pipeline, by a plain JSON request."""
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]}
    answer = httpx.post(f"{project.url}/v2/models/embed/infer", json=body, trust_env=False, timeout=20)
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    found = np.array(outputs["embedding"]["data"]).reshape(outputs["embedding"]["shape"])
    return [list(row) for row in found]


def metric(project: Composed, name: str, **labels: str) -> float:
    """One series of the orchestrator's page."""
    page = httpx.get(f"{project.control}/metrics", trust_env=False, timeout=5).text
    wanted = "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
    (line,) = [line for line in page.splitlines() if line.startswith(f"{name}{wanted} ")]
    return float(line.split()[-1])


def test_the_first_answers_are_right(project: Composed) -> None:
    for text, expected in zip(REFERENCE["texts"], REFERENCE["embeddings"], strict=True):
        np.testing.assert_allclose(embed(project, [text])[0], expected, atol=1e-4)


def test_a_step_load_from_inside_the_network_is_answered(project: Composed) -> None:
    command = ["espalier", "bench", "/etc/espalier/testbed.yaml", "--url", "http://orchestrator:8090", "--wait", "60"]
    said = project.compose("--profile", "load", "run", "--rm", "-T", "loadgen", *command, "--warmup", "1", "-o", "json")
    report = json.loads(said)
    assert report["sent"] > 60
    assert report["outcomes"]["on_time"] + report["outcomes"]["late"] == report["sent"], "nothing was lost"
    assert report["cost"] > 0
    assert set(report["stages"]) == {"tokenise", "encode", "pool"}


def test_every_container_is_held_to_its_limits_and_has_no_rights(project: Composed) -> None:
    project.want(tokenise=1, encode=2, pool=2)
    for replica, container in project.replicas().items():
        host: dict[str, Any] = json.loads(docker("inspect", container))[0]["HostConfig"]
        assert host["ReadonlyRootfs"], replica
        assert not host["Privileged"], replica
        assert host["CapDrop"] == ["ALL"], replica
        assert host["Memory"] == (512 << 20 if replica.startswith("encode") else 128 << 20)
        assert host["NanoCpus"] == 1_000_000_000
        assert set(program(container).uids()) == {10001}


def test_a_standby_is_let_out_within_two_slots(project: Composed) -> None:
    project.want(tokenise=1, encode=2, pool=2)
    until(lambda: project.status()["services"]["tokenise"]["states"]["standby"] == 1, "a standby is loaded", 60)
    version = project.status()["version"]
    project.espalier("scale", "tokenise", "2", "--standby", "0")
    until(lambda: project.status()["services"]["tokenise"]["states"]["ready"] == 2, "it is let out", 2 * SLOT_S)
    until(lambda: project.gauge("espalier_gateway_routes_version") > version, "and the gateway knows", 2 * SLOT_S)
    project.espalier("scale", "tokenise", "1", "--standby", "1", "--wait")


def test_a_killed_stage_costs_no_task_and_is_replaced(project: Composed, tmp_path: Path) -> None:
    project.want(tokenise=1, encode=2, pool=2)
    before = project.replicas("encode")
    victim = min(before)
    with project.load(tmp_path, 30, 8) as load:
        load.wait_for(30)
        docker("kill", before[victim])
        ended = load.ended()
        ran = load.finish()
        counted = load.counted()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == [], "there was a second replica for every one of them"
    assert counted == ran.outcomes, "gateway and generator agree"
    clean = ran.scheduled_from(ran.when(ended) + 2 * SLOT_S)
    assert len(clean) > 20
    assert {task["outcome"] for task in clean} == {"on_time"}
    until(lambda: len(project.replicas("encode")) == 2 and victim not in project.replicas("encode"), "it is replaced", 60)
    assert docker("ps", "--all", "--quiet", "--no-trunc", "--filter", f"id={before[victim]}") == "", "the dead one is removed"


def test_a_killed_orchestrator_costs_no_task_and_adopts_what_runs(project: Composed, tmp_path: Path) -> None:
    project.want(tokenise=1, encode=2, pool=2)
    before = project.replicas()
    with project.load(tmp_path, 30, 6) as load:
        load.wait_for(20)
        # Not by `docker kill`, after which the engine takes it for stopped by hand and does not start it again.
        program(project.container("orchestrator")).kill()
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    until(lambda: answers(project) and project.status()["ready"], "its successor is there", 60)
    assert project.replicas() == before, "the same containers"


def test_a_restarted_orchestrator_is_no_end(project: Composed) -> None:
    project.want(tokenise=1, encode=2, pool=2)
    before = project.replicas()
    project.compose("restart", "orchestrator")
    until(lambda: answers(project) and project.status()["ready"], "it is back", 60)
    assert project.replicas() == before


def test_without_prometheus_control_goes_on(project: Composed, tmp_path: Path) -> None:
    project.want(tokenise=1, encode=2, pool=2)
    until(lambda: metric(project, "espalier_controller_sources", telemetry="prometheus") > 0, "it observes through it", 60)
    with project.load(tmp_path, 20, 6) as load:
        load.wait_for(20)
        project.compose("kill", "prometheus")
        until(lambda: metric(project, "espalier_controller_sources", telemetry="prometheus") == 0, "it asks by itself", 15)
        project.espalier("scale", "pool", "1", "--wait")
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    assert project.status()["slots"]["failed"] == 0
    assert project.status()["services"]["pool"]["signal"]["age_s"] < 3
    project.compose("start", "prometheus")
    until(lambda: metric(project, "espalier_controller_sources", telemetry="prometheus") > 0, "it is used again", 60)


def test_the_orchestrator_can_start_stages_and_nothing_else(project: Composed) -> None:
    asks = (
        "import docker, sys\n"
        "api = docker.APIClient('tcp://socket-proxy:2375', version='1.41')\n"
        "for name, call in {\n"
        "    'bind': lambda: api.create_container('x', host_config=api.create_host_config(binds=['/:/host'])),\n"
        "    'images': lambda: api.images(),\n"
        "    'volumes': lambda: api.volumes(),\n"
        "    'inspect': lambda: api.inspect_container(sys.argv[1]),\n"
        "}.items():\n"
        "    try:\n"
        "        call()\n"
        "    except docker.errors.APIError as error:\n"
        "        print(name, error.status_code)\n"
    )
    said = project.compose("exec", "-T", "orchestrator", "python", "-c", asks, project.container("gateway"))
    assert said.split("\n") == ["bind 403", "images 403", "volumes 403", "inspect 403"]
    sockets = project.compose("exec", "-T", "orchestrator", "sh", "-c", "ls /var/run/docker.sock 2>&1 || true")
    assert "No such file" in sockets


def test_the_decision_log_of_the_run_replays_to_the_same_decisions(project: Composed, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    log.write_text(project.compose("exec", "-T", "orchestrator", "cat", "/state/decisions.jsonl") + "\n")
    assert len(log.read_text().splitlines()) > 5
    replayed = CliRunner().invoke(main, ["replay", str(log)])
    assert replayed.exit_code == 0, replayed.output


def test_down_leaves_nothing(project: Composed) -> None:
    left = project.left()
    assert left["containers"]
    project.compose("down", "--volumes")
    assert project.left() == {"containers": [], "networks": [], "volumes": []}


def answers(project: Composed) -> bool:
    """Whether the control plane can be asked."""
    try:
        return httpx.get(f"{project.control}/health", trust_env=False, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
