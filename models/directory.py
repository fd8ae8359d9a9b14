"""How the files of an export come to lie in their directory: whole or, for a reader, not at all.

Files are made in a folder inside the directory (the same file system, even where the directory is a mounted volume). Then
the old manifest is removed, the files are moved into place, and the new manifest comes last, so a reader finds a whole export
or is told to export again. A lock keeps two writers of one directory apart; the kernel lets go of it when a writer dies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ExportFailed, NotEnoughSpace
from models.manifest import MANIFEST_NAME, Manifest, ManifestError, load, save

Report = Callable[[str], object]
"""Told in a few words what is being done."""

_PARTIAL = ".partial-"
_LOCK = ".lock"


@contextmanager
def locked(directory: Path, report: Report) -> Iterator[None]:
    """Be the only writer of a directory, making it first; waits for another writer, and clears up after a killed one.

    Raises:
        ExportFailed: the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"waiting for another process that writes {directory}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in directory.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
    except OSError as error:
        raise ExportFailed(f"{directory}: cannot be written: {error.strerror or error}") from error


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A folder inside the directory to make files in; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=directory) as path:
        yield Path(path)


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        NotEnoughSpace: with both figures and how to go on.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise NotEnoughSpace(
            f"{directory}: the export needs about {needed_bytes >> 20} MiB and the disk has {free >> 20} MiB; free some, or "
            "name another directory with --out"
        )


def replace(manifest: Manifest, made: Path, directory: Path) -> None:
    """Put the files in the folder `made`, and their manifest, in place of the export that is there.

    Files that the old manifest does not list are left alone: they are not ours.
    """
    old = _listed_in(directory)
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    for path in made.iterdir():
        os.replace(path, directory / path.name)
    for stale in old - _listed(manifest):
        (directory / stale).unlink(missing_ok=True)
    save(manifest, directory)


def _listed(manifest: Manifest) -> set[str]:
    return {file.path for stage in manifest.stages for files in stage.files.values() for file in files}


def _listed_in(directory: Path) -> set[str]:
    """Files of the export that is there, by its own manifest; a path that leads out of the directory does not count."""
    try:
        return {path for path in _listed(load(directory)) if Path(path).name == path}
    except ManifestError:
        return set()
