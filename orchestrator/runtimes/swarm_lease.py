"""The lease of orchestrators on several managers of a Swarm: a label of a config, which is there for nothing else.

The Swarm's own store is the one thing that all managers share, and it swaps by version: an update names the version that it was
made from, and is refused where another one came in between. A config runs nowhere, so changing its label does nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from orchestrator.lease import Claim
from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.engine_api import Refused
from orchestrator.runtimes.swarm_api import OUT_OF_SEQUENCE

LABEL = "espalier.lease"


class Configs(Protocol):
    """The calls to a manager that this needs; see `swarm_api.SwarmApi`."""

    async def config(self, name: str) -> Mapping[str, Any] | None:
        """A config; None where there is none of this name."""

    async def create_config(self, name: str, labels: Mapping[str, str]) -> None:
        """Create one with nothing in it."""

    async def label_config(self, name: str, version: int, labels: Mapping[str, str]) -> None:
        """Give it other labels, if it still has that version."""


class SwarmStore:
    """See `lease.Store`."""

    def __init__(self, api: Configs, scope: str) -> None:
        self._api, self._name = api, f"{scope}-lease"

    async def read(self) -> Claim | None:
        """The claim; None where there is none yet."""
        return _claim(await self._found())

    async def write(self, claim: Claim, before: Claim | None) -> bool:
        """Put a claim in place of another; False where it was no longer that one."""
        labels = {LABEL: claim.model_dump_json()}
        try:
            found = await self._found()
            if found is None:
                if before is not None:
                    return False
                await self._api.create_config(self._name, labels)
            elif _claim(found) != before:
                return False
            else:
                await self._api.label_config(self._name, int(found["Version"]["Index"]), labels)
        except Refused as refused:
            # Somebody else was first: the name is taken, or the version has passed.
            if refused.status == 409 or OUT_OF_SEQUENCE in str(refused):
                return False
            raise OSError(str(refused)) from None
        except Unreachable as error:
            raise OSError(str(error)) from None
        return True

    async def _found(self) -> Mapping[str, Any] | None:
        try:
            return await self._api.config(self._name)
        except (Refused, Unreachable) as error:
            raise OSError(str(error)) from None


def _claim(config: Mapping[str, Any] | None) -> Claim | None:
    label = ((config or {}).get("Spec", {}).get("Labels") or {}).get(LABEL)
    try:
        return None if label is None else Claim.model_validate_json(label)
    except ValidationError:
        return None
