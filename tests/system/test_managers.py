"""Three managers of a Swarm and two orchestrators: what is lost, is taken over. In this order, on one set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.boxed import LOST_S, ON_REQUEST, Boxes, Failed, boxed
from tests.system.edge import until

TAKEOVER_S = 15.0
pytestmark = ON_REQUEST


@pytest.fixture(scope="module")
def boxes(images: None, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    with boxed(tmp_path_factory.mktemp("boxes"), minilm.parent, managers=3, orchestrators=2) as boxes:
        yield boxes


def leader(boxes: Boxes) -> str:
    """The box of the orchestrator that leads; none while nobody does."""
    try:
        return boxes.leading()[0]
    except Failed:
        return ""


def test_two_orchestrators_stand_on_different_boxes_and_one_leads(boxes: Boxes) -> None:
    until(lambda: len(boxes.controls()) == 2, "both run", LOST_S)
    assert leader(boxes) in boxes.controls()


def test_another_orchestrator_takes_over_and_the_data_plane_is_not_touched(boxes: Boxes, tmp_path: Path) -> None:
    first, stages = leader(boxes), boxes.stages()
    container = boxes.controls()[first]
    with boxes.load(tmp_path, 4, 30) as load:
        load.wait_for(4)
        boxes.on(first, "kill", container)
        began = time.monotonic()
        until(lambda: leader(boxes) not in ("", first), "the other leads", TAKEOVER_S)
        assert time.monotonic() - began < TAKEOVER_S
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    assert boxes.stages() == stages, "no replica was restarted"
    until(lambda: len(boxes.controls()) == 2, "another one waits", LOST_S)


def test_a_lost_manager_costs_what_was_on_its_way(boxes: Boxes, tmp_path: Path) -> None:
    boxes.settle()
    lost = leader(boxes)
    boxes.ask(next(box for box in boxes.addresses if box != lost))
    with boxes.load(tmp_path, 4, 50) as load:
        load.wait_for(4)
        boxes.script("kill", lost)
        until(lambda: leader(boxes) not in ("", lost), "another orchestrator leads", LOST_S)
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert len(ran.unanswered) <= load.tasks // 20, "those on their way when it was killed"
    until(lambda: len(boxes.nodes("encode")) == 2 and lost not in boxes.nodes("encode"), "core stages are elsewhere", LOST_S)
    until(lambda: len(boxes.controls()) == 2, "two orchestrators on the managers left", LOST_S)
