"""Scaling and replacing under load lose no task."""

from __future__ import annotations

from pathlib import Path

from tests.system.edge import SERVICES, Edge


def test_from_one_to_three_to_one_and_every_replica_replaced_with_none_of_1000_tasks_lost(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=1, encode=1, pool=1)
    first = edge.pids()
    # While new processes load, two cores leave the one encoder little: it may fall behind, and must not give up.
    with edge.load(tmp_path, 62.5, 16, deadline_s=8) as load:
        load.wait_for(20)
        for service in SERVICES:
            edge.espalier("scale", service, "3", "--wait")
        for service in SERVICES:
            edge.espalier("scale", service, "1", "--wait")
        edge.espalier("restart", "--all", "--wait")
        last = edge.pids()
        ran = load.finish()
        counted = load.counted()
    ran.check_every_task_ended_once(1000)
    assert ran.unanswered == []
    assert counted == ran.outcomes, "gateway and generator agree"
    assert last["gateway"] == first["gateway"]
    assert first.keys() & last.keys() == {"gateway"}, "every replica has been replaced"
    for service in SERVICES:
        assert len(ran.seen(service)) >= 4, f"the tasks saw three replicas of {service} and the one that replaced the last"
