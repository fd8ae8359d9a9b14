"""A Swarm of real engines: first answers, scaling, an update, a box that is emptied, cut off, killed, or new. In this order.

Bringing three engines up and loading the images into each takes minutes of a disk, so these run on request only:
`make test-boxes`, which says so by ESPALIER_TEST_BOXES=1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.system.boxed import LOST_S, ON_REQUEST, TAG, TESTBED, Boxes, boxed
from tests.system.edge import until

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "minilm_reference.json").read_text())
UPDATED = TESTBED.read_text().replace("cpus: 1, memory: 512MiB", "cpus: 1, memory: 640MiB")
pytestmark = ON_REQUEST


@pytest.fixture(scope="module")
def boxes(images: None, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    with boxed(tmp_path_factory.mktemp("boxes"), minilm.parent) as boxes:
        yield boxes


def test_every_box_has_a_gateway_whose_answers_are_right(boxes: Boxes) -> None:
    for box in boxes.addresses:
        until(lambda box=box: boxes.answers(box), f"{box} answers", 30)  # type: ignore[misc]
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": REFERENCE["texts"][:1]}]}
        url = f"http://{boxes.addresses[box]}:8080/v2/models/embed/infer"
        answer = httpx.post(url, json=body, trust_env=False, timeout=20).json()
        found = next(output["data"] for output in answer["outputs"] if output["name"] == "embedding")
        np.testing.assert_allclose(found, REFERENCE["embeddings"][0], atol=1e-4)


def test_replicas_stand_on_different_boxes_as_services_of_one_task(boxes: Boxes) -> None:
    assert len(boxes.nodes("encode")) == 2, "the loss of one leaves one"
    named = boxes.docker("service", "ls", "--filter", "label=espalier.replica", "--format", "{{.Name}} {{.Replicas}}")
    assert {line.split()[1] for line in named.splitlines()} == {"1/1"}
    assert len(named.splitlines()) == 6


def test_scaling_up_and_down_costs_no_task(boxes: Boxes, tmp_path: Path) -> None:
    with boxes.load(tmp_path, 6, 25) as load:
        load.wait_for(6)
        boxes.espalier("scale", "encode", "3", "--wait")
        assert sum(boxes.nodes("encode").values()) == 3
        boxes.espalier("scale", "encode", "2", "--wait")
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    boxes.settle()


def test_an_update_goes_from_box_to_box_and_costs_no_task(boxes: Boxes, tmp_path: Path) -> None:
    before = boxes.stages()
    with boxes.load(tmp_path, 4, 40) as load:
        load.wait_for(4)
        boxes.update(UPDATED)
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    assert len(boxes.nodes("encode")) == 2
    assert len(before.keys() & boxes.stages().keys()) == len(before) - 2, "replicas of encode are new, and no other"


def test_a_box_is_emptied_without_losing_a_task(boxes: Boxes, tmp_path: Path) -> None:
    with boxes.load(tmp_path, 4, 25) as load:
        load.wait_for(4)
        boxes.espalier("drain", "box-2", "--wait")
        assert "box-2" not in boxes.stages().values()
        assert len(boxes.nodes("encode")) == 2
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    boxes.espalier("undrain", "box-2")
    until(lambda: boxes.status()["nodes"]["box-2"]["state"] == "up", "it may be used again", 10)


def test_a_box_that_was_cut_off_is_back_without_duplicates(boxes: Boxes, tmp_path: Path) -> None:
    lost = next(box for box in ("box-3", "box-2") if boxes.nodes("encode")[box])
    with boxes.load(tmp_path, 4, 40) as load:
        load.wait_for(4)
        for box in boxes.addresses.keys() - {lost}:
            boxes.script("cut", lost, box)
        until(lambda: boxes.nodes("encode")[lost] == 0, "the box is given up", LOST_S)
        boxes.script("heal")
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert len(ran.unanswered) <= load.tasks // 20, "those on their way over the link when it was cut"
    until(lambda: boxes.answers(lost), "its gateway answers", LOST_S)
    boxes.settle()
    wanted = sum(service["wanted"]["ready"] for service in boxes.status()["services"].values())
    until(lambda: len(boxes.stages()) == wanted, "nothing runs twice", LOST_S)
    assert len(boxes.docker("service", "ls", "--quiet", "--filter", "label=espalier.replica").split()) == wanted


def test_a_killed_box_costs_what_was_on_its_way_and_its_stages_stand_elsewhere(boxes: Boxes, tmp_path: Path) -> None:
    boxes.settle()
    lost = next(box for box in ("box-2", "box-3") if boxes.nodes("encode")[box])
    with boxes.load(tmp_path, 6, 75) as load:
        load.wait_for(60)
        boxes.script("kill", lost)
        ended = load.ended()
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    killed_s = ran.when(ended)
    before, after = ran.on_time_share(0.0, killed_s - 2.0), ran.on_time_share(killed_s - 2.0, killed_s + 58.0)
    assert after >= 0.97 * before, "those on their way when it was killed, and no more"
    until(lambda: len(boxes.nodes("encode")) == 2 and lost not in boxes.nodes("encode"), "core stages are elsewhere", LOST_S)
    assert boxes.status()["ready"]


def test_a_new_box_is_used(boxes: Boxes) -> None:
    boxes.grow(4)  # which also gives the one that was killed its power back
    until(lambda: boxes.answers("box-4"), "its gateway answers", LOST_S)
    boxes.update(UPDATED.replace("  box-3:", "  box-4: {cpus: 8, memory: 8GiB}\n  box-3:"))
    boxes.espalier("scale", "encode", "4", "--wait")
    assert boxes.nodes("encode") == dict.fromkeys(boxes.addresses, 1)


def test_a_box_that_has_no_room_for_the_image_is_not_asked_again(boxes: Boxes) -> None:
    boxes.espalier("drain", "box-4", "--wait")
    boxes.on("box-4", "container", "prune", "--force")
    boxes.on("box-4", "image", "rm", "--force", f"espalier/stage:{TAG}")
    boxes.espalier("undrain", "box-4")
    until(lambda: boxes.status()["nodes"]["box-4"]["state"] == "up", "it may be used again", 10)
    boxes.espalier("scale", "encode", "5", "--wait")
    assert "box-4" not in boxes.nodes("encode")
    assert boxes.status()["nodes"]["box-4"]["state"] == "up", "its gateway serves"
    assert boxes.answers("box-4")


def test_a_stack_that_is_removed_takes_its_stages_along(boxes: Boxes) -> None:
    boxes.docker("stack", "rm", "boxed")
    assert boxes.docker("service", "ls", "--quiet") == ""
