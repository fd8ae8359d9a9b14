"""What a replica wrote, where an engine or a Swarm keeps it: its end goes into the replica's log file when it has ended.

For the drivers that make replicas through somebody else, `engine` and `swarm`; a process writes into its file itself.
"""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

KEPT_LINES = 200
"""Lines of a replica's output that are kept in its log file when it has ended."""
TOLD_LINES = 20
"""Lines of it that are told in our own log when it ended unasked."""


def begin(path: Path) -> None:
    """Leave a file for every replica that ever was, so that its name is not used again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def keep(path: Path, text: str) -> None:
    """Append to the log file of a replica what it wrote."""
    try:
        begin(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)


def tell(replica: str, text: str) -> None:
    """The last of it in our own log."""
    for line in text.splitlines()[-TOLD_LINES:]:
        log.warning("%s | %s", replica, line)
