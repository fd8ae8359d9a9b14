from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import plan as plans
from orchestrator import rollout
from orchestrator.plan import Plan
from orchestrator.rollout import FAILED_STARTS, Rollout, Standing
from tests.orchestrator.examples import TESTBED, export, load

SETTLED = Standing((), {})


class Testbed:
    """What an update acts on: the plans that were put into force, and what it is told of how far they are."""

    __test__ = False

    def __init__(self, home: Path, look: Callable[[int], Standing]) -> None:
        export(home)
        self.old, self.new = (
            plans.make(load(text), home / "models") for text in (TESTBED, TESTBED.replace("replicas: 2", "replicas: 3"))
        )
        self.taken: list[Plan] = []
        self.looks = self.reverted = 0
        self._look = look

    def rollout(self) -> Rollout:
        return Rollout(self.old, self.new, settle=self.settle, take=self.taken.append, look=self.look, revert=self.revert)

    async def settle(self, plan: Plan) -> Plan:
        self.new = replace(plan, placed={"encode": {"edge-2": 3}})
        return self.new

    def revert(self) -> None:
        self.reverted += 1

    def look(self) -> Standing:
        self.looks += 1
        return self._look(self.looks)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "POLL_S", 0.0)


async def test_an_update_ends_with_the_new_plan_once_all_is_settled(tmp_path: Path) -> None:
    testbed = Testbed(tmp_path, lambda looks: SETTLED if looks > 4 else Standing(("encode",), {}))
    update = testbed.rollout()
    assert update.progress.state == "rolling"
    await update.run(limit_s=60)
    assert testbed.taken == [update.both, testbed.new]
    assert testbed.reverted == 0
    assert (update.progress.state, update.progress.sha256) == ("done", testbed.new.loaded.sha256)


async def test_a_replica_that_fails_again_and_again_brings_the_old_plan_back(tmp_path: Path) -> None:
    def look(looks: int) -> Standing:
        if looks > 10:
            return SETTLED
        return Standing(("encode",), {("encode", "edge-1"): min(looks, FAILED_STARTS)})

    testbed = Testbed(tmp_path, look)
    update = testbed.rollout()
    await update.run(limit_s=60)
    assert testbed.taken == [update.both, testbed.old]
    assert update.progress.state == "rolled_back"
    assert testbed.reverted == 1
    assert update.progress.reason == "encode on edge-1 failed 3 times in a row"


async def test_failures_of_before_are_not_held_against_the_new_plan(tmp_path: Path) -> None:
    failing = {("pool", "edge-2"): 7}
    testbed = Testbed(tmp_path, lambda looks: Standing((), failing) if looks > 4 else Standing(("encode",), failing))
    update = testbed.rollout()
    await update.run(limit_s=60)
    assert update.progress.state == "done"


async def test_time_that_runs_out_brings_the_old_plan_back(tmp_path: Path) -> None:
    testbed = Testbed(tmp_path, lambda looks: SETTLED if looks > 5 else Standing(("encode", "pool"), {}))
    update = testbed.rollout()
    await update.run(limit_s=0)
    assert testbed.taken == [update.both, testbed.old]
    assert update.progress.reason == "not ready after 0 s: encode, pool"


async def test_an_old_state_that_does_not_come_back_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "RETURN_LIMIT_S", 0.0)
    testbed = Testbed(tmp_path, lambda _: Standing(("encode",), {}))
    update = testbed.rollout()
    await update.run(limit_s=0)
    assert update.progress.state == "rolled_back"
    assert "the old state is not all back either: not ready after 0 s: encode" in update.progress.reason
