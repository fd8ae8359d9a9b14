"""What stops a load run, as one tree. A task that fails is no error here: it is a record with its outcome.

    LoadgenError
    ├── SpecError     an arrival process, payload or option that cannot be meant    exit 2
    ├── SetupFailed   the server is not there, or does not know the pipeline        exit 3
    └── RunFailed     the run broke off inside the generator                        exit 4

`loadgen.__main__` maps each class to its exit status. Every message says what to change.
"""

from __future__ import annotations


class LoadgenError(Exception):
    """Base of everything this package raises on purpose."""


class SpecError(LoadgenError, ValueError):
    """A textual specification that names no arrival process, or one with impossible numbers."""


class SetupFailed(LoadgenError):
    """Nothing was sent: the server cannot be reached, or cannot say what the pipeline takes."""


class RunFailed(LoadgenError):
    """The generator itself failed while tasks were out; what was measured until then cannot be trusted."""
