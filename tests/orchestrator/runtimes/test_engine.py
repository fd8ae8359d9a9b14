"""What is special to containers; the life of replicas as such is in `test_keeper`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SetupFailed
from orchestrator.runtimes.containers import SCOPE
from orchestrator.runtimes.engine import Engine
from orchestrator.runtimes.keeper import Keeper
from orchestrator.runtimes.pins import Pins
from orchestrator.runtimes.records import Records
from orchestrator.socket_proxy.rules import Policy
from tests.engine import build_fake_stage
from tests.orchestrator.runtimes.world import (
    LIMIT_S,
    EngineKind,
    Noticeboard,
    Relay,
    by_state,
    keeper,
    launch,
    left_running,
    pool,
    running,
)
from tests.orchestrator.socket_proxy.process import command, proxy_process


class Nobody:
    """A listener that hears nothing."""

    def moved(self, replica: str, url: str) -> None:
        """Not here."""

    def ending(self, replica: str) -> None:
        """Not here."""

    def changed(self) -> None:
        """Not here."""


async def opened(containers: EngineKind, state_dir: Path, **changes: Any) -> None:
    driver = Engine(replace(containers.options, **changes), Pins(state_dir / "images.json"))
    await driver.open(Nobody())
    await driver.close()


async def until_a_problem(kept: Keeper) -> None:
    async with asyncio.timeout(LIMIT_S):
        while kept.problem is None:
            await asyncio.sleep(0.01)


def make_foreign(containers: EngineKind, name: str, labels: dict[str, str]) -> str:
    body = {"Image": containers.image, "Cmd": ["--host", "0.0.0.0"], "Labels": labels}
    created: str = containers.engine.create_container_from_config(body, name)["Id"]
    return created


async def test_limits_are_really_set(containers: EngineKind, tmp_path: Path) -> None:
    how = replace(launch(), cpus=0.25, cpu_limit=0.5, memory_bytes=2**26)
    async with running(containers, tmp_path, how) as (kept, board):
        kept.apply(pool({"a": 1}))
        await board.until(lambda s: s["ready"] == ["pool-1"])
        found: Any = containers.inspect(kept, "pool-1")
        config = found["HostConfig"]
        assert (config["NanoCpus"], config["CpuShares"]) == (500_000_000, 256)
        assert (config["Memory"], config["MemorySwap"], config["PidsLimit"]) == (2**26, 2**26, 256)
        assert (config["ReadonlyRootfs"], config["CapDrop"], config["Init"]) == (True, ["ALL"], True)
        assert found["Config"]["User"] == "10001:10001"
        assert found["Name"] == f"/{containers.options.scope}-pool-1"


async def test_what_a_container_that_died_had_to_say_is_told_and_kept(
    containers: EngineKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(containers, tmp_path, launch("broken")) as (kept, board):
        kept.apply(pool({"a": 1}))
        async with asyncio.timeout(LIMIT_S):
            while kept.actions["run", "failed"] < 2:
                await board.news.wait()
    assert "pool-1 (starting) ended unasked with status 7" in caplog.text
    assert "pool-1 | this stage is broken" in caplog.text
    assert (tmp_path / "logs" / "pool-1.log").read_text() == "this stage is broken\n"
    assert containers.left() == 0


async def test_foreign_containers_are_not_touched(containers: EngineKind, tmp_path: Path) -> None:
    foreign = [
        make_foreign(containers, f"{containers.options.scope}-pool-9", {}),
        make_foreign(containers, f"{containers.options.scope}-other", {SCOPE: "somebody-else"}),
    ]
    try:
        containers.engine.start(foreign[1])
        async with running(containers, tmp_path) as (kept, board):
            kept.apply(pool({"a": 1}))
            await board.until(lambda s: len(s["ready"]) == 1)
        states = [containers.engine.inspect_container(each)["State"]["Status"] for each in foreign]
        assert states == ["created", "running"]
    finally:
        for each in foreign:
            containers.engine.remove_container(each, force=True)


async def test_a_name_that_somebody_else_has_is_a_failed_start_and_the_next_number_is_taken(
    containers: EngineKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = make_foreign(containers, f"{containers.options.scope}-pool-1", {})
    try:
        async with running(containers, tmp_path) as (kept, board):
            kept.apply(pool({"a": 1}))
            await board.until(lambda s: s["ready"] == ["pool-2"])
            assert "pool-1 could not be started: " in caplog.text
    finally:
        containers.engine.remove_container(foreign, force=True)


async def test_a_successor_without_records_finds_what_runs_by_its_labels(containers: EngineKind, tmp_path: Path) -> None:
    async with left_running(containers, tmp_path, pool({"a": 1, "b": 1})) as before:
        shutil.rmtree(tmp_path)
        async with running(containers, tmp_path) as (kept, _):
            assert {r.id: kept.runs_as(r.id) for r in kept.replicas()} == before
            assert {(r.node, r.state, r.cpus, r.outdated) for r in kept.replicas()} == {
                ("a", "ready", 0.5, False),
                ("b", "ready", 0.5, False),
            }
            assert len(list(Records(tmp_path / "replicas").all())) == 2, "for its own successor"
            kept.apply(pool({"a": 1, "b": 1}))
            await asyncio.sleep(0.05)
            assert kept.starts == 0


async def test_one_without_a_record_that_does_not_answer_is_loading(containers: EngineKind, tmp_path: Path) -> None:
    board = Noticeboard()
    before = keeper(containers, tmp_path, board, launch("mute"))
    await before.adopt()
    before.apply(pool({"a": 1}))
    await board.until(lambda s: s["starting"] == ["pool-1"])
    await before.leave()
    shutil.rmtree(tmp_path)
    async with running(containers, tmp_path) as (kept, _):
        assert by_state(kept.replicas())["starting"] == ["pool-1"]


async def test_leftovers_of_ours_are_removed(containers: EngineKind, tmp_path: Path) -> None:
    ours = {SCOPE: containers.options.scope}
    make_foreign(containers, f"{containers.options.scope}-never-started", ours)
    async with left_running(containers, tmp_path, pool({"a": 1})) as before:
        (named,) = before.values()
        containers.engine.kill(named["container"], signal="SIGKILL")
        assert containers.left() == 1, "the first one was removed by the predecessor, and nobody saw this one end"
        async with running(containers, tmp_path) as (kept, _):
            assert kept.replicas() == ()
            assert containers.left() == 0
            assert list(Records(tmp_path / "replicas").all()) == []


async def test_what_turns_up_under_our_label_while_we_watch_is_removed(containers: EngineKind, tmp_path: Path) -> None:
    """As does what a start left behind whose answer never came."""
    async with running(containers, tmp_path):
        make_foreign(containers, f"{containers.options.scope}-pool-5", {SCOPE: containers.options.scope})
        async with asyncio.timeout(LIMIT_S):
            while containers.left():
                await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": "espalier-test/no:1"}, r"image espalier-test/no:1 is not on this engine: build it first"),
        ({"network": "espalier-test-no"}, r"there is no network espalier-test-no on this engine: docker compose up makes it"),
        ({"models": "espalier-test-no"}, r"there is no volume espalier-test-no on this engine"),
        ({"url": "unix:///nobody.sock"}, r"the engine at unix:///nobody.sock does not answer: .*; start Docker"),
    ],
)
async def test_what_is_missing_is_said_before_anything_is_started(
    containers: EngineKind, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(SetupFailed, match=said):
        await opened(containers, tmp_path, **changes)


async def test_a_gpu_image_is_missed_only_by_who_needs_it(containers: EngineKind, tmp_path: Path) -> None:
    containers.options = replace(containers.options, gpu_image="espalier-test/no-gpu:1")
    async with running(containers, tmp_path, replace(launch(), gpus=1)) as (kept, board):
        kept.apply(pool({"a": 1}))
        async with asyncio.timeout(LIMIT_S):
            while not kept.actions["run", "failed"]:
                await board.news.wait()
    assert containers.left() == 0


async def test_a_start_that_fails_leaves_nothing_behind(
    containers: EngineKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(containers, tmp_path, replace(launch(), cpu_limit=10_000.0)) as (kept, board):
        kept.apply(pool({"a": 1}))
        async with asyncio.timeout(LIMIT_S):
            while kept.actions["run", "failed"] < 2:
                await board.news.wait()
        assert containers.left() == 0
        assert kept.starts == 0
    assert "pool-1 could not be started: " in caplog.text


async def test_an_engine_that_is_away_changes_nothing_until_it_is_back(
    containers: EngineKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Relay(tmp_path / "engine.sock") as relay:
        containers.options = replace(containers.options, url=relay.url)
        async with running(containers, tmp_path / "state") as (kept, board):
            kept.apply(pool({"a": 1, "b": 1}))
            replicas = await board.until(lambda s: len(s["ready"]) == 2)
            await relay.cut()
            await until_a_problem(kept)
            await asyncio.to_thread(containers.kill, kept, "pool-1")
            kept.apply(pool({"a": 2, "b": 1}))
            await asyncio.sleep(0.3)
            assert kept.replicas() == replicas, "nobody knows better"
            assert kept.backoffs() == {}
            assert kept.actions["run", "failed"] == 0
            assert "does not answer: No such file or directory" in (kept.problem or "")

            await relay.mend()
            await board.until(lambda s: "pool-1" not in s["ready"] and len(s["ready"]) == 3 and not s["starting"])
            assert kept.problem is None
            assert caplog.text.count("until it answers again, every replica is left as it is") == 1
            assert len(re.findall("the engine at .* answers again$", caplog.text, re.MULTILINE)) == 1
        assert containers.left() == 0


async def test_a_drain_under_way_goes_on_when_the_engine_is_back(containers: EngineKind, tmp_path: Path) -> None:
    async with Relay(tmp_path / "engine.sock") as relay:
        containers.options = replace(containers.options, url=relay.url)
        async with running(containers, tmp_path / "state") as (kept, board):
            kept.apply(pool({"a": 2}))
            await board.until(lambda s: len(s["ready"]) == 2)
            board.confirmed.clear()
            kept.apply(pool({"a": 1}))
            await relay.cut()
            await until_a_problem(kept)
            board.confirmed.set()
            await asyncio.sleep(0.1)
            assert len(by_state(kept.replicas())["draining"]) == 1
            await relay.mend()
            await board.until(lambda s: len(s["ready"]) == 1 and not s["draining"])


async def test_a_new_address_is_published(containers: EngineKind, tmp_path: Path) -> None:
    async with running(containers, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1}))
        (replica,) = await board.until(lambda s: len(s["ready"]) == 1)
        container = kept.runs_as("pool-1")["container"]
        in_the_way = make_foreign(containers, f"{containers.options.scope}-way", {})
        try:
            containers.engine.disconnect_container_from_network(container, containers.network)
            containers.engine.connect_container_to_network(in_the_way, containers.network)
            containers.engine.start(in_the_way)
            containers.engine.connect_container_to_network(container, containers.network)
            async with asyncio.timeout(LIMIT_S):
                while kept.replicas()[0].url == replica.url:
                    await board.news.wait()
            assert board.history[-1][1] == kept.replicas()
        finally:
            containers.engine.remove_container(in_the_way, force=True)


@contextlib.contextmanager
def rebuilt(containers: EngineKind) -> Iterator[Callable[[str], str]]:
    """A tag of the test's own in the options, and what builds another image under it; all are removed at the end."""
    tag = f"espalier-test/{containers.options.scope}:1"
    containers.options = replace(containers.options, image=tag, gpu_image=tag)
    made: list[str] = []

    def build(note: str) -> str:
        made.append(build_fake_stage(containers.engine, tag, note))
        return made[-1]

    try:
        yield build
    finally:
        containers.remove_all()
        for image in made:
            containers.engine.remove_image(image, force=True)


def images_of(containers: EngineKind, kept: Keeper) -> set[Any]:
    return {containers.inspect(kept, r.id)["Image"] for r in kept.replicas()}


async def test_a_rebuilt_image_replaces_replicas_one_at_a_time(containers: EngineKind, tmp_path: Path) -> None:
    with rebuilt(containers) as build:
        build("first")
        async with running(containers, tmp_path) as (kept, board):
            kept.apply(pool({"a": 1, "b": 1}))
            old = {r.id for r in await board.until(lambda s: len(s["ready"]) == 2)}
            since = len(board.history)
            second = build("second")
            assert [r.outdated for r in kept.replicas()] == [False, False], "that it was built changes nothing by itself"
            await kept.refresh()
            assert [r.outdated for r in kept.replicas()] == [True, True]
            await board.until(lambda s: {i for ids in s.values() for i in ids}.isdisjoint(old) and len(s["ready"]) == 2)
            assert all(len(by_state(replicas)["ready"]) >= 2 for _, replicas in board.history[since:])
            assert max(len(by_state(replicas)["draining"]) for _, replicas in board.history[since:]) == 1
            assert images_of(containers, kept) == {second}


async def test_an_image_that_is_given_up_is_replaced_by_the_one_before(containers: EngineKind, tmp_path: Path) -> None:
    with rebuilt(containers) as build:
        first = build("first")
        async with left_running(containers, tmp_path, pool({"a": 1})):
            board = Noticeboard()
            kept = keeper(containers, tmp_path, board)
            await kept.adopt()
            kept.apply(pool({"a": 1}))
            assert not kept.has_news
            build("second")
            await kept.refresh()
            await board.until(lambda s: s["ready"] == ["pool-2"] and not s["draining"])
            kept.revert()
            await board.until(lambda s: s["ready"] == ["pool-3"] and not s["draining"])
            assert images_of(containers, kept) == {first}, "by its id, for its name is another's now"
            await kept.leave()
        async with running(containers, tmp_path) as (again, news):
            assert not again.has_news, "what was given up is not tried again"
            # The container of the one that was drained last may still be there, to be taken away.
            await news.until(lambda s: [i for ids in s.values() for i in ids] == ["pool-3"])
            assert not any(r.outdated for r in again.replicas())
        build("third")
        async with running(containers, tmp_path) as (later, _):
            assert later.has_news


async def test_all_it_asks_for_passes_the_socket_proxy(
    containers: EngineKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a proxy that dies is an engine that does not answer."""
    options = containers.options
    policy = Policy(options.scope, options.scope, frozenset({options.image}), options.network, options.models)
    with contextlib.ExitStack() as stack:
        proxy, address = stack.enter_context(proxy_process(policy))
        containers.options = replace(options, url=f"tcp://{address}", project=options.scope, gpu_image="not/allowed:1")
        async with left_running(containers, tmp_path, pool({"a": 1, "b": 1})):
            async with running(containers, tmp_path) as (kept, board):
                kept.apply(pool({"a": 1, "b": 1}))
                await asyncio.to_thread(containers.kill, kept, "pool-1")
                await board.until(lambda s: len(s["ready"]) == 2 and "pool-1" not in s["ready"])
                kept.apply(pool({"a": 1}))
                await board.until(lambda s: len(s["ready"]) == 1 and not s["draining"])
                proxy.kill()
                await until_a_problem(kept)
                start = command(policy, listen=address)
                again = stack.enter_context(subprocess.Popen(start, stderr=subprocess.DEVNULL))  # noqa: ASYNC220 - some ms
                stack.callback(again.kill)
                async with asyncio.timeout(LIMIT_S):
                    while kept.problem is not None:
                        await asyncio.sleep(0.01)
        assert containers.left() == 0
    assert "not allowed" not in caplog.text
