"""Replicas killed under load: every task ends in exactly one outcome, and what can be answered is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.system.edge import Edge, until


def kill_with_a_task_in_its_hands(edge: Edge, service: str) -> str:
    """Kill one replica of a service while it holds a task; which one it was.

    Tasks take milliseconds, so a replica is stopped until one is stuck there. All may go to the other, which is then tried.
    """
    pids = edge.pids()
    for victim in (*edge.replicas(service), *edge.replicas(service), *edge.replicas(service)):
        os.kill(pids[victim], signal.SIGSTOP)
        stuck = False
        try:
            time.sleep(0.1)
            stuck = all(edge.gauge("espalier_gateway_inflight_requests") > 0 for _ in range(5))
        finally:
            os.kill(pids[victim], signal.SIGKILL if stuck else signal.SIGCONT)
        if stuck:
            return victim
    raise AssertionError(f"no replica of {service} is sent anything")


@pytest.mark.parametrize("service", ["encode", "tokenise"])
def test_with_a_second_replica_no_task_is_lost_and_the_next_second_is_clean(edge: Edge, service: str, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    with edge.load(tmp_path, 40, 5) as load:
        load.wait_for(40)
        victim = kill_with_a_task_in_its_hands(edge, service)
        ended = load.ended()
        ran = load.finish()
        counted = load.counted()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == [], "there was a second replica for every one of them"
    assert counted == ran.outcomes, "gateway and generator agree"
    clean = ran.scheduled_from(ran.when(ended) + 1)
    assert len(clean) > 20
    assert {task["outcome"] for task in clean} == {"on_time"}
    until(lambda: len(edge.replicas(service)) == 2 and victim not in edge.replicas(service), "it has been replaced")


def test_without_a_second_replica_each_task_of_the_gap_ends_once_and_the_next_replica_answers(
    edge: Edge, tmp_path: Path
) -> None:
    edge.want(tokenise=1, encode=1, pool=1)
    (victim,) = edge.replicas("encode")
    with edge.load(tmp_path, 30, 6) as load:
        load.wait_for(30)
        os.kill(edge.pids()[victim], signal.SIGKILL)
        ran = load.finish()
        counted = load.counted()
    ran.check_every_task_ended_once(load.tasks)
    assert counted == ran.outcomes, "gateway and generator agree"
    assert ran.unanswered, "there was a gap"
    assert {task["outcome"] for task in ran.unanswered} <= {"rejected", "failed", "expired"}
    assert {task["reason"] for task in ran.unanswered} <= {"upstream_error", "no_replica", "expired", "overloaded"}
    edge.want(tokenise=1, encode=1, pool=1)
    assert victim not in edge.replicas("encode")
    with edge.load(tmp_path, 30, 1) as load:
        assert load.finish().outcomes == {"on_time": load.tasks}
