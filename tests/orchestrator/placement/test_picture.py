from __future__ import annotations

from xml.etree import ElementTree

import pytest

from orchestrator.core import Service, Target
from orchestrator.placement import explain
from orchestrator.placement.explain import Beside, Plan
from orchestrator.placement.picture import picture
from orchestrator.placement.program import Limits
from tests.orchestrator.placement.instances import line, small

SVG = "{http://www.w3.org/2000/svg}"
LIGHT = Service("pool <&>", "light", 0.5, 1)


def plan() -> Plan:
    beside = Beside((LIGHT,), {LIGHT.name: Target(1), "s0": Target(1, 1)})
    return explain.make(line(2, 0.5, gamma=0.5), Limits(gap=0.0), beside)


def test_every_node_and_replica_is_in_the_picture() -> None:
    made = plan()
    root = ElementTree.fromstring(picture(made))
    assert root.tag == f"{SVG}svg"
    for node in made.problem.nodes:
        (card,) = root.findall(f"{SVG}g[@id='node-{node.name}']")
        said = [text.text for text in card.iter(f"{SVG}text")]
        assert node.name in said
        for service in ("s0", "s1", LIGHT.name):
            ready, idle = made.placement.ready_on(service, node.name), made.placement.standby_on(service, node.name)
            line = f"{service} × {ready}" + (f" + {idle} standby" if idle else "")
            assert (line in said) == bool(ready or idle)
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("width") == box.get("height") == "9"]
    tables = (made.placement.ready, made.placement.standby)
    assert len(boxes) == sum(count for table in tables for row in table.values() for count in row.values())
    assert sum(box.get("fill") == "none" for box in boxes) == 1


def test_flows_are_arrows_with_their_rate() -> None:
    # All replicas are at a; 0.4 of a task a second come from c and go back there.
    root = ElementTree.fromstring(picture(explain.make(line(2, 0.5), Limits(gap=0.0))))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert [title for title in titles if "tasks/s" in title] == ["c to a: 0.4 tasks/s, 0.0% of the link"]
    assert "a and c: 1e+04 ms" in titles
    assert len(list(root.iter(f"{SVG}polygon"))) == 1


@pytest.mark.parametrize("seed", [14, 38])
def test_nothing_is_drawn_outside(seed: int) -> None:
    root = ElementTree.fromstring(picture(explain.make(small(seed), Limits(gap=0.0))))
    wide, high = float(root.get("width", "0")), float(root.get("height", "0"))
    for box in root.findall(f"{SVG}g/{SVG}rect"):
        x, y = float(box.get("x", "-1")), float(box.get("y", "-1"))
        assert 0 <= x <= wide - float(box.get("width", "0"))
        assert 0 <= y <= high - float(box.get("height", "0"))
