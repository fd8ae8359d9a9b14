"""The command line, and with it the orchestrator process, against fake stages and a fake gateway."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from orchestrator import display, facts
from orchestrator.__main__ import export_words, main
from orchestrator.state_dir import StateDir
from services.dataplane import routes
from tests.orchestrator.examples import TESTBED, export, load

FAKES = {
    "ESPALIER_STAGE_MODULE": "tests.orchestrator.fake_stage",
    "ESPALIER_GATEWAY_MODULE": "tests.orchestrator.fake_gateway",
}


@dataclass
class Terminal:
    """A user with a testbed file."""

    home: Path
    text: str = TESTBED
    state: StateDir = field(init=False)

    def __post_init__(self) -> None:
        self.state = StateDir(self.home / "state")
        self.testbed = self.home / "small.yaml"
        self.write(self.text)

    def write(self, text: str) -> None:
        self.testbed.write_text(text)

    def run(self, command: str, *arguments: str) -> Result:
        files = [str(self.testbed)] if command in ("up", "bench", "validate") else []
        models = ["--models-dir", str(self.home / "models")] if command in ("up", "validate") else []
        state = [] if command == "validate" else ["--state-dir", str(self.state.root)]
        return CliRunner(env=FAKES).invoke(main, [command, *files, *models, *state, *arguments])

    def good(self, command: str, *arguments: str) -> str:
        result = self.run(command, *arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.good("status", "-o", "json"))
        return found

    def settle(self) -> dict[str, Any]:
        """The status when everything is as wanted, standbys and replacements too."""
        end = time.monotonic() + 15
        while True:
            status = self.status()
            if all(service["settled"] for service in status["services"].values()):
                return status
            assert time.monotonic() < end, status

    def pids(self) -> dict[str, int]:
        return {r["id"]: r["pid"] for service in self.status()["services"].values() for r in service["replicas"]}


def runs(pid: int) -> bool:
    """Whether a process runs; one that ended and was left to an init that waits for nobody does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    export(tmp_path)
    found = Terminal(tmp_path)
    yield found
    found.run("down")


def test_a_testbed_comes_up_is_scaled_survives_its_orchestrator_and_goes_down(terminal: Terminal) -> None:
    url = terminal.good("up").strip()
    assert terminal.status()["ready"]
    status = terminal.settle()
    assert status["gateway"]["url"] == url
    assert {name: s["states"]["ready"] for name, s in status["services"].items()} == {"tokenise": 1, "encode": 2, "pool": 1}
    assert status["services"]["tokenise"]["states"]["standby"] == 1
    assert "as ordered" in status["decision"]["reason"] or "new order" in status["decision"]["reason"]

    terminal.good("scale", "pool", "3", "--wait")
    terminal.good("scale", "pool", "auto")
    until = time.monotonic() + 15
    while (states := terminal.status()["services"]["pool"]["states"]) != {
        "starting": 0,
        "standby": 0,
        "ready": 1,
        "draining": 0,
    }:
        assert time.monotonic() < until, states
    terminal.good("scale", "pool", "1", "--standby", "1", "--wait")
    assert terminal.status()["services"]["pool"]["states"] == {"starting": 0, "standby": 1, "ready": 1, "draining": 0}

    before = terminal.pids()
    terminal.good("restart", "encode", "--wait")
    after = terminal.pids()
    assert {r for r in before if not r.startswith("encode")} == {r for r in after if not r.startswith("encode")}
    assert not {r for r in before if r.startswith("encode")} & after.keys()

    daemon = terminal.state.read_daemon()
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGKILL)
    os.waitpid(daemon.pid, 0)
    assert terminal.run("status").exit_code == 4
    assert terminal.good("up").strip() == url
    assert terminal.pids() == after, "everything was adopted"
    assert terminal.status()["services"]["pool"]["wanted"] == {"ready": 1, "standby": 1}, "and the orders were kept"
    applied = routes.load(terminal.state.gateway_routes)
    assert applied is not None
    assert applied.version == terminal.status()["version"]

    terminal.good("down")
    assert not any(runs(pid) for pid in [*after.values(), status["gateway"]["pid"]])
    assert terminal.run("status").exit_code == 4
    assert list(terminal.state.root.glob("replicas/*")) == []


def test_a_changed_testbed_replaces_only_what_changed(terminal: Terminal) -> None:
    terminal.good("up")
    terminal.settle()
    before, daemon = terminal.pids(), terminal.state.read_daemon()
    terminal.good("up")
    assert terminal.pids() == before, "up again changes nothing"
    terminal.write(TESTBED.replace("stage: pool, cpus: 0.1", "stage: pool, cpus: 0.2"))
    terminal.good("up")
    after = terminal.pids()
    assert terminal.state.read_daemon() == daemon, "the orchestrator goes on"
    assert {r: p for r, p in before.items() if "pool" not in r} == {r: p for r, p in after.items() if "pool" not in r}
    assert "pool-1" not in after
    assert terminal.status()["update"]["state"] == "done"


def test_an_update_whose_replicas_do_not_start_is_rolled_back(terminal: Terminal) -> None:
    terminal.good("up")
    terminal.settle()
    before, sha256 = terminal.pids(), terminal.status()["sha256"]
    terminal.write(
        TESTBED.replace("stage: pool,", "stage: broken,").replace("stage: encode, cpus: 0.5", "stage: encode, cpus: 0.4")
    )
    result = terminal.run("up")
    assert result.exit_code == 3
    assert "rolled back: pool on edge-" in result.stderr
    assert "failed 3 times in a row" in result.stderr
    assert terminal.status()["sha256"] == sha256
    after = terminal.pids()
    assert {r: p for r, p in before.items() if "pool" in r} == {r: p for r, p in after.items() if "pool" in r}

    daemon = terminal.state.read_daemon()
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGKILL)
    os.waitpid(daemon.pid, 0)
    terminal.write(TESTBED)
    terminal.good("up")
    assert terminal.pids() == after, "what was in force comes back, and nothing is disturbed"


def test_an_update_that_cannot_be_is_refused_at_once(terminal: Terminal) -> None:
    terminal.good("up")
    before = terminal.settle() and terminal.pids()
    for text, said in (
        (TESTBED.replace("gateway: {port: 0}", "gateway: {port: 1}"), "gateway cannot change while the testbed is up"),
        (TESTBED.replace("replicas: 2", "replicas: 50"), "no node has room"),
    ):
        terminal.write(text)
        result = terminal.run("up")
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert terminal.pids() == before


def test_a_file_that_changed_while_nobody_looked_is_an_update_too(terminal: Terminal) -> None:
    terminal.good("up")
    terminal.settle()
    before, daemon = terminal.pids(), terminal.state.read_daemon()
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGKILL)
    os.waitpid(daemon.pid, 0)
    terminal.write(TESTBED.replace("stage: pool, cpus: 0.1", "stage: pool, cpus: 0.2"))
    terminal.good("up")
    after = terminal.pids()
    assert terminal.status()["update"]["state"] == "done"
    assert {r: p for r, p in before.items() if "pool" not in r} == {r: p for r, p in after.items() if "pool" not in r}
    assert "pool-1" not in after


def test_down_sweeps_up_after_an_orchestrator_that_died(terminal: Terminal) -> None:
    terminal.good("up")
    terminal.settle()
    pids, daemon = terminal.pids(), terminal.state.read_daemon()
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGKILL)
    os.waitpid(daemon.pid, 0)
    result = terminal.run("down")
    assert result.exit_code == 0
    assert f"{len(pids) + 1} replicas and gateways without an orchestrator were stopped" in result.stderr
    assert not any(runs(pid) for pid in pids.values())


def test_the_orchestrator_starts_a_killed_gateway_again(terminal: Terminal) -> None:
    terminal.good("up")
    gateway = terminal.status()["gateway"]
    os.kill(gateway["pid"], signal.SIGKILL)
    end = time.monotonic() + 15
    while (now := terminal.status()["gateway"])["pid"] == gateway["pid"] or now["state"] != "ready":
        assert time.monotonic() < end
    assert now["url"] == gateway["url"]


def test_orders_that_make_no_sense_are_refused_with_a_reason(terminal: Terminal) -> None:
    terminal.good("up")
    for arguments, said in (
        (("scale", "encod", "2"), "there is no service 'encod'; did you mean encode?"),
        (("scale", "encode", "auto", "--wait"), "auto has no number to wait for; leave out --wait"),
        (("scale", "encode", "many"), "'many' is not a valid integer range; give a number of replicas, or auto"),
        (("scale", "encode", "0"), "encode keeps at least 1 replicas (its floor); asked for 0"),
        (("scale", "encode", "50"), "no node has room for replica 9 of 50 of encode"),
        (("restart", "pol"), "there is no service 'pol'; did you mean pool?"),
        (("restart",), "name one SERVICE, or give --all"),
    ):
        result = terminal.run(*arguments)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert "  encode" in terminal.good("status")


def test_a_stage_that_does_not_start_fails_the_set_up_and_says_which(terminal: Terminal) -> None:
    terminal.write(TESTBED.replace("stage: pool,", "stage: pool, nodes: [edge-1],"))
    result = CliRunner(env={**FAKES, "ESPALIER_STAGE_MODULE": "tests.orchestrator.no_such_module"}).invoke(
        main,
        ["up", str(terminal.testbed), "--models-dir", str(terminal.home / "models"), "--state-dir", str(terminal.state.root),
         "--limit", "6"],
    )  # fmt: skip
    assert result.exit_code == 3
    assert "pool has 0 of 1 ready" in result.stderr
    assert "No module named" in (terminal.state.root / "logs" / "pool-1.log").read_text()


def test_a_model_that_is_not_exported_fails_the_set_up(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    result = terminal.run("up")
    assert result.exit_code == 3
    assert "not there; export the model first (espalier export)" in result.stderr


def test_validate_prints_every_problem_and_exits_2(terminal: Terminal) -> None:
    assert "2 nodes, 3 services, 1 pipelines" in terminal.good("validate")
    terminal.write(TESTBED.replace("stage: pool,", "stage: pol,"))
    result = terminal.run("validate", "-o", "json")
    assert result.exit_code == 2
    problem = f"{terminal.testbed}:12: services.pool.stage: model 'tiny' has no stage 'pol'; did you mean pool?"
    assert json.loads(result.stdout) == {"valid": False, "problems": [problem]}
    assert result.stderr == problem + "\n"


def test_bench_passes_the_load_generators_exit_code_on(terminal: Terminal) -> None:
    assert terminal.run("bench").exit_code == 4, "nothing is up"
    terminal.good("up")
    assert terminal.run("bench", "--duration", "1").exit_code == 3, "the fake gateway serves no pipeline"


def in_foreground(terminal: Terminal, *arguments: str) -> subprocess.Popen[bytes]:
    # These tests may run in the background of a script, where interrupts are ignored, and children inherit that.
    at_a_terminal = ["env", "--default-signal=INT"]
    return subprocess.Popen(
        [*at_a_terminal, sys.executable, "-m", "orchestrator", *arguments, "--state-dir", str(terminal.state.root)],
        env={**os.environ, **FAKES}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_ctrl_c_in_the_foreground_stops_everything(terminal: Terminal) -> None:
    models = ["--models-dir", str(terminal.home / "models")]
    with in_foreground(terminal, "up", str(terminal.testbed), *models, "--foreground") as process:
        end = time.monotonic() + 20
        while terminal.run("status").exit_code or not terminal.status()["ready"]:
            assert time.monotonic() < end
        pids = terminal.pids()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not any(runs(pid) for pid in pids.values())


def test_a_termination_leaves_the_data_plane_running(terminal: Terminal) -> None:
    terminal.good("up")
    pids, daemon = terminal.settle() and terminal.pids(), terminal.state.read_daemon()
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGTERM)
    _, status = os.waitpid(daemon.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert all(runs(pid) for pid in pids.values())


def test_watching_ends_with_130_when_interrupted(terminal: Terminal) -> None:
    terminal.good("up")
    with in_foreground(terminal, "status", "--watch", "-o", "json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["testbed"] == "small"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_a_port_that_is_taken_fails_the_set_up_and_leaves_nothing(terminal: Terminal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        terminal.write(TESTBED.replace("port: 0", f"port: {taken.getsockname()[1]}"))
        result = terminal.run("up")
    assert result.exit_code == 3
    assert "Address already in use; free it, or choose another port under gateway" in result.stderr
    assert list(terminal.state.root.glob("replicas/*")) == []


def test_info_tells_of_every_model_whether_its_weights_are_trained(terminal: Terminal) -> None:
    there = terminal.home / "models"
    (there / "half").mkdir()
    (there / "half" / "manifest.json").write_text("{}")
    assert facts.gather(terminal.home, there)["models"] == {"tiny": "seeded"}, "half is no export"
    assert facts.gather(terminal.home, there)["serving"] == {}
    terminal.good("up")
    found = facts.gather(terminal.home, there)
    assert found["serving"] == {"small": {"tiny": "seeded"}}
    said = io.StringIO()
    Console(file=said, width=200).print(display.pairs(found))
    assert "small (tiny seeded)" in said.getvalue()


def test_a_model_is_exported_in_as_many_parts_and_precisions_as_the_file_says() -> None:
    model = load(TESTBED.replace("precisions: [float32, int8]", "precisions: [fp16, int8], cut: 2")).testbed.models["tiny"]
    assert export_words(model, Path("there/tiny")) == [
        "minilm", "--out", "there/tiny", "--precision", "float16", "--precision", "int8", "--cut", "2",
    ]  # fmt: skip
    assert "--cut" not in export_words(load().testbed.models["tiny"], Path("there/tiny"))


@pytest.mark.parametrize(
    ("words", "handed_on"),
    [
        (["export", "clip-tiny"], ["export", "clip-tiny", "--models-dir", "out/models"]),
        (
            ["export", "a/dir", "--cut", "2", "--precision", "fp16", "--precision", "int8", "--out", "x", "--force"],
            [
                "export",
                "a/dir",
                "--models-dir",
                "out/models",
                "--cut",
                "2",
                "--out",
                "x",
                "--precision",
                "fp16",
                "--precision",
                "int8",
                "--force",
            ],
        ),
        (["verify", "clip-tiny", "a/dir"], ["verify", "clip-tiny", "a/dir", "--models-dir", "out/models"]),
        (
            ["profile", "clip-tiny", "--threads", "1,2", "--quick", "--plot", "p.png"],
            [*("profile", "clip-tiny", "--models-dir", "out/models"), *("--plot", "p.png", "--quick", "--threads", "1,2")],
        ),
    ],
)
def test_a_command_for_one_model_is_handed_on(words: list[str], handed_on: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("orchestrator.__main__._models", lambda *arguments: asked.append(arguments))
    assert CliRunner().invoke(main, words).exit_code == 0
    assert asked == [tuple(handed_on)]


def test_a_testbed_says_itself_how_its_models_are_exported() -> None:
    result = CliRunner().invoke(main, ["export", "deploy/testbeds/demo.yaml", "--cut", "2"])
    assert result.exit_code == 2
    assert "says of each model how it is exported; --cut is for one MODEL" in result.stderr


def test_info_tells_versions_and_providers() -> None:
    result = CliRunner().invoke(main, ["info", "-o", "json"])
    found = json.loads(result.stdout)
    assert found["packages"]["espalier"]
    assert "CPUExecutionProvider" in found["providers"]
