"""A burst between two slots lets a standby out, which serves at once and is a standby again when the burst is over."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.system.edge import PIPELINE, TESTBED, Edge, until

SLOT = "control: {policy: manual, slot: 30s}"
"""No slot begins within a burst by itself."""
TEXTS = [" ".join(["word"] * 100)] * 8
"""So many to a task that computing them takes longer than everything else."""
BURST = 12
BUDGET = 1.5 * BURST
"""Deadline of a task, in times that one takes. A quarter of it is due: half of the slack, shared by two hops."""


def test_a_burst_lets_a_standby_out_between_two_slots_and_loses_no_task(edge: Edge, tmp_path: Path) -> None:
    testbed = tmp_path / "edge.yaml"
    testbed.write_text(TESTBED.read_text().replace("control: {policy: manual}", SLOT))
    edge.up(testbed)
    for service in ("tokenise", "pool"):
        edge.espalier("scale", service, "1")
    edge.espalier("scale", "encode", "1", "--standby", "1", "--wait")
    (standby,) = [name for name, state in states(edge).items() if state == "standby"]

    alone = [ask(edge.url, 60.0) for _ in range(3)]
    assert standby not in {encoder(answer)["replica"] for answer in alone}, "nothing waits, so nothing is let out"
    deadline_s = min(BUDGET * max(encoder(answer)["compute_s"] for answer in alone), 60.0)

    slots, url = edge.status()["slots"]["done"], edge.url
    with ThreadPoolExecutor(BURST) as clients:
        answers = list(clients.map(lambda _: ask(url, deadline_s), range(BURST)))
    assert standby in {encoder(answer)["replica"] for answer in answers}
    assert counted(edge.url, "espalier_gateway_let_out_total", "encode") == {'stage="encode"': 1}
    assert counted(orchestrator(edge), "espalier_controller_let_out_total", "encode") == {'result="ok",stage="encode"': 1}
    status = edge.status()
    assert status["slots"]["done"] > slots, "it was told, which began a slot"
    assert status["decision"]["reason"].endswith("; let out: encode 1"), "and the decision keeps it"
    assert not status["services"]["encode"]["settled"]

    def taken_back() -> bool:
        edge.espalier("scale", "encode", "1", "--standby", "1")  # what is ordered already: a slot begins
        return "standby" in states(edge).values()

    before = states(edge).keys()
    until(taken_back, "the standby is taken back")
    assert states(edge).keys() == before, "none was started, none was stopped"
    edge.espalier("scale", "encode", "1", "--standby", "0", "--wait")


def ask(url: str, deadline_s: float) -> dict[str, Any]:
    """One task, answered."""
    text = {"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}
    answer = httpx.post(
        f"{url}/v2/models/{PIPELINE}/infer",
        json={"inputs": [text], "parameters": {"hops": True}},
        headers={"x-request-timeout-seconds": f"{deadline_s:g}"},
        timeout=deadline_s + 10,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def encoder(answer: dict[str, Any]) -> dict[str, Any]:
    """What the hop at the encoder reports."""
    (hop,) = [hop for hop in answer["parameters"]["hops"] if hop["service"] == "encode"]
    return dict(hop)


def states(edge: Edge) -> dict[str, str]:
    """State of every encoder."""
    return {replica["id"]: replica["state"] for replica in edge.status()["services"]["encode"]["replicas"]}


def orchestrator(edge: Edge) -> str:
    daemon = edge.state.read_daemon()
    assert daemon is not None
    return daemon.url


def counted(url: str, name: str, service: str) -> dict[str, float]:
    """Values of a counter for a service, by its labels."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = dict(line.removeprefix(f"{name}{{").split("} ") for line in lines if line.startswith(f"{name}{{"))
    return {labels: float(value) for labels, value in found.items() if f'stage="{service}"' in labels}
