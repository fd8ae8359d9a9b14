"""How the orchestrator fails, as one tree; the command line turns each branch into an exit code.

    EspalierError
    ├── UsageError          2  something the user wrote is wrong: a name, a number, a file
    │   ├── TestbedInvalid     the testbed file; carries every problem found, one line each
    │   ├── Infeasible         the services do not fit the nodes; names what lacks and the smallest relaxation
    │   └── Conflict           not now: something else is under way
    ├── SetupFailed         3  the system could not be brought up: a model not exported, a port taken, a limit passed
    └── RunFailed           4  it was up and broke off, or answers no more

A signal that is missing or stale is none of these: it is a value (`None`, an age) that leads to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class EspalierError(Exception):
    """An expected failure; its message says what to change, and `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 4


class UsageError(EspalierError):
    """Something the user wrote is wrong."""

    exit_code = 2


class TestbedInvalid(UsageError):
    """A testbed file with mistakes, each as `file:line: field: problem`."""

    __test__ = False  # pytest would otherwise take the name for a test class

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Infeasible(UsageError):
    """No placement was found that fits."""


class Conflict(UsageError):
    """What was asked for cannot be done while something else is under way."""


class SetupFailed(EspalierError):
    """The system could not be brought up."""

    exit_code = 3


class RunFailed(EspalierError):
    """The system was up and broke off, or cannot be reached any more."""

    exit_code = 4
