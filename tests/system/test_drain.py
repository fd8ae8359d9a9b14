"""A node is emptied under load, and no task is lost."""

from __future__ import annotations

from pathlib import Path

from tests.system.edge import Edge, until


def test_a_node_is_emptied_without_losing_a_task_and_used_again(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    with edge.load(tmp_path, 20, 8) as load:
        load.wait_for(10)
        edge.espalier("drain", "edge-2", "--wait")
        assert edge.status()["nodes"] == {
            "edge-1": {"state": "up", "replicas": 6},
            "edge-2": {"state": "drained", "replicas": 0},
        }
        ended = load.ended()
        ran = load.finish()
    assert ran.outcomes == {"on_time": load.tasks}
    assert ended < load.tasks, "it was drained under load"
    edge.espalier("undrain", "edge-2")
    until(lambda: edge.status()["nodes"]["edge-2"]["state"] == "up", "it is used again")
    edge.espalier("scale", "pool", "3", "--wait")
    assert {r["node"] for r in edge.status()["services"]["pool"]["replicas"]} == {"edge-1", "edge-2"}
