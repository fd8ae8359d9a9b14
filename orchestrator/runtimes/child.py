"""One operating-system process that may outlive us: started, recognised again, watched, signalled, and nothing else touched.

A process is known by its pid *and* its start time *and* its command line, so that a pid used again by somebody else is never
mistaken for ours. Where the kernel has pidfds (Linux), its death is an event and a signal cannot hit a successor; elsewhere it
is looked at ten times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.runtimes.ending import Ending

POLL_S = 0.1
"""Interval of looking at a process where no event tells of its death [s]."""
START_TIME_TOLERANCE_S = 1.0
"""Start times of one process, read before and after the wall clock was set, may differ by this much [s]."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process is recognised by."""

    pid: int
    create_time: float
    """Seconds since the epoch, as psutil has it."""
    argv: tuple[str, ...]


class Child(Ending):
    """A live process and the event of its end. Create it with `spawn` or `adopt`.

    Its `exit_code` is the exit status, or minus the signal; None for an adopted process, whose parent gets it.
    """

    def __init__(self, identity: Identity, *, ours: bool, pidfd: int | None) -> None:
        super().__init__()
        self.identity = identity
        self._ours = ours
        self._pidfd = pidfd
        self._poll: asyncio.Task[None] | None = None
        if pidfd is None:
            self._poll = asyncio.create_task(self._look())
        else:
            asyncio.get_running_loop().add_reader(pidfd, self._ended)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that is gone already is fine."""
        if self.exited.is_set():
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif recognise(self.identity):
                os.kill(self.identity.pid, number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL for one that has not ended after the grace time."""
        self.signal(signal.SIGTERM)
        if not await self.wait(grace_s):
            self.signal(signal.SIGKILL)
            await self.wait(grace_s)

    def release(self) -> None:
        """Stop watching; the process goes on."""
        if self._poll is not None:
            self._poll.cancel()
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _ended(self) -> None:
        self._is_over()
        self.ended(self.exit_code)
        self.release()

    def _is_over(self) -> bool:
        """Whether it has ended; takes the exit status of one of our own, which has to be fetched or it stays a zombie."""
        if not self._ours:
            return not recognise(self.identity)
        if self.exit_code is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.identity.pid, os.WNOHANG)
                if pid == 0:
                    return False
                self.exit_code = os.waitstatus_to_exitcode(status)
        return True

    async def _look(self) -> None:
        while not self._is_over():  # noqa: ASYNC110 - nothing would set an event
            await asyncio.sleep(POLL_S)
        self._poll = None
        self._ended()


def launch(argv: Sequence[str], *, log: Path, environment: Mapping[str, str], inherited: Sequence[int] = ()) -> Identity:
    """Start a process in a session of its own, so that it survives us and our terminal.

    Args:
        argv: program and arguments; the program by its path.
        log: file that its output is added to.
        environment: all of its environment.
        inherited: file descriptors it gets under the same numbers.

    Raises:
        OSError: it could not be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    actions = (
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    )
    try:
        for descriptor in inherited:
            os.set_inheritable(descriptor, True)
        pid = os.posix_spawn(argv[0], list(argv), environment, file_actions=actions, setsid=True, setsigmask=())
    finally:
        for descriptor in inherited:
            os.set_inheritable(descriptor, False)
    # One that dies at once stays a zombie until it is waited for, so its start time can still be read.
    return Identity(pid, psutil.Process(pid).create_time(), tuple(argv))


def spawn(
    argv: Sequence[str], *, log: Path, environment: Mapping[str, str], inherited: Sequence[int] = (), pidfds: bool = True
) -> Child:
    """As `launch`, and watch it. `pidfds=False` looks instead of waiting for an event, as on a system without pidfds."""
    identity = launch(argv, log=log, environment=environment, inherited=inherited)
    return Child(identity, ours=True, pidfd=_pidfd(identity.pid) if pidfds else None)


def adopt(identity: Identity, *, pidfds: bool = True) -> Child | None:
    """Take up a process that was started by a predecessor of ours; None where it is not there any more."""
    pidfd = _pidfd(identity.pid) if pidfds else None
    # Recognised only after the pidfd is held: from then on it cannot come to mean another process.
    if recognise(identity):
        return Child(identity, ours=False, pidfd=pidfd)
    if pidfd is not None:
        os.close(pidfd)
    return None


def recognise(identity: Identity) -> bool:
    """Whether this very process runs."""
    try:
        process = psutil.Process(identity.pid)
        if abs(process.create_time() - identity.create_time) > START_TIME_TOLERANCE_S:
            return False
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # Empty for a moment after a start (posix_spawn returns before the new program's arguments are in place) and before
        # an end; then the pid and the start time have to do.
        return tuple(process.cmdline()) in ((), identity.argv)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def environment(root: Path) -> dict[str, str]:
    """Our environment, with `root` importable and output unbuffered, for whatever we start."""
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        # Gone already, or a kernel without the call: looking tells the difference.
        return None
