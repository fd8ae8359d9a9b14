from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator import replay
from orchestrator.__main__ import main
from orchestrator.core import Target
from orchestrator.decision_log import DecisionLog
from orchestrator.errors import RunFailed, UsageError
from tests.orchestrator.scaling.test_manual import POLICY
from tests.orchestrator.test_decision_log import ORIGIN, append, write


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Five slots of one policy."""
    write(tmp_path / "decisions.jsonl")
    return tmp_path / "decisions.jsonl"


def edit(path: Path, line: int, change: Callable[[dict[str, Any]], None]) -> None:
    lines = path.read_text().splitlines()
    document = json.loads(lines[line - 1])
    change(document)
    lines[line - 1] = json.dumps(document)
    path.write_text("\n".join(lines) + "\n")


def test_a_log_decided_again_gives_the_same_decisions_and_states_bit_for_bit(log: Path) -> None:
    result = replay.replay(log)
    assert (result.slots, result.different, result.missing, result.cut_off) == (5, 0, 0, None)


def test_every_slot_is_decided_by_the_header_above_it(log: Path) -> None:
    write(log, policy=replace(POLICY, site=replace(POLICY.site, targets={"encode": Target(1), "pool": Target(1, 1)})))
    result = replay.replay(log)
    assert (result.slots, result.different) == (10, 0)
    assert [(run.line, run.slots) for run in result.runs] == [(1, 5), (7, 5)]


def test_another_policy_is_seen_to_decide_otherwise(log: Path) -> None:
    def fewer(header: dict[str, Any]) -> None:
        header["parameters"]["site"]["targets"]["encode"]["replicas"] = 1

    edit(log, 1, fewer)
    result = replay.replay(log)
    assert [(difference.line, difference.what) for difference in result.differences] == [(2, "decision"), (3, "state")]
    assert result.differences[0].replayed["reason"] == "new order: encode 1, pool 1+1"
    assert result.different == 2


def test_a_state_that_does_not_follow_is_seen(log: Path) -> None:
    """The same decision may come of a state that the slot before did not lead to."""
    edit(log, 3, lambda slot: slot["state"].update(placement=None))
    result = replay.replay(log)
    assert [(difference.line, difference.what) for difference in result.differences] == [(3, "state")]
    assert result.differences[0].logged == {"placement": None, "let_out": {}}


def test_a_run_begins_with_the_initial_state(log: Path) -> None:
    edit(log, 2, lambda slot: slot["state"].update(placement={"ready": {"encode": {"a": 1}}, "standby": {}}))
    assert replay.replay(log).differences[0].what == "state"


def test_slots_that_were_never_written_are_counted_and_break_no_chain(log: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2] + lines[4:]))
    result = replay.replay(log)
    assert (result.slots, result.missing, result.different) == (3, 2, 0)


def test_a_file_begun_in_the_middle_of_a_run_lacks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DecisionLog(path, lambda: ORIGIN)
    append(log)
    path.unlink()
    write(path, log)
    assert (replay.replay(path).missing, replay.replay(path).slots) == (0, 5)


def test_a_policy_that_fails_on_a_slot_says_on_which(log: Path) -> None:
    edit(log, 1, lambda header: header["parameters"]["site"].update(nodes=[]))
    with pytest.raises(RunFailed, match="fails on the slot of line 2: "):
        replay.replay(log)


def test_an_empty_file_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="there is no decision log in it"):
        replay.replay(tmp_path / "empty")


def command(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["replay", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_says_that_all_is_equal(log: Path) -> None:
    assert command(str(log)) == (0, f"{log}: 5 slots below 1 header decided again by manual: all equal\n", "")


def test_the_command_shows_what_differs_innermost_and_exits_1(log: Path) -> None:
    edit(log, 2, lambda slot: slot["decision"].update(reason="because"))
    code, out, _ = command(str(log))
    assert code == 1
    assert out.splitlines()[1] == f'{log}:2: decision.reason: logged "because", replayed "new order: encode 2, pool 1+1"'


def test_the_document_holds_both_sides(log: Path) -> None:
    edit(log, 2, lambda slot: slot["decision"].update(reason="because"))
    with log.open("a") as stream:
        stream.write('{"slot": 6')
    code, out, _ = command(str(log), "-o", "json")
    document = json.loads(out)
    assert code == 1
    assert (document["equal"], document["slots"], document["different"], document["cut_off"]) == (False, 5, 1, 7)
    assert document["runs"][0]["testbed"] == "small"
    assert document["differences"][0]["what"] == "decision"
    assert document["differences"][0]["logged"]["reason"] == "because"


def test_only_the_first_differences_are_kept(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", lambda: ORIGIN)
    for _ in range(replay.SHOWN + 5):
        append(log)
    code, out, _ = command(str(tmp_path / "log"))
    assert code == 1
    assert f"{replay.SHOWN + 5} different" in out
    assert f"only the first {replay.SHOWN} differences are shown" in out


def test_what_is_no_log_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "testbed.yaml").write_text("name: small\n")
    code, _, err = command(str(tmp_path / "testbed.yaml"))
    assert code == 2
    assert f"{tmp_path / 'testbed.yaml'}:1: no header of a decision log" in err
    assert command(str(tmp_path / "none"))[0] == 2
