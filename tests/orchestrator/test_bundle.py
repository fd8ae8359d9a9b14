from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import docker
import docker.errors
import pytest
from click.testing import CliRunner, Result
from rich.progress import Progress

from orchestrator import bundle, lifecycle
from orchestrator.__main__ import main
from orchestrator.bundle import Contents
from orchestrator.errors import SetupFailed, UsageError

IMAGE = "espalier-test/bundle-{name}:${{ESPALIER_TAG:-none}}"
COMPOSE = f"""\
services:
  proxy: {{image: "{IMAGE.format(name="core")}"}}
  core: {{image: "{IMAGE.format(name="core")}", build: .}}
  other: {{image: "{IMAGE.format(name="other")}"}}
  gpu: {{image: "{IMAGE.format(name="gpu")}", build: ., profiles: [gpu]}}
"""
FILES = Contents(images=False, wheels=())
QUIET = Progress(disable=True)


def wheel(directory: Path) -> str:
    """Writes a wheel of nothing; returns its sha256."""
    info = "espalier_tiny-1.0.dist-info"
    files = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: espalier-tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": "\n".join([*rows, f"{info}/RECORD,,"]).encode()}.items():
            archive.writestr(name, data)
    directory.mkdir(parents=True)
    (directory / "espalier_tiny-1.0-py3-none-any.whl").write_bytes(packed.getvalue())
    return hashlib.sha256(packed.getvalue()).hexdigest()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As small as a checkout can be: four empty packages, one pinned wheel."""
    root = tmp_path / "checkout"
    for package in bundle.PACKAGES:
        (root / package / "__pycache__").mkdir(parents=True)
        (root / package / "__init__.py").touch()
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "espalier"\nversion = "{version("espalier")}"\n'
        f"[tool.setuptools]\npackages = {list(bundle.PACKAGES)}\n"
    )
    (root / "README.md").write_text("# Tiny\n")
    (root / "docker-compose.yml").write_text(COMPOSE)
    (root / "deploy" / "testbeds").mkdir(parents=True)
    (root / "deploy" / "testbeds" / "demo.yaml").write_text("name: demo\n")
    script = root / "deploy" / "demo.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    sha256 = wheel(root / "deploy" / "wheels")
    (root / "deploy" / "requirements").mkdir()
    (root / "deploy" / "requirements" / "gateway.txt").write_text(f"espalier-tiny==1.0 --hash=sha256:{sha256}\n")
    return root


@pytest.fixture
def archive(checkout: Path, tmp_path: Path) -> Path:
    """A bundle of files alone."""
    bundle.save(tmp_path / "tiny.tar", checkout, FILES, QUIET)
    return tmp_path / "tiny.tar"


def below(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def load(archive: Path, directory: Path, **options: Any) -> bundle.Loaded:
    return bundle.load(archive, directory, QUIET, **options)


# --- files and wheels -----------------------------------------------------------------------------------------------------


def test_files_arrive_as_they_were_and_a_second_time_nothing_is_done(archive: Path, checkout: Path, tmp_path: Path) -> None:
    first = load(archive, tmp_path / "box")
    assert below(tmp_path / "box") == {
        "docker-compose.yml": COMPOSE.encode(),
        "deploy/demo.sh": b"#!/bin/sh\n",
        "deploy/testbeds/demo.yaml": b"name: demo\n",
        "deploy/requirements/gateway.txt": (checkout / "deploy/requirements/gateway.txt").read_bytes(),
    }
    assert os.access(tmp_path / "box" / "deploy/demo.sh", os.X_OK)
    assert not (tmp_path / "box" / "docker-compose.yml").stat().st_mode & 0o111
    second = load(archive, tmp_path / "box")
    assert ((first.written, first.there), (second.written, second.there)) == ((4, 0), (0, 4))


def test_wheels_are_fetched_by_their_hashes_and_ours_is_among_them(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (checkout / "build" / "lib" / "models").mkdir(parents=True)
    (checkout / "build" / "lib" / "models" / "removed.py").touch()
    bundle.save(tmp_path / "tiny.tar", checkout, Contents(images=False, wheels=("gateway",)), QUIET)
    loaded = load(tmp_path / "tiny.tar", tmp_path / "box")
    ours = f"espalier-{version('espalier')}-py3-none-any.whl"
    assert sorted(path.name for path in (tmp_path / "box" / "wheels").iterdir()) == [ours, "espalier_tiny-1.0-py3-none-any.whl"]
    assert "models/removed.py" not in zipfile.ZipFile(tmp_path / "box" / "wheels" / ours).namelist()
    assert loaded.next_commands()[2] == (
        ".venv/bin/pip install --no-index --find-links wheels --no-deps --require-hashes -r deploy/requirements/gateway.txt"
    )


def test_a_wheel_that_cannot_be_had_leaves_no_archive(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    shutil.rmtree(checkout / "deploy" / "wheels")
    with pytest.raises(SetupFailed, match=r"pip download failed: (?s:.*)espalier-tiny"):
        bundle.save(tmp_path / "tiny.tar", checkout, Contents(images=False, wheels=("gateway",)), QUIET)
    assert not list(tmp_path.glob("tiny.tar*"))


def test_models_go_where_the_commands_look_for_them(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no exported model"):
        bundle.save(tmp_path / "tiny.tar", checkout, Contents(False, wheels=(), models=tmp_path), QUIET)
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    (tmp_path / "models" / "minilm" / "manifest.json").write_text("{}")
    bundle.save(tmp_path / "tiny.tar", checkout, Contents(False, wheels=(), models=tmp_path / "models"), QUIET)
    load(tmp_path / "tiny.tar", tmp_path / "box")
    assert (tmp_path / "box" / "out/models/minilm/manifest.json").read_text() == "{}"


def test_a_file_of_the_user_s_is_not_overwritten_unasked(archive: Path, tmp_path: Path) -> None:
    load(archive, tmp_path / "box")
    edited = tmp_path / "box" / "deploy" / "testbeds" / "demo.yaml"
    edited.write_text("name: mine\n")
    (tmp_path / "box" / "deploy" / "demo.sh").unlink()
    with pytest.raises(UsageError, match=r"1 files differ from the bundle's: .*demo.yaml"):
        load(archive, tmp_path / "box")
    assert not (tmp_path / "box" / "deploy" / "demo.sh").exists(), "it is all or nothing"
    assert load(archive, tmp_path / "box", replace=True).written == 2
    assert edited.read_text() == "name: demo\n"


def test_a_name_with_more_than_a_hundred_characters_survives(checkout: Path, tmp_path: Path) -> None:
    name = "deploy/" + "a" * 120
    (checkout / name).write_bytes(b"x" * 513)
    bundle.save(tmp_path / "tiny.tar", checkout, FILES, QUIET)
    load(tmp_path / "tiny.tar", tmp_path / "box")
    assert (tmp_path / "box" / name).read_bytes() == b"x" * 513


# --- what is not as it should be ------------------------------------------------------------------------------------------


def rewritten(archive: Path, change: Any) -> None:
    """The archive with its members changed and its manifest as it was: `change` gets (header, bytes) and returns a list."""
    with tarfile.open(archive) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in (new for member in members for new in change(*member)):
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("name", ["tree/docker-compose.yml", "tree/deploy/demo.sh"])
def test_nothing_is_taken_from_an_archive_that_is_damaged(archive: Path, tmp_path: Path, name: str) -> None:
    with tarfile.open(archive) as tar:
        place = tar.getmember(name).offset_data
    data = bytearray(archive.read_bytes())
    data[place + 3] ^= 1
    archive.write_bytes(data)
    with pytest.raises(UsageError, match=f"{name} is damaged"):
        load(archive, tmp_path / "box")
    assert not (tmp_path / "box").exists()


def test_an_archive_cut_off_anywhere_is_refused(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    end = len(whole) - 2 * tarfile.BLOCKSIZE
    for length in [*range(0, end, 333), *range(0, end, tarfile.BLOCKSIZE)]:
        archive.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="no bundle"):
            load(archive, tmp_path / "box")
    assert not (tmp_path / "box").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("buy milk\n" * 200)
    with pytest.raises(UsageError, match="no bundle"):
        load(tmp_path / "notes", tmp_path / "box")


@pytest.mark.parametrize(
    "name", ["tree/../evil", "/etc/evil", "tree//etc/evil", "tree/a/../../evil", "evil", "tree/a\nb", "tree/", "tree/./a"]
)
def test_a_name_that_leads_elsewhere_is_refused(archive: Path, tmp_path: Path, name: str) -> None:
    def rename(info: tarfile.TarInfo, data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        if info.name == bundle.MANIFEST:
            data = data.replace(b'"tree/deploy/demo.sh"', json.dumps(name).encode())
        elif info.name == "tree/deploy/demo.sh":
            info.name = name
        return [(info, data)]

    rewritten(archive, rename)
    with pytest.raises(UsageError, match=r"has no member like|not those of its manifest|no plain file"):
        load(archive, tmp_path / "box")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("checkout", "tiny.tar")] == []


def test_a_link_is_refused_in_the_archive_and_on_the_way(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "box" / "deploy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="a link there leads out of"):
        load(archive, tmp_path / "box")
    assert not list((tmp_path / "elsewhere").iterdir())

    def link(info: tarfile.TarInfo, data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        if info.name == "tree/deploy/demo.sh":
            info.type, info.linkname, data = tarfile.SYMTYPE, "/etc/passwd", b""
        return [(info, data)]

    rewritten(archive, link)
    with pytest.raises(UsageError, match="not those of its manifest"):
        load(archive, tmp_path / "other")


def test_members_that_the_manifest_does_not_know_are_refused(archive: Path, tmp_path: Path) -> None:
    rewritten(archive, lambda info, data: [(info, data)] * (2 if info.name.endswith("demo.sh") else 1))
    with pytest.raises(UsageError, match="not those of its manifest"):
        load(archive, tmp_path / "box")


def test_a_manifest_of_another_format_is_refused(archive: Path, tmp_path: Path) -> None:
    rewritten(archive, lambda info, data: [(info, data.replace(b'"bundle": 1', b'"bundle": 2'))])
    with pytest.raises(UsageError, match=r"manifest\.json: bundle: Input should be 1"):
        load(archive, tmp_path / "box")


# --- disks and interruptions ----------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    archive: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SetupFailed, match="has 0 MB free and about 17 MB are needed"):
        bundle.save(tmp_path / "new.tar", checkout, FILES, QUIET)
    with pytest.raises(SetupFailed, match="has 0 MB free"):
        load(archive, tmp_path / "box")
    assert not list(tmp_path.glob("new.tar*"))
    assert below(tmp_path / "box") == {}


def test_a_disk_that_fills_up_leaves_nothing_half_written(archive: Path, checkout: Path, tmp_path: Path) -> None:
    """The size limit of files stands for the full disk. An archive of that name from before stays as it was."""
    (checkout / "deploy" / "large").write_bytes(bytes(2**20))
    before, limits = archive.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        with pytest.raises(SetupFailed, match=r"could not be written, and nothing of it was left: .*File too large"):
            bundle.save(archive, checkout, FILES, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert archive.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_an_interruption_leaves_nothing_half_written(checkout: Path, tmp_path: Path) -> None:
    class Interrupted(Progress):
        def advance(self, *_: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle.save(tmp_path / "new.tar", checkout, FILES, Interrupted(disable=True))
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]


# --- images ---------------------------------------------------------------------------------------------------------------


def test_the_compose_file_says_which_images_and_who_builds_them(checkout: Path) -> None:
    assert bundle.named_images(checkout, {"ESPALIER_TAG": "7"}) == {
        "espalier-test/bundle-gpu:7": None,
        "espalier-test/bundle-core:7": "docker compose build core",
        "espalier-test/bundle-other:7": "docker pull espalier-test/bundle-other:7",
    }
    assert "espalier-test/bundle-core:none" in bundle.named_images(checkout, {})
    (checkout / "docker-compose.yml").write_text("services: 3")
    with pytest.raises(UsageError, match="is no compose file"):
        bundle.named_images(checkout, {})


def test_the_real_compose_file_needs_what_the_system_runs() -> None:
    named = bundle.named_images(lifecycle.ROOT, {})
    tag = version("espalier")
    needed = {name for name, command in named.items() if command is not None}
    assert needed == {f"espalier/{name}:{tag}" for name in ("models", "stage", "orchestrator", "prometheus", "gateway")}
    assert named[f"espalier/orchestrator:{tag}"] == "docker compose build orchestrator"
    assert named[f"espalier/stage-gpu:{tag}"] is None


def test_variables_come_from_the_process_then_from_the_file(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPALIER_TAG", raising=False)
    (checkout / ".env").write_text("# ours\nESPALIER_TAG='3'\n\nBASE_IMAGE=espalier/base:3.11\n")
    assert bundle.tag(bundle.environment(checkout)) == "3"
    monkeypatch.setenv("ESPALIER_TAG", "4")
    assert bundle.tag(bundle.environment(checkout)) == "4"


class Images(NamedTuple):
    engine: docker.APIClient
    tag: str

    def make(self, name: str) -> str:
        """An image of one file, which differs from that of every other run; returns its id."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            info = tarfile.TarInfo("note")
            info.size = 40_000
            tar.addfile(info, io.BytesIO(f"{name} {self.tag}".encode().ljust(info.size, b".")))
        repository = f"espalier-test/bundle-{name}"
        self.engine.import_image_from_data(data.getvalue(), repository=repository, tag=self.tag)
        return str(self.engine.inspect_image(f"{repository}:{self.tag}")["Id"])

    def remove(self, name: str) -> None:
        with contextlib.suppress(docker.errors.ImageNotFound):
            self.engine.remove_image(f"espalier-test/bundle-{name}:{self.tag}", force=True)

    def has(self, name: str) -> str | None:
        try:
            return str(self.engine.inspect_image(f"espalier-test/bundle-{name}:{self.tag}")["Id"])
        except docker.errors.ImageNotFound:
            return None


@pytest.fixture
def images(engine: docker.APIClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Images]:
    """Images of this test alone, on the real engine."""
    made = Images(engine, f"{os.getpid()}-{os.urandom(4).hex()}")
    monkeypatch.setenv("ESPALIER_TAG", made.tag)
    yield made
    for name in ("core", "other", "gpu"):
        made.remove(name)


@pytest.mark.parametrize("compress", [True, False])
def test_images_are_loaded_where_they_lack_and_passed_over_where_they_are(
    images: Images, checkout: Path, tmp_path: Path, compress: bool
) -> None:
    core, other = images.make("core"), images.make("other")
    manifest = bundle.save(tmp_path / "tiny.tar", checkout, Contents(compress=compress, wheels=()), QUIET)
    assert {image.id for image in manifest.images} == {core, other}
    assert load(tmp_path / "tiny.tar", tmp_path / "box").images_loaded == ()
    images.remove("other")
    loaded = load(tmp_path / "tiny.tar", tmp_path / "box")
    assert loaded.images_loaded == (f"espalier-test/bundle-other:{images.tag}",)
    assert loaded.images_there == (f"espalier-test/bundle-core:{images.tag}",)
    assert images.has("other") == other
    assert loaded.next_commands() == [
        f"cd {tmp_path / 'box'}",
        f"ESPALIER_TAG={images.tag} docker compose up --no-build",
    ]


def test_an_image_of_a_profile_goes_in_if_it_exists(images: Images, checkout: Path, tmp_path: Path) -> None:
    for name in ("core", "other", "gpu"):
        images.make(name)
    manifest = bundle.save(tmp_path / "tiny.tar", checkout, Contents(wheels=()), QUIET)
    assert len(manifest.images) == 3


def test_a_missing_image_is_named_with_the_command_that_builds_it(images: Images, checkout: Path, tmp_path: Path) -> None:
    images.make("other")
    with pytest.raises(SetupFailed, match=f"bundle-core:{images.tag} \\(docker compose build core\\)$"):
        bundle.save(tmp_path / "tiny.tar", checkout, Contents(wheels=()), QUIET)
    assert not list(tmp_path.glob("tiny.tar*"))


def test_a_damaged_image_never_reaches_the_engine(images: Images, checkout: Path, tmp_path: Path) -> None:
    images.make("core")
    images.make("other")
    archive = tmp_path / "tiny.tar"
    bundle.save(archive, checkout, Contents(compress=False, wheels=()), QUIET)
    images.remove("core")
    data = archive.read_bytes()
    archive.write_bytes(data.replace(f"core {images.tag}".encode(), f"CORE {images.tag}".encode()))
    assert archive.read_bytes() != data
    with pytest.raises(UsageError, match=r"images\.tar is damaged"):
        load(archive, tmp_path / "box")
    assert images.has("core") is None


# --- the command ----------------------------------------------------------------------------------------------------------


def command(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(main, ["bundle", *arguments])


@pytest.fixture
def no_engine(tmp_path: Path) -> dict[str, str]:
    """Variables under which no engine answers."""
    return {"DOCKER_HOST": f"unix://{tmp_path}/none.sock"}


def test_without_an_engine_the_rest_is_unpacked_and_the_status_says_so(
    images: Images, checkout: Path, tmp_path: Path, no_engine: dict[str, str]
) -> None:
    images.make("core")
    images.make("other")
    bundle.save(tmp_path / "tiny.tar", checkout, Contents(wheels=()), QUIET)
    done = command("load", str(tmp_path / "tiny.tar"), "--into", str(tmp_path / "box"), "-o", "json", env=no_engine)
    document = json.loads(done.stdout)
    assert done.exit_code == 4
    assert len(document["images"]["left_out"]) == 2
    assert "no Docker engine answers" in document["images"]["no_engine"]
    assert (tmp_path / "box" / "docker-compose.yml").exists()


def test_the_commands_say_what_they_did_and_what_comes_next(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "ROOT", checkout)
    archive = tmp_path / "tiny.tar"
    saved = command("save", str(archive), "--no-images", "--no-wheels")
    assert saved.exit_code == 0
    assert saved.stdout.splitlines()[:3] == [f"{archive}: 0 MB, 4 members", "images: none", "wheels: none"]
    loaded = command("load", str(archive), "--into", str(tmp_path / "box"))
    assert loaded.exit_code == 0
    assert loaded.stdout.splitlines() == [
        f"{tmp_path / 'box'}: 4 files unpacked, 0 were there",
        "next:",
        f"  cd {tmp_path / 'box'}",
    ]


def test_saving_images_without_an_engine_is_a_set_up_that_failed(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_engine: dict[str, str]
) -> None:
    monkeypatch.setattr(lifecycle, "ROOT", checkout)
    done = command("save", str(tmp_path / "tiny.tar"), env=no_engine)
    assert done.exit_code == 3
    assert "no Docker engine answers" in done.stderr


def test_a_bundle_is_made_from_a_checkout_into_a_directory_that_is_there(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is made from a checkout"):
        bundle.save(tmp_path / "tiny.tar", tmp_path, FILES, QUIET)
    with pytest.raises(UsageError, match="there is no directory"):
        bundle.save(tmp_path / "none" / "tiny.tar", checkout, FILES, QUIET)
