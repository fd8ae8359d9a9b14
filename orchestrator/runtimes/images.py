"""Images out of a Docker engine and into one, as a stream: for `espalier bundle`, which runs at a person's terminal.

Beside `engine_api`, which awaits the orchestrator's own small calls, the only module that knows the `docker` package. Nothing
is held in memory but one chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import docker
import docker.errors
import docker.utils
import requests

from orchestrator.errors import RunFailed, SetupFailed

CHUNK_BYTES = 2**20
ANSWER_S = 600.0
"""The engine may be silent for this long, as it is while it unpacks an image [s]."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that the engine has."""

    name: str
    id: str
    layers: tuple[tuple[str, int], ...]
    """(what identifies it among layers with the same history below, size [bytes]), the lowest first."""


class Engine:
    """The Docker engine of the environment (`DOCKER_HOST`), or of this machine."""

    def __init__(self) -> None:
        """Connect.

        Raises:
            SetupFailed: no engine answers.
        """
        try:
            self._client = docker.APIClient(version="auto", timeout=ANSWER_S, **docker.utils.kwargs_from_env())
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise SetupFailed(f"no Docker engine answers ({error}); start one, or set DOCKER_HOST") from None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def find(self, name: str) -> Image | None:
        """An image by its name and tag, or None where there is none."""
        with _translated(f"look for {name}"):
            try:
                found = self._client.inspect_image(name)
                history = self._client.history(name)
            except docker.errors.ImageNotFound:
                return None
        layers = tuple((f"{layer['Created']} {layer['CreatedBy']}", int(layer["Size"])) for layer in reversed(history))
        return Image(name, found["Id"], layers)

    def export(self, names: Iterable[str]) -> Iterator[bytes]:
        """One archive of several images, as `docker save` writes it: layers that they share are in it once."""
        with _translated("export images"):
            answer = self._client.get(
                self._url("get"), params={"names": list(names)}, stream=True, timeout=self._client.timeout
            )
            with contextlib.closing(answer):
                _check(answer, "export images")
                yield from answer.iter_content(CHUNK_BYTES)

    def load(self, archive: Iterator[bytes]) -> None:
        """Take in an archive of `export`, compressed or not; what the engine has already it passes over."""
        with _translated("load images"):
            answer = self._client.post(
                self._url("load"), data=archive, params={"quiet": True}, stream=True, timeout=self._client.timeout
            )
            with contextlib.closing(answer):
                _check(answer, "load images")
                said = answer.text
        if '"error"' in said:
            raise RunFailed(f"the Docker engine could not load images: {said.strip()}")

    def _url(self, verb: str) -> str:
        return f"{self._client.base_url}/v{self._client.api_version}/images/{verb}"


def size_bytes(images: Iterable[Image]) -> int:
    """How long an archive of these images is, but for headers: layers that they share count once."""
    sizes: dict[tuple[str, ...], int] = {}
    for image in images:
        below: tuple[str, ...] = ()
        for key, size in image.layers:
            below = (*below, key)
            sizes[below] = size
    return sum(sizes.values())


def _check(answer: requests.Response, what: str) -> None:
    if answer.status_code != requests.codes.ok:
        raise RunFailed(f"the Docker engine refuses to {what}: {answer.text.strip()}")


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        raise RunFailed(f"the Docker engine could not {what}: {error}") from None
