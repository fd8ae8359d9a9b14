"""`espalier bundle`: all that a box with no network needs, as one archive.

The archive is a plain tar file:

    images.tar.gz   images of the compose file as the engine exports them, together, so that shared layers are in it once
    tree/           what is unpacked: docker-compose.yml, deploy/, wheels/, and out/models/ if asked for
    manifest.json   the last member: name, size and sha256 of every other one

`load` takes nothing from an archive of which one byte is not as its manifest says. That tells damage; it does not tell who
made the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml
from pydantic import Field, ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator import display
from orchestrator.errors import RunFailed, SetupFailed, UsageError
from orchestrator.runtimes import images as engines
from orchestrator.runtimes.images import Engine, Image
from services.dataplane.document import Document

FORMAT = 1
CHUNK_BYTES = 2**20
MANIFEST, TREE = "manifest.json", "tree/"
PLAIN, COMPRESSED = "images.tar", "images.tar.gz"
LONGEST_MANIFEST_BYTES = 16 * 2**20
SPARE_BYTES = 16 * 2**20
"""Free space beyond what is known to be needed."""
PLAIN_SHARE, COMPRESSED_SHARE = 1.05, 0.45
"""Bytes in the archive per byte of an image, headers included (measured: 1.02, and 0.37 to 0.42 compressed)."""
PYTHON = "python3.11"

REQUIREMENTS = ("gateway", "stage", "stage-gpu", "orchestrator", "loadgen", "models", "dev")
TORCH = ("models", "dev")
"""Those that need the pin of torch too."""
DEFAULT_WHEELS = ("orchestrator", "gateway", "stage", "loadgen")
"""What the processes runtime needs: testbeds run without Docker, from models that are exported already."""
PACKAGES = ("models", "services", "loadgen", "orchestrator")

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::?-(?P<default>[^}]*))?\}")


class Member(Document):
    """A member of the archive."""

    name: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="[0-9a-f]{64}")
    executable: bool = False


class ImageId(Document):
    """An image of the archive."""

    name: str
    id: str


class Manifest(Document):
    """What an archive holds."""

    bundle: Literal[1]
    """Version of the format."""
    espalier: str
    """Version of the package."""
    tag: str
    """Of our own images."""
    created: str
    requirements: tuple[str, ...]
    """The files below deploy/requirements/ whose wheels it holds."""
    images: tuple[ImageId, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What goes into an archive."""

    images: bool = True
    compress: bool = True
    wheels: tuple[str, ...] = DEFAULT_WHEELS
    models: Path | None = None
    """A directory of exported models."""


# --- saving ---------------------------------------------------------------------------------------------------------------


def save(archive: Path, checkout: Path, contents: Contents, progress: Progress) -> Manifest:
    """Write an archive; whatever goes wrong, none is left half written.

    Raises:
        UsageError: this is no checkout, or the models are not there.
        SetupFailed: an image is missing, no engine answers, wheels cannot be fetched, or the disk is full.
    """
    if not (checkout / "pyproject.toml").is_file():
        raise UsageError(f"a bundle is made from a checkout of Espalier; {checkout} is none")
    if not archive.parent.is_dir():
        raise UsageError(f"there is no directory {archive.parent}")
    with contextlib.ExitStack() as stack:
        variables = environment(checkout)
        engine = stack.enter_context(Engine()) if contents.images else None
        images = [] if engine is None else _present(engine, named_images(checkout, variables))
        wheels = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="espalier-wheels-")))
        if contents.wheels:
            fetch_wheels(checkout, contents.wheels, wheels)
        files = dict(_files(checkout, wheels, contents.models))
        sizes = {name: path.stat().st_size for name, path in files.items()}
        images_bytes = engines.size_bytes(images)
        share = COMPRESSED_SHARE if contents.compress else PLAIN_SHARE
        _check_space(archive.parent, int(images_bytes * share) + sum(sizes.values()))
        task = progress.add_task("writing", total=images_bytes + sum(sizes.values()))
        stream = stack.enter_context(_replacing(archive))
        writer = _Writer(stream)
        if engine is not None:
            exported = _counted(engine.export([image.name for image in images]), progress, task)
            if contents.compress:
                writer.add(COMPRESSED, _gzipped(exported))
            else:
                writer.add(PLAIN, exported)
        for name, path in files.items():
            writer.add(TREE + name, _counted(_read(path), progress, task), executable=os.access(path, os.X_OK))
        manifest = Manifest(
            bundle=FORMAT,
            espalier=version("espalier"),
            tag=tag(variables),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            requirements=contents.wheels,
            images=tuple(ImageId(name=image.name, id=image.id) for image in images),
            members=tuple(writer.members),
        )
        writer.add(MANIFEST, [manifest.model_dump_json(indent=1).encode()])
        writer.end()
    return manifest


def described(archive: Path, manifest: Manifest) -> Iterator[str]:
    """What was saved, for people."""
    yield f"{archive}: {_megabytes(archive.stat().st_size)}, {len(manifest.members)} members"
    yield f"images: {', '.join(image.name for image in manifest.images) or 'none'}"
    yield f"wheels: {', '.join(manifest.requirements) or 'none'}"
    yield f"on the other box: espalier bundle load {archive.name} (where there is no espalier yet: docs/install.md)"


def bar() -> Progress:
    """A progress bar on a terminal; nothing where stderr is none."""
    console = display.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def environment(checkout: Path) -> dict[str, str]:
    """The variables that compose sees: those of the process, and those of `.env` that the process does not set."""
    lines = (checkout / ".env").read_text().splitlines() if (checkout / ".env").is_file() else []
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, value in pairs} | dict(os.environ)


def named_images(checkout: Path, variables: Mapping[str, str]) -> dict[str, str | None]:
    """Images of the compose file, each with the command that builds it; None: of a profile, so the system does without.

    Raises:
        UsageError: there is no compose file, or it is none.
    """
    path = checkout / "docker-compose.yml"
    try:
        services = yaml.safe_load(path.read_text())["services"].items()
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no compose file: {error}") from None
    needed: dict[str, str] = {}
    built: dict[str, str] = {}
    optional: dict[str, None] = {}
    for service, section in services:
        if "image" not in section:
            continue
        name = _interpolate(section["image"], variables)
        if "build" in section:
            built[name] = f"docker compose build {service}"
        if section.get("profiles"):
            optional[name] = None
        else:
            needed[name] = f"docker pull {name}"
    return optional | needed | {name: command for name, command in built.items() if name in needed}


def tag(variables: Mapping[str, str]) -> str:
    """Tag of our own images."""
    return variables.get("ESPALIER_TAG") or version("espalier")


def _interpolate(text: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match["name"]) or match["default"] or "", text)


def _present(engine: Engine, names: Mapping[str, str | None]) -> list[Image]:
    found = {name: engine.find(name) for name in names}
    lacking = [f"{name} ({command})" for name, command in names.items() if command is not None and found[name] is None]
    if lacking:
        raise SetupFailed(f"images are missing; build them first: {'; '.join(lacking)}")
    return [image for image in found.values() if image is not None]


def fetch_wheels(checkout: Path, names: Sequence[str], directory: Path) -> None:
    """Fetch the pinned wheels of some requirement files, checked against their hashes, and build our own.

    Raises:
        SetupFailed: pip says no.
    """
    pins = checkout / "deploy" / "requirements"
    torch = [pins / "torch.txt"] if set(names) & set(TORCH) else []
    files = [word for path in (*(pins / f"{name}.txt" for name in names), *torch) for word in ("-r", str(path))]
    _pip("download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--find-links",
         str(checkout / "deploy" / "wheels"), "-d", str(directory), *files)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="espalier-source-") as copy:
        # From a copy: what an earlier build left in the checkout would end in the wheel.
        for name in PACKAGES:
            shutil.copytree(checkout / name, Path(copy, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy2(checkout / name, copy)
        _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(directory), copy)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupFailed(f"pip {arguments[0]} failed: {done.stderr.strip()[-2000:]}")


def _files(checkout: Path, wheels: Path, models: Path | None) -> Iterator[tuple[str, Path]]:
    """Name below `tree/`, and where the file lies now."""
    if (checkout / "docker-compose.yml").is_file():
        yield "docker-compose.yml", checkout / "docker-compose.yml"
    roots = [("deploy", checkout / "deploy"), ("wheels", wheels)]
    if models is not None:
        if not any(models.glob("*/manifest.json")):
            raise UsageError(f"there is no exported model in {models}; make one with espalier export")
        roots.append(("out/models", models))
    for name, root in roots:
        for path in sorted(root.rglob("*")):
            below = path.relative_to(root)
            # The wheels that images are built from stay: their images are in the archive.
            if path.is_file() and "__pycache__" not in below.parts and (name, below.parts[0]) != ("deploy", "wheels"):
                yield f"{name}/{below.as_posix()}", path


def _check_space(directory: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed_bytes + SPARE_BYTES:
        raise SetupFailed(
            f"{directory} has {_megabytes(free)} free and about {_megabytes(needed_bytes + SPARE_BYTES)} are needed; make room "
            "there, or choose another place"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


@contextlib.contextmanager
def _replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole and on the disk; otherwise nothing is left of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SetupFailed(f"{path} could not be written, and nothing of it was left: {error}") from None
        raise


class _Writer:
    """Writes members whose length is known only at their end: the header is written once more then."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.members: list[Member] = []

    def add(self, name: str, chunks: Iterable[bytes], *, executable: bool = False) -> None:
        """Append a member."""
        header = tarfile.TarInfo(name)
        header.mode = 0o755 if executable else 0o644
        begun, digest = self._stream.tell(), hashlib.sha256()
        self._put(header)
        for chunk in chunks:
            header.size += self._stream.write(chunk)
            digest.update(chunk)
        self._stream.write(bytes(-header.size % tarfile.BLOCKSIZE))
        end = self._stream.tell()
        self._stream.seek(begun)
        self._put(header)
        self._stream.seek(end)
        self.members.append(Member(name=name, size_bytes=header.size, sha256=digest.hexdigest(), executable=executable))

    def end(self) -> None:
        """The two empty blocks of the format."""
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE))

    def _put(self, header: tarfile.TarInfo) -> None:
        # The length of a GNU header does not depend on the size that it states.
        self._stream.write(header.tobuf(tarfile.GNU_FORMAT))


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _gzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Level 1: measured on images, 6 is three times slower for a tenth less."""
    packer = zlib.compressobj(1, wbits=31)
    for chunk in chunks:
        yield packer.compress(chunk)
    yield packer.flush()


def _counted(chunks: Iterable[bytes], progress: Progress, task: Any) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        progress.advance(task, len(chunk))


# --- loading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of loading an archive."""

    manifest: Manifest
    directory: Path
    written: int
    """Files unpacked now."""
    there: int
    """Files that were there already."""
    images_loaded: tuple[str, ...]
    images_there: tuple[str, ...]
    images_left_out: tuple[str, ...]
    no_engine: str | None
    """Why images were left out."""

    def next_commands(self) -> list[str]:
        """What a person types now."""
        manifest, commands = self.manifest, [f"cd {self.directory}"]
        if manifest.images:
            tag = f"ESPALIER_TAG={manifest.tag} " if manifest.tag != manifest.espalier else ""
            commands.append(f"{tag}docker compose up --no-build")
        if manifest.requirements:
            torch = ("torch",) if set(manifest.requirements) & set(TORCH) else ()
            pins = " ".join(f"-r deploy/requirements/{name}.txt" for name in (*manifest.requirements, *torch))
            pip = ".venv/bin/pip install --no-index --find-links wheels --no-deps"
            commands += [f"{PYTHON} -m venv .venv", f"{pip} --require-hashes {pins}", f"{pip} espalier=={manifest.espalier}"]
        return commands

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.directory}: {self.written} files unpacked, {self.there} were there"
        for names, what in (
            (self.images_loaded, "loaded"), (self.images_there, "there already"), (self.images_left_out, "left out"),
        ):  # fmt: skip
            if names:
                yield f"images {what}: {', '.join(names)}"
        if self.no_engine is not None:
            yield f"{self.no_engine}; then load the bundle again"
        yield "next:"
        yield from (f"  {command}" for command in self.next_commands())

    def document(self) -> dict[str, Any]:
        """For `-o json`."""
        return {
            "directory": str(self.directory), "espalier": self.manifest.espalier, "tag": self.manifest.tag,
            "files": {"written": self.written, "there": self.there},
            "images": {
                "loaded": self.images_loaded, "there": self.images_there, "left_out": self.images_left_out,
                "no_engine": self.no_engine,
            },
            "next": self.next_commands(),
        }  # fmt: skip


def load(archive: Path, directory: Path, progress: Progress, *, replace: bool = False) -> Loaded:
    """Unpack an archive into a directory and load its images; what is there already is passed over.

    The whole archive is compared with its manifest before anything is taken from it.

    Args:
        archive: written by `save`.
        directory: made if it is not there.
        progress: shows how far it is.
        replace: overwrite files of the directory that differ from the archive's.

    Raises:
        UsageError: the archive is damaged or none, or the directory has other files in their place.
        SetupFailed: the disk is full.
        RunFailed: the engine refuses an image.
    """
    with _opened(archive) as bundle:
        task = progress.add_task("verifying", total=bundle.size_bytes)
        for member in bundle.manifest.members:
            for chunk in bundle.content(member):
                progress.advance(task, len(chunk))
        files = {_place(directory, member): member for member in bundle.manifest.members if member.name.startswith(TREE)}
        missing = {path: member for path, member in files.items() if not _is_there(path, member)}
        taken = [str(path) for path in missing if path.is_symlink() or path.exists()]
        if taken and not replace:
            raise UsageError(
                f"{len(taken)} files differ from the bundle's: {', '.join(taken[:5])}{', …' if len(taken) > 5 else ''}; "
                f"unpack into another directory (--into), or replace them (--force)"
            )
        directory.mkdir(parents=True, exist_ok=True)
        _check_space(directory, sum(member.size_bytes for member in missing.values()))
        task = progress.add_task("unpacking", total=sum(member.size_bytes for member in missing.values()))
        for path, member in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(path, 0o755 if member.executable else 0o644) as stream:
                for chunk in _counted(bundle.content(member), progress, task):
                    stream.write(chunk)
        there, loaded, no_engine = _load_images(bundle, progress)
    names = tuple(image.name for image in bundle.manifest.images)
    left_out = names if no_engine is not None else ()
    return Loaded(bundle.manifest, directory, len(missing), len(files) - len(missing), loaded, there, left_out, no_engine)


class _Bundle:
    """An archive that is open, with its manifest."""

    def __init__(self, archive: Path, tar: tarfile.TarFile) -> None:
        self._archive, self._tar = archive, tar
        self._members = tar.getmembers()
        if not self._members or self._members[-1].name != MANIFEST or self._members[-1].size > LONGEST_MANIFEST_BYTES:
            raise UsageError(f"{archive} is no bundle, or its end is missing: the last member is not {MANIFEST}")
        text = b"".join(self._read(self._members.pop()))
        try:
            self.manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise UsageError(f"{archive}: {MANIFEST}: {where}: {first['msg']}") from None
        self._compare()

    @property
    def size_bytes(self) -> int:
        """Of all members but the manifest."""
        return sum(member.size_bytes for member in self.manifest.members)

    def content(self, member: Member) -> Iterator[bytes]:
        """A member's bytes; fails after the last one where they are not those of the manifest."""
        digest = hashlib.sha256()
        for chunk in self._read(self._tar.getmember(member.name)):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != member.sha256:
            raise UsageError(f"{self._archive}: {member.name} is damaged: its sha256 is not that of the manifest")

    def _read(self, info: tarfile.TarInfo) -> Iterator[bytes]:
        stream = self._tar.extractfile(info)
        if stream is None:
            raise UsageError(f"{self._archive}: {info.name} is no plain file")
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk

    def _compare(self) -> None:
        """The members must be those of the manifest, plain files all, with names that stay below the directory."""
        listed = [(member.name, member.size_bytes) for member in self.manifest.members]
        if listed != [(info.name, info.size) for info in self._members] or len(dict(listed)) != len(listed):
            raise UsageError(f"{self._archive}: its members are not those of its manifest")
        for info in self._members:
            if not info.isreg() or not (info.name in (PLAIN, COMPRESSED) or _is_safe(info.name)):
                raise UsageError(f"{self._archive}: refused, since a bundle has no member like {info.name!r}")


def _is_safe(name: str) -> bool:
    parts = name.removeprefix(TREE).split("/")
    return name.startswith(TREE) and name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[_Bundle]:
    try:
        with tarfile.open(archive, "r:") as tar:
            yield _Bundle(archive, tar)
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(f"{archive} is no bundle, or it is damaged: {error}") from None


def _place(directory: Path, member: Member) -> Path:
    """Where a file goes; not through a link that leads out of the directory."""
    path = directory / member.name.removeprefix(TREE)
    if not path.parent.resolve().is_relative_to(directory.resolve()):
        raise UsageError(f"{path} is refused: a link there leads out of {directory}")
    return path


def _is_there(path: Path, member: Member) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != member.size_bytes:
        return False
    digest = hashlib.sha256()
    for chunk in _read(path):
        digest.update(chunk)
    return digest.hexdigest() == member.sha256


def _load_images(bundle: _Bundle, progress: Progress) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Names of images that were there, names of those that were loaded, and why none could be."""
    member = next((member for member in bundle.manifest.members if member.name in (PLAIN, COMPRESSED)), None)
    if member is None:
        return (), (), None
    try:
        engine = Engine()
    except SetupFailed as error:
        return (), (), str(error)
    with engine:
        found = {image: engine.find(image.name) for image in bundle.manifest.images}
        there = tuple(image.name for image, has in found.items() if has is not None and has.id == image.id)
        wanted = tuple(image.name for image in found if image.name not in there)
        if wanted:
            task = progress.add_task("loading images", total=member.size_bytes)
            engine.load(_counted(bundle.content(member), progress, task))
        if lacking := [name for name in wanted if engine.find(name) is None]:
            raise RunFailed(f"the Docker engine took the images but has no {', '.join(lacking)}")
    return there, wanted, None
