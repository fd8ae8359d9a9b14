"""Scaling and replacing under load lose no task."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.system.edge import SERVICES, Edge, Ran


def test_from_one_to_three_to_one_and_every_replica_replaced_with_none_of_1000_tasks_lost(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=1, encode=1, pool=1)
    first = edge.pids()
    # However long the changes take on this machine, load goes on until after the last of them.
    with ThreadPoolExecutor(1) as beside:
        ran = [some_load(edge, tmp_path)]
        changes = beside.submit(scale_and_replace, edge)
        while not changes.done() or len(ran) < 4:
            ran.append(some_load(edge, tmp_path))
        changes.result()
    ran.append(some_load(edge, tmp_path))
    last = edge.pids()
    assert sum(each.report["sent"] for each in ran) >= 1000
    assert sum((each.outcomes for each in ran), Counter()).keys() <= {"on_time", "late"}
    assert last["gateway"] == first["gateway"]
    assert first.keys() & last.keys() == {"gateway"}, "every replica has been replaced"
    for service in SERVICES:
        seen = set[str]().union(*(each.seen(service) for each in ran))
        assert len(seen) >= 4, f"the tasks saw three replicas of {service} and the one that replaced the last"


def scale_and_replace(edge: Edge) -> None:
    """Every service from one replica to three and back, and then each of them replaced; by commands beside this process."""
    changes = [["scale", service, count] for count in ("3", "1") for service in SERVICES] + [["restart", "--all"]]
    for change in changes:
        command = [sys.executable, "-m", "orchestrator", *change, "--wait", "--state-dir", str(edge.state.root)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr


def some_load(edge: Edge, directory: Path) -> Ran:
    """250 tasks in four seconds, each ended once and counted alike by gateway and generator."""
    # While new processes load, two cores leave the one encoder little: it may fall behind, and must not give up.
    with edge.load(directory, 62.5, 4, deadline_s=8) as load:
        ran = load.finish()
        assert load.counted() == ran.outcomes, "gateway and generator agree"
    ran.check_every_task_ended_once(250)
    return ran
