"""The command line's side of the control plane: finds a running orchestrator and talks to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from orchestrator.errors import RunFailed, UsageError
from orchestrator.state_dir import StateDir

ANSWER_S, PROBE_S = 5.0, 45.0
POLL_S = 0.1


class Client:
    """One orchestrator. Its methods mirror the endpoints of `orchestrator.app`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(base_url=url, timeout=ANSWER_S, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def status(self) -> dict[str, Any]:
        """`GET /v1/status`."""
        found: dict[str, Any] = self._ask("GET", "/v1/status").json()
        return found

    def scale(self, service: str, replicas: int | None, standby: int | None = None) -> None:
        """`POST /v1/scale`; None takes an order back."""
        self._ask("POST", "/v1/scale", {"service": service, "replicas": replicas, "standby": standby})

    def restart(self, services: list[str] | None) -> None:
        """`POST /v1/restart`."""
        self._ask("POST", "/v1/restart", {"services": services})

    def update(self, text: str, name: str, limit_s: float) -> None:
        """`POST /v1/update`."""
        self._ask("POST", "/v1/update", {"testbed": text, "name": name, "limit": limit_s})

    def drain(self, node: str) -> None:
        """`POST /v1/drain`."""
        self._ask("POST", "/v1/drain", {"node": node})

    def undrain(self, node: str) -> None:
        """`POST /v1/undrain`."""
        self._ask("POST", "/v1/undrain", {"node": node})

    def probe(self, a: str, b: str) -> dict[str, Any]:
        """`POST /v1/probe`."""
        found: dict[str, Any] = self._ask("POST", "/v1/probe", {"between": [a, b]}, PROBE_S).json()
        return found

    def shut_down(self) -> None:
        """`POST /v1/shutdown`."""
        self._ask("POST", "/v1/shutdown", {})

    def watch(self, limit_s: float, done: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
        """The status again and again, until it is as wanted.

        Raises:
            RunFailed: it was not within the limit.
        """
        end = time.monotonic() + limit_s
        while True:
            status = self.status()
            yield status
            if done(status):
                return
            if time.monotonic() > end:
                raise RunFailed(f"not there after {limit_s:g} s: {unsettled(status)}")
            time.sleep(POLL_S)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, answer_s: float = ANSWER_S) -> httpx.Response:
        try:
            answer = self._http.request(method, path, json=body, timeout=answer_s)
        except httpx.TransportError as error:
            raise RunFailed(f"the orchestrator at {self._url} does not answer: {error}") from None
        if answer.is_success:
            return answer
        message = _message(answer)
        if answer.status_code < 500:
            raise UsageError(message)
        raise RunFailed(message)


def connect(state: StateDir) -> Client:
    """The orchestrator that runs in this state directory.

    Raises:
        RunFailed: none does.
    """
    daemon = state.read_daemon()
    if daemon is None or not daemon.is_alive():
        raise RunFailed(f"nothing is up in {state.root}; start it with espalier up")
    return Client(daemon.url)


def unsettled(status: dict[str, Any]) -> str:
    """What is not as wanted, in words."""
    parts = [_counts(name, service) for name, service in status["services"].items() if not service["settled"]]
    if status["gateway"] is None or status["gateway"]["state"] != "ready":
        parts.append("the gateway is not ready")
    return ", ".join(parts) or "everything is as wanted"


def _counts(name: str, service: dict[str, Any]) -> str:
    """`encode has 1 of 2 ready`; standbys only where some are wanted."""
    counts = [f"{service['states'][state]} of {wanted} {state}" for state, wanted in service["wanted"].items() if wanted]
    return f"{name} has {' and '.join(counts)}"


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"the orchestrator answered HTTP {answer.status_code}: {answer.text[:200]}"
