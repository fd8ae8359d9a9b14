from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.runtimes import child as children
from orchestrator.runtimes.child import Child, Identity

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")
DEAF = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
)


@pytest.fixture
def stray() -> Iterator[list[Identity]]:
    """Identities of processes that a test leaves running."""
    left: list[Identity] = []
    yield left
    for identity in left:
        if children.recognise(identity):
            os.kill(identity.pid, signal.SIGKILL)
            os.waitpid(identity.pid, 0)


def start(argv: tuple[str, ...], tmp_path: Path, *, pidfds: bool = True) -> Child:
    return children.spawn(argv, log=tmp_path / "log", environment=dict(os.environ), pidfds=pidfds)


@pytest.mark.parametrize("pidfds", [True, False], ids=["event", "looking"])
async def test_the_end_of_a_process_is_known_at_once_with_its_status(tmp_path: Path, pidfds: bool) -> None:
    child = start((sys.executable, "-c", "print('hello'); raise SystemExit(5)"), tmp_path, pidfds=pidfds)
    assert await child.wait(10)
    assert child.exit_code == 5
    assert (tmp_path / "log").read_text() == "hello\n"


async def test_a_killed_process_is_noticed_within_a_fifth_of_a_second(tmp_path: Path) -> None:
    child = start(SLEEP, tmp_path)
    began = time.monotonic()
    os.kill(child.identity.pid, signal.SIGKILL)
    await child.exited.wait()
    assert time.monotonic() - began < 0.2
    assert child.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("pidfds", [True, False], ids=["event", "looking"])
async def test_a_process_is_stopped_politely_first_and_by_force_after_its_grace(tmp_path: Path, pidfds: bool) -> None:
    polite, deaf = start(SLEEP, tmp_path, pidfds=pidfds), start(DEAF, tmp_path, pidfds=pidfds)
    while "deaf" not in (tmp_path / "log").read_text():
        await asyncio.sleep(0.01)
    await asyncio.gather(polite.stop(5), deaf.stop(0.2))
    assert (polite.exit_code, deaf.exit_code) == (-signal.SIGTERM, -signal.SIGKILL)
    deaf.signal(signal.SIGTERM)  # to nobody, and without a complaint


async def test_a_process_survives_us_and_is_known_again(tmp_path: Path, stray: list[Identity]) -> None:
    child = start(SLEEP, tmp_path)
    stray.append(child.identity)
    assert os.getsid(child.identity.pid) == child.identity.pid
    child.release()
    again = children.adopt(child.identity)
    assert again is not None
    await again.stop(5)
    assert again.exit_code is None, "its parent gets that"


@pytest.mark.parametrize("change", ["create_time", "argv", "pid"])
async def test_a_foreign_process_is_never_taken_for_ours(tmp_path: Path, stray: list[Identity], change: str) -> None:
    child = start(SLEEP, tmp_path)
    stray.append(child.identity)
    child.release()
    other = {"create_time": child.identity.create_time - 60, "argv": ("sleep", "60"), "pid": 2**22 - 1}
    assert children.adopt(replace(child.identity, **{change: other[change]})) is None  # type: ignore[arg-type]
    assert children.recognise(child.identity)


def test_a_dead_process_is_not_recognised_even_while_nobody_has_waited_for_it(tmp_path: Path) -> None:
    identity = children.launch((sys.executable, "-c", ""), log=tmp_path / "log", environment=dict(os.environ))
    os.waitid(os.P_PID, identity.pid, os.WEXITED | os.WNOWAIT)
    assert not children.recognise(identity)
    os.waitpid(identity.pid, 0)


def test_a_program_that_is_not_there_is_an_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    read, write = os.pipe()
    with pytest.raises(OSError, match="No such file"):
        children.launch(["/nonexistent"], log=tmp_path / "log", environment={}, inherited=[read])
    assert not os.get_inheritable(read)
    os.close(read)
    os.close(write)


def test_the_environment_makes_the_package_importable_from_anywhere() -> None:
    path = children.environment(Path("/somewhere"))["PYTHONPATH"]
    assert path.split(os.pathsep)[0] == "/somewhere"


def test_a_process_is_recognised_from_the_first_moment_on(tmp_path: Path) -> None:
    for _ in range(20):
        identity = children.launch(SLEEP, log=tmp_path / "log", environment=dict(os.environ))
        recognised = children.recognise(identity)
        os.kill(identity.pid, signal.SIGKILL)
        os.waitpid(identity.pid, 0)
        assert recognised
