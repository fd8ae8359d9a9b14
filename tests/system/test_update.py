"""A rolling update under load loses no task, and one that does not come up is taken back."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.system.composed import TESTBED as COMPOSED
from tests.system.edge import Edge, running
from tests.system.engine import docker


def version(edge: Edge, directory: Path, *changes: tuple[str, str]) -> Path:
    """The testbed's file with other words in place of some."""
    text = edge.testbed.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = directory / "changed.yaml"
    path.write_text(text)
    return path


def test_an_update_under_load_replaces_what_changed_and_loses_nothing(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    before = edge.pids()
    changed = version(edge, tmp_path, ("stage: pool, cpus: 0.1, memory: 128MiB", "stage: pool, cpus: 0.2, memory: 160MiB"))
    with edge.load(tmp_path, 30, 8) as load:
        load.wait_for(20)
        edge.up(changed)
        after = edge.pids()
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    assert without_pool(before) == without_pool(after), "what did not change was not touched"
    assert not {name for name in before if "pool" in name} & after.keys()


def test_an_update_that_does_not_come_up_is_rolled_back(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    before = edge.pids()
    spoil(edge.models)
    spoilt = version(
        edge,
        tmp_path,
        ("models:\n", "models:\n  spoilt: {source: minilm, precisions: [float32, int8]}\n"),
        ("{model: minilm, stage: tokenise,", "{model: spoilt, stage: tokenise,"),
    )
    with edge.load(tmp_path, 30, 8) as load:
        load.wait_for(20)
        said = edge.refused("up", *edge.as_given(spoilt))
        ran = load.finish()
    assert "rolled back: tokenise on edge-" in said
    assert "failed 3 times in a row" in said
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    assert edge.pids() == before, "nothing that worked was touched"


def test_a_rebuilt_image_is_taken_up_or_taken_back(images: None, minilm: Path, tmp_path: Path) -> None:
    tag = f"espalier-test/{tmp_path.name.lower()}:1"
    docker("tag", "espalier/stage:0.1.0", tag)
    edge = Edge(tmp_path, minilm.parent, "engine", COMPOSED, ("--engine-image", tag))
    try:
        with running(edge):
            edge.settle()
            first = edge.pids()
            rebuild(tmp_path, tag, 'ENTRYPOINT ["false"]')
            with edge.load(tmp_path, 20, 8) as load:
                load.wait_for(20)
                assert "rolled back" in edge.refused("up", *edge.as_given())
                ran = load.finish()
            assert ran.unanswered == []
            assert edge.pids() == first, "nothing that worked was touched"
            rebuild(tmp_path, tag, "ENV REBUILT=1")
            edge.up()
            edge.settle()
            assert first.keys() & edge.pids().keys() == {"gateway"}, "all replicas are new"
    finally:
        docker("rmi", "--force", tag)


def rebuild(directory: Path, tag: str, line: str) -> None:
    """Another image under the tag, made from the real one."""
    (directory / "Dockerfile").write_text(f"FROM espalier/stage:0.1.0\n{line}\n")
    docker("build", "--quiet", "--tag", tag, "--file", str(directory / "Dockerfile"), str(directory))


def spoil(models: Path) -> None:
    """A model beside the real one whose files are not what its manifest says."""
    shutil.copytree(models / "minilm", models / "spoilt", ignore=shutil.ignore_patterns("*.onnx*"), dirs_exist_ok=True)
    (vocabulary,) = (models / "spoilt").rglob("tokenizer.json")
    vocabulary.write_text("{}")


def without_pool(pids: dict[str, int]) -> dict[str, int]:
    """All processes but those of `pool`."""
    return {name: pid for name, pid in pids.items() if not name.startswith("pool")}
