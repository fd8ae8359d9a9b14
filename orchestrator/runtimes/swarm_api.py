"""The calls to a manager of a Swarm, beside those to any engine: services, tasks, boxes. The same door, two words wider.

`runtimes.swarm` calls it. Everything is said as by `engine_api`: the manager answers no (`Refused`), or there is no answer
(`driver.Unreachable`), which is also what a manager without a leader gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.runtimes.engine_api import EngineApi, Refused

NOT_A_MANAGER = "not a swarm manager"
"""What an engine says that is no manager, or in no Swarm at all; with the status of one that does not answer."""
OUT_OF_SEQUENCE = "out of sequence"
TRIES = 5
"""How often an update is tried that somebody else's came before."""


class SwarmApi(EngineApi):
    """One manager; `connect` comes first."""

    async def network(self, name: str) -> dict[str, Any] | None:
        """All that is known of a network; None where there is none of this name."""
        return await self._unless_missing(lambda: dict(self._client.inspect_network(name)))

    async def boxes(self) -> list[dict[str, Any]]:
        """Every box of the Swarm."""
        return list(await self._call(self._client.nodes))

    async def services(self, label: str) -> list[dict[str, Any]]:
        """Every service with this label."""
        return list(await self._call(lambda: self._client.services(filters={"label": [label]})))

    async def tasks(self, label: str) -> list[dict[str, Any]]:
        """Every task, over or not, of services with this label."""
        return list(await self._call(lambda: self._client.tasks(filters={"label": [label]})))

    async def create_service(self, body: Mapping[str, Any]) -> str:
        """Create a service; returns its id."""

        def create() -> Any:
            return self._client.create_service(
                body["TaskTemplate"], name=body["Name"], labels=body["Labels"], mode=body["Mode"],
                endpoint_spec=body["EndpointSpec"],
            )  # fmt: skip

        return str((await self._call(create))["ID"])

    async def scale_service(self, service: str, replicas: int) -> None:
        """Say how many tasks a service is to have."""

        def scale() -> None:
            document = self._client.inspect_service(service)
            mode = {"Replicated": {"Replicas": replicas}}
            self._client.update_service(service, document["Version"]["Index"], mode=mode, fetch_current_spec=True)

        for tried in range(1, TRIES + 1):
            try:
                await self._call(scale)
            except Refused as refused:
                # Between the look and the update somebody else's came, the Swarm's own as well.
                if OUT_OF_SEQUENCE not in str(refused) or tried == TRIES:
                    raise
            else:
                return

    async def remove_service(self, service: str) -> None:
        """Remove a service; its task is told to end."""
        await self._call(lambda: self._client.remove_service(service))

    async def config(self, name: str) -> dict[str, Any] | None:
        """A config; None where there is none of this name."""
        return await self._unless_missing(lambda: dict(self._client.inspect_config(name)))

    async def create_config(self, name: str, labels: Mapping[str, str]) -> None:
        """Create a config that is there for its labels: it says what it is, since none may be empty."""
        await self._call(lambda: self._client.create_config(name, name.encode(), labels=dict(labels)))

    async def label_config(self, name: str, version: int, labels: Mapping[str, str]) -> None:
        """Give a config other labels, if it still has that version; nothing else of one can change."""

        def label() -> None:
            # A call that the client knows no word for.
            url = f"{self._client.base_url}/v{self._client.api_version}/configs/{name}/update"
            answer = self._client.post(url, params={"version": version}, json={"Name": name, "Labels": dict(labels)})
            if not answer.ok:
                raise Refused(answer.status_code, answer.text)

        await self._call(label)

    async def last_lines(self, container: str, lines: int) -> str:
        """The end of what the task of a service has written, wherever it ran."""

        def read() -> bytes:
            return b"".join(self._client.service_logs(container, stdout=True, stderr=True, tail=lines, is_tty=False))

        return (await self._call(read)).decode(errors="replace")
