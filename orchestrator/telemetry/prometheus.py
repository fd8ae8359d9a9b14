"""The only PromQL in the project: the newest samples of every source, out of a Prometheus server.

One instant query with a range selector gives the raw samples with the times they were taken at. No `rate()`: its window
would add seconds of delay, and differences are taken in `exposition`, the same for every telemetry. A sample belongs to who
has its `instance` (HOST:PORT) and its `replica` (the name), both from the targets that `targets.py` names: the address alone
may have been another replica's a second ago.

Server and orchestrator are taken to agree on the time of day. Where they do not, samples look too old and are not used, or
lie in the future and are refused: either way the sources are scraped directly.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import BaseModel, ValidationError

from orchestrator.telemetry import fetch
from orchestrator.telemetry.exposition import COUNTERS, GAUGES, PREFIX, Key, Sample
from orchestrator.telemetry.fetch import NoAnswer
from orchestrator.telemetry.targets import GATEWAY_JOB, STAGE_JOB

WINDOW_S = 5
"""How far back the query looks: two scrapes of one second each, and some that failed [s]."""
AHEAD_S = 1.0
"""A sample that lies this far in the future counts as one of now; one further on tells that the clocks disagree [s]."""
QUERY = f'{{__name__=~"{PREFIX}({"|".join(sorted(GAUGES | COUNTERS))})",job=~"{GATEWAY_JOB}|{STAGE_JOB}"}}[{WINDOW_S}s]'

Place = tuple[str, str]
"""`instance` and `replica`."""


class _Series(BaseModel):
    metric: dict[str, str]
    values: list[tuple[float, float]]
    """Unix time [s] and value."""


class _Data(BaseModel):
    resultType: Literal["matrix"]
    result: list[_Series]


class _Answer(BaseModel):
    status: Literal["success"]
    data: _Data


class Prometheus:
    """One server. `clock` is the one that samples are dated by, `wall` the time of day [Unix s]."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.url = url.rstrip("/")
        self._clock, self._wall = clock, wall
        self._client = fetch.client()

    async def newest(self) -> dict[Place, tuple[Sample, ...]]:
        """Up to two samples of every source that the server scrapes, the newest last.

        Raises:
            NoAnswer: the server does not answer in time, or with something else.
        """
        parameters = {"query": QUERY, "timeout": f"{1e3 * fetch.ANSWER_S:.0f}ms"}
        body = await fetch.get(self._client, f"{self.url}/api/v1/query", parameters)
        try:
            return read(body, self._clock(), self._wall())
        except ValidationError as error:
            raise NoAnswer(f"not the answer of a Prometheus server: {error.errors()[0]['msg']}") from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def read(body: bytes, now: float, wall: float) -> dict[Place, tuple[Sample, ...]]:
    """Samples of a query's answer, on the clock that shows `now` while it is `wall` o'clock [Unix s].

    Series that were scraped together have one timestamp, so together they are the page as it was.

    Raises:
        ValidationError: it is no answer with a matrix.
    """
    pages: dict[Place, dict[float, dict[Key, float]]] = defaultdict(lambda: defaultdict(dict))
    for series in _Answer.model_validate_json(body).data.result:
        place, key = _place_and_key(series.metric)
        for stamp, value in series.values:
            if stamp <= wall + AHEAD_S:
                pages[place][stamp][key] = value
    return {place: _last_two(by_stamp, now, wall) for place, by_stamp in pages.items()}


def _place_and_key(metric: Mapping[str, str]) -> tuple[Place, Key]:
    labels = {name: value for name, value in metric.items() if name not in {"__name__", "instance", "job", "replica"}}
    place = metric.get("instance", ""), metric.get("replica", "")
    return place, (metric.get("__name__", "").removeprefix(PREFIX), tuple(sorted(labels.items())))


def _last_two(by_stamp: Mapping[float, Mapping[Key, float]], now: float, wall: float) -> tuple[Sample, ...]:
    return tuple(Sample(min(now, now - (wall - stamp)), by_stamp[stamp]) for stamp in sorted(by_stamp)[-2:])
