"""How an answer is to be made, as the OpenAI API's requests say it, and as inputs of a pipeline take it."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from services.dataplane import wire
from services.dataplane.errors import BadRequest
from services.dataplane.wire import Tensor
from services.gateway.table import Plan

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_TOKENS: Any = Field(default=None, ge=1, lt=2**63)
"""How a request says it. What a pipeline's decoder has room for is for its stage to say; this is what its tensor can hold."""


class Sampling(BaseModel):
    """The fields of a request that have a part in how tokens are chosen. What is left out, the pipeline's defaults say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_tokens: int | None = MAX_TOKENS
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)

    def tensors(self, plan: Plan, items: int) -> dict[str, Tensor]:
        """The inputs that these make, by reference.

        A sampled answer without a seed gets one of chance: asked twice, it is another answer.

        Raises:
            BadRequest: the pipeline does not take what the request says.
        """
        seed = self.seed
        if seed is None and "seed" in plan.optional and self._samples(plan):
            seed = secrets.randbits(63)
        said = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, "seed": seed}
        made = {}
        for name, value in said.items():
            if value is None:
                continue
            if name not in plan.optional:
                raise BadRequest(f"{name}: pipeline {plan.pipeline.name!r} does not take it; leave it out")
            spec = plan.inputs[name]
            made[f"request.{name}"] = Tensor(name, spec.datatype, np.full(items, value, wire.DTYPES[spec.datatype]))
        return made

    def _samples(self, plan: Plan) -> bool:
        """Whether tokens are drawn, by the request's temperature or else the pipeline's."""
        default = plan.inputs["temperature"].default if "temperature" in plan.optional else None
        return bool(default if self.temperature is None else self.temperature)


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """The strings that end an answer.

    Raises:
        BadRequest: too many of them, an empty or a very long one.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop: {len(stops)} strings; the limit is {MAX_STOPS}")
    if not all(0 < len(each) <= MAX_STOP_CHARACTERS for each in stops):
        raise BadRequest(f"stop: a string must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops
